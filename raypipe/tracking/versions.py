"""The weights of a run's versions, one safetensors file each, and which of them are kept.

A file's name holds its version and the first 12 digits of its blake3, so a half-written or altered file cannot
pass for a version. It appears under that name only when it is whole and on the disk. What was removed here is
still in the journal: lineage is kept for ever, weights by rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from raypipe.errors import ConfigError, RunError
from raypipe.models.tensors import Array, state_dict_from
from raypipe.types import Layout

FOLDER = "versions"
HEADER = "raypipe"  # the key of our metadata in a file's header
DIGITS = 12

Tensors: TypeAlias = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a version's weights lie: `file` is a name within the store, `hash` the blake3 of its content."""

    file: str
    hash: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Which weights stay. Pinned ones stay too; a follower that lags should find its Nth ones, so name its N here."""

    last: int = 5
    every: tuple[int, ...] = ()  # multiples of each of these
    best: int | None = None
    also: frozenset[int] = frozenset()  # e.g. versions still in use, or not judged yet

    def keeps(self, version: int, first: int, newest: int) -> bool:
        """Whether a version stays, given the first and the newest that there are."""
        by_rule = version == first or version > newest - self.last or any(version % n == 0 for n in self.every)
        return by_rule or version == self.best or version in self.also


class VersionStore:
    """One folder; one writer, readers in any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, version: int, vector: Array, layout: Layout, metadata: Mapping[str, object]) -> Stored:
        """Durable when it returns. `metadata` goes into the header (`lineage.model_card`).

        A file of the same version that a crash left unpublished is replaced. The library writes straight from the
        vector (one pass, no copy) and the hash is taken from the page cache: as fast as writing the format by hand.
        Raises RunError when the disk is full.
        """
        part = self.folder / f"v{version:05d}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(state_dict_from(layout, vector), part, metadata={HEADER: json.dumps(metadata, sort_keys=True)})
            digest = _digest(part)
            with part.open("rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            final = self.folder / f"v{version:05d}-{digest[:DIGITS]}.safetensors"
            part.rename(final)
            for stale in self._files(version):
                if stale != final:
                    stale.unlink(missing_ok=True)
            _sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise RunError(f"version {version} could not be written: {_reason(error)}") from None
        return Stored(final.name, digest, num_bytes)

    def path(self, version: int) -> Path:
        """The file of a version. Raises ConfigError naming the nearest kept ones when its weights are gone."""
        for file in self._files(version):
            return file
        near = sorted(sorted(self.kept(), key=lambda v: abs(v - version))[:3])
        there = f"the nearest kept are {', '.join(map(str, near))}" if near else "no version's weights are kept"
        raise ConfigError(f"the weights of version {version} are not kept; {there}")

    def read(self, version: int, expected: str | None = None) -> Tensors:
        """The tensors by name; the content is checked against its name, and against `expected` (a blake3) if given.

        Raises ConfigError when the weights are gone, RunError when the file was altered.
        """
        file = self.path(version)
        digest = _digest(file)
        if digest[:DIGITS] != file.stem.partition("-")[2] or expected not in (None, digest):
            raise RunError(f"the weights of version {version} are damaged: {file.name} has hash {digest[:DIGITS]}")
        return dict(load_file(file))

    def kept(self) -> list[int]:
        """Versions whose weights are here, ascending."""
        return sorted({int(file.name[1:].partition("-")[0]) for file in self.folder.glob("v*-*.safetensors")})

    def pin(self, version: int) -> None:
        """Keep this one whatever the rule says; any process may ask. Raises ConfigError when it is gone."""
        self.path(version)
        (self.folder / f"v{version:05d}.pin").touch()
        self.path(version)

    def pinned(self) -> set[int]:
        """Versions kept by name, e.g. promoted ones."""
        return {int(file.stem[1:]) for file in self.folder.glob("v*.pin")}

    def prune(self, keep: Retention) -> list[int]:
        """Remove what the rule does not keep; the versions removed, ascending."""
        kept = self.kept()
        gone = [v for v in kept if not keep.keeps(v, kept[0], kept[-1])]
        removed = []
        for version in gone:
            if version not in self.pinned():
                removed.append(version)
                for file in self._files(version):
                    file.unlink(missing_ok=True)
        return removed

    def _files(self, version: int) -> list[Path]:
        return list(self.folder.glob(f"v{version:05d}-*.safetensors"))


def read_file(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Any safetensors file: its tensors and what raypipe wrote in its header. Raises ConfigError in one line."""
    try:
        with safe_open(file, "np") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
        return tensors, dict(json.loads(header.get(HEADER, "{}")))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file.name} is no readable safetensors file: {_reason(error)}") from None


def _digest(file: Path) -> str:
    """blake3 of a file: 64 hex digits, as `b3sum` prints them."""
    return blake3().update_mmap(file).hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
