"""What a store has finished for one run and still owes: on its own disk, whatever is killed.

    <store home>/state/<run>/
        lock            held by the process at work on the run; its id is in it
        epoch           the newest coordinator epoch that was heard of; forced to the disk before it is acted on
        slot-0, ...     big arrays, see slots.py
        <hash>.ticket   an unsettled ticket: its report, which slots hold its update and what is to be kept
        <hash>.kept     what is kept (kept.py) of the last ticket that was folded, and which ticket that was
        told            a line for each verdict that was obeyed: the ticket, and the version that it is in or `-`

Data comes first, then the small entry under its name in one rename: a half-written entry is never one. Settling
writes the kept state, with its ticket's id inside, and then removes the entry: after a kill between the two, an
entry whose ticket the kept state names is settled already.

But for the epoch nothing is forced to the disk on a ticket's way. A killed process loses nothing, since the page cache
outlives it. A power cut does: an entry of an earlier boot counts only if its checksum was taken and holds (taken
when the entry has waited a few seconds, off the ticket's way); else it is dropped, and the ticket is trained again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreError, StoreSuperseded
from raypipe.security.files import sync_folder
from raypipe.store.messages import Report, encode, expect
from raypipe.store.near import told
from raypipe.store.runs import LOCK_TRIES, Entry, lock, packed, run_folder, unpacked
from raypipe.store.slots import Slot, Slots, disk_error, filled, outline, write_tensors

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Point: TypeAlias = Callable[[str], None]  # told what was just done; a test's way to be killed there

OUTBOX = 8  # updates that wait to be settled; a coordinator that forgot older ones has lost them
SEAL_EVERY_S = 2.0  # an entry that has waited for so long is given its checksum


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An entry and its mapped slots: of a ticket its update and perhaps its pending state, of a kept state that."""

    entry: Entry
    slots: tuple[Slot, ...]


class Outbox:
    """One run's. Any thread may call it; one process at a time has it, until it is closed or forgotten."""

    def __init__(self, folder: Path, log: logging.Logger, point: Point = lambda done: None) -> None:
        """Raises StoreError: another process is at work on the run; the disk is full."""
        self._folder, self._log, self._point = folder, log, point
        self._guard = threading.RLock()
        self._slots = Slots(folder)
        self._waiting: dict[str, Held] = {}
        self._kept: dict[str, Held] = {}
        self._reports: dict[str, Report] = {}
        self._fresh: set[str] = set()
        self._boot = boot_id()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = lock(folder, LOCK_TRIES, str(os.getpid()))
            if held is None:
                raise StoreError("another process of this store is at work on this run; it has to end first")
            self._closer = weakref.finalize(self, os.close, held)
            self.epoch = self._read_epoch()
            self._load()
        except OSError as error:
            raise disk_error(error) from None
        threading.Thread(target=_keep_sealing, args=(weakref.ref(self),), name="seal", daemon=True).start()

    def close(self) -> None:
        """Let another process have the run."""
        self._closer()

    def fence(self, epoch: int) -> None:
        """Raises StoreSuperseded when a newer coordinator has been heard of; a newer one is remembered for ever."""
        with self._guard:
            if epoch < self.epoch:
                raise StoreSuperseded(f"epoch {epoch} of this run is over, epoch {self.epoch} has begun")
            if epoch > self.epoch:
                self._write("epoch", str(epoch).encode(), durable=True)
                self.epoch = epoch

    def tickets(self) -> tuple[str, ...]:
        """That wait, the oldest first."""
        with self._guard:
            return tuple(self._waiting)

    def report(self, ticket: str) -> Report | None:
        """Of a ticket that waits."""
        return self._reports.get(ticket)

    def update(self, ticket: str) -> Array | None:
        """The float32 vector of a ticket that waits: read-only, a view, whole until the ticket is settled."""
        with self._guard:
            held = self._waiting.get(ticket)
        if held is None:
            return None
        view = held.slots[0].floats
        view.flags.writeable = False
        return view

    def place(self, ticket: str, update: Array) -> dict[str, int] | None:
        """Where on this machine the update of a ticket that waits lies, if this is it as it lies there."""
        with self._guard:
            held = self._waiting.get(ticket)
        return None if held is None else told(held.slots[0], update)

    def kept(self, key: str) -> tuple[str, dict[str, Any]] | None:
        """A copy of the state that was committed under this key, and the ticket that it came of."""
        with self._guard:
            held = self._kept.get(key)
            return None if held is None else (held.entry.ticket, filled(held.entry.outline, held.slots[0]))

    @contextmanager
    def room(self, num_bytes: int) -> Iterator[Slot]:
        """A slot for an update; free again unless it was `put`. Raises StoreError when the disk is full."""
        with self._guard:
            slot = self._slots.take(num_bytes)
        try:
            yield slot
        finally:
            with self._guard:
                if not any(slot in held.slots for held in self._waiting.values()):
                    self._slots.free(slot)

    def put(self, report: Report, update: Slot, key: str, state: dict[str, Any] | None) -> None:
        """The ticket is finished, from here on whatever is killed. `state`: what is to be kept, pending under `key`.

        Raises StoreError, and nothing is changed, when the disk is full. Beyond OUTBOX the oldest ticket is lost.
        """
        plan, tensors, size = outline(state)
        with self._guard:
            slots: tuple[Slot, ...] = (update,) if state is None else (update, self._slots.take(size))
            try:
                if state is not None:
                    write_tensors(tensors, slots[1])
                self._point("slots written")
                number = 1 + max((held.entry.number for held in self._waiting.values()), default=0)
                sizes = [[slot.number, slot.data.size] for slot in slots]
                entry = Entry(report.ticket, number, encode(report), key, plan, self._boot, sizes, [])
                held = Held(entry, slots) if self._boot else _sealed(Held(entry, slots))
                self._write(_file(report.ticket, "ticket"), packed(held.entry))
            except BaseException:
                for slot in slots[1:]:
                    self._slots.free(slot)
                raise
            self._waiting[report.ticket], self._reports[report.ticket] = held, report
            self._fresh.add(report.ticket)
            while len(self._waiting) > OUTBOX:
                oldest = next(iter(self._waiting))
                self._log.warning("ticket %s is dropped: more than %d wait to be settled", oldest, OUTBOX)
                self._remove(oldest, again=False)  # the coordinator may read it yet, see near.py

    def settle(self, ticket: str, version: int | None) -> None:
        """Forget the update; commit its state if it is in a version. Settling twice does nothing."""
        with self._guard:
            held = self._waiting.get(ticket)
            if held is None:
                return
            self._note(ticket, version)
            old = None
            if version is not None and len(held.slots) == 2:
                old = self._commit(held)
            self._remove(ticket)
            self._point("entry removed")
            if old is not None:
                self._slots.free(old.slots[0])

    def seal(self, *, all_of_them: bool = True) -> None:
        """Give checksums to the entries that have none; or only to those that waited for a round."""
        with self._guard:
            fresh, self._fresh = self._fresh, set()
            both = [("ticket", name, held) for name, held in self._waiting.items()]
            both += [("kept", name, held) for name, held in self._kept.items()]
        for suffix, name, held in both:
            if held.entry.digests or (held.entry.ticket in fresh and not all_of_them):
                continue
            sealed = _sealed(held)
            with self._guard, suppress(StoreError):  # a full disk: it stays without
                table = self._waiting if suffix == "ticket" else self._kept
                if table.get(name) is held and self._closer.alive:  # not settled, nor its slots another's, meanwhile
                    self._write(_file(name, suffix), packed(sealed.entry))
                    table[name] = sealed

    # -- inside, the guard held -----------------------------------------------------------------------------

    def _commit(self, held: Held) -> Held | None:
        """The pending state becomes the kept one; what was kept before."""
        entry = held.entry
        entry = replace(entry, report=b"", slots=entry.slots[1:], digests=entry.digests[1:])
        self._write(_file(entry.key, "kept"), packed(entry))
        old = self._kept.get(entry.key)
        self._kept[entry.key] = Held(entry, held.slots[1:])
        self._fresh.add(entry.ticket)
        return old

    def _note(self, ticket: str, version: int | None) -> None:
        """Before it is obeyed, so it may be there twice; for whoever compares it with the coordinator's record."""
        with suppress(OSError), (self._folder / "told").open("a", encoding="utf-8") as file:
            file.write(f"{ticket} {'-' if version is None else version}\n")

    def _remove(self, ticket: str, *, again: bool = True) -> None:
        """`again`: its slots are written over soon."""
        (self._folder / _file(ticket, "ticket")).unlink(missing_ok=True)
        held = self._waiting.pop(ticket)
        self._reports.pop(ticket, None)
        kept = self._kept.get(held.entry.key)
        for slot in held.slots:
            if kept is None or slot not in kept.slots:
                (self._slots.free if again else self._slots.drop)(slot)

    def _write(self, name: str, content: bytes, *, durable: bool = False) -> None:
        part, kind = self._folder / f"{name}.part", name.rpartition(".")[2]
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                self._point(f"{kind} has no name")
                if durable:
                    os.fsync(file.fileno())
            part.rename(self._folder / name)
            if durable:
                sync_folder(self._folder)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise disk_error(error) from None
        self._point(f"{kind} written")

    def _load(self) -> None:
        for part in self._folder.glob("*.part"):
            part.unlink()
        kept = [held for file in self._folder.glob("*.kept") if (held := self._read(file)) is not None]
        self._kept = {held.entry.key: held for held in kept}
        settled = {held.entry.ticket for held in kept}
        waiting = []
        for file in self._folder.glob("*.ticket"):
            if (entry := unpacked(file)) is not None and entry.ticket in settled and entry.outline is not None:
                file.unlink()
            elif (held := self._read(file)) is not None:
                waiting.append(held)
        for held in sorted(waiting, key=lambda held: held.entry.number):
            self._waiting[held.entry.ticket] = held
            self._reports[held.entry.ticket] = expect(Report, held.entry.report)
        self._slots.find_free()

    def _read(self, file: Path) -> Held | None:
        """An entry of an earlier process; a damaged one is dropped, and said."""
        entry = unpacked(file)
        slots = [self._slots.reopen(number, size) for number, size in entry.slots] if entry is not None else []
        whole = tuple(slot for slot in slots if slot is not None)
        sound = entry is not None and len(whole) == len(entry.slots)
        if sound and entry is not None:
            sound = [s.digest() for s in whole] == entry.digests if entry.digests else entry.boot == self._boot != ""
        if sound and entry is not None:
            return Held(entry, whole)
        what = "a ticket, it will be trained again" if file.suffix == ".ticket" else "what was kept of the last one"
        self._log.warning("dropped %s: %s is damaged", what, file.name)
        for slot in whole:
            self._slots.free(slot)
        file.unlink()
        return None

    def _read_epoch(self) -> int:
        with suppress(FileNotFoundError):
            return int((self._folder / "epoch").read_text("ascii"))
        return 0


def open_outbox(home: Path, run: str, log: logging.Logger, point: Point = lambda done: None) -> Outbox:
    """Of a run in a store's folder. Raises StoreError."""
    return Outbox(run_folder(home, run), log, point)


def boot_id() -> str:
    """Changes when the machine starts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _file(name: str, suffix: str) -> str:
    return f"{blake2b(name.encode(), digest_size=10).hexdigest()}.{suffix}"


def _sealed(held: Held) -> Held:
    return replace(held, entry=replace(held.entry, digests=[slot.digest() for slot in held.slots]))


def _keep_sealing(ref: weakref.ref[Outbox]) -> None:
    """In a thread of its own, for as long as the outbox is somebody's."""
    while True:
        time.sleep(SEAL_EVERY_S)
        outbox = ref()
        if outbox is None:
            return
        outbox.seal(all_of_them=False)
        del outbox
