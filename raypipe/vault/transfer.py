"""A big vector in pieces, each with its own hash, that goes on after a cut where it was left.

The receiver says how much it has; the sender goes on from there. What is whole is checked against the hash that was
announced, and begun anew if it differs. Pure: who carries the pieces is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from blake3 import blake3

from raypipe.errors import StoreError
from raypipe.ledger.keys import digest

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE = 1 << 16  # bytes; what is lost at a cut is a piece and what was in the socket


@dataclass(frozen=True, slots=True)
class Piece:
    """`check`: 8 bytes of BLAKE3."""

    at: int
    data: bytes
    check: bytes


class Damaged(StoreError):
    """A piece that is not the next one, or not as it was sent: asked for again, it may come right."""


def piece_of(raw: Array, at: int, size: int) -> Piece:
    """Of a uint8 array, so many bytes at most."""
    data = raw[at : at + size].tobytes()
    return Piece(at, data, blake3(data).digest(8))


def pieces(raw: Array, at: int) -> Iterator[Piece]:
    """Of a uint8 array, from an offset on."""
    for start in range(at, raw.size, PIECE):
        yield piece_of(raw, start, PIECE)


class Incoming:
    """A vector on its way here: `have` bytes of `data` are there."""

    def __init__(self, announced: str, num_bytes: int) -> None:
        self.announced = announced
        self.data = np.empty(num_bytes, np.uint8)
        self.have = 0

    def take(self, piece: Piece) -> None:
        """Raises Damaged: not the next one, too long, not what was sent."""
        if piece.at != self.have:
            raise Damaged(f"piece {piece.at} came where {self.have} was next")
        if not 0 < len(piece.data) <= self.data.size - self.have:
            raise Damaged("more pieces came than were announced")
        if blake3(piece.data).digest(8) != piece.check:
            raise Damaged(f"piece {piece.at} was damaged on its way")
        self.data[self.have : self.have + len(piece.data)] = np.frombuffer(piece.data, np.uint8)
        self.have += len(piece.data)

    def whole(self) -> bool:
        """Whether all of it is here, and is what was announced; if it is not, it begins anew."""
        if self.have < self.data.size:
            return False
        if digest(self.data) != self.announced:
            self.have = 0
            raise StoreError("the vector is not the one that was announced")
        return True
