"""A run's journal becomes its ledger, whenever its coordinator dies."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from ledgers import STORES, Told, is_proven, lines_of, weights

from raypipe.errors import ConfigError, RunError
from raypipe.ledger import entries
from raypipe.ledger.evidence import evidence
from raypipe.ledger.follow import KINDS, record
from raypipe.ledger.keys import digest, load_or_make_key
from raypipe.ledger.lines import FILE
from raypipe.ledger.prove import prove
from raypipe.ledger.verify import verify
from raypipe.tracking.journal import Record
from raypipe.tracking.records import Kind


@pytest.fixture
def told(tmp_path: Path) -> Told:
    made = Told(tmp_path / "told")
    made.run()
    return made


def test_a_journal_becomes_a_ledger_that_holds(told: Told) -> None:
    told.follow()
    version = ["update", "update", "version", "head"]
    assert told.kinds() == [
        *("run", "version", "head", "kept", "store", "store"),
        *(*version, "refused", "kept", *version, "run", "withdrawn", "store", *version, "kept", *version),
        *("kept", "finished", "head"),
    ]
    findings = verify(told.folder)
    assert findings.problems == findings.notes == ()
    assert findings.counts["weights"] == 4
    assert findings.head is not None
    assert (findings.head.version, findings.head.at) == (3, told.at)
    first = json.loads(told.lines()[4])["entry"]
    assert first["body"]["counts"] == {"shelf": {"train": 70}}
    assert first["body"]["data_hashes"] == {"shelf": "da7a"}
    assert (first["at"], first["record"]) == (1007.5, 5)
    for store in STORES:
        assert is_proven(prove(told.folder, 2, store), told.key.public)
    assert "withdrawn: its weights were lost" in evidence(told.folder, at=1.0)


def test_a_ledger_that_is_told_again_says_nothing_twice(told: Told) -> None:
    told.follow()
    before = told.lines()
    ledger = told.ledger()
    assert ledger.recorded == told.journal.last()
    assert record(ledger, told.journal.read()) is None
    ledger.close()
    assert told.lines() == before


def test_whenever_the_coordinator_dies_the_ledger_is_the_same(told: Told) -> None:
    told.follow()
    whole = told.lines()
    for until in range(told.journal.last() + 1):
        (told.folder / FILE).unlink()
        told.follow(until)
        told.follow()
        assert told.lines() == whole, until
    for cut in range(0, len(b"".join(whole)), 97):
        os.truncate(told.folder / FILE, cut)
        told.follow()
        assert told.lines() == whole, cut


def test_a_ledger_told_record_by_record_is_the_same(told: Told) -> None:
    told.follow()
    whole = told.lines()
    (told.folder / FILE).unlink()
    ledger = told.ledger()
    for one in told.journal.read():
        record(ledger, [one])
    ledger.close()
    assert told.lines() == whole


def test_a_full_disk_is_made_up_for_when_it_has_room(told: Told) -> None:
    told.follow()
    whole = told.lines()
    for room in range(0, len(b"".join(whole)), 1501):
        (told.folder / FILE).unlink()
        ledger = told.ledger()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(RunError, match="could not be written: File too large"):
                record(ledger, told.journal.read())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        record(ledger, told.journal.read(after=ledger.recorded, kinds=KINDS))
        ledger.close()
        assert told.lines() == whole, room


def test_a_run_without_signatures_says_so(tmp_path: Path) -> None:
    told = Told(tmp_path / "told", signed=False)
    told.run()
    told.follow()
    findings = verify(told.folder)
    assert findings.ok
    assert [str(note) for note in findings.notes] == [
        "entry 5: 8 updates from here on are unsigned: whose they are is the coordinator's word alone"
    ]
    update = json.loads(told.lines()[6])["entry"]["body"]
    assert (update["digest"], update["signature"]) == (None, None)
    with pytest.raises(ConfigError, match="store north did not sign its update in version 2"):
        prove(told.folder, 2, "north")
    assert "none: unsigned" in evidence(told.folder, at=1.0)
    assert "320 images, unsigned)" in evidence(told.folder, at=1.0)


def test_a_store_that_comes_with_another_key_has_the_first_revoked(told: Told, tmp_path: Path) -> None:
    told.keys["north"] = load_or_make_key(tmp_path / "other.pem")
    told.join("north", train=80)
    told.publish(4)
    told.follow()
    assert told.kinds()[-7:-4] == ["head", "revoked", "store"]
    assert verify(told.folder).problems == ()
    told.join("north", train=80, key=None)
    told.publish(5)
    told.follow()
    assert "not signed by store north" in lines_of(verify(told.folder))


def test_a_key_revoked_by_hand_is_not_taken_in_again_by_an_old_record(told: Told) -> None:
    """The store's last record says nothing new, so only its number shows that it was read."""
    told.join("north", train=80)
    told.follow()
    ledger = told.ledger()
    record(ledger, told.journal.read())
    ledger.append(entries.Revoked("north", told.keys["north"].public, "lost"), at=told.at)
    ledger.seal(at=told.at)
    ledger.close()
    ledger = told.ledger()
    record(ledger, told.journal.read())
    assert ledger.store("north") is None
    ledger.close()


def test_a_withdrawn_version_has_no_proof_until_it_is_made_again(told: Told) -> None:
    ledger = told.ledger()
    records = list(told.journal.read())
    gone = next(i for i, one in enumerate(records) if one.kind == "version_withdrawn")
    record(ledger, records[:gone])
    first = ledger.base_proof(2)["entry"]
    record(ledger, records[gone:-1])
    assert ledger.newest == 3
    assert ledger.base_proof(2)["entry"]["index"] > first["index"]
    ledger.append(entries.Withdrawn(3, "lost"), at=told.at)
    assert ledger.newest == 2
    head = ledger.seal(at=told.at)
    assert (head.version, head.digest) == (2, digest(weights(2)))
    with pytest.raises(RunError, match="no sealed version 3"):
        ledger.base_proof(3)
    ledger.close()
    assert verify(told.folder).ok
    ledger = told.ledger()
    assert ledger.newest == 2
    with pytest.raises(RunError, match="no sealed version 3"):
        ledger.base_proof(3)
    with pytest.raises(ConfigError, match="the ledger has no version 3; the newest is 2"):
        prove(told.folder, 3, "north")
    ledger.close()


def test_the_weights_of_a_withdrawn_version_are_not_asked_for(told: Told) -> None:
    end: dict[str, Any] = {"reason": "enough", "versions": 4, "best_version": 3}
    told.publish(4)
    told.keep(4)
    told.tell("run_finished", **end)
    (told.folder / "versions" / "v4").write_bytes(b"damaged")
    told.follow()
    assert "the weights of version 4 are not those of the ledger" in lines_of(verify(told.folder))
    told.tell("version_withdrawn", version=4, reason="its weights were damaged")
    told.tell("run_finished", **end)
    told.follow()
    assert verify(told.folder).problems == ()


def test_a_record_that_cannot_be_is_named_and_leaves_nothing(told: Told) -> None:
    told.follow()
    before = told.lines()
    wrong: list[tuple[Kind, dict[str, Any], str]] = [
        ("weights_kept", {"version": 3}, r"journal record \d+ is not of kind weights_kept: 'file'"),
        ("update_rejected", {"store": 1, "ticket": 2, "reason": 3}, "the ledger cannot hold this: refused: store"),
        ("version_published", {"version": 9, "parent": 8, "hash": "", "contributions": []}, "has no version 8 that it"),
        (
            "version_published",
            {
                **{"version": 4, "parent": 3, "hash": digest(weights(4))},
                "contributions": [
                    told.contribution("north", 4, "a"),
                    {**told.contribution("south", 4, "b"), "weight": float("nan")},
                ],
            },
            "cannot hold this",
        ),
    ]
    ledger = told.ledger()
    for number, (kind, body, line) in enumerate(wrong):
        one = Record(told.journal.last() + number + 1, 1.0, kind, body)
        for _ in range(2):
            with pytest.raises(RunError, match=line):
                record(ledger, [one])
    ledger.seal(at=1.0)
    ledger.close()
    assert told.lines() == before
