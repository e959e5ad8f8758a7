"""A version's weights put together, where the coordinator's side of a store lives: frozen ones come once.

A site, wherever it is, is handed whole vectors, so that it can check a version by its hash.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreRefused

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


class Pieces:
    """The frozen weights of the last plan that came with some."""

    def __init__(self) -> None:
        self._plan = b""
        self._vector: Array | None = None
        self._size = 0  # of the part that training changes

    def whole(self, plan: bytes, weights: Array, still: Array | None) -> Array:
        """The whole vector, valid until the next is put together; `weights` themselves where nothing is frozen.

        Raises StoreRefused for a piece that does not fit what came before.
        """
        if still is not None:
            if not weights.dtype == still.dtype == np.float32 or not weights.ndim == still.ndim == 1:
                raise StoreRefused("a version's weights and its frozen weights are float32 vectors")
            self._plan, self._vector, self._size = plan, np.concatenate([weights, still]), weights.size
            return self._vector
        if self._vector is None or plan != self._plan or weights.shape != (self._size,):
            return weights
        if weights.dtype != np.float32:
            raise StoreRefused(f"weights are {weights.dtype}, not float32")
        self._vector[: self._size] = weights
        return self._vector
