"""Small convolutional networks for small images: the default, made for a laptop's cores, and that of NIID-Bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from raypipe.errors import ConfigError
from raypipe.models import models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signature without torch
    Module: TypeAlias = Any


@models("small_cnn")
def small_cnn(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    width: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 16,
    hidden: Annotated[int, Field(ge=8, le=4096)] = 64,
    norm: Literal["group", "batch", "none"] = "group",
) -> Module:
    """Two 3x3 convolutions, each halved by pooling, and two dense layers; 106k parameters at 28x28x1, 137k at 32x32x3.

    GroupNorm by default and not BatchNorm, since its result does not hang on what else is in a store's batch.
    """
    from torch import nn

    if image_size < 8:
        raise ConfigError(f"small_cnn needs image_size >= 8, found {image_size}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        normalised = {"group": nn.GroupNorm(8, outputs), "batch": nn.BatchNorm2d(outputs), "none": nn.Identity()}[norm]
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), normalised, nn.ReLU(), nn.MaxPool2d(2)]
        return [layer for layer in layers if not isinstance(layer, nn.Identity)]  # names of tensors go by place

    return nn.Sequential(
        *block(channels, width),
        *block(width, 2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * (image_size // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_outputs),
    )


@models("lenet")
def lenet(num_outputs: int, channels: int, image_size: int) -> Module:
    """As NIID-Bench trains it: two 5x5 convolutions of 6 and 16 channels, each halved by pooling, dense 120 and 84.

    44,426 parameters at 28x28x1. LeCun et al. 1998, with ReLU; Li et al. 2022, arXiv:2102.02079.
    """
    from torch import nn

    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ConfigError(f"lenet needs image_size >= 16, found {image_size}")
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * side**2, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, num_outputs),
    )
