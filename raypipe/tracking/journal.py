"""The journal of one run: what is written here happened, and everything else follows from it.

An SQLite file in WAL mode, so that any number of processes read while one writes. `append` returns when the
record is on the disk (synchronous=FULL, one fsync); rows are never changed, the database itself refuses it.

Who has written `run_started` owns the run until another writes one of a higher epoch: from then on each of its
appends is refused, in the same statement, so that a coordinator which stood still and goes on adds nothing. The newest
`run_started` is found by an index of these rows alone, whatever the journal's length.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import RunError, StoreSuperseded
from raypipe.tracking.damage import Tail, rows, salvage, schema_of
from raypipe.tracking.migrate import CREATE, SCHEMA, STARTS, rewrite, upgraded
from raypipe.tracking.records import KINDS, Kind

FILE = "journal.sqlite"
PAGE = 256  # records fetched at once
NEWEST = "select max(seq) from record where kind = 'run_started'"
ADD = f"""insert into record(at, kind, body) select ?1, ?2, ?3 where ?4 is null or ?4 = ({NEWEST})"""
BEGIN = f"""insert into record(at, kind, body) select ?1, ?2, ?3 where ?4 is null or
            ?4 > coalesce((select json_extract(body, '$.epoch') from record where seq = ({NEWEST})), 0)
            and (?5 is null or ?5 = (select max(seq) from record))"""
CUT = "the journal was cut inside a write: its last record is not whole, nobody acted on it, it is left out"

OTHERS = "another coordinator has taken this run over"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One fact: `seq` counts from 1 without gaps, `at` is in seconds since the epoch."""

    seq: int
    at: float
    kind: Kind
    body: dict[str, Any]


class Journal:
    """One writer, many readers, in any process; threads of one process may share an instance."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        """Opens for reading, or makes the file where it is missing and opens it for writing.

        One of an earlier schema is read as if it were of today's, and rewritten before it is written to. `damage`
        says what of a damaged one is left out. Raises RunError when there is no journal to read, or one of a later
        schema, or nothing in it can be read.
        """
        self.path, self.damage = path, ""
        self._lock = threading.Lock()
        self._schema = SCHEMA
        self._whole = True
        self._begun: int | None = None  # the number of the `run_started` that was written here
        if not write and not path.is_file():
            raise RunError(f"no run here: {path} is missing")
        try:
            self._open(write)
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"the journal {path.name} cannot be opened: {error}") from None
        if self.damage:
            log.warning("%s", self.damage)

    def _open(self, write: bool) -> None:
        tail = Tail(self.path)
        self._db = self._connected(write)
        try:
            self._prepare(write)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, not permitted, full: not damaged
                raise
            self._left_out(error, write)
        if write and self._whole:
            pages = self._db.execute("pragma wal_checkpoint(passive)").fetchone()[1]
            self.damage = self.damage or (CUT if tail.is_cut(pages) else "")

    def _connected(self, write: bool) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={'rwc' if write else 'ro'}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=20)

    def _prepare(self, write: bool) -> None:
        if write:
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
        self._schema = found = self._db.execute("pragma user_version").fetchone()[0]
        if found > SCHEMA:
            name = self.path.name
            raise RunError(f"the journal {name} has schema {found}; this raypipe reads schema {SCHEMA} and older")
        if found == 0 and write:
            self._db.executescript(f"begin immediate; {CREATE} pragma user_version = {SCHEMA}; commit;")
        elif found == 0:
            raise RunError(f"the journal {self.path.name} is empty: its run never began")
        elif write:
            self._db.execute("select count(*) from record").fetchone()  # a damaged one is found now
            if found < SCHEMA:
                rewrite(self._db, self.path, found)
        if write:
            self._db.execute(STARTS)
        self._schema = SCHEMA if write else found

    def _left_out(self, error: sqlite3.Error, write: bool) -> None:
        """Read, or go on with, what can still be read. Raises sqlite3.Error where that is nothing."""
        if write:
            self._db.close()
            last = salvage(self.path, CREATE)
            self._db = self._connected(write)
            self._prepare(write)
        else:
            self._whole, self._schema = False, schema_of(self._db)
            last = sum(1 for _ in rows(self._db, 0))
            if not last:
                raise error
        self.damage = f"the journal {self.path.name} is damaged: what came after record {last} is left out"

    def append(self, kind: Kind, body: Mapping[str, object], at: float, after: int | None = None) -> int:
        """The record's number; it is on the disk. `after`: of a `run_started`, the newest record that it knows of.

        Raises RunError (disk full, no such kind), StoreSuperseded (a later coordinator has begun): nothing was written.
        """
        if kind not in KINDS:
            raise RunError(f"the journal knows no record of kind {kind!r}")
        text, begins = json.dumps(body, separators=(",", ":")), kind == "run_started"
        owner = (body.get("epoch"), after) if begins else (self._begun,)
        try:
            with self._lock:
                cursor = self._db.execute(BEGIN if begins else ADD, (at, kind, text, *owner))
        except sqlite3.Error as error:
            raise RunError(f"the journal {self.path.name} could not be written: {error}") from None
        if not cursor.rowcount:
            raise StoreSuperseded(OTHERS)
        number = int(cursor.lastrowid or 0)
        self._begun = number if begins else self._begun
        return number

    def refuse_superseded(self) -> None:
        """Before anything is written beside the journal. Raises StoreSuperseded: a later coordinator has begun."""
        if self._begun is not None and self._rows(NEWEST)[0][0] != self._begun:
            raise StoreSuperseded(OTHERS)

    def read(self, after: int = 0, kinds: Sequence[Kind] | None = None) -> Iterator[Record]:
        """The records with a number above `after`, in order, up to what is there now."""
        chosen = KINDS if kinds is None else tuple(kinds)
        for seq, at, kind, text in self._from(after, chosen):
            try:
                said = json.loads(text)
            except ValueError:
                raise RunError(f"record {seq} of the journal {self.path.name} is damaged") from None
            for now, body in upgraded(kind, said, self._schema):
                if now in chosen:
                    yield Record(seq, at, now, body)

    def _from(self, after: int, chosen: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        if not self._whole:
            with self._lock:
                yield from list(rows(self._db, after))
            return
        asked, values = "", tuple(chosen)
        if self._schema == SCHEMA:  # else a record may have become one of another kind
            asked = f"and kind in ({','.join('?' * len(chosen))})"
        query = f"select seq, at, kind, body from record where seq > ? {asked} order by seq limit {PAGE}"
        while page := self._rows(query, after, *(values if asked else ())):
            yield from page
            after = page[-1][0]

    def last(self) -> int:
        """The number of the newest record; 0 when there is none."""
        if not self._whole:
            return sum(1 for _ in self._from(0, KINDS))
        return int(self._rows("select coalesce(max(seq), 0) from record")[0][0])

    def copy_to(self, path: Path) -> None:
        """One moment of it as a file of its own; who writes meanwhile is not held up. Raises RunError."""
        try:
            with self._lock, closing(sqlite3.connect(path)) as copy:
                self._db.backup(copy)
                copy.execute("pragma journal_mode = delete")
        except sqlite3.Error as error:
            raise RunError(f"the journal {self.path.name} cannot be copied: {error}") from None

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise RunError(f"the journal {self.path.name} cannot be read: {error}") from None
