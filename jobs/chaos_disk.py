"""What outlives a coordinator in a random history: its diary, its journal, its versions' weights, on a disk that fails.

The diary, the journal, the state of the server's transform and the control variates are the real ones, in a folder of
memory. Weights are a word each: `written` outlives the process, `kept` the machine. Every write is counted, and at
some of them the coordinator dies:

    after   the write is there, and nothing that should follow it
    torn    half a line of the diary is there (an event that was not acted upon), elsewhere as `after`
    power   the machine goes down: what was not forced to the disk is gone, of the diary a half line may stay
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal, TypeAlias

import numpy as np

from raypipe.aggregation.variates import Variate, Variates
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.state import Memory
from raypipe.tracking.journal import Journal
from raypipe.tracking.variates import VariateStore
from raypipe.tracking.versions import force_state, read_state, save_state

Death: TypeAlias = Literal["after", "torn", "power"]
DEATHS: tuple[Death, ...] = ("after", "torn", "power")


class Crash(Exception):
    """The coordinator died."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version by its record."""

    number: int
    contributions: tuple[do.Contribution, ...]


class Forced:
    """Which files are on the disk: `os.fsync`, watched until `close`. A power cut takes the others."""

    def __init__(self) -> None:
        self._real, self._done = os.fsync, set[tuple[int, int]]()
        vars(os)["fsync"] = self._watched

    def _watched(self, handle: int) -> None:
        self._real(handle)
        self._done.add(_identity(os.fstat(handle)))

    def lose(self, *files: Path) -> None:
        """Those that were not forced, or whose name was not: their folder."""
        for file in files:
            if not {_identity(file.stat()), _identity(file.parent.stat())} <= self._done:
                file.unlink()

    def close(self) -> None:
        vars(os)["fsync"] = self._real


def _identity(stat: os.stat_result) -> tuple[int, int]:
    """With the time of the last change, as a number is given again."""
    return stat.st_ino, 0 if S_ISDIR(stat.st_mode) else stat.st_mtime_ns


class Disk:
    """`deaths`: which write, counted from 1, is the coordinator's last, and how."""

    def __init__(self, folder: Path, deaths: Mapping[int, Death], chance: random.Random) -> None:
        self.folder, self.deaths, self.chance = folder, deaths, chance
        self.writes = 0
        self.died: Counter[tuple[str, Death]] = Counter()  # after what, and how
        self.power_cuts = 0
        self.weights: dict[int, Literal["written", "kept", "lost"]] = {}
        self.last: Death | None = None  # how it died the last time
        self.kept: set[int] = set()  # versions that were safe, whatever was damaged since
        self._synced = 0  # bytes of the newest diary file that are on the disk
        self._forced = Forced()
        self._open()

    def _open(self) -> None:
        self.diary = Diary(self.folder)
        self.journal = Journal(self.folder / "journal.sqlite", write=True)
        self.variates = VariateStore(self.folder)

    def close(self) -> None:
        self._forced.close()
        self._shut()

    def _shut(self) -> None:
        self.diary.close()
        self.journal.close()

    # -- writes, in the words of coordinator/publisher.py and tracking/book.py ----------------------------------

    def note(self, event: ev.Event, actions: list[do.Action]) -> None:
        before = self._size() if self.writes + 1 in self.deaths else None
        self.diary.note(event, actions)
        self._wrote("diary line", before)

    def checkpoint(self, memory: Memory, owed: list[do.Record]) -> None:
        self.diary.checkpoint(memory, owed)
        self._synced = self._size()
        self._wrote("checkpoint")

    def sync(self) -> None:
        self.diary.sync()
        self._synced = self._size()

    def record(self, kind: Any, body: dict[str, Any]) -> None:
        self.journal.append(kind, body, 0.0)
        self._wrote(f"record {kind}")

    def write(self, version: int) -> None:
        self.weights[version] = "written"
        self.kept.discard(version)
        save_state(self.folder, version, {"momentum": _values(version)})
        self.variates.write(version, Variates.of({"s0": Variate(_values(version), 1.0, version)}))
        self._wrote("weights")

    def keep(self, version: int) -> None:
        """Once more after a power cut that took the diary's word of it: then its state may have gone with its age."""
        again = version in self.kept and version < max(self.kept) - 1
        state, variates = force_state(self.folder, version), self.variates.force(version)
        assert state is not None or again, f"version {version} is kept without its state"
        assert variates is not None or again, f"version {version} is kept without its variates"
        self.weights[version] = "kept"
        self.kept.add(version)
        self._wrote("weights kept")

    # -- dying and coming back --------------------------------------------------------------------------------

    def _wrote(self, what: str, before: int | None = None) -> None:
        self.writes += 1
        death = self.deaths.get(self.writes)
        if death is None:
            return
        self.died[what, death] += 1
        self.last = death
        if death == "torn" and before is not None:
            self._cut(self.chance.randrange(before, self._size()))
        elif death == "power":
            self.power_cuts += 1
            if (size := self._size()) > self._synced:
                self._cut(self.chance.randint(self._synced, size))
            self.weights = {v: "kept" if state == "kept" else "lost" for v, state in self.weights.items()}
            self._forced.lose(*self.folder.glob("state-*"), *self.variates.folder.glob("*"))
        raise Crash

    def damage(self, version: int) -> None:
        """A bit of a version's weights flips, kept or not."""
        self.weights[version] = "lost"

    def reopen(self) -> None:
        """In a new process."""
        self._shut()
        self._open()

    def intact(self, version: int) -> bool:
        """As `raypipe.compose` asks: all that it takes to go on from a version."""
        if self.weights.get(version) not in ("written", "kept"):
            return False
        return read_state(self.folder, version) is not None and self.variates.read(version) is not None

    def past(self) -> tuple[int, int, dict[int, Version]]:
        """The newest epoch, the machine's last record and the versions, as `raypipe.compose` reads them."""
        epoch, told, versions = 0, 0, dict[int, Version]()
        for record in self.journal.read():
            body = record.body
            told = max(told, body.get("told", 0))
            if record.kind == "run_started":
                epoch = body["epoch"]
            elif record.kind == "version_published":
                made = tuple(do.Contribution(**c) for c in body["contributions"])
                versions[body["version"]] = Version(body["version"], made)
            elif record.kind == "version_withdrawn":
                del versions[body["version"]]
        return epoch, told, versions

    def _file(self) -> Path | None:
        return max((self.folder / "diary").glob("*.jsonl"), default=None)

    def _size(self) -> int:
        file = self._file()
        return file.stat().st_size if file is not None else 0

    def _cut(self, size: int) -> None:
        file = self._file()
        assert file is not None
        with file.open("rb+") as opened:
            opened.truncate(size)


def _values(version: int) -> np.ndarray:
    return np.full(4, version, np.float32)


@dataclass
class Recording:
    """A record in the lane."""

    disk: Disk
    action: do.Record
    owed: list[do.Record]

    def __call__(self) -> None:
        self.disk.record(self.action.kind, self.action.body | {"told": self.action.number})
        self.owed.remove(self.action)
