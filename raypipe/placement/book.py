"""Who of a cluster's nodes is up, and why one does not come: a small file of its NodeProvider on the head."""

from __future__ import annotations

import copy
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raypipe.placement.homes import raypipe_home


def books() -> Path:
    """Where they lie, a file a cluster."""
    return raypipe_home() / "cluster"


def troubles() -> dict[str, str]:
    """Stores whose node does not start, and why, by the books on this machine: of the head, if it is the head."""
    found = [(node, one) for path in sorted(books().glob("*.json")) for node, one in Book(path).read().items()]
    return {node.rpartition("-")[0]: one["trouble"] for node, one in found if one.get("trouble")}


class Book:
    """Nodes by id: host and tags. Read and written by several threads and processes, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cached: tuple[tuple[int, int], dict[str, dict[str, Any]]] = (0, 0), {}

    def read(self) -> dict[str, dict[str, Any]]:
        """As it is now; not to be changed. The autoscaler asks twice for each node, every few seconds."""
        try:
            found = self._path.stat()
            stamp = found.st_ino, found.st_mtime_ns
            if stamp != self._cached[0]:
                self._cached = stamp, json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        return self._cached[1]

    def put(self, *, node: str, host: str, tags: dict[str, str]) -> None:
        """Add or replace one."""
        with self._change() as book:
            book[node] = {"host": host, "tags": dict(tags)}

    def tag(self, node: str, tags: dict[str, str]) -> None:
        """Change some of its tags, if it is there."""
        with self._change() as book:
            if node in book:
                book[node]["tags"] |= tags

    def note(self, node: str, trouble: str) -> bool:
        """Why one does not start, if it is there; whether that is new."""
        if self.read().get(node, {}).get("trouble", "") == trouble:
            return False
        with self._change() as book:
            if node in book:
                book[node]["trouble"] = trouble
        return True

    def remove(self, node: str) -> None:
        """Take one out."""
        with self._change() as book:
            book.pop(node, None)

    @contextmanager
    def _change(self) -> Iterator[dict[str, dict[str, Any]]]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            book = copy.deepcopy(self.read())
            yield book
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(book, indent=1))
            os.replace(part, self._path)
