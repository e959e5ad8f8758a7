"""How a version moves: server transforms of the aggregated update, which is ADDED (a pseudo-gradient, not a gradient).

A transform is a pair `init(size) -> state`, `update(weights, step, state)`; both vectors are the shared span,
changed in place, block by block, so that no temporary is as large as a model. The state is a dict of flat float32
tensors and nothing else: it is what has to be saved beside the weights to go on after a crash.

Reddi et al. 2021, Adaptive Federated Optimization, arXiv:2003.00295.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from raypipe.registry import Registry
from raypipe.types import Layout

if TYPE_CHECKING:  # a transform's settings are checked without torch, which takes a second to import
    import torch

    from raypipe.aggregation.fold import Mean

State: TypeAlias = "dict[str, torch.Tensor]"
Rate: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]

BLOCK = 1 << 20  # floats
AVERAGE = "average"  # in the state of `ema`


@dataclass(frozen=True, slots=True)
class Transform:
    """See the top of the file."""

    init: Callable[[int], State]
    update: Callable[[torch.Tensor, torch.Tensor, State], None]


transforms: Registry[Transform] = Registry("transform")


@transforms("sgd")
def sgd(*, lr: Rate = 1.0) -> Transform:
    """weights += lr * step. With lr 1 exactly base + mean: FedAvg."""

    def update(weights: torch.Tensor, step: torch.Tensor, state: State) -> None:
        weights.add_(step, alpha=lr)

    return Transform(lambda size: {}, update)


@transforms("momentum")
def momentum(*, lr: Rate = 1.0, beta: Share = 0.9, dampened: bool = True) -> Transform:
    """m = beta m + (1 - beta) step; weights += lr m. Hsu et al. 2019 (FedAvgM), arXiv:1909.06335.

    Dampened by default: without, m = beta m + step moves 1 / (1 - beta) times as far, and lr 1 diverges.
    Under staleness momentum is a known failure (arXiv:2401.09135): prefer sgd where stores are not waited for.
    """

    def update(weights: torch.Tensor, step: torch.Tensor, state: State) -> None:
        for w, s, m in _blocks(weights, step, state["m"]):
            m.mul_(beta).add_(s, alpha=1.0 - beta if dampened else 1.0)
            w.add_(m, alpha=lr)

    return Transform(lambda size: {"m": _full(size)}, update)


@transforms("adam")
def adam(*, lr: Rate = 0.03, beta1: Share = 0.9, beta2: Share = 0.99, eps: Rate = 1e-3) -> Transform:
    """m = b1 m + (1 - b1) step; v = b2 v + (1 - b2) step^2; weights += lr m / (sqrt(v) + eps).

    As in arXiv:2003.00295, algorithm 2: v starts at eps^2 and there is no bias correction.
    """

    def init(size: int) -> State:
        return {"m": _full(size), "v": _full(size, eps**2)}

    def update(weights: torch.Tensor, step: torch.Tensor, state: State) -> None:
        for w, s, m, v in _blocks(weights, step, state["m"], state["v"]):
            m.mul_(beta1).add_(s, alpha=1.0 - beta1)
            v.mul_(beta2).addcmul_(s, s, value=1.0 - beta2)
            w.addcdiv_(m, v.sqrt().add_(eps), value=lr)

    return Transform(init, update)


@transforms("ema")
def ema(*, lr: Rate = 1.0, decay: Share = 0.9, ramp: Rate = 10.0) -> Transform:
    """weights += lr * step, as sgd, and beside them their running average, which is judged at the end of a run.

    The average's decay grows with the versions, decay * (1 - e^(-n / ramp)): without, it would lag far behind at first
    (measured on a detector: .0005 against .106). Training goes on from the weights, not from the average: to
    train from it is nothing but dampened momentum.
    """

    def init(size: int) -> State:
        return {AVERAGE: _full(size), "versions": _full(1)}

    def update(weights: torch.Tensor, step: torch.Tensor, state: State) -> None:
        if state["versions"] == 0:
            state[AVERAGE].copy_(weights)
        state["versions"] += 1
        keep = decay * (1 - math.exp(-float(state["versions"]) / ramp))
        for w, s, a in _blocks(weights, step, state[AVERAGE]):
            w.add_(s, alpha=lr)
            a.mul_(keep).add_(w, alpha=1 - keep)

    return Transform(init, update)


def averaged(weights: torch.Tensor, layout: Layout, average: torch.Tensor) -> torch.Tensor:
    """A copy of the whole vector (layout.size,) with `ema`'s average in the place of the shared weights."""
    vector = weights.clone()
    vector[layout.shared] = average
    return vector


def apply(
    weights: torch.Tensor,
    mean: Mean,
    layout: Layout,
    transform: Transform,
    state: State,
    statistic_mix: float = 1.0,
) -> None:
    """Make the next version of `weights`, the whole flat vector (layout.size,), in place.

    Shared entries move by the transform. Statistics are values: (1 - mix) * old + mix * mean, with mix 1 exactly
    the mean; updates of no weight say nothing about them. Frozen, local and fixed entries stay as they are.
    Variances come as second moments about the base's mean, which for updates from this version gives the variance of
    all images together, exactly; from an older base what its mean has moved since is left out.
    """
    transform.update(weights[layout.shared], mean.shared, state)
    if mean.weight == 0.0:
        return
    moments = layout.moments
    before = [weights[mean].clone() for mean, _ in moments]
    statistic = weights[layout.statistic]
    if statistic_mix == 1.0:
        statistic.copy_(mean.statistic)
    else:
        statistic.mul_(1.0 - statistic_mix).add_(mean.statistic, alpha=statistic_mix)
    for (place, variance), old in zip(moments, before, strict=True):
        weights[variance].sub_((weights[place] - old).square_()).clamp_(min=0.0)


def server_memory(layout: Layout, transform: Transform) -> int:
    """Floats that the coordinator holds: the weights, the transform's state and the fold's two vectors."""
    shared: int = layout.shared.stop
    vectors = sum(tensor.numel() == 2 for tensor in transform.init(2).values())
    return layout.size + vectors * shared + 2 * layout.update_size


def _full(size: int, value: float = 0.0) -> torch.Tensor:
    import torch

    return torch.full((size,), value)


def _blocks(*vectors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    for at in range(0, vectors[0].numel(), BLOCK):
        yield tuple(vector[at : at + BLOCK] for vector in vectors)
