"""Where a model's head is: the last dense layer, whose inputs are the features."""

from __future__ import annotations

from torch import nn

from raypipe.errors import ConfigError


def head_of(module: nn.Module, num_outputs: int) -> tuple[str, nn.Linear]:
    """Its name and itself. Raises ConfigError where there is none."""
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.Linear) and part.out_features == num_outputs and part.bias is not None:
            return name, part
    raise ConfigError("a head in closed form needs a model that ends in a dense layer with a bias")
