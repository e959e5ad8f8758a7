"""Checks one proof of a raypipe ledger, with nothing of raypipe: Python and the `cryptography` package.

    python offline.py proof.json --coordinator-key HEX [--store-key HEX]

One line says what is proven (exit code 0) or why it is not (exit code 1). `raypipe ledger prove RUN VERSION STORE`
makes the file. The keys must come from somewhere else than the file: whoever holds the coordinator's key could have
written any ledger, whoever holds the store's key any update.

An entry's hash is sha256 of its canonical JSON (sorted keys, no spaces, ASCII). These hashes are the leaves of a
Merkle tree as in RFC 6962, 2.1. All that is signed is canonical JSON after a line that says what it is. raypipe
itself imports these functions: what is read here is what ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FORMAT = "raypipe-proof/1"
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def canonical(value: object) -> bytes:
    """The one JSON text of a value. Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold."""
    return _ENCODER.encode(value).encode("ascii")


def entry_hash(entry: Mapping[str, Any]) -> bytes:
    """32 bytes: what the next entry's `prev` names (as hex), and what the tree's leaf is made of."""
    return hashlib.sha256(canonical(entry)).digest()


def leaf_hash(data: bytes) -> bytes:
    """RFC 6962, 2.1: a leaf cannot pass for an inner node."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962, 2.1."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_from(index: int, size: int, leaf: bytes, path: Sequence[bytes]) -> bytes | None:
    """The root that an inclusion proof leads to, or None for a path of the wrong length. RFC 9162, 2.1.3.2."""
    if not 0 <= index < size:
        return None
    place, last, found = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return None
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        place, last = place >> 1, last >> 1
    return found if last == 0 else None


def is_signed(public: str, domain: str, payload: bytes, signature: str) -> bool:
    """Ed25519 over `raypipe/<domain>/1`, a line feed, the payload; key and signature are lower-case hex."""
    try:
        raw = bytes.fromhex(signature)
        if raw.hex() != signature:  # upper case and spaces would be a second form of the same signature
            return False
        _public(public).verify(raw, under(domain, payload))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def under(domain: str, payload: bytes) -> bytes:
    """What the signature is computed over: a signature given for one kind of statement cannot be shown for another."""
    return b"raypipe/" + domain.encode() + b"/1\n" + payload


@lru_cache(maxsize=1024)
def _public(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))


def update_statement(
    *,
    run: str,
    store: str,
    ticket: str,
    base_version: int,
    base_digest: str,
    update_digest: str,
    steps: int,
    examples: int,
) -> bytes:
    """What a store signs (domain `update`) for an update: `update_digest` is of the bytes as they leave the store,
    `base_digest` of the weights that it trained from, as it saw them.
    """
    return canonical(
        {
            "run": run,
            "store": store,
            "ticket": ticket,
            "base_version": base_version,
            "base_digest": base_digest,
            "update_digest": update_digest,
            "steps": steps,
            "examples": examples,
        }
    )


def head_statement(head: Mapping[str, Any]) -> bytes:
    """What the coordinator signs (domain `head`): the head, all but the signature itself."""
    return canonical({key: value for key, value in head.items() if key != "signature"})


def witness_statement(store: str, head: Mapping[str, Any]) -> bytes:
    """What a store signs (domain `witness`) when it has seen a head: the whole of it."""
    return canonical({"store": store, "head": dict(head)})


def check(proof: Mapping[str, Any], coordinator_key: str, store_key: str | None = None) -> str:
    """What is proven, in one line. Raises ValueError with the first thing that is wrong."""
    _hold(proof["format"] == FORMAT, f"this is no proof of the format {FORMAT}")
    head, store, number = proof["head"], proof["store"], proof["version"]
    run = head["run"]
    _hold(head["coordinator"] == coordinator_key, "the head is of another coordinator key than the one given")
    _hold(is_signed(coordinator_key, "head", head_statement(head), head["signature"]), "the head's signature is wrong")
    entries = [_included(part, head) for part in proof["entries"]]
    keys: dict[str, str] = {}
    versions, updates = [], []
    for entry in sorted(entries, key=lambda e: int(e["index"])):
        body = entry["body"]
        if entry["kind"] == "store":
            keys[body["store"]] = body["key"]
        elif entry["kind"] == "version" and body["version"] == number:
            versions.append(body)
        elif entry["kind"] == "update" and body["version"] == number and body["store"] == store:
            updates.append(entry)
            key = keys.get(store)
            _hold(key is not None, f"the entry that enrols store {store} is not in the file, or comes later")
            _hold(store_key in (None, key), f"store {store} is enrolled with another key than the one given")
            _hold(
                is_signed(str(key), "update", _statement(run, body), body["signature"]),
                f"entry {entry['index']}: the update's signature is not of store {store}",
            )
    _hold(len(versions) == 1, f"version {number} is not in the file")
    _hold(bool(updates), f"no update of store {store} in version {number} is in the file")
    witnesses = set()
    for name, signature in proof["cosignatures"].items():
        said = name in keys and is_signed(keys[name], "witness", witness_statement(name, head), signature)
        _hold(said, f"the head is not co-signed by store {name}")
        witnesses.add(name)
    places = ", ".join(str(e["index"]) for e in updates)
    tickets = ", ".join(e["body"]["ticket"] for e in updates)
    return (
        f"proven: run {run}, version {number} ({versions[0]['digest']}) has an update signed by store {store} (ticket"
        f" {tickets}, entry {places}), in the tree of {head['size']} entries with root {head['root'][:16]}, signed by"
        f" the coordinator {coordinator_key[:16]}, co-signed by {', '.join(sorted(witnesses)) or 'nobody'}"
    )


def _statement(run: str, body: Mapping[str, Any]) -> bytes:
    return update_statement(
        run=run,
        store=body["store"],
        ticket=body["ticket"],
        base_version=body["base"],
        base_digest=body["base_digest"],
        update_digest=body["digest"],
        steps=body["steps"],
        examples=body["examples"],
    )


def _included(part: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    entry = dict(part["entry"])
    path = [bytes.fromhex(step) for step in part["path"]]
    root = root_from(entry["index"], head["size"], leaf_hash(entry_hash(entry)), path)
    _hold(root is not None and root.hex() == head["root"], f"entry {entry['index']} is not in the tree of the head")
    return entry


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description="Check a proof of a raypipe ledger.")
    parser.add_argument("proof", help="the file that `raypipe ledger prove` made")
    parser.add_argument("--coordinator-key", required=True, metavar="HEX", help="Ed25519 public key, 64 hex digits")
    parser.add_argument("--store-key", metavar="HEX", help="the store's, if you have it from the store itself")
    options = parser.parse_args()
    try:
        with open(options.proof, encoding="utf-8") as file:
            verdict, code = check(json.load(file), options.coordinator_key, options.store_key), 0
    except KeyError as error:
        verdict, code = f"NOT proven: the file has no {error}", 1
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        verdict, code = f"NOT proven: {error}", 1
    print(verdict.encode("unicode_escape").decode("ascii"))  # the file may not drive the terminal
    return code


if __name__ == "__main__":
    sys.exit(main())
