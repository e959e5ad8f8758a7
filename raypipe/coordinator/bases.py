"""Versions as stores fetch them: handles, what goes with them, who works on which, and the bytes that moved."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np

from raypipe.aggregation.variates import Sent, Variates
from raypipe.coordinator.ports import Book, Handle
from raypipe.coordinator.stages import Stages
from raypipe.errors import ConfigError, RunError, StoreError
from raypipe.store import messages as msg


class Bases:
    """One a run. `put` makes a vector fetchable and is called once a version; `varies`: there are control variates."""

    def __init__(self, stages: Stages, book: Book, put: Callable[[np.ndarray], Handle], *, varies: bool) -> None:
        self._stages, self._book, self._put, self._varies = stages, book, put, varies
        self.handles: dict[int, Handle] = {}
        self.tables: dict[int, Variates] = {}  # as handles, in a run with control variates
        self._holds: Counter[int] = Counter()  # tickets in flight on each version
        self._sent: set[tuple[int, str]] = set()
        self._still: dict[int, Handle] = {}  # of frozen weights, made at the first version of a stage
        self._has_still: set[tuple[str, int]] = set()  # stores that were given them
        self.bytes_down = self.bytes_total = 0  # since the newest version; both ways, of the whole run

    async def handle(self, version: int) -> Handle:
        """An older one only after the coordinator was away: from the disk. Raises StoreError where it is gone."""
        if version not in self.handles:
            try:
                vector = await asyncio.to_thread(self._book.read, version, self._stages.at(version).layout)
            except (ConfigError, RunError) as error:
                raise StoreError(error.message) from None
            self.handles[version] = self.fetchable(version, vector)
        return self.handles[version]

    async def sent_with(self, version: int, store: str) -> Sent | None:
        """The store's control variates as they were in the ticket's base version. Raises StoreError: they are gone."""
        if not self._varies:
            return None
        if version not in self.tables:
            table = await asyncio.to_thread(self._book.variates.read, version)
            if table is None:
                raise StoreError(f"the control variates of version {version} are not kept")
            self.tables[version] = table
        return self.tables[version].sent(store)

    def fetchable(self, version: int, vector: np.ndarray) -> Handle:
        """A version for the stores; frozen weights are those of its stage's first version, fetchable once for all."""
        stage = self._stages.at(version)
        layout = stage.layout
        if not layout.splits:
            return self._put(vector)
        if stage.since not in self._still:
            self._still[stage.since] = self._put(vector[layout.update_size :].copy())
        return msg.Parts(self._put(vector[: layout.update_size]), self._still[stage.since])

    def count_down(self, version: int, store: str) -> None:
        """The bytes of a version to a store, once."""
        if (version, store) in self._sent:
            return
        self._sent.add((version, store))
        stage = self._stages.at(version)
        layout, given = stage.layout, (store, stage.since)
        num_bytes = 4 * (layout.update_size if layout.splits and given in self._has_still else layout.size)
        self._has_still.add(given)
        self.moved(num_bytes)

    def moved(self, num_bytes: int) -> None:
        """So much went down."""
        self.bytes_down += num_bytes
        self.bytes_total += num_bytes

    def new_process(self, store: str) -> None:
        """It may lack the frozen weights that the one before was given."""
        self._has_still = {(s, stage) for s, stage in self._has_still if s != store}

    def hold(self, version: int) -> None:
        """Somebody works on it until `release`."""
        self._holds[version] += 1

    def in_use(self) -> set[int]:
        """Versions that somebody works on."""
        return {version for version, held in self._holds.items() if held > 0}

    def release(self, version: int) -> None:
        """The weights leave the object store when the last ticket on them ended and a newer version is there."""
        self._holds[version] -= 1
        newest = max(self.handles)
        for old in [v for v in list(self.handles) if v < newest and self._holds[v] <= 0]:
            del self.handles[old]
            self.tables.pop(old, None)
            self._holds.pop(old, None)
            self._sent = {(v, s) for v, s in self._sent if v != old}
