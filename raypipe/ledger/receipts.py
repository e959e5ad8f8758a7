"""The store's own account of what left it: every message's kind, bytes, hash and reason, on its own disk.

One file a month (`egress-2026-11.jsonl`), one chain through all of them: each line is `{"hash":...,"receipt":{...}}`,
canonical JSON; `prev` is the hash of the line before. It shows that nothing was changed or taken out in the middle.
Lines missing at the end, or an account written anew, it cannot show: the file is the store's word to itself.

    egress/RUN/   of a run: written by the one process that has the run's outbox
    egress/_/     of no run, or of one that another process has: whoever writes takes its lock

Bytes are those of messages and vectors, without the frames around them; a peer of the protocol before is told the same
message less what it does not know. What holds nothing has no receipt: that a verb was done, that the store lives, how
much of a vector has come.

Lines are handed to the system at once and not forced to the disk: a power cut may lose the last seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from raypipe.errors import StoreError, unwritten
from raypipe.ledger.entries import FIRST, exact, plain
from raypipe.ledger.offline import canonical, entry_hash

TAIL = 1 << 16  # bytes read to find the last line; `why` is cut so that a line fits
WHY = 1000  # characters
NAME = 256  # of a run or a ticket: what is asked for may have any length
APART = "_"  # no run's name begins so
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Receipt:
    """`kind` as in `card`, `report`, `update`, `evaluation`, `sums`, `refusal`; `digest` is of the bytes that left.

    `again`: a part of an update that was sent once more. `pause`: why nothing is computed now, told at each heartbeat
    until it changes. `doctor`: what a look at the node has said of the store. `hello`: a vault's greeting.
    """

    index: int
    prev: str
    at: float  # seconds since the epoch
    kind: str
    run: str
    ticket: str
    num_bytes: int
    digest: str
    why: str


@dataclass(frozen=True, slots=True)
class Sum:
    """What left by one kind of message."""

    messages: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Egress:
    """What a store's receipts say; `problems` names every file and line that does not hold."""

    kinds: dict[str, Sum]
    first: float | None  # seconds since the epoch
    last: float | None
    problems: tuple[str, ...]


class Receipts:
    """The one writer of a store's receipts; threads of its process may share it."""

    def __init__(self, folder: Path) -> None:
        """Goes on after the last whole line. Raises StoreError: not writable, or that line is damaged."""
        self.folder = folder
        self._lock = Lock()
        self._index, self._prev = 0, FIRST
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = _files(folder)
            self._name = files[-1].name if files else ""
            for path in reversed(files):
                if (last := _last(path)) is not None:
                    self._index, self._prev = last.index + 1, entry_hash(plain(last)).hex()
                    break
            self._file = _open(folder / self._name) if self._name else None
        except OSError as error:
            raise StoreError(f"the store's receipts cannot be opened: {error.strerror}") from None

    def write(self, *, at: float, kind: str, run: str, ticket: str, num_bytes: int, digest: str, why: str) -> Receipt:
        """One more receipt; call it before the bytes leave. Raises StoreError (disk full): then they may not."""
        with self._lock:
            names = kind, run[:NAME], ticket[:NAME]
            receipt = Receipt(self._index, self._prev, float(at), *names, num_bytes, digest, why[:WHY])
            found = entry_hash(plain(receipt)).hex()
            line = b'{"hash":"' + found.encode() + b'","receipt":' + canonical(plain(receipt)) + b"}\n"
            try:
                _put(self._turn(at), line)
            except OSError as error:
                raise unwritten("the store cannot write its receipts", error) from None
            self._index, self._prev = self._index + 1, found
            return receipt

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._name = None, ""

    def _turn(self, at: float) -> int:
        """The month's file, opened; a clock that was set back does not go back to an older one."""
        name = max(self._name, f"egress-{datetime.fromtimestamp(at, UTC):%Y-%m}.jsonl")
        if self._file is None or name != self._name:
            opened = _open(self.folder / name)
            if self._file is not None:
                os.close(self._file)
            self._file, self._name = opened, name
        return self._file


def write_apart(egress: Path, **said: Any) -> Receipt:
    """A receipt in the account that many processes write; as `Receipts.write`, which says what is to be `said`."""
    folder = egress / APART
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritten("the store cannot write its receipts", error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        receipts = Receipts(folder)
        try:
            return receipts.write(**said)
        finally:
            receipts.close()
    finally:
        os.close(lock)


def read_receipts(folder: Path) -> Egress:
    """Sums by kind, and whether the chain holds. Raises StoreError when there are none."""
    files = _files(folder)
    if not files:
        raise StoreError("the store has no receipts")
    kinds: dict[str, Sum] = {}
    problems: list[str] = []
    index, prev = 0, FIRST
    first = last = None
    for place, found in _lines(files):
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
            index, prev = index + 1, ""
            continue
        if found.index != index:
            problems.append(f"{place}: receipt {index} should stand here, found {found.index}")
        elif prev and found.prev != prev:
            problems.append(f"{place}: receipt {index} does not follow the one before")
        index, prev = found.index + 1, entry_hash(plain(found)).hex()
        before = kinds.get(found.kind, Sum())
        kinds[found.kind] = Sum(before.messages + 1, before.num_bytes + found.num_bytes)
        first = found.at if first is None else first
        last = found.at
    return Egress(kinds, first, last, tuple(problems))


def _lines(files: list[Path]) -> Iterator[tuple[str, Receipt | str]]:
    for path in files:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield f"{path.name}:{number}", _receipt(raw)
                except (ValueError, RecursionError) as error:
                    yield f"{path.name}:{number}", str(error)


def _receipt(raw: bytes) -> Receipt:
    if not raw.endswith(b"\n"):
        raise ValueError("the file ends inside its line; this receipt is not counted")
    try:
        given = json.loads(raw)
    except ValueError:
        raise ValueError("its line is not JSON") from None
    if not isinstance(given, dict) or given.keys() != {"hash", "receipt"} or canonical(given) + b"\n" != raw:
        raise ValueError("its line is not a receipt in canonical JSON")
    receipt = exact(Receipt, given["receipt"])
    if entry_hash(given["receipt"]).hex() != given["hash"]:
        raise ValueError("its content does not have its hash")
    return receipt


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("egress-????-??.jsonl"))


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _put(handle: int, line: bytes) -> None:
    end = os.fstat(handle).st_size
    try:
        if os.write(handle, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(handle, end)
        raise


def _last(path: Path) -> Receipt | None:
    """The last whole line; one that a crash cut is removed. Raises StoreError when it is damaged."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, size - len(content) + whole)
    if whole == 0:
        return None
    try:
        return _receipt(content[content.rfind(b"\n", 0, whole - 1) + 1 : whole])
    except ValueError as error:
        raise StoreError(f"the store's receipts are damaged at the end of {path.name}: {error}") from None
