"""Average precision from counts that may leave a store, without torch: COCO's, of all stores' detections together.

A store matches its detections to its boxes itself. What it sends are sums, as of every metric:

    boxes/C          how many boxes of class C there are
    found/C/B/O      how many detections of class C have a score in bin B and came out as O: bit i says that it hit a
                     box at the i-th of COCO's ten overlaps, bit 10 + i that it met an ignored one there; else a miss

No image, box or detection leaves it. Such counts of many stores add up, so the precision over all stores together is
known; the mean of the stores' own precisions is another number. Detections in one bin tie, as rounding would tie them.

Matching and interpolation as in COCO (Lin et al. 2014, arXiv:1405.0312): each detection, the best first, takes the
free box of its class that it overlaps most; crowds and difficult boxes are neither hits nor misses; 101 recalls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
Counts: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]

BOXES, FOUND = "boxes/", "found/"
OVERLAPS = np.linspace(0.5, 0.95, 10)
_UP = float(np.float32(0.01)) * np.arange(51)
RECALLS = np.concatenate([_UP[:50], 1 - _UP[::-1]]).astype(np.float32).astype(np.float64)  # 101, rounded as by torch
ALMOST_ONE = 1 - 1e-10
ALMOST = 1e-9  # counts divided by the number of images come back with such an error
_BITS = 1 << np.arange(len(OVERLAPS))


def judged(found: Floats, boxes: Floats, labels: Counts, ignored: Flags, *, num_bins: int) -> Counter[str]:
    """The sums of one image. `found` (k, 6): x1, y1, x2, y2, score, label, at most 100; `boxes` (m, 4): corners."""
    sums = Counter(f"{BOXES}{label}" for label in labels[~ignored].tolist())
    own = found[:, 5].astype(np.int64)
    for label in np.unique(own).tolist():
        mine = found[own == label]
        mine = mine[np.argsort(-mine[:, 4], kind="stable")]
        true = labels == label
        outcomes = _outcomes(_overlaps(mine[:, :4], boxes[true], ignored[true]), ignored[true])
        places = zip(bins(mine[:, 4], num_bins).tolist(), outcomes.tolist(), strict=True)
        sums.update(f"{FOUND}{label}/{place}/{outcome:x}" for place, outcome in places)
    return sums


def bins(scores: Floats, num_bins: int) -> Counts:
    """The bin of each score in [0, 1]; narrower where scores are low and many."""
    return np.minimum((np.sqrt(np.clip(scores, 0, 1)) * num_bins).astype(np.int64), num_bins - 1)


def boxes_precision(mean: Mapping[str, float]) -> dict[str, float]:
    """`map50` and `map` (overlaps .5 to .95), means over the classes that there are; nothing for none.

    Of sums, or of sums that are all divided by one number. A name that `judged` does not make is passed over.
    """
    there = {name[len(BOXES) :]: value for name, value in mean.items() if name.startswith(BOXES) and value > 0}
    rows: dict[str, list[tuple[int, int, float]]] = {label: [] for label in there}
    for name, value in mean.items():
        match name.split("/"):
            case ["found", label, place, outcome] if label in rows and value > 0 and _written(place, outcome):
                rows[label].append((int(place), int(outcome, 16), value))
    if not there:
        return {}
    each = np.array([_class_precision(rows[label], value) for label, value in there.items()])  # (classes, overlaps)
    return {"map50": float(each[:, 0].mean()), "map": float(each.mean())}


def _written(place: str, outcome: str) -> bool:
    return place.isdecimal() and place.isascii() and set(outcome) <= set("0123456789abcdef") and 0 < len(outcome) < 6


def _class_precision(rows: list[tuple[int, int, float]], boxes: float) -> Floats:
    """At each overlap, of one class with so many boxes."""
    if not rows:
        return np.zeros(len(OVERLAPS))
    place, outcome, count = (np.array(column) for column in zip(*rows, strict=True))
    bits = outcome[:, None]
    hit = ((bits & _BITS) > 0) * count[:, None]
    miss = ((bits & (_BITS | _BITS << len(OVERLAPS))) == 0) * count[:, None]
    _, group = np.unique(-place, return_inverse=True)
    hits, misses = (np.zeros((group.max() + 1, len(OVERLAPS))) for _ in range(2))
    np.add.at(hits, group, hit)
    np.add.at(misses, group, miss)
    hits, seen = hits.cumsum(0), hits.cumsum(0) + misses.cumsum(0)
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    best = np.maximum.accumulate(precision[::-1], 0)[::-1]
    result = np.zeros(len(OVERLAPS))
    for at in range(len(OVERLAPS)):
        first = np.searchsorted(hits[:, at] / boxes + ALMOST, RECALLS, side="left")
        result[at] = np.append(best[:, at], 0.0)[first].mean()
    return result


def _outcomes(overlap: Floats, ignored: Flags) -> Counts:
    """Of each detection (rows, the best first)."""
    least = np.minimum(OVERLAPS, ALMOST_ONE)
    outcomes = np.zeros(len(overlap), np.int64)
    free = np.ones((len(OVERLAPS), len(ignored)), np.bool_)
    for row in np.flatnonzero(overlap.max(1, initial=0.0) >= least[0]):
        able = overlap[row] >= least[:, None]
        good = np.where(able & free & ~ignored, overlap[row], -1.0)
        pick = good.shape[1] - 1 - good[:, ::-1].argmax(1)  # of equal ones the last, as COCO takes it
        hit = good[np.arange(len(OVERLAPS)), pick] >= 0
        beside = ~hit & (able & ignored).any(1)
        free[hit, pick[hit]] = False
        outcomes[row] = (hit @ _BITS) | (beside @ _BITS) << len(OVERLAPS)
    return outcomes


def _overlaps(found: Floats, boxes: Floats, ignored: Flags) -> Floats:
    """Intersection over union; over the detection's own area where the box is a crowd."""
    low = np.maximum(found[:, None, :2], boxes[None, :, :2])
    high = np.minimum(found[:, None, 2:], boxes[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(2)
    own, theirs = ((b[:, 2:] - b[:, :2]).prod(1) for b in (found, boxes))
    whole = np.where(ignored, own[:, None], own[:, None] + theirs - inside)
    return np.asarray(np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0))
