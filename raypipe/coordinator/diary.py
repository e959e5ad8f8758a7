"""What the machine was told, in order: with it a coordinator that died comes back as it was.

The machine is pure, so its state is a function of the events that it handled. Each event is written here, with what
was decided, before anything is done about it: one line of JSON in an append-only file (a line costs 0.1 ms where a
row of a database costs a millisecond, and several are written for each ticket). The lines are in the page cache,
which outlives this process; `sync` has them on the disk too, before a version's record says that it is a fact.

A file begins with a checkpoint, all that the machine remembers and the records that were decided and not written yet,
so that coming back takes no longer for a run of weeks than for one of minutes. A line that was cut while it was
written is the last one, was not acted upon, and is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.state import Memory
from raypipe.errors import RunError
from raypipe.security.files import sync_folder

FOLDER = "diary"
SCHEMA = 2  # 1 did not count records: which of them were not written cannot be known
STEPS = 2000  # lines of a file, after which the next version begins another
FILES = 500  # older ones are removed: what they hold is in the checkpoints
CUT = "the diary was cut inside a line: its last event is not whole, nobody acted on it, it is left out"
DECISIONS = (
    do.Train,
    do.Collect,
    do.Fold,
    do.Publish,
    do.Keep,
    do.Settle,
    do.Restart,
    do.Ask,
    do.Release,
    do.Finish,
)

_KINDS = {kind.__name__: TypeAdapter(kind) for kind in get_args(ev.Event)}
_MEMORY = TypeAdapter(Memory)


@dataclass(frozen=True, slots=True)
class Remembered:
    """A checkpoint and what came after it. `owed` None: it was written before records were counted.

    `damage`: that its last line was cut and is left out, in words; empty: nothing is.
    """

    memory: Memory
    owed: tuple[do.Record, ...] | None
    events: tuple[ev.Event, ...]
    damage: str = ""


class Diary:
    """One writer. Raises RunError when the disk is full: then nothing was written, and it can be tried again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._file: FileIO | None = None
        self._number = self._steps = 0

    @property
    def long(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._steps >= STEPS

    def checkpoint(self, memory: Memory, owed: Sequence[do.Record] = ()) -> None:
        """Begin another file; durable when it returns. `owed`: records that may not be written yet."""
        line = _line({"schema": SCHEMA, "memory": asdict(memory), "owed": [asdict(record) for record in owed]})
        self._number = max((int(file.stem) for file in self._files()), default=0) + 1
        path = self.folder / f"{self._number:06d}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(line)
            with part.open("rb+") as whole:
                os.fsync(whole.fileno())
            part.rename(path)
            sync_folder(self.folder)
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(f"the diary could not be written: {error.strerror}") from None
        if self._file is not None:
            self._file.close()
        self._file, self._steps = file, 0
        for old in self._files()[:-FILES]:
            old.unlink(missing_ok=True)

    def note(self, event: ev.Event, actions: Sequence[do.Action]) -> None:
        """An event and what was decided; before anything is done about it."""
        assert self._file is not None, "a diary begins with a checkpoint"
        decided = [{"do": type(a).__name__, **asdict(a)} for a in actions if isinstance(a, DECISIONS)]
        line = _line({"event": type(event).__name__, **asdict(event), "decided": decided})
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            self._file.truncate(start)
            raise RunError(f"the diary could not be written: {error.strerror}") from None
        self._steps += 1

    def sync(self) -> None:
        """Have all that was noted on the disk; from any thread."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def read(self) -> Remembered | None:
        """The newest checkpoint and the events since; None where there is none. Raises RunError if it is damaged."""
        for file in reversed(self._files()):
            first, *lines = file.read_bytes().split(b"\n")
            whole = lines[:-1]  # what follows the last line end was cut, or is nothing
            memory, owed = _memory(first, file)
            return Remembered(memory, owed, tuple(_event(line, file) for line in whole), CUT if any(lines[-1:]) else "")
        return None

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), default=sorted).encode() + b"\n"  # sets alone are not JSON


def _memory(line: bytes, file: Path) -> tuple[Memory, tuple[do.Record, ...] | None]:
    try:
        body = json.loads(line)
        schema = body["schema"]
        if not 1 <= schema <= SCHEMA:
            raise RunError(f"the diary {file.name} has schema {schema}; this raypipe reads schema {SCHEMA} and older")
        owed = tuple(do.Record(**record) for record in body["owed"]) if schema > 1 else None
        return _MEMORY.validate_python(body["memory"]), owed
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"the diary {file.name} is damaged: {type(error).__name__} in its checkpoint") from None


def _event(line: bytes, file: Path) -> ev.Event:
    try:
        body = json.loads(line)
        del body["decided"]
        event: ev.Event = _KINDS[body.pop("event")].validate_python(body)
        return event
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"the diary {file.name} is damaged: {type(error).__name__}") from None
