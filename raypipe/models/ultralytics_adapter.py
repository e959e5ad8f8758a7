"""A `Detector` of a module that the package ultralytics builds; importing this imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg  # type: ignore[import-not-found]  # an extra
from ultralytics.nn.tasks import DetectionModel  # type: ignore[import-not-found]
from ultralytics.utils import SETTINGS  # type: ignore[import-not-found]

from raypipe.models.detector import boxes_of

# Sync and its trackers. By dict's own update, since theirs writes a file: the user's, if it was imported before.
dict.update(SETTINGS, {name: False for name, value in SETTINGS.items() if value is True})


class Ultralytics(nn.Module):
    """Its loss takes centres and sides as shares of the image, sorted by image; ours are in pixels."""

    def __init__(self, architecture: str, num_outputs: int, channels: int) -> None:
        super().__init__()
        self.net: Any = DetectionModel(architecture, ch=channels, nc=num_outputs, verbose=False)
        self.net.args = get_cfg()

    def forward(self, images: Tensor) -> Tensor:
        """Centres, sides and a chance for each class, (n, 4 + classes, places)."""
        found = self.net(images)
        decoded: Tensor = found[0] if isinstance(found, tuple) else found
        return decoded

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """As `raypipe.models.detector.Detector` says: the mean over the batch of its three parts' sum."""
        rows = targets[torch.argsort(targets[:, 0], stable=True)]
        batch = {
            "img": images,
            "batch_idx": rows[:, 0],
            "cls": rows[:, 1:2],
            "bboxes": rows[:, 2:6] / images.shape[-1],
        }
        parts, _ = self.net.loss(batch)
        total: Tensor = parts.sum() / len(images)
        return total

    def detect(self, images: Tensor, *, score: float, overlap: float, most: int) -> list[Tensor]:
        """As `raypipe.models.detector.Detector` says."""
        rows = []
        for place in self(images).transpose(1, 2):
            centre, half = place[:, :2], place[:, 2:4] / 2
            corners = torch.cat((centre - half, centre + half), 1)
            rows.append(boxes_of(corners, place[:, 4:], score, overlap, most))
        return rows
