"""The one shape in which weights live: a flat float32 vector and the table that says what lies where.

Roles decide what a federation may do with an entry (design, part 4):

    shared     trained together; an update carries its delta; transforms, clipping and noise see only these
    statistic  BatchNorm means and variances; an update carries values, averaged as values; where a variance has a mean
               beside it, its value is the second moment about the base version's mean, so that the average is exact
    frozen     sent once, never changed by training
    local      trained, and stays at the store: a version has what the run began with; see models/personal.py
    fixed      anchors, integer counters: overwritten from the base version, never averaged

Entries are ordered by role, so that each role is one contiguous slice and an update is a prefix of the vector.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    Vector: TypeAlias = np.ndarray[Any, np.dtype[Any]]

WORTH_BYTES = 1 << 16  # sent apart from this size on
MEAN, VARIANCE = "running_mean", "running_var"  # as torch's norm layers name them
ALIGN = 16  # floats: 64 bytes, a cache line and a vector register


class Role(StrEnum):
    """What may happen to an entry of the vector."""

    SHARED = "shared"
    STATISTIC = "statistic"
    FROZEN = "frozen"
    LOCAL = "local"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Entry:
    """One named tensor: `offset` and `size` count floats; `dtype` is the tensor's own, e.g. "int64"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """The table of a flat vector of `size` floats; padding between entries is zero."""

    entries: tuple[Entry, ...]
    size: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], str, Role]]) -> Self:
        """Lay tensors (name, shape, dtype, role) out, by role, in the order given within a role."""
        order = list(Role)
        entries, at = [], 0
        for name, shape, dtype, role in sorted(tensors, key=lambda t: order.index(t[3])):
            entries.append(Entry(name, tuple(shape), dtype, role, at))
            at += -(-max(1, math.prod(shape)) // ALIGN) * ALIGN
        return cls(tuple(entries), at)

    def span(self, *roles: Role) -> slice:
        """The slice that holds these (adjacent) roles, padding included; empty when there are none."""
        places = [i for i, e in enumerate(self.entries) if e.role in roles]
        if not places:
            return slice(0, 0) if Role.SHARED in roles else slice(self.update_size, self.update_size)
        after = places[-1] + 1
        end = self.entries[after].offset if after < len(self.entries) else self.size
        return slice(self.entries[places[0]].offset, end)

    @property
    def shared(self) -> slice:
        return self.span(Role.SHARED)

    @property
    def local(self) -> slice:
        return self.span(Role.LOCAL)

    @property
    def statistic(self) -> slice:
        stop = self.update_size
        return slice(min(self.shared.stop, stop), stop)

    def with_statistics(self, vector: Vector, statistics: Vector) -> Vector:
        """A copy of the vector with these in the place of its own."""
        changed = vector.copy()
        changed[self.statistic] = statistics
        return changed

    @property
    def update_size(self) -> int:
        """Floats of an update: the shared entries (as delta), then the statistics (as values)."""
        sent = (Role.SHARED, Role.STATISTIC)
        return next((e.offset for e in self.entries if e.role not in sent), self.size)

    @property
    def splits(self) -> bool:
        """Whether what no version changes is worth sending apart, and once: frozen weights, not a few counters."""
        return 4 * (self.size - self.update_size) >= WORTH_BYTES

    @property
    def moments(self) -> tuple[tuple[slice, slice], ...]:
        """Where means and variances lie that belong to each other: statistics of the same norm layer."""
        known = {e.name: e for e in self.entries if e.role is Role.STATISTIC}
        means = [name for name in known if name.rpartition(".")[2] == MEAN]
        pairs = ((known[name], known.get(name.removesuffix(MEAN) + VARIANCE)) for name in means)
        return tuple((mean.slice, variance.slice) for mean, variance in pairs if variance is not None)

    @property
    def fingerprint(self) -> str:
        """Equal for equal layouts; two ends that differ must not exchange vectors."""
        return _fingerprint(self)

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "entries": [asdict(e) for e in self.entries]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        entries = (Entry(**{**e, "shape": tuple(e["shape"]), "role": Role(e["role"])}) for e in data["entries"])
        return cls(tuple(entries), data["size"])


@lru_cache(maxsize=16)
def _fingerprint(layout: Layout) -> str:
    """A store asks with each ticket: of a ResNet-18's table it takes 2 ms to write."""
    return hashlib.sha256(json.dumps(layout.to_json(), sort_keys=True).encode()).hexdigest()[:16]
