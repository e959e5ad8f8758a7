"""One store's update in one version, as one file that needs no raypipe to be checked: see offline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError, RunError
from raypipe.ledger.entries import Entry, plain
from raypipe.ledger.heads import Head
from raypipe.ledger.lines import FILE, read_lines
from raypipe.ledger.offline import FORMAT
from raypipe.ledger.tree import Tree


def prove(folder: Path, version: int, store: str) -> dict[str, Any]:
    """The proof, JSON-plain: the entries (update, version, keys) with their paths to the root of one signed head.

    The head is the one over them that most stores co-signed. Raises ConfigError when the version or the store's
    part in it is not there, RunError when the ledger is not whole; it is not verified beyond that.
    """
    tree, chain, heads = Tree(), list[Entry](), dict[int, Head]()
    for line in read_lines(folder / FILE):
        if isinstance(line.item, Entry) and line.item.index == tree.size:
            tree.append(line.hash)
            chain.append(line.item)
        elif isinstance(line.item, Head):
            heads[line.item.size] = line.item
        elif not line.cut:
            raise RunError(f"the ledger {folder / FILE} is not whole at entry {tree.size}: see `raypipe ledger verify`")
    own = _own(chain, version, store)
    head, cosignatures = _head(chain, heads, own[-1].index, version)
    if tree.root(head.size).hex() != head.root:
        raise RunError(f"the head ({head.short}) is not over these entries: see `raypipe ledger verify`")
    keys = _keys(chain, {store: own[0].index} | dict.fromkeys(cosignatures, head.size))
    parts = {entry.index: entry for entry in (*own, *keys) if entry.index < head.size}
    return {
        "format": FORMAT,
        "version": version,
        "store": store,
        "head": plain(head),
        "entries": [
            {"entry": plain(entry), "path": [step.hex() for step in tree.inclusion(index, head.size)]}
            for index, entry in sorted(parts.items())
        ],
        "cosignatures": {name: signature for name, signature in cosignatures.items() if _has_key(parts, name)},
    }


def _own(chain: list[Entry], version: int, store: str) -> list[Entry]:
    """The store's updates in this version, then the version."""
    chain = _standing(chain)
    made = [e for e in chain if e.kind == "version" and e.body["version"] == version]
    if not made:
        last = max((e.body["version"] for e in chain if e.kind == "version"), default=None)
        raise ConfigError(f"the ledger has no version {version}; the newest is {last}")
    updates = [e for e in chain if e.kind == "update" and e.body["version"] == version]
    own = [e for e in updates if e.body["store"] == store]
    if not own:
        names = ", ".join(sorted({e.body["store"] for e in updates})) or "no store"
        raise ConfigError(f"store {store} has no update in version {version}; {names} contributed to it")
    if any(e.body["signature"] is None for e in own):
        raise ConfigError(f"store {store} did not sign its update in version {version}: there is nothing to prove")
    return [*own, made[0]]


def _standing(chain: list[Entry]) -> list[Entry]:
    """Without the updates and versions that were withdrawn."""
    there: list[Entry] = []
    for entry in chain:
        if entry.kind == "withdrawn":
            number = entry.body["version"]
            there = [e for e in there if e.kind not in ("update", "version") or e.body["version"] != number]
        there.append(entry)
    return there


def _head(chain: list[Entry], heads: dict[int, Head], index: int, version: int) -> tuple[Head, dict[str, str]]:
    seen: dict[int, dict[str, str]] = {}
    for entry in chain:
        if entry.kind == "witnessed":
            seen.setdefault(entry.body["size"], {}).update(entry.body["cosignatures"])
    over = [size for size in heads if size > index]
    if not over:
        raise ConfigError(f"version {version} is not sealed by a signed head yet")
    size = max(over, key=lambda s: (len(seen.get(s, {})), s))
    return heads[size], seen.get(size, {})


def _keys(chain: list[Entry], before: dict[str, int]) -> list[Entry]:
    """Each store's enrolment that stood last before an index."""
    found = {e.body["store"]: e for e in chain if e.kind == "store" and e.index < before.get(e.body["store"], 0)}
    return list(found.values())


def _has_key(parts: dict[int, Entry], store: str) -> bool:
    return any(e.kind == "store" and e.body["store"] == store for e in parts.values())
