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

import numpy as np
import pytest
from conftest import ROOT

from raypipe.errors import RunError, StoreSuperseded
from raypipe.ledger.keys import digest
from raypipe.tracking.book import RunBook
from raypipe.tracking.damage import Tail
from raypipe.tracking.journal import CUT, FILE, NEWEST, Journal
from raypipe.tracking.lineage import list_versions, read_history
from raypipe.tracking.migrate import CREATE, SCHEMA, STEPS
from raypipe.tracking.versions import VersionStore
from raypipe.types import Layout, Role

STARTED = {"run": "run", "config": {"task": {}, "model": {}}}
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


def test_a_coordinator_that_is_over_adds_nothing(tmp_path: Path) -> None:
    """Frozen, and thawed after another has taken the run over; or two that begin at once."""
    layout = Layout.of([("w", (40,), "float32", Role.SHARED)])
    vector = np.ones(layout.size, np.float32)
    first, second, late = (RunBook(tmp_path, 5, (10,), lambda: 0.0) for _ in range(3))
    first.record("run_started", {**STARTED, "epoch": 1})
    first.write(1, vector, layout, {"m": vector})
    first.record("version_published", {"version": 1, "contributions": []})
    second.record("run_started", {**STARTED, "epoch": 2})
    there = said(tmp_path / FILE), sorted(tmp_path.rglob("*.part"))
    for write in (
        lambda: first.record("version_published", {"version": 2, "contributions": []}),
        lambda: first.write(2, vector, layout, {"m": vector}),
        lambda: first.keep(1),
        lambda: late.record("run_started", {"epoch": 2}),
        lambda: late.record("run_started", {"epoch": 1}),
    ):
        with pytest.raises(StoreSuperseded, match="another coordinator has taken this run over"):
            write()
    assert (said(tmp_path / FILE), sorted(tmp_path.rglob("*.part"))) == there
    list(late.past())
    second.record("version_published", {"version": 2, "contributions": []})
    with pytest.raises(StoreSuperseded):
        late.record("run_started", {"epoch": 3})  # it does not know of version 2
    list(late.past())
    late.record("run_started", {"epoch": 3})
    assert [kind for _, kind, _ in said(tmp_path / FILE)][2:] == ["run_started", "version_published", "run_started"]


def test_the_newest_start_is_found_without_a_look_at_every_record_also_in_an_old_journal(tmp_path: Path) -> None:
    file = make(tmp_path, [(0.0, "run_started", {"epoch": 4}), *[(0.0, "store_left", {"store": "a"})] * 50], SCHEMA)
    journal = Journal(file, write=True)
    assert journal.append("store_left", {"store": "b"}, 0.0) == 52, "who has not begun is no coordinator"
    assert "USING INDEX starts" in str(journal._rows(f"explain query plan {NEWEST}"))
    assert journal.append("run_started", {"epoch": 5}, 0.0) == 53


def test_two_coordinators_that_make_the_same_version_do_not_spoil_each_others_weights(tmp_path: Path) -> None:
    layout = Layout.of([("w", (40,), "float32", Role.SHARED)])
    ours, theirs = np.full(layout.size, 2.0, np.float32), np.full(layout.size, 1.0, np.float32)
    for value in (ours, theirs):
        value[40:] = 0
    first, second = VersionStore(tmp_path), VersionStore(tmp_path)
    first.life, second.life = 9, 10
    first.write(1, theirs, layout, {})
    assert second.recover(1, layout, digest(theirs)) is not None, "what the one before it has written"
    second.write(1, ours, layout, {})
    first.write(1, theirs, layout, {})
    second.keep(1)
    assert second.read(1)["w"][0] == 2.0
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    (tmp_path / "v00002.part").write_bytes(second.path(1).read_bytes())  # as it was named once
    second.keep(2)
    assert second.read(2)["w"][0] == 2.0
