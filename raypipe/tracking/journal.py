"""The journal of one run: what is written here happened, and everything else follows from it.

An SQLite file in WAL mode, so that any number of processes read while one writes. `append` returns when the
record is on the disk (synchronous=FULL, one fsync); rows are never changed, the database itself refuses it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import RunError
from raypipe.tracking.records import KINDS, Kind

FILE = "journal.sqlite"
SCHEMA = 1
PAGE = 256  # records fetched at once

_CREATE = f"""
begin immediate;
create table record(seq integer primary key, at real not null, kind text not null, body text not null) strict;
create trigger never_updated before update on record begin select raise(abort, 'the journal is append-only'); end;
create trigger never_deleted before delete on record begin select raise(abort, 'the journal is append-only'); end;
pragma user_version = {SCHEMA};
commit;
"""


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

        Raises RunError when there is no journal to read, or one of another schema version.
        """
        self.path = path
        self._lock = threading.Lock()
        if not write and not path.is_file():
            raise RunError(f"no run here: {path} is missing")
        try:
            mode = "rwc" if write else "ro"
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=20)
            self._prepare(write)
        except sqlite3.Error as error:
            raise RunError(f"the journal {path.name} cannot be opened: {error}") from None

    def _prepare(self, write: bool) -> None:
        if write:
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
        found = self._db.execute("pragma user_version").fetchone()[0]
        if found == 0 and write:
            self._db.executescript(_CREATE)
        elif found != SCHEMA:
            raise RunError(f"the journal {self.path.name} has schema {found}; this raypipe reads schema {SCHEMA}")

    def append(self, kind: Kind, body: Mapping[str, object], at: float) -> int:
        """The record's number; it is on the disk. Raises RunError (disk full, no such kind); nothing was written."""
        if kind not in KINDS:
            raise RunError(f"the journal knows no record of kind {kind!r}")
        text = json.dumps(body, separators=(",", ":"))
        try:
            with self._lock:
                cursor = self._db.execute("insert into record(at, kind, body) values (?, ?, ?)", (at, kind, text))
        except sqlite3.Error as error:
            raise RunError(f"the journal {self.path.name} could not be written: {error}") from None
        return int(cursor.lastrowid or 0)

    def read(self, after: int = 0, kinds: Sequence[Kind] | None = None) -> Iterator[Record]:
        """The records with a number above `after`, in order, up to what is there now."""
        chosen = KINDS if kinds is None else tuple(kinds)
        query = (
            f"select seq, at, kind, body from record where seq > ? and kind in ({','.join('?' * len(chosen))})"
            f" order by seq limit {PAGE}"
        )
        while rows := self._rows(query, after, *chosen):
            for seq, at, kind, body in rows:
                yield Record(seq, at, kind, json.loads(body))
            after = rows[-1][0]

    def last(self) -> int:
        """The number of the newest record; 0 when there is none."""
        return int(self._rows("select coalesce(max(seq), 0) from record")[0][0])

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
