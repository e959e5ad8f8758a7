"""A run's ledger, read by hand: it imports nothing of raypipe, and knows the format from its description alone.

`ledger.jsonl` has a line an entry, `{"entry":{actor,at,body,index,kind,prev,record},"hash":...}`, and a line a signed
head, `{"head":{size,root,...}}`. An entry's hash is the sha256 of its canonical JSON, `prev` the hash before it, a root
that of the Merkle tree of RFC 6962 over the hashes. Whether signatures are right is for `raypipe ledger verify`; here:
is it one chain, does it say what the journal says, and is each head that a store has kept a head of this chain?
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

Body: TypeAlias = dict[str, Any]
FILE = "ledger.jsonl"


class Chain:
    """The right edge of the tree: the roots of its full subtrees, the largest first."""

    def __init__(self) -> None:
        self.size, self._edge = 0, list[tuple[int, bytes]]()

    def add(self, leaf: bytes) -> None:
        leaves, node = 1, sha256(b"\x00" + leaf).digest()
        while self._edge and self._edge[-1][0] == leaves:
            leaves, node = 2 * leaves, sha256(b"\x01" + self._edge.pop()[1] + node).digest()
        self._edge.append((leaves, node))
        self.size += 1

    def root(self) -> str:
        *before, (_, node) = self._edge
        for _, left in reversed(before):
            node = sha256(b"\x01" + left + node).digest()
        return node.hex()


@dataclass
class Ledger:
    """What it says, and what is wrong with it by itself. `roots`: by number of entries, after each."""

    versions: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)  # digest and tickets, not withdrawn
    roots: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read(file: Path) -> Ledger:
    """The whole of it; what cannot be read is a fault."""
    ledger, chain, updates, prev = Ledger(), Chain(), list[str](), "0" * 64
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            said = json.loads(line)
            if "head" in said:
                ledger.faults += _head(said["head"], chain)
                continue
            entry, told = said["entry"], said["hash"]
            place, before, kind, body = entry["index"], entry["prev"], entry["kind"], entry["body"]
        except (ValueError, KeyError, TypeError):
            ledger.faults.append(f"ledger: line {number} is damaged")
            continue
        found = sha256(canonical(entry))
        if found.hexdigest() != told:
            ledger.faults.append(f"ledger: entry {place} does not have its hash")
        if (place, before) != (chain.size, prev):
            ledger.faults.append(f"ledger: entry {place} does not follow entry {chain.size - 1}")
        prev = told
        chain.add(found.digest())
        ledger.roots.append(chain.root())
        if kind == "update":
            updates.append(body["ticket"])
        elif kind == "version":
            ledger.versions[body["version"]] = (body["digest"], tuple(updates))
            updates = []
        elif kind == "withdrawn":
            ledger.versions.pop(body["version"], None)
    return ledger


def canonical(value: object) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _head(head: Body, chain: Chain) -> list[str]:
    if head["size"] != chain.size:
        return [f"ledger: a head of {head['size']} entries stands after {chain.size}"]
    return [] if head["root"] == chain.root() else [f"ledger: the head of {head['size']} entries has another root"]


def check(folder: Path, name: str, versions: Mapping[int, Body], homes: Path | None) -> Iterator[str]:
    """A ledger beside the journal's `versions` of a run, and beside what the stores keep, where they are known."""
    ledger = read(folder / FILE)
    yield from ledger.faults
    journal = {number: (v["hash"], tuple(c["ticket"] for c in v["contributions"])) for number, v in versions.items()}
    for number in sorted(journal.keys() | ledger.versions.keys()):
        if number not in ledger.versions:
            yield f"ledger: version {number} is in the journal and not in the ledger"
        elif number not in journal:
            yield f"ledger: version {number} is in the ledger and not in the journal"
        else:
            (digest, tickets), (right, theirs) = ledger.versions[number], journal[number]
            if digest != right:
                yield f"ledger: version {number} has digest {digest[:15]}; by the journal {right[:15]}"
            if tickets != theirs:
                yield f"ledger: version {number} is of {', '.join(tickets)}; by the journal of {', '.join(theirs)}"
    yield from _heads(homes, name, ledger.roots) if homes is not None else ()


def _heads(homes: Path, name: str, roots: list[str]) -> Iterator[str]:
    """Of each store, those that it was shown and has kept."""
    for file in sorted(homes.glob(f"*/heads/{name}.heads.jsonl")):
        store = file.parent.parent.name
        for line in file.read_bytes().splitlines():
            try:
                head = json.loads(line)["head"]
            except (ValueError, KeyError, TypeError):
                continue  # cut as it was written: the store leaves it out too
            if head["size"] > len(roots):
                yield f"ledger: {store} keeps a head of {head['size']} entries; the ledger has {len(roots)}"
            elif roots[head["size"] - 1] != head["root"]:
                yield f"ledger: {store} keeps a head of {head['size']} entries that is not on the chain"
