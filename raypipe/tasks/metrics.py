"""Metrics from sums, without torch, so that what many stores send adds up to what pooled examples would give.

A store sends sums over its examples and nothing else. Five kinds, by name:

    loss, accuracy, ...      the metric itself, summed: the mean over all examples is the pooled metric
    moments/...              of a target y and its error e: sums of e^2, y, y^2. From them rmse and r2 of all rows,
                             exactly those of the pooled rows
    scores/1/B, scores/0/B   how many positives (1) and negatives (0) have a score in bin B. From them auc and
                             average_precision of all rows, exactly those of the pooled scores rounded to their bins
    labels/C, hits/C         images of class C, and those of them that were told right. From them recall/C, and recall,
                             their mean over the classes that there are
    boxes/C, found/C/B/O     boxes of class C, and detections by score and by what they hit. From them map50 and map
                             of all detections; see precision.py

A mean of the stores' own AUCs is another number than the AUC of all rows (it never compares one store's positives
with another's negatives), and a mean of their R2 is not even bounded by it. So both are made here, from the sums of
all stores. A bin ties the scores in it, as rounding would: the AUC of the raw scores lies within `auc_error`.

Sums divided by the number of examples are means, and means of many stores, weighted by their examples, are the means
of all: so the coordinator keeps means and derives the metrics last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from raypipe.tasks.precision import BOXES, FOUND, boxes_precision

LOWER_IS_BETTER = frozenset({"loss", "rmse"})
MOMENTS = "moments/"
SCORES = "scores/"
LABELS, HITS = "labels/", "hits/"
COUNTS = (MOMENTS, SCORES, LABELS, HITS, BOXES, FOUND)  # what metrics are derived from


def means(sums: Mapping[str, float], num_examples: int) -> dict[str, float]:
    """Per example; nothing for none."""
    return {name: value / num_examples for name, value in sums.items()} if num_examples else {}


def metrics(sums: Mapping[str, float], num_examples: int) -> dict[str, float]:
    """The metrics that these sums stand for; nothing for no examples."""
    return derived(means(sums, num_examples))


def derived(mean: Mapping[str, float]) -> dict[str, float]:
    """Metrics from means over all examples. What cannot be had (one class only, a constant target) is left out."""
    found = {name: value for name, value in mean.items() if not name.startswith(COUNTS)}
    if f"{MOMENTS}squared_error" in mean:
        error, y, square = (mean.get(f"{MOMENTS}{of}", 0.0) for of in ("squared_error", "target", "target_squared"))
        found["rmse"] = math.sqrt(error)
        if (variance := square - y * y) > 1e-12 * max(1.0, square):
            found["r2"] = 1.0 - error / variance
    positives, negatives = _histogram(mean, 1), _histogram(mean, 0)
    if positives and negatives:
        found["auc"] = auc(positives, negatives)
        found["average_precision"] = average_precision(positives, negatives)
    return found | _recalls(mean) | boxes_precision(mean)


def _recalls(mean: Mapping[str, float]) -> dict[str, float]:
    there = {name.removeprefix(LABELS): value for name, value in mean.items() if name.startswith(LABELS) and value > 0}
    recalls = {f"recall/{place}": mean.get(f"{HITS}{place}", 0.0) / value for place, value in there.items()}
    return recalls | {"recall": sum(recalls.values()) / len(recalls)} if recalls else {}


def auc(positives: Mapping[int, float], negatives: Mapping[int, float]) -> float:
    """Area under the ROC curve from counts by bin: how often a positive's bin is above a negative's, ties half."""
    below = won = 0.0
    for place in sorted({*positives, *negatives}):
        here = negatives.get(place, 0.0)
        won += positives.get(place, 0.0) * (below + 0.5 * here)
        below += here
    return won / (below * sum(positives.values()))


def auc_error(positives: Mapping[int, float], negatives: Mapping[int, float]) -> float:
    """How far the AUC of the raw scores may lie from `auc`: half the pairs that share a bin."""
    tied = sum(count * negatives.get(place, 0.0) for place, count in positives.items())
    return 0.5 * tied / (sum(positives.values()) * sum(negatives.values()))


def average_precision(positives: Mapping[int, float], negatives: Mapping[int, float]) -> float:
    """The sum over thresholds, from the highest bin down, of precision times the recall that is gained."""
    total = sum(positives.values())
    found = seen = area = 0.0
    for place in sorted({*positives, *negatives}, reverse=True):
        new = positives.get(place, 0.0)
        found += new
        seen += new + negatives.get(place, 0.0)
        area += found / seen * new / total
    return area


def lower_is_better(metric: str) -> bool:
    """Whether the smaller value is the better one."""
    return metric in LOWER_IS_BETTER


def _histogram(mean: Mapping[str, float], of: int) -> dict[int, float]:
    start = f"{SCORES}{of}/"
    return {int(name[len(start) :]): value for name, value in mean.items() if name.startswith(start) and value > 0}
