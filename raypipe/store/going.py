"""An update that leaves a store in pieces, no faster than the store's policy says, and how it is fetched.

A piece that did not come, or came damaged, is asked for again; what has come is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreUnreachable
from raypipe.ledger.keys import digest
from raypipe.vault.transfer import Damaged, Incoming, Piece, piece_of

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE_S = 0.25  # of the rate, a piece
LEAST = 1 << 14  # bytes
# What comes with Ray's own answer; anything longer is an object that is looked up, asked for and given up apart, which
# over a thin line cost an eighth more (measured). Beyond, a call for each would be slower than the rate.
INLINE, INLINE_UP_TO = 96 << 10, 3 * 96 << 10
TRIES, PAUSE_S = 20, 0.5  # for one piece; a link that is away for longer is the heartbeat's to tell
# What was asked for more slowly than it may go is made up for, but not more: else a link that is back after a minute
# would be given the minute's bytes at once.
MADE_UP_S = 1.0


class Pace:
    """When bytes may leave a store, of all updates that are on their way. Seconds are of any one clock."""

    def __init__(self, rate: float, now: float) -> None:
        """`rate` in bytes a second."""
        self.rate, self._free_at = rate, now

    def due(self, num_bytes: int, now: float) -> float:
        """When the last of so many may go; then they are taken for gone."""
        self._free_at = max(self._free_at, now - MADE_UP_S) + num_bytes / self.rate
        return self._free_at


class Going:
    """`run`: whose it is."""

    def __init__(self, array: Array, pace: Pace, run: str = "") -> None:
        self.run, self.sent = run, 0  # bytes that a piece was made of; some may not have come
        self._raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()  # its slot may be another's soon
        size = max(LEAST, int(pace.rate * PIECE_S))
        self._size, self._pace = INLINE if INLINE < size <= INLINE_UP_TO else size, pace
        self.about = {"num_bytes": self._raw.size, "dtype": array.dtype.str, "digest": digest(self._raw)}

    def piece(self, at: int, now: float) -> tuple[Piece, float]:
        """The bytes from an offset on, and when they may go; a piece asked for again goes again, and counts."""
        piece = piece_of(self._raw, at, self._size)
        self.sent = max(self.sent, at + len(piece.data))
        return piece, self._pace.due(len(piece.data), now)


async def fetched(
    about: Mapping[str, Any], ask: Callable[[int], Awaitable[Piece]], *, pause_s: float = PAUSE_S
) -> Array:
    """What a `Going` is about; `ask` for the piece at an offset.

    Raises StoreError: what `ask` raises, but StoreUnreachable only when a piece did not come in `TRIES`; Damaged
    likewise; that the whole is not what was announced.
    """
    coming, failed = Incoming(str(about["digest"]), int(about["num_bytes"])), 0
    while not coming.whole():
        try:
            coming.take(await ask(coming.have))
            failed = 0
        except (StoreUnreachable, Damaged):
            failed += 1
            if failed == TRIES:
                raise
            await asyncio.sleep(pause_s)
    return coming.data.view(np.dtype(about["dtype"]))
