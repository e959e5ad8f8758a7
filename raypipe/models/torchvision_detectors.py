"""SSDlite and Faster R-CNN by torchvision, behind the same two methods as the other detectors; never downloaded.

Their own label 0 is the background, so labels are one higher inside. Slow to learn from nothing: for GPUs, or where
a warm start is at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from raypipe.errors import ConfigError
from raypipe.models import models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signatures without torch
    Module: TypeAlias = Any

Norm: TypeAlias = Literal["batch", "group"]


@models("ssdlite320_mobilenet_v3_large")
def ssdlite320_mobilenet_v3_large(num_outputs: int, channels: int, image_size: int, *, norm: Norm = "batch") -> Module:
    """2.2 million parameters for 4 classes; images are seen at 320 pixels. Sandler et al. 2018, arXiv:1801.04381."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    from raypipe.models.detector_adapter import Adapted
    from raypipe.models.torchvision_models import group_norm

    _colour("ssdlite320_mobilenet_v3_large", channels)
    made = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=num_outputs + 1,
        norm_layer=group_norm if norm == "group" else None,
    )
    return Adapted(made)


@models("fasterrcnn_mobilenet_v3_large_320_fpn")
def fasterrcnn_mobilenet_v3_large_320_fpn(num_outputs: int, channels: int, image_size: int) -> Module:
    """19 million parameters; images are seen at 320 pixels. Ren et al. 2015, arXiv:1506.01497."""
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    from raypipe.models.detector_adapter import Adapted

    _colour("fasterrcnn_mobilenet_v3_large_320_fpn", channels)
    made = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_outputs + 1,
    )
    return Adapted(made)


def _colour(name: str, channels: int) -> None:
    if channels != 3:
        raise ConfigError(f"{name} sees colour: set task.channels to 3")
