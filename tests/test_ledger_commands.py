"""`raypipe ledger` and `raypipe evidence` from the command line."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import RUN, Federation, Told, federation, offline

from raypipe.errors import ConfigError, RunError
from raypipe.ledger import entries, heads
from raypipe.ledger.chain import Ledger
from raypipe.ledger.commands import add_parsers
from raypipe.ledger.keys import fingerprint
from raypipe.ledger.lines import FILE
from raypipe.ledger.roster import change_roster, enroll, load_roster


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


class Line:
    """`raypipe`, with this room's verbs only."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.parser, self.capsys = argparse.ArgumentParser(), capsys
        add_parsers(self.parser.add_subparsers(required=True))

    def __call__(self, *words: object) -> tuple[int, list[str]]:
        options = self.parser.parse_args([str(word) for word in words])
        code = options.run(options, None)
        return code, self.capsys.readouterr().out.splitlines()


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Line(capsys)


def test_a_ledger_is_verified_from_the_command_line(line: Line, tmp_path: Path) -> None:
    told = Told(tmp_path / "home" / "runs" / RUN)
    told.run()
    with pytest.raises(RunError, match=f"run {RUN} kept no ledger: .*{FILE} is missing"):
        line("ledger", "verify", RUN)
    told.follow()
    code, said = line("ledger", "verify", "last")
    assert code == 0
    assert said[0].startswith("the ledger holds (2 run, 5 version, 6 heads, 4 kept")
    assert f"signed by {told.key.public} (fingerprint {fingerprint(told.key.public)})" in said[1]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(told.lines()))
    assert line("ledger", "verify", RUN, "--against", copy, "--coordinator-key", told.key.public) == (0, said[:1])
    lines = told.lines()
    lines[1] = lines[1].replace(b'"version":0', b'"version":7')
    (told.folder / FILE).write_bytes(b"".join(lines))
    code, said = line("ledger", "verify", told.folder, "--against", copy)
    assert code == 1
    assert said[0] == "WRONG: entry 1: its content does not have its hash"
    assert said[-2].startswith("the ledger does NOT hold")
    with pytest.raises(ConfigError, match="--coordinator-key: a public key is 64"):
        line("ledger", "verify", told.folder, "--coordinator-key", "00")
    with pytest.raises(ConfigError, match="no run named 'other'"):
        line("ledger", "verify", "other")
    with pytest.raises(ConfigError, match="cannot be read"):
        line("ledger", "verify", told.folder, "--against", tmp_path / "nowhere")


def test_a_proof_is_written_that_its_reader_will_accept(line: Line, made: Federation, tmp_path: Path) -> None:
    code, said = line("ledger", "prove", made.run_folder, 2, "north")
    path = tmp_path / f"proof-{RUN}-2-north.json"
    assert (code, said[1]) == (0, f"written: {path.name}")
    done = offline(path, "--coordinator-key", made.key.public)
    assert done.stdout == f"{said[0]}\n"
    assert said[2].endswith(f"{path.name} --coordinator-key {made.key.public}")
    with pytest.raises(ConfigError, match="no version 9"):
        line("ledger", "prove", made.run_folder, 9, "north")
    with pytest.raises(RunError, match="could not be written: No such file"):
        line("ledger", "prove", made.run_folder, 2, "north", "--out", tmp_path / "nowhere" / "p.json")
    lines = made.read()
    head = next(i for i, one in enumerate(lines) if b'"version":2' in one and one.startswith(b'{"head"'))
    other = replace(heads.head_from(json.loads(lines[head])["head"]), signature="00" * 64)
    made.write([*lines[:head], heads.line_of(other)])
    with pytest.raises(RunError, match=r"proves nothing: the head's signature is wrong; see `raypipe ledger verify"):
        line("ledger", "prove", made.run_folder, 2, "north")


def test_keys_are_enrolled_and_revoked_by_hand(line: Line, made: Federation, tmp_path: Path) -> None:
    north, south = made.keys["north"].public, made.keys["south"].public
    path = tmp_path / "home" / "roster.json"
    assert line("ledger", "enroll", "north", north)[1] == [
        f"store north is enrolled with {north} (fingerprint {fingerprint(north)})",
        f"roster: {path}",
    ]
    assert "already" in line("ledger", "enroll", "north", north)[1][0]
    assert f"; revoked: {north}" in line("ledger", "enroll", "north", south)[1][0]
    assert load_roster(path).key_of("north") == south
    assert line("ledger", "revoke", "north")[0] == 0
    assert load_roster(path).key_of("north") is None
    assert [e.key for e in load_roster(path).enrolments] == [north, south]
    with pytest.raises(ConfigError, match="store north has no key that stands"):
        line("ledger", "revoke", "north")
    with pytest.raises(ConfigError, match="64 lower-case hex digits"):
        line("ledger", "enroll", "north", "no key")
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"the roster .* is damaged"):
        line("ledger", "enroll", "north", north)
    assert path.read_text() == "{"


def test_two_who_change_the_roster_at_once_both_have_their_way(tmp_path: Path, made: Federation) -> None:
    path, key = tmp_path / "home" / "roster.json", made.key.public
    names = [f"store-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: change_roster(path, lambda roster: enroll(roster, name, key, 1.0)), names))
    assert sorted(e.store for e in load_roster(path).enrolments) == sorted(names)


def test_evidence_is_written_from_the_command_line(line: Line, made: Federation, tmp_path: Path) -> None:
    code, said = line("evidence", made.run_folder, "--against", made.heads_of("north"))
    assert (code, said[1]) == (0, "written: evidence-run.html")
    assert "the ledger holds" in (tmp_path / "evidence-run.html").read_text()
    made.write([*made.read()[:4], *made.read()[5:]])
    code, said = line("evidence", made.run_folder, "--out", tmp_path / "page.html")
    assert code == 1
    assert said[0].startswith("the ledger does NOT hold")
    assert "the ledger does NOT hold" in (tmp_path / "page.html").read_text()


def test_what_is_printed_cannot_drive_the_terminal(line: Line, made: Federation) -> None:
    ledger = Ledger(made.run_folder, made.key, RUN)
    ledger.append(entries.Store("evil\x1b[2J\n", made.key.public), at=1.0)
    ledger.append(entries.Store("evil\x1b[2J\n", made.keys["north"].public), at=1.0)
    ledger.seal(at=1.0)
    ledger.close()
    said = line("ledger", "verify", made.run_folder)[1]
    assert "store evil\\x1b[2J\\n comes with another key" in said[0]
    assert all(one.isprintable() for one in said)
