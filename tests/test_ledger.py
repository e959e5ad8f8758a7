"""The ledger: what was said is kept, and whoever changes it is found."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import RUN, STORES, Federation, federation, lines_of, named, weights

from raypipe.errors import RunError
from raypipe.ledger import entries, heads
from raypipe.ledger.chain import Ledger
from raypipe.ledger.entries import Body, Entry
from raypipe.ledger.heads import signed_head
from raypipe.ledger.keys import digest
from raypipe.ledger.lines import FILE
from raypipe.ledger.verify import Findings, read_saved, verify


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, list[bytes]]:
    """One ledger, and its lines as they were."""
    found = federation(tmp_path_factory.mktemp("many"), versions=5)
    return found, found.read()


# The chain


def test_an_honest_ledger_holds(made: Federation) -> None:
    findings = made.verify(*(read_saved(made.heads_of(store)) for store in STORES))
    assert findings.problems == findings.notes == ()
    assert findings.counts["version"] == findings.counts["weights"] == findings.counts["kept"] == 4
    assert findings.counts["heads"] == 5
    assert findings.counts["cosignatures"] == 6
    assert findings.coordinator == made.key.public
    assert findings.summary().startswith("the ledger holds (1 run, 2 store, 4 version")
    assert verify(made.run_folder, coordinator=made.keys["north"].public).problems


def test_a_ledger_goes_on_where_it_was_sealed(made: Federation) -> None:
    made.ledger = Ledger(made.run_folder, made.key, RUN)
    assert made.ledger.newest == 3
    made.say(entries.Refused("north", "t", "not finite"))  # never sealed
    made.ledger.close()
    made.ledger = Ledger(made.run_folder, made.key, RUN)
    made.publish(4)
    made.say(entries.Finished("enough", 5, None))
    made.ledger.seal(at=made.at)
    made.ledger.close()
    findings = made.verify(read_saved(made.heads_of("north")))
    assert findings.problems == findings.notes == ()
    assert "refused" not in findings.counts


@pytest.mark.parametrize(("cut", "newest"), [(1, 3), (40, 3), (700, 3), (1400, 2), (3000, 2)])
def test_a_line_that_a_crash_cut_is_ignored_and_said(made: Federation, cut: int, newest: int) -> None:
    path = made.run_folder / FILE
    os.truncate(path, path.stat().st_size - cut)
    findings = made.verify()
    assert findings.ok
    assert "the file ends inside" in findings.notes[0].line
    ledger = Ledger(made.run_folder, made.key, RUN)
    assert ledger.recovered.endswith("were never sealed and are cut off")
    assert ledger.newest == newest
    ledger.close()
    again = made.verify()
    assert again.problems == again.notes == ()


def test_an_altered_ledger_is_not_written_to(made: Federation) -> None:
    lines = made.read()
    for place, line in enumerate(lines):
        made.write(
            [*lines[:place], line.replace(b":10", b":11", 1).replace(b'"root":"', b'"root":"0', 1), *lines[place + 1 :]]
        )
        if made.read() != lines:
            with pytest.raises(RunError, match=r"was altered|did not sign"):
                Ledger(made.run_folder, made.key, RUN)
        if line.startswith(b'{"entry"'):
            digit = b"1" if line[-4:-3] == b"0" else b"0"
            made.write([*lines[:place], line[:-4] + digit + line[-3:], *lines[place + 1 :]])
            with pytest.raises(RunError, match="its content does not have its hash"):
                Ledger(made.run_folder, made.key, RUN)
    made.write([*lines[:1], *lines[2:]])
    with pytest.raises(RunError, match="was altered: entry 1 is not in its place"):
        Ledger(made.run_folder, made.key, RUN)
    made.write(lines)
    with pytest.raises(RunError, match="that this coordinator's key did not sign"):
        Ledger(made.run_folder, made.keys["north"], RUN)


def test_one_process_writes_a_ledger(made: Federation) -> None:
    first = Ledger(made.run_folder, made.key, RUN)
    with pytest.raises(RunError, match="another process writes the ledger"):
        Ledger(made.run_folder, made.key, RUN)
    first.close()
    Ledger(made.run_folder, made.key, RUN).close()


def test_a_full_disk_leaves_the_ledger_as_it_was(made: Federation) -> None:
    path = made.run_folder / FILE
    ledger = Ledger(made.run_folder, made.key, RUN)
    before = path.read_bytes()
    ledger.append(entries.Refused("north", "t", "not finite"), at=2000.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(RunError, match="could not be written: File too large"):
            ledger.seal(at=2000.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    ledger.seal(at=2001.0)
    ledger.close()
    findings = made.verify()
    assert findings.ok
    assert findings.counts["refused"] == 1


def test_what_a_ledger_cannot_hold_is_refused(made: Federation) -> None:
    ledger = Ledger(made.run_folder, made.key, RUN)
    with pytest.raises(RunError, match="the ledger cannot hold this: update: weight"):
        ledger.append(made.update("north", 4, weight="much"), at=1.0)
    with pytest.raises(RunError, match="the ledger cannot hold this"):
        ledger.append(made.update("north", 4, weight=float("nan")), at=1.0)
    ledger.close()


# What a verifier finds


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_names_its_entry(many: tuple[Federation, list[bytes]], data: st.DataObject) -> None:
    made, lines = many
    place = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[place]) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(lines[place])
    changed[at] ^= flip
    made.write([*lines[:place], bytes(changed), *lines[place + 1 :]])
    assert named(made.verify()) == touched(lines, place)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_dropped_doubled_or_moved_entry_is_named(many: tuple[Federation, list[bytes]], data: st.DataObject) -> None:
    made, lines = many
    inner = [i for i, line in enumerate(lines) if line.startswith(b'{"entry"')]
    one, two = sorted(data.draw(st.lists(st.sampled_from(inner), min_size=2, max_size=2, unique=True)))
    made.write([*lines[:one], *lines[one + 1 :]])
    assert named(made.verify()) == touched(lines, one)
    made.write([*lines[: one + 1], *lines[one:]])
    assert named(made.verify()) == touched(lines, one)
    changed = list(lines)
    changed[one], changed[two] = lines[two], lines[one]
    made.write(changed)
    assert named(made.verify()) == touched(lines, one)
    made.write([*lines[:one], *lines[one + 1 : two + 1], lines[one], *lines[two + 1 :]])
    assert named(made.verify()) == touched(lines, one)


def touched(lines: list[bytes], place: int) -> int:
    """The entry on this line; for a head, the last one that it is over."""
    said = json.loads(lines[place])
    return int(said["entry"]["index"]) if "entry" in said else int(said["head"]["size"]) - 1


def test_an_entry_that_is_rewritten_with_its_hash_is_named(made: Federation) -> None:
    lines = made.read()
    last = json.loads(lines[-1])["head"]["size"] - 1
    for place, line in enumerate(lines):
        said = json.loads(line)
        if "entry" in said and said["entry"]["index"] < last:  # the last has nothing after it: see the next test
            entry = replace(Entry(**said["entry"]), at=0.5)
            made.write([*lines[:place], entries.line_of(entry)[0], *lines[place + 1 :]])
            assert (named(made.verify()), made.verify().ok) == (entry.index, False)


def test_a_line_that_says_the_same_in_other_bytes_is_named(made: Federation) -> None:
    lines = made.read()
    for other in (lines[3].replace(b":", b": ", 1), lines[3].replace(b'{"entry"', b'{"entry":1,"entry"')):
        made.write([*lines[:3], other, *lines[4:]])
        assert str(made.verify().problems[0]) == "entry 3: its line is not canonical JSON"


def test_a_line_that_is_torn_in_two_is_named_once(made: Federation) -> None:
    lines = made.read()
    for place, line in enumerate(lines):
        for at in (0, 1, 2, 7, 8, 9, 100, len(line) - 2):
            made.write([*lines[:place], line[:at] + b"\n" + line[at + 1 :], *lines[place + 1 :]])
            assert named(made.verify()) == touched(lines, place)


def test_a_head_of_another_key_is_named(made: Federation) -> None:
    lines, stranger = made.read(), made.keys["north"]
    head = heads.head_from(json.loads(lines[-1])["head"])
    for other in (
        signed_head(stranger, replace(head, coordinator=stranger.public)),
        replace(head, signature=stranger.sign("head", b"")),
    ):
        made.write([*lines[:-1], heads.line_of(other)])
        assert named(made.verify()) == head.size - 1
        assert "is not signed by the coordinator's key" in lines_of(made.verify())
        with pytest.raises(RunError, match="that this coordinator's key did not sign"):
            Ledger(made.run_folder, made.key, RUN)


def test_a_rechained_ledger_breaks_at_the_head_that_was_signed(made: Federation) -> None:
    """Without the coordinator's key: all hashes made anew, the heads left as they were."""
    lines, prev = [], entries.FIRST
    for line in made.read():
        said = json.loads(line)
        if "head" in said:
            lines.append(line)
            continue
        entry = replace(Entry(**said["entry"]), prev=prev)
        entry = replace(entry, at=entry.at + 1) if entry.index == 9 else entry
        lines.append(entries.line_of(entry)[0])
        prev = entry.hash.hex()
    made.write(lines)
    sealed = [json.loads(line)["head"]["size"] for line in lines if line.startswith(b'{"head"')]
    findings = made.verify()
    assert named(findings) == max(size for size in sealed if size <= 9)
    assert "is not what the head after" in lines_of(findings)
    with pytest.raises(RunError, match="its entries are not those of the head"):
        Ledger(made.run_folder, made.key, RUN)


def retold(made: Federation, bodies: list[Body]) -> Findings:
    """The ledger with these entries and one more head at its end."""
    ledger = Ledger(made.run_folder, made.key, RUN)
    for body in bodies:
        ledger.append(body, at=5000.0)
    ledger.seal(at=5000.0)
    ledger.close()
    return made.verify()


def test_what_a_version_may_not_be_is_named(tmp_path: Path) -> None:
    def version(made: Federation) -> entries.Version:
        return made.version(4, 1)

    right = digest(weights(3))
    wrong: list[tuple[str, Callable[[Federation], list[Body]]]] = [
        ("not signed by store north", lambda f: [replace(f.update("north", 4), steps=11), version(f)]),
        ("not signed by store north", lambda f: [replace(f.update("north", 4), digest="b3:0"), version(f)]),
        ("not signed by store north", lambda f: [replace(f.update("north", 4), ticket="t"), version(f)]),
        ("not signed by store north", lambda f: [replace(f.update("north", 4), examples=321), version(f)]),
        ("not signed by store north", lambda f: [replace(f.update("north", 4, base=2), base=3), version(f)]),
        (
            "not signed by store north",
            lambda f: [replace(f.update("north", 4, base_digest=""), base_digest=right), version(f)],
        ),
        ("not signed by store north", lambda f: [replace(f.update("north", 4), signature=""), version(f)]),
        ("not signed by store north", lambda f: [replace(f.update("south", 4), store="north"), version(f)]),
        ("ticket north-3 is folded twice", lambda f: [f.update("north", 4, ticket="north-3"), version(f)]),
        ("store north trained from b3:", lambda f: [f.update("north", 4, base_digest=digest(b"other")), version(f)]),
        ("its base version 9 is not in the ledger", lambda f: [f.update("north", 4, base=9), version(f)]),
        ("no store east is enrolled", lambda f: [replace(f.update("north", 4), store="east"), version(f)]),
        ("the key of store north was revoked", lambda f: [gone(f), f.update("north", 4), version(f)]),
        ("has 1 updates; 0 stand before it", lambda f: [version(f)]),
        ("an update of version 4, which was never made", lambda f: [f.update("north", 4)]),
        ("does not name the parent that it has", lambda f: [f.version(4, 0, parent_digest=digest(b"other"))]),
        ("does not name the parent that it has", lambda f: [f.version(4, 0, parent=2)]),
        ("version 3 was made before", lambda f: [f.version(3, 0, parent=3, parent_digest=digest(weights(3)))]),
        ("an update of version 3, which was made before it", lambda f: [f.update("north", 3, ticket="late")]),
        ("names a file outside its folder", lambda f: [entries.Kept(3, "../../keys/coordinator.pem", "0", 1)]),
        ("weights of version 4, which is not", lambda f: [entries.Kept(4, "v", "0", 1)]),
        ("comes with another key while", lambda f: [entries.Store("north", f.key.public)]),
        ("has no such key to revoke", lambda f: [entries.Revoked("north", f.key.public, "lost")]),
        ("the configuration does not have its hash", lambda f: [entries.Run(RUN, 2, f.key.public, "0", "c", {})]),
        ("the coordinator's key is", lambda f: [entries.Run(RUN, 2, f.keys["north"].public, "0", "c")]),
        ("it is of run other", lambda f: [entries.Run("other", 2, f.key.public, "0", "c")]),
        ("did not co-sign the head of size", lambda f: [entries.Witnessed(f.size(), {"north": "00" * 64})]),
        ("which is not here", lambda f: [entries.Witnessed(2, {})]),
        ("version 2 is withdrawn; the newest, which alone can be, is 3", lambda f: [entries.Withdrawn(2, "lost")]),
        ("not signed by store north", lambda f: [replace(f.update("north", 4), signature=None), version(f)]),
        ("comes with no key while", lambda f: [entries.Store("north", None)]),
        ("not signed by store south", lambda f: [*keyless(f), f.update("south", 4), version(f)]),
    ]

    def gone(made: Federation) -> Body:
        return entries.Revoked("north", made.keys["north"].public, "lost")

    def keyless(made: Federation) -> list[Body]:
        return [entries.Revoked("south", made.keys["south"].public, "lost"), entries.Store("south", None)]

    for number, (line, bodies) in enumerate(wrong):
        made = federation(tmp_path / str(number))
        found = retold(made, bodies(made))
        assert line in lines_of(found), (line, lines_of(found))
        assert found.problems[0].entry is not None
        assert found.problems[0].entry >= 15
