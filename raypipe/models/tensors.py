"""The flat vector as named tensors and back, without torch: what is written to disk and read from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import ConfigError
from raypipe.types import Layout

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def state_dict_from(layout: Layout, vector: Array) -> dict[str, Array]:
    """Named tensors of their own dtypes; those of float32 are views of `vector`. A tied weight has one name."""
    if vector.shape != (layout.size,):
        raise ConfigError(f"the vector has shape {vector.shape}, the layout needs ({layout.size},)")
    return {e.name: vector[e.slice].reshape(e.shape).astype(e.dtype, copy=False) for e in layout.entries}


def vector_from(layout: Layout, tensors: Mapping[str, Array]) -> Array:
    """A new vector, zero between entries. Tensors that the layout does not name are left out.

    Raises ConfigError with every missing or wrong-shaped tensor, a line each.
    """
    problems = [f"tensor {e.name!r} is missing" for e in layout.entries if e.name not in tensors]
    problems += [
        f"tensor {e.name!r} has shape {tensors[e.name].shape}, the model needs {e.shape}"
        for e in layout.entries
        if e.name in tensors and tuple(tensors[e.name].shape) != e.shape
    ]
    if problems:
        raise ConfigError(problems)
    vector = np.zeros(layout.size, np.float32)
    for entry in layout.entries:
        vector[entry.slice] = tensors[entry.name].reshape(-1)
    return vector
