"""Control variates at the coordinator: of each store the mean of its own gradients along its last ticket.

What they are and how a store uses them says store/correct.py. Here they are kept, derived from the updates as they
are decoded, so that a store uploads nothing more than its update. A table of them belongs to a version: what an update
says counts from the version on that it is folded into, and a late ticket is read with the table of its own base
version, whatever has been published since. Nothing is changed in place: tables of neighbouring versions share what
they have in common.

c is the mean over the stores that are in the table, by their worth (examples, or all the same). A store without a
variate steps uncorrected until it has one, and one that has not been heard of for `FORGOTTEN` versions leaves, so that
who is gone for good does not draw the others towards its last gradient. The paper starts with zeros instead, and
with few stores a version a store's first steps are then g + c. Where all take part the two are the same.

BatchNorm statistics, counters and frozen weights have no gradient and no variate: only the shared span has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Reach: TypeAlias = Callable[[int, float], float]  # (steps, the run's progress) -> reach, see store/correct.py

FORGOTTEN = 200  # versions
BLOCK = 1 << 18  # floats: temporaries stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Variate:
    """c_i: `values` float32 (shared,), never written to; `version`: the base that it was measured from."""

    values: Array
    worth: float
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """What went to a store with a ticket, by reference."""

    store: str
    mean: Array | None = None
    own: Array | None = None

    def correction(self) -> Array | None:
        """c - c_i, a new vector; None where there is nothing to correct."""
        if self.mean is None or self.own is None or self.mean is self.own:
            return None
        return self.mean - self.own


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What beside an update its variate is derived from."""

    sent: Sent
    steps: int
    progress: float
    worth: float
    base: int


@dataclass(frozen=True, slots=True, eq=False)
class Variates:
    """The table of one version."""

    known: Mapping[str, Variate] = field(default_factory=dict)
    mean: Array | None = None

    @classmethod
    def of(cls, known: Mapping[str, Variate]) -> Variates:
        """With the mean of these; in the order of the stores' names, so that bits repeat."""
        there = [known[store] for store in sorted(known) if known[store].worth > 0]
        if len(there) < 2:
            return cls(known, there[0].values if there else None)
        total = sum(variate.worth for variate in there)
        mean = np.zeros_like(there[0].values)
        for at in range(0, mean.size, BLOCK):
            block = mean[at : at + BLOCK]
            for variate in there:
                block += np.float32(variate.worth / total) * variate.values[at : at + BLOCK]
        return cls(known, mean)

    def sent(self, store: str) -> Sent:
        """What a ticket of this version brings to a store."""
        own = self.known.get(store)
        return Sent(store) if own is None else Sent(store, self.mean, own.values)

    def moved(self, notes: Mapping[str, Variate]) -> Variates:
        """The next version's, with what its updates say; who was not heard of for long leaves."""
        if not notes:
            return self
        known = {**self.known, **notes}
        newest = max(variate.version for variate in known.values())
        return Variates.of({s: v for s, v in known.items() if v.version >= newest - FORGOTTEN})


def derived(update: Array, learned: Learned, reach: float) -> Variate | None:
    """c_i after a ticket, from its decoded update; None where its learning rate was nothing, or it is not finite."""
    if reach <= 0:
        return None
    correction = learned.sent.correction()
    values = np.multiply(update, np.float32(-1.0 / reach), dtype=np.float32)
    if correction is not None:
        values -= correction
    return Variate(values, learned.worth, learned.base) if np.isfinite(values).all() else None
