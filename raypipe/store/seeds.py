"""The seed of a ticket: equal for equal run, store and base version, so that a ticket done again gives equal bits."""

from __future__ import annotations

import hashlib


def ticket_seed(run_seed: int, store: str, version: int, repeat: int = 0) -> int:
    """In [0, 2**63), which numpy, torch and msgpack all take. `repeat` counts what the store has already handed over
    from this base, so that its next ticket on it is other work."""
    text = f"{run_seed}\0{store}\0{version}".encode() + (f"\0{repeat}".encode() if repeat else b"")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
