"""Proofs and evidence: what a reader without raypipe can check."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ledgers import RUN, Federation, federation, is_proven, offline

from raypipe.errors import ConfigError
from raypipe.ledger import entries
from raypipe.ledger.chain import Ledger
from raypipe.ledger.evidence import evidence
from raypipe.ledger.keys import fingerprint
from raypipe.ledger.offline import canonical
from raypipe.ledger.prove import prove
from raypipe.ledger.verify import read_saved


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


def test_a_proof_is_checked_without_raypipe(made: Federation, tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    proof = prove(made.run_folder, 2, "north")
    path.write_text(json.dumps(proof))
    done = offline(path, "--coordinator-key", made.key.public, "--store-key", made.keys["north"].public)
    assert done.stdout.startswith(f"proven: run {RUN}, version 2 (b3:"), done
    assert done.stdout.strip().endswith("co-signed by north, south")
    assert done.returncode == 0
    assert offline(path, "--coordinator-key", made.keys["north"].public).returncode == 1
    assert offline(path, "--coordinator-key", made.key.public, "--store-key", made.key.public).returncode == 1
    assert offline(tmp_path / "nowhere", "--coordinator-key", made.key.public).returncode == 1
    path.write_text("[]")
    assert "NOT proven" in offline(path, "--coordinator-key", made.key.public).stdout
    imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / "raypipe/ledger/offline.py").read_text(), re.M)
    assert set(imported) - set(sys.stdlib_module_names) == {"cryptography"}


def test_a_proof_in_which_anything_was_changed_is_none(made: Federation) -> None:
    whole = json.loads(json.dumps(prove(made.run_folder, 2, "north")))
    alone = {**whole, "cosignatures": {}}  # then only the coordinator's signature is on the head

    def leaves(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, dict):
            return [found for key, inner in value.items() for found in leaves(inner, (*place, key))]
        if isinstance(value, list):
            return [found for i, inner in enumerate(value) for found in leaves(inner, (*place, i))]
        return [place]

    for proof, place in [(one, place) for one in (whole, alone) for place in leaves(one)]:
        assert is_proven(proof, made.key.public)
        changed = json.loads(json.dumps(proof))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        old = inner[place[-1]]
        inner[place[-1]] = old + 1 if isinstance(old, int | float) else f"{old or ''}0"
        assert not is_proven(changed, made.key.public), place


def test_what_was_not_there_cannot_be_proven(made: Federation) -> None:
    with pytest.raises(ConfigError, match="no version 9; the newest is 3"):
        prove(made.run_folder, 9, "north")
    with pytest.raises(ConfigError, match="store east has no update in version 2; north, south contributed"):
        prove(made.run_folder, 2, "east")
    with pytest.raises(ConfigError, match="store north has no update in version 0; no store contributed"):
        prove(made.run_folder, 0, "north")


class Page(HTMLParser):
    """Tags, their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.script += data if self.tags and self.tags[-1][0] == "script" and self.script == "" else ""


def test_evidence_is_one_page_that_loads_and_runs_nothing(made: Federation) -> None:
    hostile = "</script><script>alert(1)</script><img src=http://x>"
    ledger = Ledger(made.run_folder, made.key, RUN)
    ledger.append(entries.Refused("north", hostile, hostile), at=3000.0)
    ledger.append(entries.Finished(hostile, 4, 3), at=3000.0)
    ledger.seal(at=3000.0)
    ledger.close()
    text = evidence(made.run_folder, at=4000.0, against=[read_saved(made.heads_of("north"))])
    page = Page(text)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "ledger"}]
    assert not [tag for tag, _ in page.tags if tag in {"img", "link", "iframe", "a", "form"}]
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onclick"} & attrs.keys()]
    embedded, head = json.loads(page.script), made.verify().head
    assert head is not None
    assert [canonical(e) for e in embedded["entries"]] == [
        canonical(json.loads(line)["entry"]) for line in made.read() if b'{"entry"' in line
    ]
    for said in (
        "the ledger holds (1 run",
        made.key.public,
        fingerprint(made.keys["north"].public),
        "70 train, 10 val",
        "north 50.0% (base 1, 10 steps, 320 images)",
        "1970-01-01 00:16:41 UTC",
        "&quot;lr&quot;: 0.05",
        head.signature,
    ):
        assert said in text, said


def test_evidence_of_a_broken_ledger_says_so(made: Federation) -> None:
    lines = made.read()
    made.write([*lines[:4], *lines[5:]])
    text = evidence(made.run_folder, at=4000.0)
    assert "the ledger does NOT hold" in text
    assert '<div class="fails">' in text
