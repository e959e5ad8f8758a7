"""When a model has learned what it will: a pooled opponent that is stopped early is no opponent."""

from __future__ import annotations

from collections.abc import Sequence

GAIN = 0.005  # of the metric: less than this in the last fifth is a plateau
LEAST = 10  # judgements before anything can be said


def gained(scores: Sequence[float], *, lower_is_better: bool = False, least: int = LEAST) -> float | None:
    """What the last fifth of these scores, in order of time and evenly spaced, brought; None for fewer than `least`.

    It is the best score of all over the best one before that fifth: a single lucky score early does not hide that the
    later ones rise, a single bad one at the end does not look like a gain.
    """
    if len(scores) < max(2, least):
        return None
    best = min if lower_is_better else max
    before = best(scores[: -max(1, len(scores) // 5)])
    return abs(best([before, *scores]) - before)


def plateaued(
    scores: Sequence[float], *, lower_is_better: bool = False, gain: float = GAIN, least: int = LEAST
) -> bool:
    """Whether the last fifth of these scores brought less than `gain`."""
    found = gained(scores, lower_is_better=lower_is_better, least=least)
    return found is not None and found < gain


def plateau_line(gain: float | None, judged: int) -> str:
    """In words; `judged`: how many validation scores there were."""
    if gain is None:
        return f"plateau unknown: judged {judged} times, it takes {LEAST}"
    return f"{'at' if gain < GAIN else 'no'} plateau: {gain:.3f} gained in the last fifth"
