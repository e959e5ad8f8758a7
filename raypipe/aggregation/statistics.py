"""BatchNorm's statistics measured anew by all stores together, for weights that are the mean of theirs.

What stores have of them in training, each normalised by its own batches, belongs to no weights that anybody judges,
and a detector over unlike stores loses by it. The statistics of a layer follow from those of all layers before it. So
they are measured layer after layer, those before being all stores' already, and are in the end exactly what one batch
of all stores' images would give. Precise statistics, Wu & Johnson 2021, arXiv:2105.07576, section 3, of many parties.

    stores   sums of a layer's inputs, by channel      ->  mean and variance of all, each store by its share
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from raypipe.types import MEAN, VARIANCE, Layout

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def pooled(sums: Mapping[str, Array], shares: Mapping[str, float]) -> tuple[Array, Array] | None:
    """Mean and variance of each channel over all stores' images, each store by its share; None: they do not fit."""
    sizes = {packed.shape for packed in sums.values()}
    if len(sizes) != 1 or not all(np.isfinite(p).all() and p[0] > 0 for p in sums.values()):
        return None
    width = (next(iter(sizes))[0] - 1) // 2
    total = sum(shares[store] for store in sums)
    mean, square = np.zeros(width), np.zeros(width)
    for store in sorted(sums):  # equal answers give equal bits
        own = sums[store][1:] / sums[store][0] * (shares[store] / total)
        mean += own[:width]
        square += own[width:]
    return mean, np.maximum(square - np.square(mean), 0.0)


def put(vector: Array, layout: Layout, layer: str, found: tuple[Array, Array]) -> bool:
    """A layer's mean and variance, in place; False where they are not as many as it has."""
    places = {entry.name: entry.slice for entry in layout.entries}
    for name, values in zip((MEAN, VARIANCE), found, strict=True):
        place = places[f"{layer}.{name}"]
        if values.shape != (place.stop - place.start,):
            return False
        vector[place] = values
    return True
