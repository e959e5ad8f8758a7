"""Journals of earlier schemas: one function a step, from a record as it was to the records that say the same now.

    1  versions named the file of their weights and its sha256; later ones, under the same number, have `weights_kept`
    2  a version has the hash of its content; a record of its own says that its weights are kept
    3  a version has all that it takes to make it again: progress, repeat and state of each update, the step's numbers

A journal that is only read is upgraded as it is read and stays as it is; one that is written to is rewritten in one
transaction, a copy of the old one beside it. What an old record never said is None: nothing is made up.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

SCHEMA = 3
Said: TypeAlias = tuple[str, dict[str, Any]]  # a record's kind and body

CREATE = """
create table record(seq integer primary key, at real not null, kind text not null, body text not null) strict;
create trigger never_updated before update on record begin select raise(abort, 'the journal is append-only'); end;
create trigger never_deleted before delete on record begin select raise(abort, 'the journal is append-only'); end;
"""
STARTS = "create index if not exists starts on record(seq) where kind = 'run_started'"  # made by whoever writes


def _to_2(kind: str, body: dict[str, Any]) -> list[Said]:
    if kind != "version_published":
        return [(kind, body)]
    if "file" not in body:  # written after the shape had changed, under the old number
        bare = re.fullmatch("[0-9a-f]{64}", body["hash"])
        return [(kind, {**body, "hash": f"b3:{body['hash']}"} if bare else body)]
    kept = {"version": body["version"], **{key: body[key] for key in ("file", "hash", "num_bytes")}}
    rest = {key: value for key, value in body.items() if key not in ("file", "num_bytes")}
    return [(kind, {**rest, "hash": f"sha256:{body['hash']}"}), ("weights_kept", kept)]


def _to_3(kind: str, body: dict[str, Any]) -> list[Said]:
    if kind != "version_published":
        return [(kind, body)]
    unknown = {"progress": None, "repeat": None, "after": None}
    parts = [{**unknown, **part} for part in body["contributions"]]
    return [(kind, {"full_weight": None, "statistic_mix": None, **body, "contributions": parts})]


STEPS: dict[int, Callable[[str, dict[str, Any]], list[Said]]] = {1: _to_2, 2: _to_3}


def upgraded(kind: str, body: dict[str, Any], schema: int) -> list[Said]:
    """What a record of an earlier schema says, in today's; a record of today's is itself."""
    said = [(kind, body)]
    for step in range(schema, SCHEMA):
        said = [now for before in said for now in STEPS[step](*before)]
    return said


def rewrite(db: sqlite3.Connection, path: Path, schema: int) -> None:
    """Bring an open journal to today's schema, all or nothing; the old one stays beside it. Raises sqlite3.Error."""
    with closing(sqlite3.connect(path.with_suffix(f".schema{schema}.sqlite"))) as copy:
        db.backup(copy)
    db.execute("begin immediate")
    try:
        if db.execute("pragma user_version").fetchone()[0] == schema:  # no other process was first
            _rewrite(db, schema)
        db.execute("commit")
    except BaseException:
        db.execute("rollback")
        raise


def _rewrite(db: sqlite3.Connection, schema: int) -> None:
    rows = list(db.execute("select at, kind, body from record order by seq"))
    db.execute("drop table record")
    for statement in CREATE.strip().split("\n"):
        db.execute(statement)
    db.executemany("insert into record(at, kind, body) values (?, ?, ?)", _new_rows(rows, schema))
    db.execute(f"pragma user_version = {SCHEMA}")


def _new_rows(rows: list[tuple[float, str, str]], schema: int) -> Iterator[tuple[float, str, str]]:
    for at, kind, text in rows:
        for now, body in upgraded(kind, json.loads(text), schema):
            yield at, now, json.dumps(body, separators=(",", ":"))
