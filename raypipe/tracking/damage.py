"""A journal that was cut: what can be read of it, and how that is known.

A record that was being written when its machine died is not whole in SQLite's write-ahead log; SQLite leaves it out
in silence, and rightly: nobody acted on it. `Tail` finds such a rest, so that it can be said. The main file is cut by
no crash, but by a bad copy or disk: then `salvage` takes over the records that can still be read, from the first on.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

HEADER, FRAME = 32, 24  # bytes, of the log and of each page in it; https://www.sqlite.org/fileformat.html#walformat
LOGS = ("-wal", "-shm")


class Tail:
    """The log as it is before anybody opens the journal."""

    def __init__(self, path: Path) -> None:
        log = path.with_name(path.name + "-wal")
        self._log = log.read_bytes() if log.is_file() else b""

    def is_cut(self, whole: int) -> bool:
        """Whether something of a record that was not finished follows the log's whole pages."""
        if len(self._log) < HEADER:
            return len(self._log) > 0
        (page,), salts = struct.unpack(">I", self._log[8:12]), self._log[16:24]
        rest = self._log[HEADER + whole * (FRAME + page) :]
        return bool(len(rest) % (FRAME + page)) or rest[8:16] == salts


def schema_of(db: sqlite3.Connection) -> int:
    """Also of a damaged journal. Raises sqlite3.Error where its first page is gone."""
    db.execute("pragma writable_schema = on")  # else a file that is too short is refused as a whole
    return int(db.execute("pragma user_version").fetchone()[0])


def rows(db: sqlite3.Connection, after: int) -> Iterator[tuple[Any, ...]]:
    """Of a damaged journal, in order, up to the first that cannot be read."""
    expected = after + 1
    try:
        schema_of(db)
        for row in db.execute("select seq, at, kind, body from record where seq > ? order by seq", (after,)):
            if row[0] != expected:
                return
            expected += 1
            yield row
    except sqlite3.DatabaseError:
        return


def salvage(path: Path, create: str) -> int:
    """Put what can be read in the journal's place, the damaged one beside it; how many records.

    Raises sqlite3.Error, OSError.
    """
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as old, closing(sqlite3.connect(part)) as new:
        found = list(rows(old, 0))
        if not found:
            raise sqlite3.DatabaseError("nothing in it can be read")
        new.executescript(f"begin; {create} pragma user_version = {schema_of(old)}; commit;")
        new.executemany("insert into record values (?, ?, ?, ?)", found)
        new.commit()
    for log in LOGS:
        if (beside := path.with_name(path.name + log)).exists():
            beside.rename(path.with_suffix(f".damaged.sqlite{log}"))
    os.replace(path, path.with_suffix(".damaged.sqlite"))
    part.rename(path)
    return len(found)
