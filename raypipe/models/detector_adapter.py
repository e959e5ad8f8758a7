"""Torchvision's detectors as a `Detector`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Adapted(nn.Module):
    """`net` takes a list of images and dictionaries of targets, and answers by its mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Per image boxes, scores and labels, as torchvision gives them, labels from 0."""
        found = self.net(list(images))
        return [{**each, "labels": each["labels"] - 1} for each in found]

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sum of the net's own losses. An image without boxes teaches background only."""
        parts: dict[str, Tensor] = self.net(list(images), [_target(targets, i) for i in range(len(images))])
        total = images.new_zeros(())
        for part in parts.values():
            total = total + part
        return total

    def detect(self, images: Tensor, *, score: float, overlap: float, most: int) -> list[Tensor]:
        """As `raypipe.models.detector.Detector` says."""
        net: Any = self.net
        own = net.roi_heads if hasattr(net, "roi_heads") else net
        own.score_thresh, own.nms_thresh, own.detections_per_img = score, overlap, most
        rows = []
        for found in self(images):
            columns = (found["boxes"], found["scores"][:, None], found["labels"][:, None].to(found["boxes"].dtype))
            rows.append(_joined(columns))
        return rows


def _joined(columns: tuple[Tensor, ...]) -> Tensor:
    import torch

    return torch.cat(columns, 1)


def _target(targets: Tensor, image: int) -> dict[str, Tensor]:
    own = targets[targets[:, 0] == image]
    centre, half = own[:, 2:4], own[:, 4:6] / 2
    return {"boxes": _joined((centre - half, centre + half)), "labels": own[:, 1].long() + 1}
