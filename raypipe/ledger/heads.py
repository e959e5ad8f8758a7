"""Signed tree heads: the coordinator's word on all entries up to here (RFC 6962, 3.5), and stores' words on that.

A head alone proves nothing against the holder of the coordinator's key, who can sign another. What binds the
coordinator is that others keep the heads they were shown: two heads of one size with different roots convict it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raypipe.ledger.entries import exact, plain
from raypipe.ledger.keys import Key, verify
from raypipe.ledger.offline import canonical, head_statement, witness_statement


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


def cosign(key: Key, store: str, head: Head) -> dict[str, Any]:
    """What a store answers when it has seen a head: {store, size, signature}."""
    signature = key.sign("witness", witness_statement(store, plain(head)))
    return {"store": store, "size": head.size, "signature": signature}


def is_cosigned(head: Head, store: str, public: str, signature: str) -> bool:
    """Whether this store saw exactly this head."""
    return verify(public, "witness", witness_statement(store, plain(head)), signature)
