"""BatchNorm layers in the order in which a batch meets them, and sums of their inputs: aggregation/statistics.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raypipe.types import MEAN, Layout, Role

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


class _EnoughError(Exception):
    """What comes after the layer is not computed."""


def norm_order(module: nn.Module, layout: Layout, batch: Callable[[], object]) -> list[str]:
    """Names of the layers whose statistics versions carry, as a batch meets them."""
    carried = {entry.name for entry in layout.entries if entry.role is Role.STATISTIC}
    met: list[str] = []

    def meeting(name: str) -> Callable[..., None]:
        return lambda *_: met.append(name)

    hooks = [
        part.register_forward_pre_hook(meeting(name))
        for name, part in module.named_modules()
        if isinstance(part, _NormBase) and f"{name}.{MEAN}" in carried
    ]
    module.eval()
    try:
        with torch.inference_mode():
            batch()
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(met))


class Sums:
    """Of a layer's inputs: how many numbers a channel has, and for each channel their sum and that of their squares."""

    def __init__(self) -> None:
        self.num, self.sums, self.squares = 0.0, np.zeros(0), np.zeros(0)

    def add(self, inputs: Tensor) -> None:
        """(images, channels, ...)."""
        found = inputs.detach().double().flatten(2) if inputs.ndim > 2 else inputs.detach().double()[:, :, None]
        self.num += found.shape[0] * found.shape[2]
        self.sums = found.sum((0, 2)).cpu().numpy() + (self.sums if self.sums.size else 0.0)
        self.squares = found.square().sum((0, 2)).cpu().numpy() + (self.squares if self.squares.size else 0.0)

    def packed(self) -> Array:
        """(1 + 2 * channels,), float64."""
        return np.concatenate([[self.num], self.sums, self.squares])


@contextmanager
def summing(module: nn.Module, layer: str) -> Iterator[Sums]:
    """Within it a batch that goes through `reach` ends at this layer."""
    sums = Sums()

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add(inputs[0])
        raise _EnoughError

    handle = module.get_submodule(layer).register_forward_pre_hook(hook)
    try:
        yield sums
    finally:
        handle.remove()


def reach(batch: Callable[[], object]) -> None:
    """As far as the layer that is summed."""
    with suppress(_EnoughError):
        batch()
