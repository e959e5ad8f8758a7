"""Keys, digests and the roster: whose word counts."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from ledgers import Federation, federation

from raypipe.errors import ConfigError, StoreRefused, UpdateRejected
from raypipe.ledger.keys import MANY_BYTES, digest, fingerprint, load_key, load_or_make_key
from raypipe.ledger.keys import verify as is_signed_by
from raypipe.ledger.roster import Roster, admit, check_signature, enroll, load_roster, revoke, save_roster


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


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
    assert ("north", north) in {(e.store, e.key) for e in replaced.enrolments}
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
