"""Control variates at a store: each of its steps goes as if the other stores' examples had a part in it.

SCAFFOLD, Karimireddy et al. 2020, arXiv:1910.06378, option II. With c_i the mean of a store's own gradients along its
last ticket and c the stores' mean of those, a store steps by `g - c_i + c`. The coordinator keeps both and sends what
is added, `c - c_i`, beside the weights; a store keeps nothing. For the way back the update is enough: the weights moved
by -reach * (mean gradient + c - c_i), so that the new c_i is `-update / reach - (c - c_i)`.

Where the correction goes in, and what reach is, depends on the local optimizer:

    gradient   SGD, with momentum too as long as it begins anew with each ticket: it is linear, so the correction is
               added to each gradient, and reach is the sum of what a gradient of one moves the weights by. Exact.
    step       everything else (AdamW; a momentum that goes on from ticket to ticket): the correction is added to each
               step, times the learning rate; c_i is the mean of the store's own *steps* and reach the sum of the
               learning rates. It corrects the drift of what the optimizer makes of gradients; no theorem says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from raypipe.errors import StoreRefused
from raypipe.types import Role

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raypipe.models.flat import FlatModel

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def in_gradient(optimizer: Mapping[str, Any], *, kept: bool) -> bool:
    """Whether the correction goes into the gradient. `kept`: the optimizer's state stays from ticket to ticket."""
    return optimizer["name"] == "sgd" and not (kept and optimizer.get("momentum"))


def reach(optimizer: Mapping[str, Any], steps: int, *, kept: bool) -> float:
    """By how much so many steps of learning rate 1 move the weights, of a gradient (or step) of ones."""
    rho = float(optimizer.get("momentum", 0.0)) if in_gradient(optimizer, kept=kept) else 0.0
    if not rho:
        return float(steps)
    heavy = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)  # the sum of all momenta
    return steps + rho * heavy if optimizer.get("nesterov") else heavy


def correct(optimizer: Optimizer, model: FlatModel, correction: Array, said: Mapping[str, Any], *, kept: bool) -> None:
    """From now on each step of `optimizer` is corrected. `correction`: c - c_i, float32 (layout.shared.stop,).

    Raises StoreRefused for one of another shape.
    """
    import torch

    size = model.layout.shared.stop
    if correction.shape != (size,) or correction.dtype != np.float32:
        raise StoreRefused(f"a correction of {correction.dtype} {correction.shape} came, not float32 ({size},)")
    whole = torch.tensor(correction, device=model.device)  # a copy: it may come in shared memory
    shared = [entry for entry in model.layout.entries if entry.role is Role.SHARED]
    pieces = [whole[entry.slice].view(entry.shape) for entry in shared]
    trained: list[torch.Tensor] = list(model.trained[: len(shared)])
    plain, inside = optimizer.step, in_gradient(said, kept=kept)

    @torch.no_grad()
    def step(*arguments: Any) -> Any:
        if inside:
            for parameter, piece in zip(trained, pieces, strict=True):
                parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)
            return plain(*arguments)
        done = plain(*arguments)
        torch._foreach_add_(trained, pieces, alpha=-optimizer.param_groups[0]["lr"])
        return done

    optimizer.step = step  # type: ignore[method-assign, assignment]  # of this one, for this ticket
