"""Local optimizers. Each is given the shared parameters, which are views into the model's one vector.

A user's own comes in by the entry point group `raypipe.optimizer`: any function from parameters to a torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from raypipe.errors import ConfigError
from raypipe.registry import Registry

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer
else:  # settings are checked from signatures without torch
    Parameter: TypeAlias = Any
    Optimizer: TypeAlias = Any

Make: TypeAlias = Callable[[list[Parameter]], Optimizer]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]

optimizers: Registry[Make] = Registry("optimizer", modules=("raypipe.store.optimizers",))


def _eager(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """The optimizer without the wrappers that tell torch's compiler to stay away from its methods.

    Nothing is compiled here, and those wrappers import the compiler at their first use: 1.4 s of CPU in every store.
    """
    from torch import no_grad

    names = ("add_param_group", "state_dict", "load_state_dict", "step")
    plain = {name: getattr(getattr(kind, name), "__wrapped__", getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": no_grad()(plain["step"])})


@optimizers("sgd")
def sgd(*, momentum: Share = 0.0, weight_decay: NotNegative = 0.0, nesterov: bool = False) -> Make:
    """Plain by default: its bits are those of a plain PyTorch loop."""
    if nesterov and momentum == 0:
        raise ConfigError("sgd: nesterov needs a momentum above 0")

    def make(weights: list[Parameter]) -> Optimizer:
        from torch.optim import SGD

        said = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        return _eager(SGD)(weights, lr=0.0, foreach=True, **said)

    return make


@optimizers("adamw")
def adamw(
    *,
    betas: tuple[Share, Share] = (0.9, 0.999),
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8,
    weight_decay: NotNegative = 0.01,
) -> Make:
    """Decoupled weight decay. Loshchilov & Hutter 2017, arXiv:1711.05101."""

    def make(weights: list[Parameter]) -> Optimizer:
        from torch.optim import AdamW

        return _eager(AdamW)(weights, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    return make
