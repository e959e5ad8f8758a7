"""The folder of a run on a store's disk: whose it is now, what lies in it, when it goes. See outbox.py."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from raypipe.errors import StoreRefused
from raypipe.ledger.keys import digest
from raypipe.store.slots import numbers

LOCK_TRIES, LOCK_WAIT_S = 50, 0.1  # for a process that was killed to be gone
UNUSED_S = 30 * 86400.0  # after which a run's state is removed
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies on the disk of a ticket, or of a kept state (then `report` is empty). Slots: (number, bytes)."""

    ticket: str
    number: int  # counts up: the order in which tickets were finished
    report: bytes
    key: str
    outline: Any
    boot: str
    slots: list[list[int]]
    digests: list[str]


def run_folder(home: Path, run: str) -> Path:
    """Raises StoreRefused for what names no folder."""
    if not RUN.fullmatch(run):
        raise StoreRefused(f"run {run!r}: a run's name has letters, digits, '.', '_' and '-', 128 at most")
    return home / "state" / run


def lock(folder: Path, tries: int, holder: str) -> int | None:
    """A handle that holds the folder's lock for as long as it is open, the holder written there; None: taken."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for left in range(tries, 0, -1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left > 1:
                time.sleep(LOCK_WAIT_S)
            continue
        os.ftruncate(handle, 0)
        os.pwrite(handle, holder.encode(), 0)
        return handle
    os.close(handle)
    return None


def packed(entry: Entry) -> bytes:
    """With its own checksum before it."""
    body: bytes = msgpack.packb({field.name: getattr(entry, field.name) for field in fields(entry)})
    return digest(body).encode() + b"\n" + body


def unpacked(file: Path) -> Entry | None:
    """None when it is not what was written."""
    check, _, body = file.read_bytes().partition(b"\n")
    if check != digest(body).encode():
        return None
    return Entry(**msgpack.unpackb(body))


def tidy(home: Path, now: float, log: logging.Logger) -> None:
    """Remove the state of runs not used for 30 days, and the empty slots of those no process works on.

    `now`: seconds since the epoch.
    """
    for folder in sorted(home.glob("state/*")):
        with suppress(OSError):  # a folder that cannot be tidied is not worth a store
            held = lock(folder, 1, "")
            if held is None:
                continue
            try:
                used = folder.stat().st_mtime
                if now - used > UNUSED_S:
                    log.warning("removed the state of run %s, unused for 30 days", folder.name)
                    shutil.rmtree(folder)
                    continue
                entries = [unpacked(f) for f in folder.iterdir() if f.suffix in (".ticket", ".kept")]
                full = {number for entry in entries if entry is not None for number, _ in entry.slots}
                for number in set(numbers(folder)) - full:
                    (folder / f"slot-{number}").unlink()
                os.utime(folder, (used, used))
            finally:
                os.close(held)


def end_holder(home: Path, run: str) -> bool:
    """Kill the process that is at work on a run, frozen or not. False where there is none."""
    folder = run_folder(home, run)
    if not folder.is_dir():
        return False
    held = lock(folder, 1, "")
    if held is not None:
        os.close(held)
        return False
    holder = (folder / "lock").read_text("ascii")
    if not holder.isdecimal():
        return False
    with suppress(ProcessLookupError):
        os.kill(int(holder), signal.SIGKILL)
    return True
