"""The store's side of the ledger: heads that it co-signs, and receipts of what has left it."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ledgers import RUN, Federation, ask, federation, goes_on, heavier, rewritten, weights

from raypipe.errors import RunError, StoreError, StoreRefused
from raypipe.ledger import entries, heads
from raypipe.ledger.chain import Ledger
from raypipe.ledger.entries import Entry, plain
from raypipe.ledger.heads import signed_head
from raypipe.ledger.keys import digest
from raypipe.ledger.receipts import Receipts, read_receipts
from raypipe.ledger.verify import read_saved
from raypipe.ledger.witness import Witness


@pytest.fixture
def going_on(tmp_path: Path) -> Federation:
    return goes_on(federation(tmp_path))


def test_a_store_co_signs_the_head_that_its_base_is_under(going_on: Federation) -> None:
    said = ask(going_on, "north", 4)
    assert said["size"] == going_on.witnesses["north"].size(RUN) == going_on.size()
    going_on.ledger.witness(said, going_on.keys["north"].public)
    assert ask(going_on, "north", 2)["size"] == said["size"]  # an older base is on the chain too
    for wrong in ({**said, "size": 3}, {**said, "store": "south"}, {**said, "signature": "00"}, {}):
        with pytest.raises(StoreError, match="co-sign"):
            going_on.ledger.witness(wrong, going_on.keys["north"].public)
    going_on.ledger.seal(at=going_on.at)
    assert ask(going_on, "north", 4)["size"] == going_on.size() > said["size"]
    shown = going_on.ledger.base_proof(4, 0)["head"]["size"]
    going_on.say(entries.Refused("north", "t", "late"))
    assert going_on.ledger.base_proof(4, 0)["head"]["size"] == shown  # not sealed, not said
    going_on.ledger.seal(at=going_on.at)
    assert going_on.ledger.base_proof(4, 0)["head"]["size"] == shown + 1
    assert going_on.verify(read_saved(going_on.heads_of("north"))).ok


def test_other_weights_than_the_chain_says_are_refused(going_on: Federation) -> None:
    before = going_on.heads_of("north").read_bytes()
    with pytest.raises(StoreRefused, match="other weights than the chain says: version 4 is b3:"):
        ask(going_on, "north", 4, vector=weights(4) + np.float32(1e-6))
    assert going_on.heads_of("north").read_bytes() == before


def test_a_base_that_is_not_on_the_chain_is_refused(going_on: Federation) -> None:
    proof = going_on.ledger.base_proof(4)
    forged = {**proof["entry"], "body": {**proof["entry"]["body"], "digest": digest(weights(9))}}
    with pytest.raises(StoreRefused, match="version 4 is not on the chain of the head"):
        ask(going_on, "north", 4, entry=forged, vector=weights(9))
    with pytest.raises(StoreRefused, match="the base's proof is not of version 4"):
        ask(going_on, "north", 4, entry=going_on.ledger.base_proof(3)["entry"])
    update = Entry(0, entries.FIRST, "update", 1.0, "north", plain(going_on.update("north", 4)))
    with pytest.raises(StoreRefused, match="the base's proof is not of version 4"):
        ask(going_on, "north", 4, entry=plain(update))
    with pytest.raises(RunError, match="has no sealed version 9"):
        ask(going_on, "north", 9)


def test_a_head_that_another_key_signed_is_refused(going_on: Federation) -> None:
    head = heads.head_from(going_on.ledger.base_proof(4)["head"])
    stranger = going_on.keys["south"]
    other = signed_head(stranger, replace(head, coordinator=stranger.public))
    with pytest.raises(StoreRefused, match=r"the head is of coordinator key .* this run began with"):
        ask(going_on, "north", 4, head=plain(other))
    with pytest.raises(StoreRefused, match="is not signed by the coordinator's key"):
        ask(going_on, "north", 4, head=plain(replace(head, at=1.0)))
    with pytest.raises(StoreRefused, match="is of run else, not of"):
        ask(going_on, "north", 4, head=plain(signed_head(going_on.key, replace(head, run="else"))))
    named = Witness(going_on.folder / "new", going_on.keys["north"], "north", [stranger.public])
    with pytest.raises(StoreRefused, match="the store's policy does not name the coordinator key"):
        named.check(going_on.ledger.base_proof(4), run=RUN, version=4, digest=digest(weights(4)))


def test_a_rewritten_history_is_refused_by_whoever_saw_the_first(going_on: Federation, tmp_path: Path) -> None:
    """The coordinator writes a ledger that holds by itself, longer than what the store saw."""
    ask(going_on, "north", 4)
    going_on.ledger.close()
    for change, line in ((heavier, "does not continue size"), (lambda entry: None, "does not continue size")):
        forged = rewritten(going_on, change, tmp_path / line / change.__name__)
        forged.ledger = Ledger(forged.run_folder, forged.key, RUN)
        for number in range(40):
            forged.ledger.append(entries.Refused("north", str(number), "not finite"), at=9000.0)
        forged.ledger.seal(at=9000.0)
        with pytest.raises(StoreRefused, match=line):
            ask(forged, "north", 4)
        forged.ledger.close()
        assert not forged.verify(read_saved(forged.heads_of("north"))).ok


def test_a_history_that_is_rolled_back_or_forked_in_place_is_refused(going_on: Federation) -> None:
    ask(going_on, "north", 4)
    last = heads.head_from(going_on.ledger.base_proof(4)["head"])
    back = signed_head(going_on.key, replace(last, size=last.size - 1))
    with pytest.raises(StoreRefused, match="the history is rolled back: this store co-signed size"):
        ask(going_on, "north", 4, head=plain(back))
    other = signed_head(going_on.key, replace(last, root="00" * 32))
    with pytest.raises(StoreRefused, match=f"the history is forked: this store co-signed size {last.size}"):
        ask(going_on, "north", 4, head=plain(other))


def test_a_proof_from_another_head_than_the_stores_last_says_where_to_begin(going_on: Federation) -> None:
    last = going_on.witnesses["north"].size(RUN)
    with pytest.raises(StoreRefused, match=f"starts at size 3; this store's last head is of {last}"):
        ask(going_on, "north", 4, since_shown=3)
    assert ask(going_on, "north", 4)["size"] == going_on.size()
    with pytest.raises(StoreError, match="the store has a head of size 999"):
        going_on.ledger.base_proof(4, 999)


def test_a_restarted_store_remembers_and_a_cut_head_was_never_co_signed(going_on: Federation) -> None:
    ask(going_on, "north", 4)
    path = going_on.heads_of("north")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    again = Witness(path.parent, going_on.keys["north"], "north")
    assert 0 < again.size(RUN) < going_on.size()
    going_on.witnesses["north"] = again
    ask(going_on, "north", 4)
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(StoreRefused, match="co-signed heads is damaged"):
        Witness(path.parent, going_on.keys["north"], "north").size(RUN)


def test_a_message_that_is_no_proof_is_refused(going_on: Federation) -> None:
    good = going_on.ledger.base_proof(4, going_on.witnesses["north"].size(RUN))
    for key in good:
        for value in (None, [], {}, "x", 3.5, [1], {"size": "1"}):
            if value != good[key]:
                with pytest.raises(StoreRefused):
                    ask(going_on, "north", 4, **{key: value})
    with pytest.raises(StoreRefused, match="a run id holds letters"):
        going_on.witnesses["north"].size("../../etc")


# What left the store


def test_receipts_add_up_and_go_on_over_months(tmp_path: Path) -> None:
    kept = Receipts(tmp_path)
    november, december = 1_795_000_000.0, 1_797_000_000.0
    for number, at in enumerate((november, november, december, november)):  # the clock was set back once
        kind = "update" if number % 2 else "report"
        kept.write(at=at, kind=kind, run=RUN, ticket="t", num_bytes=100, digest=digest(b"x"), why="asked")
        kept.close()
        kept = Receipts(tmp_path)
    kept.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["egress-2026-11.jsonl", "egress-2026-12.jsonl"]
    egress = read_receipts(tmp_path)
    assert egress.problems == ()
    assert {kind: (s.messages, s.num_bytes) for kind, s in egress.kinds.items()} == {
        "report": (2, 200),
        "update": (2, 200),
    }
    assert egress.first == november
    assert stat.S_IMODE((tmp_path / "egress-2026-11.jsonl").stat().st_mode) == 0o600


def test_a_changed_or_missing_receipt_is_named(tmp_path: Path) -> None:
    kept = Receipts(tmp_path)
    for number in range(4):
        kept.write(at=1_795_000_000.0, kind="report", run=RUN, ticket=str(number), num_bytes=7, digest="", why="w")
    kept.close()
    path = tmp_path / "egress-2026-11.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong, problem in (
        ([lines[0], lines[1].replace(b'"num_bytes":7', b'"num_bytes":1'), *lines[2:]], "11.jsonl:2: its content"),
        ([lines[0], *lines[2:]], "11.jsonl:2: receipt 1 should stand here, found 2"),
        ([lines[0], lines[2], lines[1], lines[3]], "11.jsonl:2: receipt 1 should stand here, found 2"),
        ([*lines[:3], lines[3][:-9]], "11.jsonl:4: the file ends inside its line"),
        ([lines[0].replace(b'"why"', b'"WHY"'), *lines[1:]], "11.jsonl:1: its line is not a receipt"),
    ):
        path.write_bytes(b"".join(wrong))
        assert problem in read_receipts(tmp_path).problems[0]
    path.write_bytes(b"".join([*lines[:3], lines[3][:-9]]))
    kept = Receipts(tmp_path)
    assert kept.write(at=0.0, kind="card", run="", ticket="", num_bytes=1, digest="", why="").index == 3
    kept.close()
    assert read_receipts(tmp_path).problems == ()
