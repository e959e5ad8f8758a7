"""An update that leaves a store in pieces, no faster than the store's policy says."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE_S = 0.25  # of the rate, a piece
LEAST = 1 << 14  # bytes


class Going:
    """`rate` in bytes a second; `now` and what `piece` says are seconds of any one clock."""

    def __init__(self, array: Array, rate: float, now: float) -> None:
        self._raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()  # its slot may be another's soon
        self._size, self._rate, self._began = max(LEAST, int(rate * PIECE_S)), rate, now
        self.about = {"num_bytes": self._raw.size, "dtype": array.dtype.str}

    def piece(self, at: int) -> tuple[Array, float]:
        """The bytes from an offset on, and when they may go: a piece asked for again has its time still."""
        piece = self._raw[at : at + self._size]
        return piece, self._began + (at + piece.size) / self._rate
