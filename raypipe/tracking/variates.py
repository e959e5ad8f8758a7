"""The stores' control variates on the coordinator's disk, so that a run that died goes on with the same bytes.

    <run>/variates/<store>-<12 digits>.f32    one variate, raw little-endian float32, named by the blake3 of its content
    <run>/variates/v00012.json                the table after version 12: store -> digits, worth, version

A version writes the variates that its updates have changed and its table, in one rename each, and has them on the disk
before its weights count as kept. What no table names any more is removed: tables are kept of the newest two versions,
and of those that open tickets were trained from.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from raypipe.aggregation.variates import Variate, Variates
from raypipe.errors import RunError
from raypipe.ledger.keys import digest
from raypipe.security.files import sync_folder

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
FOLDER = "variates"
DIGITS = 12
TABLE = "v{:05d}.json"


class VariateStore:
    """One folder; one writer."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self._names: dict[str, tuple[Variate, str]] = {}  # of each store's newest: it, and its file's name
        self._forced: set[str] = set()  # files that are on the disk

    def write(self, version: int, variates: Variates) -> None:
        """The table after a version; outlives this process when it returns. Raises RunError."""
        rows = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for store, variate in variates.known.items():
                rows[store] = [self._written(store, variate), variate.worth, variate.version]
            self._put(TABLE.format(version), json.dumps(rows).encode())
        except OSError as error:
            raise RunError(f"the variates of version {version} could not be written: {error.strerror}") from None

    def force(self, version: int) -> str | None:
        """Have the table after a version on the disk; its hash, None where there is none. Raises RunError."""
        table = self.folder / TABLE.format(version)
        if not table.is_file():
            return None
        try:
            content = table.read_bytes()
            named = {row[0] for row in json.loads(content).values()}
            for name in sorted(named - self._forced):
                _force(self.folder / name)
            _force(table)
            sync_folder(self.folder)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its table is damaged"
            raise RunError(f"the variates of version {version} could not be kept: {reason}") from None
        self._forced = named
        return digest(content)

    def read(self, version: int, expected: str | None = None) -> Variates | None:
        """The table after a version; None where any of it is lost or damaged, or not of the `expected` hash."""
        try:
            content = (self.folder / TABLE.format(version)).read_bytes()
            if expected not in (None, digest(content)):
                return None
            rows = json.loads(content)
            known = {}
            for store, (name, worth, base) in rows.items():
                values = np.fromfile(self.folder / name, "<f4")
                if _name(store, values) != name:
                    return None
                known[store] = Variate(values, float(worth), int(base))
                self._names[store] = known[store], name
        except (OSError, ValueError):
            return None
        return Variates.of(known)

    def prune(self, keep: frozenset[int]) -> None:
        """Remove tables but these and the newest two, and what none of those names."""
        tables = {int(file.stem[1:]): file for file in self.folder.glob("v*.json")}
        stay = keep | set(sorted(tables)[-2:])
        named = set()
        for version, file in tables.items():
            if version in stay:
                named |= {row[0] for row in json.loads(file.read_bytes()).values()}
            else:
                file.unlink()
        for file in (*self.folder.glob("*.f32"), *self.folder.glob("*.part")):
            if file.name not in named:
                file.unlink()

    def _written(self, store: str, variate: Variate) -> str:
        """The file's name; what is there already is not written again."""
        if store in self._names and self._names[store][0] is variate:
            return self._names[store][1]
        name = _name(store, variate.values)
        self._put(name, variate.values.astype("<f4", copy=False).data)
        self._names[store] = variate, name
        return name

    def _put(self, name: str, content: Any) -> None:
        part = self.folder / f"{name}.part"
        self._forced.discard(name)
        try:
            part.write_bytes(content)
            part.rename(self.folder / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _force(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _name(store: str, values: Array) -> str:
    return f"{store}-{digest(values).removeprefix('b3:')[:DIGITS]}.f32"
