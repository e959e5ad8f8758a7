"""The ledger of one run: `ledger.jsonl` in the run's folder, entries and signed heads in the order they were written.

`append` prepares entries, `seal` writes all of them with a head over the whole chain: one write, one fsync. What was
not sealed was never said: a crash takes it back, and the coordinator appends it again from its journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

from raypipe.errors import RunError, StoreError
from raypipe.ledger import heads
from raypipe.ledger.entries import (
    FIRST,
    Body,
    Entry,
    Revoked,
    Run,
    Store,
    Version,
    Withdrawn,
    Witnessed,
    line_of,
    make_entry,
    plain,
)
from raypipe.ledger.heads import Head, is_cosigned, is_genuine, signed_head
from raypipe.ledger.keys import Key
from raypipe.ledger.lines import FILE, Line, read_lines
from raypipe.ledger.tree import Tree
from raypipe.security.files import sync_folder

# In a proof from the first entry on: 128 kB; in another: who misses more entries goes without. A ticket brings up to 17
# proofs, one of them from the first, and has to fit into a vault's frame with a plan of 10,000 class names.
JOIN_LEAVES, MOST_LEAVES = 2048, 512


class LedgerBusy(RunError):
    """Another process writes it, and may end soon."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sealed version's entry lies in the file."""

    index: int
    start: int
    num_bytes: int


class Ledger:
    """The one writer of a run's ledger; threads of its process may share it."""

    def __init__(self, folder: Path, key: Key, run: str) -> None:
        """Opens the run's ledger, or begins it. Cuts off what a crash left behind the last head: see `recovered`.

        Raises LedgerBusy: another process writes it. Raises RunError: it is not what this key signed last.
        """
        self.path, self.recovered = folder / FILE, ""
        self._key, self._run = key, run
        self._lock = Lock()
        self._tree, self._prev = Tree(), FIRST
        self._head: Head | None = None
        self._started: Run | None = None
        self._stores: dict[str, Store] = {}  # those whose key stands
        self._versions: dict[int, Version] = {}  # those not withdrawn, the newest last
        self._recorded = 0
        self._places: dict[int, _Place] = {}
        self._lines: list[tuple[Entry, bytes]] = []  # not sealed yet
        self._heads: dict[int, Head] = {}
        self._proofs: dict[tuple[int, int], dict[str, Any]] = {}  # under the newest head, by version and since
        self._seen: dict[int, dict[str, str]] = {}  # head size -> store -> co-signature, not sealed yet
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab", buffering=0)
            sync_folder(folder)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise LedgerBusy(f"another process writes the ledger {self.path}") from None
        except OSError as error:
            raise RunError(f"the ledger {self.path} cannot be opened: {error.strerror}") from None
        try:
            self._end = self._load()
        except RunError:
            self._file.close()
            raise

    @property
    def last(self) -> Head | None:
        """The newest signed head."""
        return self._head

    @property
    def coordinator(self) -> str:
        """The public key that signs."""
        return self._key.public

    @property
    def started(self) -> Run | None:
        """The newest `run` entry that was appended."""
        return self._started

    @property
    def newest(self) -> int | None:
        """The newest version that was appended and not withdrawn."""
        return next(reversed(self._versions), None)

    @property
    def recorded(self) -> int:
        """The newest journal record that is accounted for, 0 for none: what comes after it is still to be."""
        return self._recorded

    @property
    def owed(self) -> float | None:
        """When the newest version or end was that no `seal` has written yet; None where all are."""
        return next((e.at for e, _ in reversed(self._lines) if e.kind in ("version", "finished")), None)

    def version(self, number: int) -> Version | None:
        """As it was appended and not withdrawn."""
        return self._versions.get(number)

    def store(self, store: str) -> Store | None:
        """As it was appended last, unless its key was revoked since."""
        return self._stores.get(store)

    def append(self, body: Body, *, at: float) -> Entry:
        """One more entry, on the disk with the next `seal`. Raises RunError for a body that its kind cannot have."""
        with self._lock:
            return self._append([body], at)[0]

    def extend(self, bodies: Sequence[Body], *, at: float, record: int) -> None:
        """All entries that a journal record stands for, which may be none; or no entry where `append` would refuse one.

        They are under the same head, so that a crash leaves all of them or none.
        """
        with self._lock:
            self._append(bodies, at, record)
            self._recorded = max(self._recorded, record)

    def witness(self, cosignature: Mapping[str, Any], public: str) -> None:
        """Take a store's signature on a head in; the next `seal` writes it. `public` is the store's enrolled key.

        Raises StoreError when it is not that: the store saw another head, or another key signed.
        """
        with self._lock:
            try:
                size, store, signature = int(cosignature["size"]), str(cosignature["store"]), cosignature["signature"]
            except (KeyError, TypeError, ValueError):
                raise StoreError("a co-signature holds store, size and signature") from None
            head = self._heads.get(size)
            if head is None or not is_cosigned(head, store, public, signature):
                raise StoreError(f"store {store} co-signed no head of size {size} that this ledger has")
            self._seen.setdefault(size, {})[store] = signature

    def seal(self, *, at: float) -> Head:
        """Write what was appended and a signed head, durably. With nothing new, the head that is there.

        Raises RunError (disk full); then nothing was written, and the next `seal` tries again.
        """
        with self._lock:
            for size in sorted(self._seen):
                self._append([Witnessed(size, self._seen.pop(size))], at)
            if not self._lines:
                if self._head is None:
                    raise RunError(f"the ledger {self.path} has no entry to seal")
                return self._head
            head = self._next_head(at)
            self._write(b"".join(line for _, line in self._lines) + heads.line_of(head))
            start = self._end
            for entry, line in self._lines:
                self._place(entry, start, len(line))
                start += len(line)
            self._end = start + len(heads.line_of(head))
            self._lines.clear()
            self._heads[head.size] = self._head = head
            self._proofs.clear()
            return head

    def base_proof(self, version: int, since: int = 0) -> dict[str, Any]:
        """What a store needs to see before it trains from `version`: see `Witness.check`.

        `since` is the size of the last head that the store co-signed, 0 for none. Plain values, for reading only.
        Raises StoreError when `since` is more than there is, RunError when the version was not sealed.
        """
        with self._lock:
            head, place = self._head, self._places.get(version)
            if (version, since) in self._proofs:
                return self._proofs[version, since]
            if head is None or place is None:
                raise RunError(f"the ledger of run {self._run} has no sealed version {version}")
            if not 0 <= since <= head.size:
                raise StoreError(f"the store has a head of size {since}, the ledger has {head.size} entries")
            try:
                with self.path.open("rb") as file:
                    raw = os.pread(file.fileno(), place.num_bytes, place.start)
            except OSError as error:
                raise RunError(f"the ledger {self.path} cannot be read: {error.strerror}") from None
            self._proofs[version, since] = proof = {
                "head": plain(head),
                "since": since,
                "entry": json.loads(raw)["entry"],
                "inclusion": [step.hex() for step in self._tree.inclusion(place.index, head.size)],
                "consistency": [step.hex() for step in self._tree.consistency(since, head.size)] if since else [],
                "leaves": self._leaves(since, head.size),
            }
            return proof

    def _leaves(self, since: int, size: int) -> str:
        most = MOST_LEAVES if since else JOIN_LEAVES
        return "" if size - since > most else self._tree.leaves(since, size).hex()

    def close(self) -> None:
        """Idempotent; what was not sealed is gone."""
        with self._lock:
            self._file.close()

    def _append(self, bodies: Sequence[Body], at: float, record: int = 0) -> list[Entry]:
        record = max(self._recorded, record)
        made: list[tuple[Entry, bytes]] = []
        hashes, prev = list[bytes](), self._prev
        for body in bodies:
            try:
                entry = make_entry(self._tree.size + len(made), prev, body, at, record)
                line, found = line_of(entry)
            except ValueError as error:
                raise RunError(f"the ledger cannot hold this: {error}") from None
            made.append((entry, line))
            hashes.append(found)
            prev = found.hex()
        for (entry, _), body, found in zip(made, bodies, hashes, strict=True):
            self._tree.append(found)
            self._know(entry, body)
        self._prev = prev
        self._lines += made
        return [entry for entry, _ in made]

    def _know(self, entry: Entry, body: Body) -> None:
        """What is asked of the ledger later."""
        self._recorded = max(self._recorded, entry.record)
        match body:
            case Run():
                self._started = body
            case Store():
                self._stores[body.store] = body
            case Revoked():
                self._stores.pop(body.store, None)
            case Version():
                self._versions[body.version] = body
            case Withdrawn():
                self._versions.pop(body.version, None)
            case _:
                pass

    def _place(self, entry: Entry, start: int, num_bytes: int) -> None:
        """Of a sealed entry."""
        if entry.kind == "version":
            self._places[entry.body["version"]] = _Place(entry.index, start, num_bytes)
        elif entry.kind == "withdrawn":
            self._places.pop(entry.body["version"], None)

    def _next_head(self, at: float) -> Head:
        new = next(reversed(self._versions.values()), None)
        version, digest = (None, None) if new is None else (new.version, new.digest)
        root = self._tree.root().hex()
        return signed_head(
            self._key, Head(self._run, self._tree.size, root, version, digest, float(at), self._key.public)
        )

    def _write(self, content: bytes) -> None:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)
            raise RunError(f"the ledger {self.path} could not be written: {error.strerror}") from None

    def _load(self) -> int:
        """Takes in what is sealed; the number of bytes kept."""
        sealed = loose = 0
        pending: list[tuple[Entry, Line]] = []
        for line in read_lines(self.path, quick=True):
            if line.cut:
                loose += 1
            elif isinstance(line.item, Entry):
                pending.append((line.item, line))
            elif line.item is None:
                place = self._tree.size + len(pending)
                raise RunError(f"the ledger {self.path} was altered: entry {place}: {line.problem}")
            else:
                self._take(pending, line.item)
                pending.clear()
                sealed = line.end
        if self._head is not None and not is_genuine(self._head):  # the last one is over all that is here
            raise self._not_ours(self._head)
        loose += len(pending)
        if loose:
            os.ftruncate(self._file.fileno(), sealed)
            os.fsync(self._file.fileno())
            self.recovered = f"{loose} lines after the last head of {self.path} were never sealed and are cut off"
        return sealed

    def _take(self, pending: list[tuple[Entry, Line]], head: Head) -> None:
        """Entries and the head that seals them."""
        for entry, line in pending:
            if (entry.index, entry.prev) != (self._tree.size, self._prev):
                raise RunError(f"the ledger {self.path} was altered: entry {self._tree.size} is not in its place")
            self._prev = line.hash.hex()
            self._tree.append(line.hash)
            if line.body is not None:
                self._know(entry, line.body)
            self._place(entry, line.start, line.end - line.start)
        if head.coordinator != self._key.public or head.run != self._run:
            raise self._not_ours(head)
        if (head.size, head.root) != (self._tree.size, self._tree.root().hex()):
            raise RunError(f"the ledger {self.path} was altered: its entries are not those of the head ({head.short})")
        self._heads[head.size] = self._head = head

    def _not_ours(self, head: Head) -> RunError:
        return RunError(f"the ledger {self.path} has a head ({head.short}) that this coordinator's key did not sign")
