"""Signed tree heads: the coordinator's word on all entries up to here (RFC 6962, 3.5), and stores' words on that.

A head alone proves nothing against the holder of the coordinator's key, who can sign another. What binds the
coordinator is that others keep the heads they were shown: two heads of one size with different roots convict it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from raypipe.ledger.entries import exact, plain
from raypipe.ledger.keys import Key, verify
from raypipe.ledger.offline import canonical, head_statement, witness_statement
from raypipe.ledger.tree import WIDTH, Tree


@dataclass(frozen=True, slots=True)
class Head:
    """`size` entries have this `root` (hex); `version` and `digest` are of the newest version among them."""

    run: str
    size: int
    root: str
    version: int | None
    digest: str | None
    at: float  # seconds since the epoch
    coordinator: str  # public key
    signature: str = ""

    @property
    def short(self) -> str:
        """For messages."""
        return f"size {self.size}, root {self.root[:12]}"


def signed_head(key: Key, head: Head) -> Head:
    """The head with the coordinator's signature."""
    return replace(head, signature=key.sign("head", head_statement(plain(head))))


def is_genuine(head: Head) -> bool:
    """Whether the holder of `head.coordinator` signed it; whose key that is, is for the caller to know."""
    return verify(head.coordinator, "head", head_statement(plain(head)), head.signature)


def head_from(given: object) -> Head:
    """Raises ValueError in one line."""
    return exact(Head, given)


def line_of(head: Head) -> bytes:
    """A line of a ledger or of a file of saved heads, with its line feed."""
    return b'{"head":' + canonical(plain(head)) + b"}\n"


def leaves_line(since: int, leaves: bytes) -> bytes:
    """A line of a file of saved heads, before the head whose tree has these hashes of leaves from `since` on."""
    return canonical({"leaves": leaves.hex(), "since": since}) + b"\n"


def read_kept(content: bytes) -> tuple[list[Head], Tree, int]:
    """What a store keeps: its heads; the leaves of the tree that they are of, as far as it was told; how many bytes of
    the file that is: a line after the last head, or one that is cut, was never co-signed.

    Raises ValueError with the number of the line that is none.
    """
    found, tree, told, end, at = list[Head](), Tree(), (0, b""), 0, 0
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
        at += len(line)
        try:
            said = json.loads(line)
            if "leaves" in said:
                told = int(said["since"]), bytes.fromhex(said["leaves"])
                continue
            found.append(head_from(said["head"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{number}: neither a head nor leaves ({type(error).__name__})") from None
        since, leaves = told
        if since == tree.size and since + len(leaves) // WIDTH == found[-1].size:
            for place in range(0, len(leaves), WIDTH):
                tree.add(leaves[place : place + WIDTH])
        told, end = (0, b""), at
    return found, tree, end


def cosign(key: Key, store: str, head: Head) -> dict[str, Any]:
    """What a store answers when it has seen a head: {store, size, signature}."""
    signature = key.sign("witness", witness_statement(store, plain(head)))
    return {"store": store, "size": head.size, "signature": signature}


def is_cosigned(head: Head, store: str, public: str, signature: str) -> bool:
    """Whether this store saw exactly this head."""
    return verify(public, "witness", witness_statement(store, plain(head)), signature)
