"""Journals of earlier schemas, of later ones, and journals that were cut."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from raypipe.errors import RunError
from raypipe.tracking.damage import Tail
from raypipe.tracking.journal import CUT, FILE, Journal
from raypipe.tracking.lineage import list_versions, read_history
from raypipe.tracking.migrate import CREATE, SCHEMA, STEPS

OLD = ROOT / "tests" / "journals" / "schema-1.jsonl"  # as raypipe wrote it then: three stores, two versions


def make(folder: Path, rows: list[Any], schema: int) -> Path:
    file = folder / FILE
    db = sqlite3.connect(file)
    db.executescript(f"pragma journal_mode = wal; {CREATE} pragma user_version = {schema};")
    for at, kind, body in rows:
        db.execute("insert into record(at, kind, body) values (?, ?, ?)", (at, kind, json.dumps(body)))
    db.commit()
    db.close()
    return file


def old_rows() -> list[Any]:
    return [json.loads(line) for line in OLD.read_text().splitlines()]


def said(file: Path) -> list[tuple[Any, ...]]:
    return [(r.at, r.kind, r.body) for r in Journal(file).read()]


def test_a_journal_of_the_first_schema_is_read_as_it_is_and_says_what_it_said(tmp_path: Path) -> None:
    file = make(tmp_path, old_rows(), 1)
    before = file.read_bytes()
    history = read_history(tmp_path)
    assert list(history.versions) == [0, 1, 2]
    assert history.versions[2]["hash"].startswith("sha256:25868fc5e2a8")
    assert history.weights[2]["file"] == "v00002-25868fc5e2a8.safetensors"
    assert history.versions[2]["contributions"][0]["progress"] is None
    assert "file" not in history.versions[2]
    assert [row.score for row in list_versions(tmp_path)] == [0.08, 0.19, 0.41]
    assert [r.kind for r in Journal(file).read(kinds=["weights_kept"])] == ["weights_kept"] * 3
    assert file.read_bytes() == before


def test_before_it_is_written_to_it_is_rewritten_and_the_old_one_stays_beside_it(tmp_path: Path) -> None:
    file = make(tmp_path, old_rows(), 1)
    as_read = said(file)
    journal = Journal(file, write=True)
    number = journal.append("store_left", {"store": "a", "reason": "gone"}, 1.0)
    assert number == len(as_read) + 1
    with pytest.raises(RunError, match="append-only"):
        journal._rows("delete from record")
    assert said(file)[:-1] == as_read
    assert sqlite3.connect(file).execute("pragma user_version").fetchone() == (SCHEMA,)
    kept = sqlite3.connect(tmp_path / "journal.schema1.sqlite")
    assert kept.execute("select count(*) from record").fetchone() == (len(old_rows()),)


def test_a_rewriting_that_dies_half_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(tmp_path, old_rows(), 1)
    as_read = said(file)

    def dies(kind: str, body: dict[str, Any]) -> list[Any]:
        if kind == "evaluated":
            raise KeyboardInterrupt
        return [(kind, body)]

    with monkeypatch.context() as patch:
        patch.setitem(STEPS, 2, dies)
        with pytest.raises(KeyboardInterrupt):
            Journal(file, write=True)
    assert said(file) == as_read
    Journal(file, write=True).close()
    assert said(file) == as_read


def test_there_is_a_step_from_every_earlier_schema() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA))


def test_what_was_written_under_the_old_number_after_the_shape_had_changed_is_taken_as_it_is(tmp_path: Path) -> None:
    body = {"version": 1, "parent": 0, "hash": "ab" * 32, "contributions": [{"store": "a"}]}
    now = {**body, "hash": "b3:" + "cd" * 32}
    file = make(tmp_path, [(1.0, "version_published", body), (2.0, "version_published", now)], 1)
    assert [r.body["hash"] for r in Journal(file).read()] == ["b3:" + "ab" * 32, "b3:" + "cd" * 32]


def test_a_journal_of_a_later_schema_is_refused_in_one_line(tmp_path: Path) -> None:
    file = make(tmp_path, [], SCHEMA + 1)
    for write in (False, True):
        with pytest.raises(RunError, match=f"schema {SCHEMA + 1}; this raypipe reads schema {SCHEMA} and older") as no:
            Journal(file, write=write)
        assert "\n" not in no.value.message


WRITER = """
import os, signal, sys
from pathlib import Path
from raypipe.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]), write=True)
for i in range(50):
    journal.append("store_left", {"store": str(i), "reason": "x" * 300}, float(i))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("cut", [1, 100, 4119])
def test_a_record_that_was_cut_while_it_was_written_is_left_out_and_said(cut: int, tmp_path: Path) -> None:
    file = tmp_path / FILE
    done = subprocess.run([sys.executable, "-c", WRITER, str(file)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    log = tmp_path / f"{FILE}-wal"
    os.truncate(log, log.stat().st_size - cut)
    journal = Journal(file, write=True)
    assert journal.damage == CUT
    assert [r.body["store"] for r in journal.read()] == [str(i) for i in range(49)]
    assert journal.append("store_left", {"store": "49", "reason": ""}, 49.0) == 50
    journal.close()
    assert Journal(file, write=True).damage == ""


def test_a_journal_that_nothing_was_cut_from_is_not_called_cut(tmp_path: Path) -> None:
    file = tmp_path / FILE
    subprocess.run([sys.executable, "-c", WRITER, str(file)], cwd=ROOT, check=False)
    journal = Journal(file, write=True)
    assert (journal.damage, journal.last()) == ("", 50)
    assert Tail(file).is_cut(0), "the check looks at what follows the whole pages"


def test_of_a_journal_whose_file_was_cut_the_readable_records_are_used_and_it_is_said(tmp_path: Path) -> None:
    rows = [(float(i), "store_left", {"store": str(i), "reason": "x" * 300}) for i in range(500)]
    file = make(tmp_path, rows, SCHEMA)
    os.truncate(file, file.stat().st_size // 2)
    reader = Journal(file)
    there = [r.body["store"] for r in reader.read()]
    assert 100 < len(there) < 400
    assert there == [str(i) for i in range(len(there))]
    assert reader.last() == len(there)
    assert [r.seq for r in reader.read(after=len(there) - 2)] == [len(there) - 1, len(there)]
    writer = Journal(file, write=True)
    assert (
        writer.damage
        == reader.damage
        == f"the journal {FILE} is damaged: what came after record {len(there)} is left out"
    )
    assert writer.append("store_left", {"store": "next", "reason": ""}, 0.0) == len(there) + 1
    assert (tmp_path / "journal.damaged.sqlite").is_file()
    assert Journal(file).damage == ""


def test_a_journal_of_which_nothing_is_left_says_so_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_bytes(b"no journal at all" * 1000)
    for write in (False, True):
        with pytest.raises(RunError, match="cannot be opened") as no:
            Journal(file, write=write)
        assert "\n" not in no.value.message
