"""What every detection model offers beside its weights, so that the task knows none by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torchvision.ops import batched_nms

SEEN = 0.05  # chance of an object of a class that nobody labelled from which a place is no background
CANDIDATES = 1000  # an image, before overlapping ones are removed: an untrained model sees something everywhere


@runtime_checkable
class Detector(Protocol):
    """A module for square images (n, channels, size, size) in [0, 1]."""

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """A scalar. Targets are rows (image in the batch, label, centre x, centre y, width, height), in pixels."""

    def detect(self, images: Tensor, *, score: float, overlap: float, most: int) -> list[Tensor]:
        """For each image rows (x1, y1, x2, y2, score, label), the best first, at most so many.

        Above this score; of two boxes of a label with more than this overlap (intersection over union) the better.
        """


def boxes_of(corners: Tensor, chances: Tensor, score: float, overlap: float, most: int) -> Tensor:
    """Rows as in `Detector.detect`, of boxes (k, 4) and a chance for each class (k, classes)."""
    place, label = (chances > score).nonzero(as_tuple=True)
    found = chances[place, label]
    if len(found) > CANDIDATES:
        found, best = found.topk(CANDIDATES)
        place, label = place[best], label[best]
    boxes = corners[place]
    kept = batched_nms(boxes, found, label, overlap)[:most]
    return torch.cat((boxes[kept], found[kept, None], label[kept, None].to(boxes.dtype)), 1)
