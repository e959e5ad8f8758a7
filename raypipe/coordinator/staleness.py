"""How much less an update weighs the older the version it was trained from: s(tau), s(0) = 1, never rising.

tau counts versions published between the one trained on and the one folded into. Xie et al. 2019 (FedAsync),
arXiv:1903.03934, section 5; FedBuff (arXiv:2106.06639) takes the polynomial with exponent 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

from pydantic import Field

from raypipe.registry import Registry

Staleness: TypeAlias = Callable[[int], float]  # tau, in versions -> a factor in (0, 1]

staleness: Registry[Staleness] = Registry("staleness")


@staleness("constant")
def constant() -> Staleness:
    """Age does not matter: right where tau is the same for all, as in wait-for-all."""
    return lambda tau: 1.0


@staleness("polynomial")
def polynomial(*, exponent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5) -> Staleness:
    """(1 + tau)^-exponent: 1, 0.71, 0.58, ... for the default."""
    return lambda tau: float((1.0 + tau) ** -exponent)


@staleness("hinge")
def hinge(
    *, a: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0, b: Annotated[int, Field(ge=0)] = 4
) -> Staleness:
    """Full weight up to b versions, then 1 / (a (tau - b) + 1)."""
    return lambda tau: 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)
