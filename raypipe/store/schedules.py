"""Learning-rate schedules: the run's progress in [0, 1] to a factor of the plan's learning rate.

Progress is the run's and not the ticket's, so that a store that is seldom asked does not lag behind in its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, TypeAlias

from pydantic import Field

from raypipe.registry import Registry

Schedule: TypeAlias = Callable[[float], float]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]

schedules: Registry[Schedule] = Registry("schedule", modules=("raypipe.store.schedules",))


@schedules("constant")
def constant() -> Schedule:
    """Always 1."""
    return lambda progress: 1.0


@schedules("cosine")
def cosine(*, final_fraction: Share = 0.0, warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Schedule:
    """Linear warm-up from a hundredth, then half a cosine to `final_fraction`. Loshchilov & Hutter 2016, 1608.03983."""

    def factor(progress: float) -> float:
        if progress < warmup_fraction:
            return max(0.01, progress / warmup_fraction)
        done = (progress - warmup_fraction) / (1 - warmup_fraction)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


@schedules("step")
def step(*, at: list[Share] = [0.5, 0.75], factor: Annotated[float, Field(gt=0, le=1)] = 0.1) -> Schedule:  # noqa: B006  # never changed
    """Multiplied by `factor` at each of these points."""
    return lambda progress: factor ** sum(progress >= point for point in at)
