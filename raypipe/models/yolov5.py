"""YOLOv5, release 6 of the architecture, written anew in plain PyTorch: scales n, s, m, l and x.

Provenance. Made from public facts alone: the vendor's public description of the architecture (stem 6x6 of stride 2,
C3 blocks repeated 3-6-9-3 and 3 times in the neck, SPPF with kernel 5, channels 64 to 1024, the width and depth
factors, anchors, strides, decoding, loss gains and balances), the names and shapes of tensors in published
checkpoints, and the papers: CSPNet (arXiv:1911.11929), PANet (1803.01534), SPP (1406.4729), SiLU (1702.03118),
YOLOv4 and its scaled form (2004.10934, 2011.08036), CIoU (1911.08287). No line, file of settings or weight of any
implementation was copied. Parameters are named as in published checkpoints, so that a plain state dict loads by name.

Boxes are pixels of the square image. Targets are rows (image in the batch, label, centre x, centre y, width, height).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from raypipe.errors import ConfigError
from raypipe.models import models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signatures without torch
    Module: TypeAlias = Any

Norm: TypeAlias = Literal["batch", "group"]
Gain: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side: TypeAlias = Annotated[float, Field(gt=0, le=10_000)]
Anchors: TypeAlias = Annotated[list[tuple[Side, Side]], Field(min_length=9, max_length=9)]
Ratio: TypeAlias = Annotated[float, Field(gt=1, le=100)]

SCALES = {"n": (1 / 3, 0.25), "s": (1 / 3, 0.5), "m": (2 / 3, 0.75), "l": (1.0, 1.0), "x": (4 / 3, 1.25)}
PUBLIC_SIZE = 640  # pixels, of the public anchors
PUBLIC_CLASSES = 80
PUBLIC_ANCHORS = (
    *((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    *((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    *((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)


def scaled_anchors(image_size: int) -> list[tuple[float, float]]:
    """The public anchors, (width, height) in pixels of another image size; fitted ones serve small images better."""
    return [(w * image_size / PUBLIC_SIZE, h * image_size / PUBLIC_SIZE) for w, h in PUBLIC_ANCHORS]


def _part(scale: str) -> Callable[..., Module]:
    def part(
        num_outputs: int,
        channels: int,
        image_size: int,
        *,
        anchors: Anchors | None = None,
        norm: Norm = "batch",
        box_gain: Gain = 0.05,
        object_gain: Gain = 1.0,
        class_gain: Gain = 0.5,
        scale_gains: bool = False,
        match_ratio: Ratio = 4.0,
    ) -> Module:
        """n, s, m, l, x: 1.9, 7.2, 21, 47, 87 million parameters for 80 classes.

        `anchors`: nine (width, height) in pixels of this image size, the small ones first, the same for all stores;
        `raypipe anchors` fits them to boxes; None: the public ones, scaled. `match_ratio`: up to it the sides of a
        box and of an anchor match. `scale_gains`: objects count less in small images and classes less where they are
        few, as in the public recipe; at 160 pixels objects would hardly count then.
        """
        from raypipe.models.yolov5_net import Gains, Yolov5

        if image_size % 32:
            raise ConfigError(f"yolov5{scale} needs an image_size that is a multiple of 32, found {image_size}")
        sides = anchors if anchors is not None else scaled_anchors(image_size)
        if scale_gains:
            object_gain *= (image_size / PUBLIC_SIZE) ** 2
            class_gain *= num_outputs / PUBLIC_CLASSES
        gains = Gains(box_gain, object_gain, class_gain, match_ratio)
        return Yolov5(num_outputs, channels, *SCALES[scale], sides, norm, gains)

    return part


for _scale in SCALES:
    models(f"yolov5{_scale}")(_part(_scale))
