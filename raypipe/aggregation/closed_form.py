"""A head in closed form: ridge regression on frozen features, from sums that each store uploads once.

A store with features X (n, d), a column of ones beside them, and targets Y (n, C; a 1 at the class, or the number)
sends X'X and X'Y in float64. These add up, so that the head W = (X'X + lambda I)^-1 X'Y is that of the pooled rows
whatever the stores' mixes, order or delay. A store is removed by subtraction, exactly as if it had never been there; a
class is one more column of X'Y, zero for stores that never had it. Fed3R, Fani et al. 2024, arXiv:2406.01116; AFL,
Zhuang et al. 2024, arXiv:2405.16240.

lambda is `ridge` times the mean of X'X's diagonal without the ones: a number that needs no knowledge of the features'
size, and the same for equal sums. The column of ones is not penalised.

What a store gives away: second moments of its features by class, of the whole split. Its policy says whether it may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np

from raypipe.errors import RunError

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """Sums over examples: `features` (d+1, d+1), `targets` (d+1, C); the last row is of the ones."""

    features: Array
    targets: Array

    @classmethod
    def of(cls, inputs: Array, targets: Array) -> Self:
        """Of a batch: inputs (n, d), targets (n, C), both float64."""
        ones = np.hstack([inputs, np.ones((len(inputs), 1))])
        return cls(ones.T @ ones, ones.T @ targets)

    @classmethod
    def zero(cls, width: int, num_outputs: int) -> Self:
        return cls(np.zeros((width + 1, width + 1)), np.zeros((width + 1, num_outputs)))

    @property
    def num_examples(self) -> float:
        return float(self.features[-1, -1])

    def __add__(self, other: Gram) -> Gram:
        """Of both. The one with fewer classes has nothing of the others'."""
        own, more = self._fitted(other)
        return Gram(self.features + other.features, own + more)

    def __sub__(self, other: Gram) -> Gram:
        """Without the other's examples."""
        own, less = self._fitted(other)
        return Gram(self.features - other.features, own - less)

    def _fitted(self, other: Gram) -> tuple[Array, Array]:
        num = max(self.targets.shape[1], other.targets.shape[1])
        return _widened(self.targets, num), _widened(other.targets, num)

    def solve(self, ridge: float) -> Array:
        """The head, (d+1, C): weights, then the bias. Raises RunError where there are no examples."""
        if self.num_examples < 1:
            raise RunError("a head in closed form needs examples, and no store sent any")
        width = len(self.features) - 1
        penalty = ridge * max(float(np.trace(self.features[:-1, :-1])) / max(1, width), 1e-12)
        diagonal = np.append(np.full(width, penalty), 0.0)
        return np.asarray(np.linalg.solve(self.features + np.diag(diagonal), self.targets), np.float64)

    def packed(self) -> Array:
        """As it travels: the upper triangle of the symmetric part, then the targets; float64 (n,)."""
        upper = self.features[np.triu_indices(len(self.features))]
        return np.concatenate([upper, self.targets.ravel()])

    @classmethod
    def unpacked(cls, vector: Array, width: int, num_outputs: int) -> Self:
        """Raises RunError for a vector of another length, or one that is not finite."""
        rows = width + 1
        size = rows * (rows + 1) // 2
        if vector.shape != (size + rows * num_outputs,) or not np.isfinite(vector).all():
            raise RunError(f"sums for a head of {width} inputs and {num_outputs} outputs were expected, others came")
        features = np.zeros((rows, rows))
        features[np.triu_indices(rows)] = vector[:size]
        return cls(np.triu(features, 1).T + features, vector[size:].reshape(rows, num_outputs).copy())


def _widened(targets: Array, num_outputs: int) -> Array:
    return np.pad(targets, ((0, 0), (0, num_outputs - targets.shape[1])))
