"""How one row of runs compares with another, pair by pair of equal seeds, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# One-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal's.
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
NORMAL95 = 1.645
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # two-sided 95 %


@dataclass(frozen=True, slots=True)
class Ratio:
    """More is better: of a metric of which less is better it is other / own."""

    mean: float
    low: float  # end of the one-sided 95 % interval; nan for one pair
    pairs: int

    @property
    def bound(self) -> float | None:
        """`low` where there is one."""
        return None if math.isnan(self.low) else self.low


def ratio(own: Mapping[int, float], other: Mapping[int, float], *, falls: bool = False) -> Ratio | None:
    """Of figures by seed, own / other. A pair whose divisor is not above 0 is left out: nothing can be said by it.

    `falls`: less is better in them.
    """
    pairs = [(own[seed], other[seed]) for seed in sorted(own) if seed in other]
    pairs = [(b, a) for a, b in pairs] if falls else pairs
    found = [above / below for above, below in pairs if below > 0]
    if not found:
        return None
    if len(found) == 1:
        return Ratio(found[0], math.nan, 1)
    free = len(found) - 1
    quantile = T95[free - 1] if free <= len(T95) else NORMAL95
    return Ratio(fmean(found), fmean(found) - quantile * stdev(found) / math.sqrt(len(found)), len(found))


def half_width(values: Sequence[float]) -> float:
    """Of the two-sided 95 % interval of a mean, of two values or more."""
    return _t975(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _t975(free: int) -> float:
    """Student's quantile; beyond the table by the expansion of Cornish and Fisher, there right to 0.002."""
    if free <= len(T975):
        return T975[free - 1]
    z = 1.95996
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
