"""Where a model's head is: the last dense layer, whose inputs are the features."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from raypipe.errors import ConfigError

Trained: TypeAlias = str | Sequence[str]  # "all", "head", or patterns of tensors' names


def freeze(module: nn.Module, trained: Trained, num_outputs: int) -> None:
    """Only what is `trained` keeps its gradient: all, the head, or tensors whose names fit one of the patterns.

    A norm layer whose weights are frozen keeps its statistics too. Raises ConfigError for a pattern that fits nothing.
    """
    if trained == "all":
        return
    patterns = [trained] if isinstance(trained, str) else list(trained)
    if trained == "head":
        patterns = [f"{head_of(module, num_outputs)[0]}.*"]
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise ConfigError(f"train.trained: no tensor's name fits {pattern!r}; they begin with {shown}")
    for name, parameter in module.named_parameters():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def head_of(module: nn.Module, num_outputs: int) -> tuple[str, nn.Linear]:
    """Its name and itself. Raises ConfigError where there is none."""
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.Linear) and part.out_features == num_outputs and part.bias is not None:
            return name, part
    raise ConfigError("a head in closed form needs a model that ends in a dense layer with a bias")
