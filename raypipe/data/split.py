"""Which store gets which image of a sample that knows no stores.

A part says what each store sells, its mix: a matrix (stores, classes) whose rows sum to 1. `share` then gives
every image to exactly one store, so that the stores' sizes hold exactly and their mixes as nearly as the images
allow: iterative proportional fitting (Deming and Stephan 1940), the nearest matrix by Kullback-Leibler
divergence with given row and column sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raypipe.data.dataset import Labels
from raypipe.errors import ConfigError, did_you_mean
from raypipe.registry import Registry

Matrix: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]
Mix: TypeAlias = Callable[[Sequence[str], int, np.random.Generator], Matrix]  # classes, number of stores

FEW = 5  # images that even the smallest store gets while there are so many
NEVER = 1e-9  # of a class that a store does not sell: taken only if nobody else has room
DEPARTMENTS = (  # of Fashion-MNIST
    ("Sandal", "Sneaker", "Ankle boot", "Bag"),
    ("T-shirt/top", "Pullover", "Shirt"),
    ("Dress", "Coat", "Bag"),
    ("Trouser", "Shirt", "Sneaker"),
    ("Pullover", "Coat", "Ankle boot"),
)

splits: Registry[Mix] = Registry("split")


@splits("iid")
def iid() -> Mix:
    """Every store sells everything alike."""
    return lambda classes, num_stores, rng: np.full((num_stores, len(classes)), 1 / len(classes))


@splits("dirichlet")
def dirichlet(*, alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3) -> Mix:
    """Label skew; 0.1 leaves a store few classes, 100 is nearly iid. Hsu et al. 2019, arXiv:1909.06335."""
    return lambda classes, num_stores, rng: rng.dirichlet(np.full(len(classes), alpha), num_stores)


@splits("departments")
def departments(*, groups: list[list[str]] | None = None, mix: Annotated[float, Field(ge=0, le=1)] = 0.1) -> Mix:
    """Specialised shops: store i sells the classes of group i, and a share `mix` of everything.

    With fewer stores than groups the last groups are dropped, with more they begin again. Without `groups`:
    a shoe and bag shop, and others, for Fashion-MNIST; for other classes pairs of neighbours.
    """

    def build(classes: Sequence[str], num_stores: int, rng: np.random.Generator) -> Matrix:
        chosen = groups or _default_groups(classes)
        unknown = next((name for group in chosen for name in group if name not in classes), None)
        if unknown is not None:
            raise ConfigError(f"departments.groups: no class named {unknown!r}.{did_you_mean(unknown, classes)}")
        if not all(chosen):
            raise ConfigError("departments.groups: a group needs at least one class")
        rows = np.full((num_stores, len(classes)), mix / len(classes))
        for store in range(num_stores):
            group = sorted(set(chosen[store % len(chosen)]))
            rows[store, [classes.index(name) for name in group]] += (1 - mix) / len(group)
        return rows

    return build


def sizes(total: int, num_stores: int, ratio: float) -> Counts:
    """Images for each store, the first the largest: geometric from `ratio` to 1, but a few for everyone."""
    target = np.geomspace(ratio, 1, num_stores)
    target *= total / target.sum()
    result = np.floor(target).astype(np.int64)
    result[np.argsort(result - target, kind="stable")[: total - result.sum()]] += 1
    few = min(FEW, total // num_stores)
    while (poor := int(result.argmin())) != (rich := int(result.argmax())) and result[poor] < few:
        moved = min(few - result[poor], result[rich] - few)
        result[poor] += moved
        result[rich] -= moved
    return result


def share(labels: Labels, mix: Matrix, num_images: Counts, rng: np.random.Generator) -> list[Counts]:
    """Indices for each store, in random order: every image once, `num_images[s]` (they add up to all) to store s."""
    per_class = np.bincount(labels, minlength=mix.shape[1])
    counts = _round(_fit(mix, num_images, per_class), num_images, per_class)
    parts: list[list[Counts]] = [[] for _ in num_images]
    for label in range(mix.shape[1]):
        mine = rng.permutation(np.flatnonzero(labels == label))
        for store, some in enumerate(np.split(mine, np.cumsum(counts[:, label])[:-1])):
            parts[store].append(some)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def balanced(labels: Labels, count: int, rng: np.random.Generator) -> Counts:
    """Indices of `count` images, each class as often as the others while it lasts; `count` may exceed what is there."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels[order] == label)
        turn[where] = np.arange(len(where))
    return order[np.argsort(turn, kind="stable")][:count]


def _fit(mix: Matrix, num_images: Counts, per_class: Counts) -> Matrix:
    """The matrix nearest to the mix whose sums are at most, and nearly, those of stores (rows) and classes."""
    fitted = mix + NEVER
    for _ in range(300):
        fitted *= (num_images / np.maximum(fitted.sum(1), NEVER))[:, None]
        fitted *= per_class / np.maximum(fitted.sum(0), NEVER)
    fitted *= np.minimum(1, num_images / np.maximum(fitted.sum(1), NEVER))[:, None]
    return fitted


def _round(target: Matrix, num_images: Counts, per_class: Counts) -> Counts:
    """Whole images with exactly these sums: first the largest remainders, then whatever room is left."""
    counts = np.floor(target).astype(np.int64)
    rows, columns = num_images - counts.sum(1), per_class - counts.sum(0)
    for wanted, most in ((target - counts, 1), (target, None)):
        for cell in np.argsort(-wanted, axis=None, kind="stable"):
            s, c = np.unravel_index(cell, counts.shape)
            more = min(rows[s], columns[c], rows[s] if most is None else most)
            counts[s, c] += more
            rows[s] -= more
            columns[c] -= more
    return counts


def _default_groups(classes: Sequence[str]) -> list[list[str]]:
    if all(name in classes for group in DEPARTMENTS for name in group):
        return [list(group) for group in DEPARTMENTS]
    return [list(classes[i : i + 2]) for i in range(0, len(classes), 2)]
