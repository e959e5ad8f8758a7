"""The reader of a run's record: silent where all is well, and each damage is named."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "jobs"))

from chaos_ledger import Chain, canonical
from chaos_reader import read_run
from test_resume import make
from test_shell import NAMES, SitePort, config, run

from raypipe.tracking.follow import follow

VERSIONS = 4


@dataclass(frozen=True)
class Good:
    """A run and all that it left behind."""

    top: Path

    @property
    def folder(self) -> Path:
        return self.top / "runs" / "run"

    def faults(self, calm: Path | None = None) -> list[str]:
        return read_run(self.folder, stores_home=self.top / "stores", tracked=self.top / "mlflow.db", calm=calm)

    def sql(self, *statements: str) -> None:
        with sqlite3.connect(self.folder / "journal.sqlite") as db:
            for statement in ("drop trigger never_updated", "drop trigger never_deleted", *statements):
                db.execute(statement)

    def edit(self, kind: str, change: Callable[[dict[str, Any]], object], which: int = 0) -> None:
        """One record of a kind, the oldest or another."""
        with sqlite3.connect(self.folder / "journal.sqlite") as db:
            rows = db.execute("select seq, body from record where kind = ? order by seq", (kind,)).fetchall()
            seq, body = rows[which][0], json.loads(rows[which][1])
            change(body)
            db.execute("drop trigger if exists never_updated")
            db.execute("update record set body = ? where seq = ?", (json.dumps(body), seq))

    def repeat(self, kind: str, change: Callable[[dict[str, Any]], object], which: int = -1) -> None:
        """A record like one that there is, at the end."""
        with sqlite3.connect(self.folder / "journal.sqlite") as db:
            rows = db.execute("select at, kind, body from record where kind = ? order by seq", (kind,)).fetchall()
            body = json.loads(rows[which][2])
            change(body)
            db.execute("insert into record(at, kind, body) values (?, ?, ?)", (*rows[which][:2], json.dumps(body)))

    def tracked(self, statement: str) -> None:
        with sqlite3.connect(self.top / "mlflow.db") as db:
            db.execute(statement)

    def told(self, change: Callable[[str], str]) -> None:
        file = self.top / "stores" / "a" / "state" / "run" / "told"
        file.write_text(change(file.read_text()))

    def weights(self, version: int) -> Path:
        (file,) = (self.folder / "versions").glob(f"v{version:05d}-*")
        return file

    def flip(self, version: int) -> None:
        content = bytearray(self.weights(version).read_bytes())
        content[-9] ^= 1
        self.weights(version).write_bytes(content)

    def diary(self, change: Callable[[str], str]) -> None:
        file = self.folder / "diary" / "000001.jsonl"
        text = file.read_text()
        assert change(text) != text
        file.write_text(change(text))

    def ledger(self, change: Callable[[str], str]) -> None:
        file = self.folder / "ledger.jsonl"
        text = file.read_text()
        assert change(text) != text
        file.write_text(change(text))

    def cut_ledger(self, version: int) -> None:
        """Back to the head that is before a version's updates, as whoever holds the file can."""
        lines = (self.folder / "ledger.jsonl").read_text().splitlines(keepends=True)
        at = next(n for n, line in enumerate(lines) if '"kind":"update"' in line and f'"version":{version}' in line)
        last = max(n for n, line in enumerate(lines[:at]) if line.startswith('{"head"'))
        (self.folder / "ledger.jsonl").write_text("".join(lines[: last + 1]))

    def rewrite(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """The whole chain anew, right by itself: with one head at its end, as a forger would have it."""
        lines = [json.loads(line) for line in (self.folder / "ledger.jsonl").read_text().splitlines()]
        entries = change([line["entry"] for line in lines if "entry" in line])
        head, chain, prev, made = [line["head"] for line in lines if "head" in line][-1], Chain(), "0" * 64, []
        for place, entry in enumerate(entries):
            entry |= {"index": place, "prev": prev}
            found = sha256(canonical(entry))
            chain.add(found.digest())
            prev = found.hexdigest()
            made.append({"entry": entry, "hash": prev})
        made.append({"head": head | {"size": chain.size, "root": chain.root()}})
        (self.folder / "ledger.jsonl").write_bytes(b"".join(canonical(line) + b"\n" for line in made))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("good")
    make(top / "stores")
    run(config(stop={"max_versions": VERSIONS}), top, {n: SitePort(top / "stores" / n) for n in NAMES})
    follow(top / "runs" / "run", home=top)
    return top


@pytest.fixture
def good(made: Path, tmp_path: Path) -> Good:
    shutil.copytree(made, tmp_path / "run")
    return Good(tmp_path / "run")


def test_a_good_run_has_no_faults(good: Good) -> None:
    assert good.faults(calm=good.folder) == []
    told = (good.top / "stores" / "a" / "state" / "run" / "told").read_text().splitlines()
    assert [line.split()[1] for line in told] == [str(v) for v in range(1, VERSIONS + 1)]
    command = [sys.executable, str(ROOT / "jobs" / "chaos_reader.py"), str(good.folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "the record holds\n"
    good.flip(2)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(" faults")


def without_version_2(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in entries if not (e["kind"] in ("update", "version", "kept") and e["body"]["version"] == 2)]


def another_digest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (entry,) = [e for e in entries if e["kind"] == "version" and e["body"]["version"] == 2]
    entry["body"]["digest"] = "b3:0"
    return entries


def another_ticket(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entry = next(e for e in entries if e["kind"] == "update" and e["body"]["version"] == 3)
    entry["body"]["ticket"] = "9.1-9.a"
    return entries


def first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["contributions"][0].update(changes)


def twice(body: dict[str, Any]) -> None:
    body["contributions"].append(body["contributions"][0])


DAMAGES: dict[str, Callable[[Good], object]] = {
    "record 6 follows record 4": lambda g: g.sql("delete from record where seq = 5"),
    "version 4 follows version 2": lambda g: g.edit("version_published", lambda b: b.update(version=4), 3),
    "version 2 has parent 0": lambda g: g.edit("version_published", lambda b: b.update(parent=0), 2),
    "version 3 holds no update": lambda g: g.edit("version_published", lambda b: b.update(contributions=[]), 3),
    "is in version 1 2 times": lambda g: g.edit("version_published", twice, 1),
    "is in version 4 and in version 5": lambda g: g.repeat(
        "version_published", lambda b: b.update(version=5, parent=4)
    ),
    "is said to be b's from 1": lambda g: g.edit("version_published", first(store="b"), 2),
    "has staleness 1": lambda g: g.edit("version_published", first(staleness=1), 2),
    "share 0.9 of": lambda g: g.edit("version_published", first(share=0.9), 2),
    "s after the start": lambda g: g.edit("version_published", lambda b: b.update(elapsed_s=-5.0), 2),
    "epoch 1 began after epoch 1": lambda g: g.repeat("run_started", lambda b: None),
    "version 2 is withdrawn and is not the newest": lambda g: g.sql(
        "insert into record(at, kind, body) values (0, 'version_withdrawn', '{\"version\": 2}')"
    ),
    "version 9 is judged and is not there": lambda g: g.edit("evaluated", lambda b: b.update(version=9)),
    "it is not what was kept": lambda g: g.flip(2),
    "of a version that the journal does not have": lambda g: g.weights(2).rename(
        g.weights(2).with_name(g.weights(2).name.replace("v00002", "v00009"))
    ),
    "the newest version 4 has no file": lambda g: g.weights(4).unlink(),
    "version 2 has 2 files": lambda g: shutil.copy(
        g.weights(2), g.weights(2).with_name("v00002-0123456789ab.safetensors")
    ),
    "holds other weights than version 2": lambda g: g.edit("version_published", lambda b: b.update(hash="b3:0"), 2),
    "was never decided": lambda g: g.diary(
        lambda t: t.replace('"do":"Publish","version":3', '"do":"Other","version":3')
    ),
    "and was never asked for": lambda g: g.diary(never_asked),
    "is settled in 1 and in 2": lambda g: g.diary(settled_again),
    "of 000001.jsonl is damaged": lambda g: g.diary(lambda t: t.replace('"decided":[', '"decided":[,', 1)),
    "keeps no note of this run": lambda g: shutil.rmtree(g.top / "stores" / "b" / "state" / "run"),
    "a was told of ticket": lambda g: g.told(lambda t: t + t.splitlines()[0].split()[0] + " 7\n"),
    "is in 7; by the journal: 1": lambda g: g.told(lambda t: t.replace(" 1\n", " 7\n")),
    "is in -; by the journal: 1": lambda g: g.told(lambda t: t.replace(" 1\n", " -\n")),
    "is in 3; by the journal: no version": lambda g: g.told(lambda t: t + "2.1-99.a 3\n"),
    "a has heard of epoch 5": lambda g: (g.top / "stores" / "a" / "state" / "run" / "epoch").write_text("5"),
    "mlflow: versions [3] are no steps": lambda g: g.tracked("delete from metrics where step = 3"),
    "mlflow: steps [44] are no versions": lambda g: g.tracked("update metrics set step = step + 40 where step = 4"),
    "mlflow: version 2 took 1000 steps": lambda g: g.tracked(
        "update metrics set value = 1000 where step = 2 and key = 'fed/steps'"
    ),
    "ledger: version 4 is in the journal and not in the ledger": lambda g: g.cut_ledger(4),
    "; the ledger has ": lambda g: g.cut_ledger(2),
    "ledger: version 2 is in the journal and not in the ledger": lambda g: g.rewrite(without_version_2),
    "entries that is not on the chain": lambda g: g.rewrite(without_version_2),
    "ledger: version 2 has digest b3:0;": lambda g: g.rewrite(another_digest),
    "ledger: version 3 is of 9.1-9.a": lambda g: g.rewrite(another_ticket),
    "does not have its hash": lambda g: g.ledger(lambda t: t.replace('"staleness":0', '"staleness":1', 1)),
    "ledger: there is none": lambda g: (g.folder / "ledger.jsonl").unlink(),
    "mlflow: 0 runs bear the name": lambda g: g.tracked("delete from tags where key = 'fed.run_key'"),
}


def never_asked(text: str) -> str:
    """One of those that are in a version."""
    return re.sub(r'("do":"Train","ticket":")1\.[^"]*\.a"', r'\g<1>1.1-99.a"', text)


def settled_again(text: str) -> str:
    """The second settled ticket of a store gets the name of the first."""
    names = re.findall(r'"do":"Settle","store":"a","ticket":"([^"]*)"', text)
    return text.replace(
        f'"do":"Settle","store":"a","ticket":"{names[1]}"', f'"do":"Settle","store":"a","ticket":"{names[0]}"'
    )


def test_a_run_that_learned_less_than_the_calm_one_is_named(good: Good, tmp_path: Path) -> None:
    calm = Good(tmp_path)
    shutil.copytree(good.folder, tmp_path / "runs" / "run")
    for which in range(VERSIONS):
        calm.edit("evaluated", lambda b: b["metrics"].update(accuracy=0.99), which)
    (fault,) = good.faults(calm=calm.folder)
    assert "the calm run came to 0.990" in fault


@pytest.mark.parametrize("said", DAMAGES)
def test_each_damage_is_named(said: str, good: Good) -> None:
    DAMAGES[said](good)
    faults = good.faults()
    assert any(said in fault for fault in faults), faults
