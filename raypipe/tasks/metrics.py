"""Metrics from sums, without torch: each sum is named as its metric, so that sums of many stores add up exactly."""

from __future__ import annotations

from collections.abc import Mapping

LOWER_IS_BETTER = frozenset({"loss"})


def metrics(sums: Mapping[str, float], num_examples: int) -> dict[str, float]:
    """Means over the examples; nothing for none."""
    return {name: value / num_examples for name, value in sums.items()} if num_examples else {}


def lower_is_better(metric: str) -> bool:
    """Whether the smaller value is the better one."""
    return metric in LOWER_IS_BETTER
