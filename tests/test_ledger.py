"""The ledger: what was said is kept, and whoever changes it is found."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypipe.coordinator.notary import MOST as MOST_HEADS
from raypipe.errors import ConfigError, RunError, StoreError, StoreRefused, UpdateRejected
from raypipe.ledger import entries, heads
from raypipe.ledger.audit import Finding
from raypipe.ledger.chain import JOIN_LEAVES, MOST_LEAVES, Ledger
from raypipe.ledger.commands import add_parsers
from raypipe.ledger.entries import Body, Entry, plain
from raypipe.ledger.evidence import evidence
from raypipe.ledger.follow import KINDS, record
from raypipe.ledger.heads import signed_head
from raypipe.ledger.keys import MANY_BYTES, digest, fingerprint, load_key, load_or_make_key
from raypipe.ledger.keys import verify as is_signed_by
from raypipe.ledger.lines import FILE
from raypipe.ledger.offline import canonical, check, leaf_hash, node_hash, update_statement
from raypipe.ledger.prove import prove
from raypipe.ledger.receipts import Receipts, read_receipts
from raypipe.ledger.roster import (
    Roster,
    admit,
    change_roster,
    check_signature,
    enroll,
    load_roster,
    revoke,
    save_roster,
)
from raypipe.ledger.tree import Tree, verify_consistency, verify_inclusion
from raypipe.ledger.verify import Findings, Saved, read_saved, verify
from raypipe.ledger.witness import Witness
from raypipe.store.messages import Ticket, encode
from raypipe.tracking.journal import Journal, Record
from raypipe.tracking.records import Kind
from raypipe.vault.frames import MAX_FRAME

RUN = "shelf-1"
STORES = ["north", "south"]


def weights(version: int) -> np.ndarray:
    return np.full(64, version, np.float32)


class Federation:
    """A coordinator and two stores that keep a ledger as they should; no training in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / "run"
        self.key = load_or_make_key(folder / "keys" / "coordinator.pem")
        self.keys = {store: load_or_make_key(folder / store / "key.pem") for store in STORES}
        self.witnesses = {store: Witness(folder / store / "ledger", self.keys[store], store) for store in STORES}
        self.ledger = Ledger(self.run_folder, self.key, RUN)
        self.at = 1000.0

    def begin(self) -> None:
        config = {"train": {"lr": 0.05}}
        hashed = sha256(canonical(config)).hexdigest()
        self.say(entries.Run(RUN, 1, self.key.public, hashed, "c0de", config))
        for store in STORES:
            key, counts = self.keys[store].public, {"shelf": {"train": 70, "val": 10}}
            self.say(entries.Store(store, key, {"max_examples": 1000.0}, {"shelf": "da7a"}, counts))
        self.publish(0)

    def say(self, body: Body) -> Entry:
        self.at += 1
        return self.ledger.append(body, at=self.at)

    def update(self, store: str, version: int, **changes: Any) -> entries.Update:
        """One store's update from the version before, signed."""
        update = entries.Update(
            version=version,
            store=store,
            ticket=f"{store}-{version}",
            base=version - 1,
            base_digest=digest(weights(version - 1)),
            staleness=0,
            steps=10,
            examples=320,
            weight=0.5,
            digest=digest(store.encode() + bytes([version])),
            signature="",
        )
        return self.signed(replace(update, **changes))

    def signed(self, update: entries.Update) -> entries.Update:
        assert update.digest is not None
        said = update_statement(
            run=RUN,
            store=update.store,
            ticket=update.ticket,
            base_version=update.base,
            base_digest=update.base_digest,
            update_digest=update.digest,
            steps=update.steps,
            examples=update.examples,
        )
        return replace(update, signature=self.keys[update.store].sign("update", said))

    def version(self, number: int, updates: int, **changes: Any) -> entries.Version:
        parent = number - 1 if number else None
        before = digest(weights(number - 1)) if number else None
        return replace(entries.Version(number, parent, before, digest(weights(number)), updates), **changes)

    def keep(self, number: int) -> entries.Kept:
        folder = self.run_folder / "versions"
        folder.mkdir(exist_ok=True)
        content = weights(number).tobytes()
        name = f"v{number:05d}.safetensors"
        (folder / name).write_bytes(content)
        return entries.Kept(number, name, blake3(content).hexdigest(), len(content))

    def publish(self, number: int) -> None:
        """The stores look at the base, co-sign, and have their updates folded."""
        if number:
            for store in STORES:
                self.witness(store, number - 1)
                self.say(self.update(store, number))
        self.say(self.version(number, len(STORES) if number else 0))
        self.ledger.seal(at=self.at)
        self.say(self.keep(number))  # under the next head

    def witness(self, store: str, base: int) -> None:
        proof = self.ledger.base_proof(base, self.witnesses[store].size(RUN))
        said = self.witnesses[store].check(proof, run=RUN, version=base, digest=digest(weights(base)))
        self.ledger.witness(said, self.keys[store].public)

    def heads_of(self, store: str) -> Path:
        return self.folder / store / "ledger" / f"{RUN}.heads.jsonl"

    def verify(self, *against: Saved) -> Findings:
        return verify(self.run_folder, against)

    def read(self) -> list[bytes]:
        return (self.run_folder / FILE).read_bytes().splitlines(keepends=True)

    def index_of(self, words: bytes) -> int:
        """Of the first entry that has these words in its line."""
        return int(json.loads(next(line for line in self.read() if words in line))["entry"]["index"])

    def size(self) -> int:
        return int(json.loads(self.read()[-1])["head"]["size"])

    def write(self, lines: list[bytes]) -> None:
        (self.run_folder / FILE).write_bytes(b"".join(lines))


def federation(folder: Path, versions: int = 4) -> Federation:
    made = Federation(folder)
    made.begin()
    for number in range(1, versions):
        made.publish(number)
    made.ledger.seal(at=made.at)
    made.ledger.close()
    return made


def rewritten(made: Federation, change: Callable[[Entry], Body | None], folder: Path) -> Federation:
    """The holder of the coordinator's key writes another ledger: every entry that `change` names has another body."""
    forged = Ledger(folder, made.key, RUN)
    for line in made.read():
        said = json.loads(line)
        if "head" in said:
            forged.seal(at=said["head"]["at"])
        else:
            entry = Entry(**said["entry"])
            if entry.kind != "witnessed":  # stores did not co-sign the forged heads
                forged.append(change(entry) or entry.typed(), at=entry.at)
    forged.close()
    other = object.__new__(Federation)
    other.__dict__ = {**made.__dict__, "run_folder": folder}
    return other


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


def named(findings: Findings) -> int | None:
    """The entry of the first problem, or of the first note where there is no problem."""
    return (*findings.problems, *findings.notes)[0].entry


def lines_of(findings: Findings) -> str:
    return " | ".join(map(str, findings.problems))


# Keys and digests


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "store.pem"
    made = load_or_make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_or_make_key(path).public == load_key(path).public == made.public
    assert [p.name for p in path.parent.iterdir()] == ["store.pem"]
    assert made.public not in repr(path.read_bytes())
    assert fingerprint(made.public) == sha256(bytes.fromhex(made.public)).hexdigest()[:16]
    assert "private" not in repr(made)


def test_whoever_is_first_makes_the_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = {key.public for key in pool.map(lambda _: load_or_make_key(tmp_path / "a" / "key.pem"), range(64))}
    assert len(found) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "store.pem"
    load_or_make_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as refused:
        load_or_make_key(path)
    assert refused.value.message == f"key file {path} can be read by others (mode {mode:04o}): chmod 600 {path}"


def test_what_is_no_key_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "store.pem"
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not an unencrypted Ed25519 private key"):
        load_or_make_key(path)
    assert path.read_text() == "not a key"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_key(tmp_path / "nowhere.pem")


def test_a_signature_counts_for_one_kind_of_statement_in_one_form(made: Federation) -> None:
    signature = made.key.sign("update", b"said")
    assert is_signed_by(made.key.public, "update", b"said", signature)
    assert not is_signed_by(made.key.public, "head", b"said", signature)
    assert not is_signed_by(made.key.public, "update", b"said!", signature)
    assert not is_signed_by(made.key.public, "update", b"said", signature.upper())
    assert not is_signed_by(made.keys["north"].public, "update", b"said", signature)
    assert not is_signed_by("no key", "update", b"said", signature)
    assert not is_signed_by(made.key.public, "update", b"said", "")


def test_a_digest_is_of_the_little_endian_bytes_whatever_the_array() -> None:
    vector = np.arange(1000, dtype=np.float32)
    expected = "b3:" + blake3(vector.tobytes()).hexdigest()
    frozen = vector.copy()
    frozen.flags.writeable = False
    assert digest(frozen) == digest(vector.astype(">f4")) == digest(vector.tobytes()) == expected
    assert digest(np.repeat(vector, 2)[::2]) == digest(vector.reshape(10, 100)) == expected
    assert digest(vector.view(np.uint8)) == expected
    assert digest(np.zeros(0, np.float32)) == digest(b"") == "b3:" + blake3(b"").hexdigest()


def test_a_digest_is_the_same_by_any_number_of_threads() -> None:
    for size in (MANY_BYTES, MANY_BYTES + 4, 3 * MANY_BYTES):
        vector = np.arange(size // 4, dtype=np.float32)
        expected = "b3:" + blake3(vector.tobytes()).hexdigest()
        assert {digest(vector, threads=threads) for threads in (None, 1, 2)} == {expected}


# The tree, against RFC 6962's own words (2.1)


def rfc_root(data: list[bytes]) -> bytes:
    if not data:
        return sha256(b"").digest()
    if len(data) == 1:
        return leaf_hash(data[0])
    k = 1 << (len(data) - 1).bit_length() - 1
    return node_hash(rfc_root(data[:k]), rfc_root(data[k:]))


def rfc_path(m: int, data: list[bytes]) -> list[bytes]:
    if len(data) == 1:
        return []
    k = 1 << (len(data) - 1).bit_length() - 1
    if m < k:
        return [*rfc_path(m, data[:k]), rfc_root(data[k:])]
    return [*rfc_path(m - k, data[k:]), rfc_root(data[:k])]


def rfc_subproof(m: int, data: list[bytes], whole: bool) -> list[bytes]:
    if m == len(data):
        return [] if whole else [rfc_root(data)]
    k = 1 << (len(data) - 1).bit_length() - 1
    if m <= k:
        return [*rfc_subproof(m, data[:k], whole), rfc_root(data[k:])]
    return [*rfc_subproof(m - k, data[k:], False), rfc_root(data[:k])]


def test_roots_and_proofs_are_those_of_the_rfc() -> None:
    tree, data = Tree(), []
    assert tree.root() == rfc_root([])
    for size in range(1, 35):
        data.append(bytes([size]) * 3)
        tree.append(data[-1])
        root = tree.root()
        assert root == rfc_root(data)
        for other in range(size):
            path = tree.inclusion(other, size)
            assert path == rfc_path(other, data)
            assert verify_inclusion(other, size, data[other], path, root)
            assert not verify_inclusion(other, size, b"else", path, root)
            assert not verify_inclusion(other, size, data[other], [*path, root], root)
            assert not verify_inclusion(other, size, data[other], path[:-1], root) or not path
            assert not verify_inclusion(other, 2 * size, data[other], path, root)
            old, steps = tree.root(other + 1), tree.consistency(other + 1, size)
            assert steps == rfc_subproof(other + 1, data, True)
            assert verify_consistency(other + 1, size, steps, old, root)
            assert not verify_consistency(other + 1, size, steps, leaf_hash(b"else"), root)
            assert not verify_consistency(other + 1, size, steps, old, leaf_hash(b"else"))
            assert not verify_consistency(other + 1, size, [*steps, root], old, root)
            assert not verify_consistency(other + 1, 2 * size, steps, old, root)
            if steps:
                assert not verify_consistency(other + 1, size, steps[:-1], old, root)
                assert not verify_consistency(other + 1, size, [leaf_hash(b"else"), *steps[1:]], old, root)


# The reference data of Certificate Transparency's own Merkle tree tests.
CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
CT_INCLUSION = {  # leaf, size -> from the leaf up, by their first 8 digits
    (0, 1): "",
    (0, 8): "96a296d2 5f083f0a 6b47aaf2",
    (5, 8): "bc1a0643 ca854ea1 d37ee418",
    (2, 3): "fac54203",
    (1, 5): "6e340b9c 5f083f0a bc1a0643",
}
CT_CONSISTENCY = {  # of which size, in which size
    (1, 1): "",
    (1, 8): "96a296d2 5f083f0a 6b47aaf2",
    (6, 8): "0ebc5d34 ca854ea1 d37ee418",
    (2, 5): "5f083f0a bc1a0643",
}


def test_the_published_vectors_come_out() -> None:
    tree = Tree()
    for size, root in enumerate(CT_ROOTS):
        assert tree.root().hex() == root
        if size < len(CT_LEAVES):
            tree.append(bytes.fromhex(CT_LEAVES[size]))
    assert [tree.root(size).hex() for size in range(9)] == CT_ROOTS
    for (leaf, size), path in CT_INCLUSION.items():
        assert " ".join(step.hex()[:8] for step in tree.inclusion(leaf, size)) == path
    for (first, size), path in CT_CONSISTENCY.items():
        assert " ".join(step.hex()[:8] for step in tree.consistency(first, size)) == path


def test_the_rfcs_own_example_comes_out() -> None:
    """RFC 6962, 2.1.3: seven leaves, its letters."""
    data = [bytes([number]) for number in range(7)]
    tree = Tree()
    for one in data:
        tree.append(one)
    a, b, c, d, e, f, j = map(leaf_hash, data)
    g, h, i = node_hash(a, b), node_hash(c, d), node_hash(e, f)
    k, l = node_hash(g, h), node_hash(i, j)  # noqa: E741  # the RFC's letter
    assert tree.root() == node_hash(k, l)
    assert [tree.inclusion(leaf, 7) for leaf in (0, 3, 4, 6)] == [[b, h, l], [c, g, l], [f, j, k], [i, k]]
    assert [tree.consistency(first, 7) for first in (3, 4, 6)] == [[c, d, g, l], [l], [i, j, k]]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 1200), data=st.data())
def test_big_trees_are_those_of_the_rfc_at_every_earlier_size(size: int, data: st.DataObject) -> None:
    leaves = [number.to_bytes(2, "big") for number in range(size)]
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    then = data.draw(st.integers(1, size))
    index = data.draw(st.integers(0, then - 1))
    assert tree.root(then) == rfc_root(leaves[:then])
    assert tree.inclusion(index, then) == rfc_path(index, leaves[:then])
    assert tree.consistency(index + 1, then) == rfc_subproof(index + 1, leaves[:then], True)


def test_what_a_tree_does_not_have_is_refused() -> None:
    tree = Tree()
    tree.append(b"")
    for asked in (lambda: tree.root(2), lambda: tree.inclusion(0, 2), lambda: tree.consistency(0, 1)):
        with pytest.raises(ValueError, match=r"in a tree of .*1"):
            asked()


def test_a_tree_that_began_otherwise_has_no_proof() -> None:
    tree, other = Tree(), Tree()
    for number in range(20):
        tree.append(bytes([number]))
        other.append(bytes([number if number != 3 else 99]))
    assert not verify_consistency(8, 20, other.consistency(8, 20), tree.root(8), other.root())
    assert verify_consistency(3, 20, other.consistency(3, 20), tree.root(3), other.root())
    assert not verify_consistency(0, 20, [], tree.root(0), tree.root())


# The roster


def test_a_first_key_is_trusted_and_another_is_not(made: Federation) -> None:
    north, south = made.keys["north"].public, made.keys["south"].public
    roster = admit(Roster(), "north", north, 1.0, "tofu")
    assert admit(roster, "north", north, 2.0, "closed") is roster
    with pytest.raises(StoreRefused) as refused:
        admit(roster, "north", south, 2.0, "tofu")
    assert f"({fingerprint(south)}) than the one enrolled ({fingerprint(north)})" in refused.value.message
    assert refused.value.message.endswith(f"if it is right: raypipe ledger enroll north {south}")
    replaced = enroll(roster, "north", south, 3.0)
    assert replaced.key_of("north") == south
    assert replaced.knows("north", north)
    with pytest.raises(StoreRefused, match="is not in the roster, which is closed"):
        admit(roster, "south", south, 2.0, "closed")
    with pytest.raises(ConfigError, match="64 lower-case hex digits"):
        enroll(roster, "east", north.upper(), 1.0)


def test_unknown_revoked_and_wrong_signatures_are_refused(made: Federation) -> None:
    key = made.keys["north"]
    roster = admit(Roster(), "north", key.public, 1.0, "tofu")
    signature = key.sign("update", b"said")
    assert check_signature(roster, "north", "update", b"said", signature) == key.public
    with pytest.raises(UpdateRejected, match="store south is not in the roster"):
        check_signature(roster, "south", "update", b"said", signature)
    with pytest.raises(UpdateRejected, match="not of store north's enrolled key"):
        check_signature(roster, "north", "update", b"other", signature)
    gone = revoke(roster, "north", 2.0)
    with pytest.raises(UpdateRejected, match="store north's key was revoked"):
        check_signature(gone, "north", "update", b"said", signature)
    with pytest.raises(StoreRefused, match="the key of store north was revoked"):
        admit(gone, "north", key.public, 3.0, "tofu")
    assert enroll(gone, "north", key.public, 4.0).key_of("north") == key.public


def test_a_roster_outlives_its_process(tmp_path: Path, made: Federation) -> None:
    path = tmp_path / "home" / "roster.json"
    assert load_roster(path) == Roster()
    roster = revoke(admit(Roster(), "north", made.keys["north"].public, 1, "tofu"), "north", 2)
    save_roster(path, roster)
    assert load_roster(path) == roster
    path.write_text(path.read_text().replace('"store"', '"shop"'))
    with pytest.raises(ConfigError, match=r"the roster .* is damaged"):
        load_roster(path)


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


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, list[bytes]]:
    """One ledger, and its lines as they were."""
    found = federation(tmp_path_factory.mktemp("many"), versions=5)
    return found, found.read()


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


def heavier(entry: Entry) -> Body | None:
    """North's update in version 2 weighs more than it did."""
    body = entry.typed()
    is_it = isinstance(body, entries.Update) and body.ticket == "north-2"
    return replace(body, weight=0.9) if is_it and isinstance(body, entries.Update) else None


def test_a_fork_under_the_coordinators_own_key_is_found_by_heads_that_stores_kept(
    made: Federation, tmp_path: Path
) -> None:
    forged = rewritten(made, heavier, tmp_path / "forged")
    assert forged.verify().ok  # by itself it holds: nobody else's word is in it
    kept = read_saved(made.heads_of("south"))
    findings = forged.verify(kept)
    assert "forked: it is not what the kept head" in lines_of(findings)
    ours, theirs = ([json.loads(line)["entry"] for line in it.read() if b'{"entry"' in line] for it in (made, forged))
    differs = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    assert named(findings) == differs
    findings = forged.verify(replace(kept, tree=Tree()))
    assert "forked: it or one up to" in lines_of(findings)
    assert named(findings) == max(head.size for head in kept.heads if head.size <= differs)


Tale = list[tuple[Body, float]]  # a ledger's entries: what is said, and when
FORKS: dict[str, Callable[[Tale, int], Tale]] = {
    "changed": lambda tale, i: [*tale[:i], (tale[i][0], tale[i][1] + 0.5), *tale[i + 1 :]],
    "left out": lambda tale, i: [*tale[:i], *tale[i + 1 :]],
    "moved": lambda tale, i: [*tale[:i], *tale[i + 1 : i + 2], tale[i], *tale[i + 2 :]],
    "put in": lambda tale, i: [*tale[:i], (entries.Refused("north", "never", "late"), 7.0), *tale[i:]],
    "cut off": lambda tale, i: tale[:i],
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_fork_at_any_entry_is_found_and_its_entry_named(
    many: tuple[Federation, list[bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Signed anew with the coordinator's own key: by itself it may hold, against what others kept it never does."""
    made, lines = many
    made.write(lines)
    said = [Entry(**one["entry"]) for one in map(json.loads, lines) if "entry" in one]
    kept, copy = read_saved(made.heads_of("south")), read_saved(made.run_folder / FILE)
    seen = max(head.size for head in kept.heads)
    kind, first = data.draw(st.sampled_from(sorted(FORKS))), data.draw(st.integers(1, seen - 2))
    forged = Ledger(tmp_path_factory.mktemp("fork"), made.key, RUN)
    for body, at in FORKS[kind]([(entry.typed(), entry.at) for entry in said], first):
        forged.append(body, at=at)
    forged.seal(at=9000.0)
    forged.close()
    folder = forged.path.parent
    for witness in (kept, copy):
        assert shown(folder, witness)[0].entry == first, kind
    (one,) = shown(folder, replace(kept, tree=Tree()))
    assert one.entry is not None
    assert one.entry <= first
    if "up to" in one.line:
        assert first <= int(one.line.partition("up to ")[2].partition(",")[0])
    else:
        assert one.entry == first


def shown(folder: Path, witness: Saved) -> list[Finding]:
    """What is found by what was kept, and not by the ledger itself."""
    alone = verify(folder).problems
    return [one for one in verify(folder, [witness]).problems if one not in alone]


def test_leaves_that_are_not_those_of_the_head_are_refused_and_no_liar_frames_the_coordinator(
    going_on: Federation, tmp_path: Path
) -> None:
    proof = going_on.ledger.base_proof(4, going_on.witnesses["north"].size(RUN))
    for wrong in (proof["leaves"][64:] + proof["leaves"][:64], "00" * 32 * (len(proof["leaves"]) // 64)):
        with pytest.raises(StoreRefused, match="the leaves that the base's proof brings are not those of its head"):
            ask(going_on, "north", 4, leaves=wrong)
    with pytest.raises(StoreRefused, match="no proof"):
        ask(going_on, "north", 4, leaves=proof["leaves"][64:])
    before = going_on.heads_of("north").read_bytes()
    ask(going_on, "north", 4)
    assert going_on.heads_of("north").read_bytes().startswith(before), "what was refused left nothing"
    path = tmp_path / "liar"
    lines = going_on.heads_of("north").read_bytes().splitlines(keepends=True)
    told = json.loads(lines[0])
    path.write_bytes(heads.leaves_line(0, bytes(len(told["leaves"]) // 2)) + b"".join(lines[1:]))
    assert going_on.verify(read_saved(path)).ok, "leaves that no signed root is of say nothing"
    going_on.ledger.close()
    forged = rewritten(going_on, heavier, tmp_path / "forged")
    assert "forked: it or one up to" in lines_of(forged.verify(read_saved(path)))
    assert "forked: it is not what" in lines_of(forged.verify(read_saved(going_on.heads_of("north"))))


def test_the_leaves_of_all_proofs_fit_into_a_vaults_frame(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    made.begin()
    for number in range(1000, 1000 + 3 * JOIN_LEAVES):
        made.say(entries.Refused("north", str(number), "late"))
    size = made.ledger.seal(at=made.at).size
    assert made.ledger.base_proof(0)["leaves"] == made.ledger.base_proof(0, size - MOST_LEAVES - 1)["leaves"] == ""
    proofs = [made.ledger.base_proof(0, size - MOST_LEAVES)] * MOST_HEADS
    first = {**made.ledger.base_proof(0), "leaves": "0" * 64 * JOIN_LEAVES}
    ticket = Ticket("t", "north", 1, 0, 0, (0.0, 0.0), base=(first, *proofs))
    assert len(encode(ticket)) + 250_000 < MAX_FRAME


def test_a_store_that_was_told_no_leaves_keeps_heads_alone(going_on: Federation) -> None:
    """An older coordinator; or one that had more to tell than goes into a ticket."""
    ask(going_on, "north", 4, leaves="")
    going_on.ledger.seal(at=1.0)
    going_on.publish(5)
    kept = read_saved(going_on.heads_of("north"))
    assert kept.tree.size < kept.heads[-2].size
    again = Witness(going_on.heads_of("north").parent, going_on.keys["north"], "north")
    assert again.size(RUN) == kept.heads[-1].size
    assert going_on.verify(kept).ok
    path = going_on.heads_of("north")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]) + b"{}\n")
    with pytest.raises(ConfigError, match=r"heads.jsonl:4: neither a head nor leaves"):
        read_saved(path)


def test_a_copy_of_the_ledger_names_the_forked_entry(made: Federation, tmp_path: Path) -> None:
    same = rewritten(made, lambda entry: None, tmp_path / "same")
    forged = rewritten(made, heavier, tmp_path / "forged")
    copy = read_saved(same.run_folder / FILE)
    assert same.verify(copy).ok
    findings = forged.verify(copy)
    assert named(findings) == forged.index_of(b'"ticket":"north-2"')
    assert "it is another one than in the copy" in lines_of(findings)
    longer = read_saved(same.run_folder / FILE)
    same.write(same.read()[:5])
    assert named(same.verify(longer)) == 4


def test_a_ledger_cut_off_after_a_head_is_found_by_a_kept_head(made: Federation) -> None:
    lines = made.read()
    first = next(i for i, line in enumerate(lines) if line.startswith(b'{"head"'))
    made.write(lines[: first + 1])
    assert made.verify().ok
    findings = made.verify(read_saved(made.heads_of("north")))
    assert named(findings) == json.loads(lines[first])["head"]["size"]
    assert "it is gone: a head was signed over" in lines_of(findings)


def test_two_heads_of_one_size_convict_the_coordinator(made: Federation, tmp_path: Path) -> None:
    same = rewritten(made, lambda entry: None, tmp_path / "same")
    head = rewritten(made, heavier, tmp_path / "forged").verify().head
    assert head is not None
    assert "the coordinator signed both roots of size" in lines_of(same.verify(Saved((head,))))
    stranger = signed_head(made.keys["north"], replace(head, coordinator=made.keys["north"].public))
    assert "is not signed by this ledger's coordinator" in lines_of(same.verify(Saved((stranger,))))


def test_weights_that_were_altered_are_named_and_those_not_kept_are_not(made: Federation) -> None:
    folder = made.run_folder / "versions"
    (folder / "v00001.safetensors").unlink()
    (folder / "v00002.safetensors").write_bytes(weights(7).tobytes())
    findings = made.verify()
    assert named(findings) == made.index_of(b'"file":"v00002.safetensors"')
    assert "the weights of version 2 are not those of the ledger" in lines_of(findings)
    assert findings.counts["weights"] == 3
    assert verify(made.run_folder, weights=False).ok


def test_a_file_that_holds_no_heads_is_no_witness(tmp_path: Path, made: Federation) -> None:
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(ConfigError, match="other:1: its line is not JSON"):
        read_saved(tmp_path / "other")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="holds no signed head"):
        read_saved(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_saved(tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot be read"):
        verify(tmp_path)


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


# The store's side


def ask(made: Federation, store: str, base: int, **changes: Any) -> dict[str, Any]:
    """What the store answers to this base, with parts of the proof exchanged."""
    since = changes.pop("since_shown", made.witnesses[store].size(RUN))
    vector = changes.pop("vector", weights(base))
    proof = {**made.ledger.base_proof(base, since), **changes}
    return made.witnesses[store].check(proof, run=RUN, version=base, digest=digest(vector))


@pytest.fixture
def going_on(made: Federation) -> Federation:
    made.ledger = Ledger(made.run_folder, made.key, RUN)
    made.publish(4)
    return made


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


# Proofs and evidence


def offline(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Without raypipe: another working folder, no path of ours, and a check that none was found."""
    script = ROOT / "raypipe" / "ledger" / "offline.py"
    return subprocess.run([sys.executable, "-I", script, *map(str, arguments)], capture_output=True, text=True, cwd="/")


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


def is_proven(proof: dict[str, Any], key: str) -> bool:
    try:
        return check(proof, key).startswith("proven: ")
    except (ValueError, KeyError, TypeError):
        return False


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


# From the journal


class Told:
    """A journal of a run with two stores, and the ledger that follows it."""

    def __init__(self, folder: Path, *, signed: bool = True) -> None:
        self.folder, self.signed = folder, signed
        folder.mkdir(parents=True, exist_ok=True)
        self.key = load_or_make_key(folder / "coordinator.pem")
        self.keys = {store: load_or_make_key(folder / f"{store}.pem") for store in STORES}
        self.journal = Journal(folder / "journal.sqlite", write=True)
        self.at = 1000.0

    def tell(self, kind: Kind, **body: Any) -> None:
        self.at += 1.5
        self.journal.append(kind, body, self.at)

    def start(self, epoch: int = 1) -> None:
        self.tell("run_started", run=RUN, epoch=epoch, code_hash="c0de", config={"data": "shelf", "lr": 0.05})

    def join(self, store: str, train: int = 70, **more: Any) -> None:
        if self.signed:
            more = {"key": self.keys[store].public, **more}
        self.tell("store_joined", store=store, counts={"train": train}, hash="da7a", cpus=1.0, gpu=None, **more)

    def contribution(self, store: str, version: int, ticket: str) -> dict[str, Any]:
        base = version - 1
        made = {"store": store, "ticket": ticket, "base": base, "staleness": 0, "steps": 10, "examples": 320}
        if self.signed:
            sent = digest(ticket.encode())
            said = update_statement(
                run=RUN,
                store=store,
                ticket=ticket,
                base_version=base,
                base_digest=digest(weights(base)),
                update_digest=sent,
                steps=10,
                examples=320,
            )
            made |= {"digest": sent, "signature": self.keys[store].sign("update", said)}
        return {**made, "weight": 0.5, "share": 0.5, "seconds": 1.0, "loss": 0.1, "bytes_up": 256}

    def publish(self, version: int) -> None:
        made = [self.contribution(store, version, f"{store}-{version}") for store in STORES] if version else []
        facts = {"version": version, "parent": version - 1 if version else None, "hash": digest(weights(version))}
        self.tell("version_published", **facts, contributions=made)
        self.tell("evaluated", version=version, split="validation")

    def keep(self, version: int) -> None:
        folder = self.folder / "versions"
        folder.mkdir(exist_ok=True)
        content = weights(version).tobytes()
        (folder / f"v{version}").write_bytes(content)
        hashed = blake3(content).hexdigest()
        self.tell("weights_kept", version=version, file=f"v{version}", hash=hashed, num_bytes=len(content))

    def run(self) -> None:
        """A run in which a coordinator dies, a version is lost, and a store comes back as it was."""
        self.start()
        self.publish(0)
        self.keep(0)
        for store in STORES:
            self.join(store)
        self.publish(1)
        self.tell("update_rejected", store="north", ticket="t", reason="not finite")
        self.keep(1)
        self.publish(2)
        self.start(epoch=2)
        self.tell("version_withdrawn", version=2, reason="its weights were lost")
        self.join("south")
        self.join("north", train=80)
        self.publish(2)
        self.keep(2)
        self.publish(3)
        self.keep(3)
        self.tell("run_finished", reason="enough", status="finished", versions=4, best_version=3, at=self.at)

    def ledger(self) -> Ledger:
        return Ledger(self.folder, self.key, RUN)

    def follow(self, until: int | None = None) -> None:
        """What the journal has up to a record; then the process is gone."""
        ledger = self.ledger()
        record(ledger, islice(self.journal.read(), until))
        ledger.close()

    def lines(self) -> list[bytes]:
        return (self.folder / FILE).read_bytes().splitlines(keepends=True)

    def kinds(self) -> list[str]:
        said = [json.loads(line) for line in self.lines()]
        return [one["entry"]["kind"] if "entry" in one else "head" for one in said]


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


# The command line


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
