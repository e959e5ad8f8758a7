"""The seed of a ticket: equal for equal run, store and base version, so that a ticket done again gives equal bits."""

from __future__ import annotations

import hashlib


def ticket_seed(run_seed: int, store: str, version: int) -> int:
    """In [0, 2**63), which numpy, torch and msgpack all take."""
    text = f"{run_seed}\0{store}\0{version}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
