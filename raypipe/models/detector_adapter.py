"""Torchvision's detectors as a `Detector`.

A store that cannot label a class has its things in images without a box. Where another model (the version that the
ticket began with) finds such a thing, its box comes among the targets with the label OTHER: anchors and proposals that
would be taught to be it are taught nothing then, neither to be it nor to be background, as with crowds in COCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, nms

from raypipe.models.detector import SEEN

Target: TypeAlias = dict[str, Tensor]
OTHER = -1  # a label; torchvision's own sampler of proposals leaves out what is below 0
SAME = 0.5  # two boxes that overlap so much are of one thing
LEAST_SIDE = 1.0  # pixels, of a box that is found: one without an extent is refused as a target
CERTAIN = 100.0  # logit of what is taught nothing: neither loss nor slope, so never among the hardest either


class Adapted(nn.Module):
    """`net` takes a list of images and dictionaries of targets, and answers by its mode."""

    restricts = True  # `loss` takes `among` and `seen`

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        if isinstance(net, SSD):  # torchvision builds it: but for one method they stay as they are
            net.__class__ = _Ssd
        else:
            self.net.rpn.__class__ = _Rpn

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Per image boxes, scores and labels, as torchvision gives them, labels from 0."""
        found = self.net(list(images))
        return [{**each, "labels": each["labels"] - 1} for each in found]

    def loss(
        self, images: Tensor, targets: Tensor, among: Sequence[int] | None = None, seen: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The sum of the net's own losses. An image without boxes teaches background only.

        `among`: the only classes whose boxes are labelled. `seen`: what another model's `raw` has of the same images.
        """
        wanted = [_target(targets, i) for i in range(len(images))]
        if among is not None and seen is not None:
            wanted = [_beside_others(own, found, among) for own, found in zip(wanted, seen, strict=True)]
        parts: dict[str, Tensor] = self.net(list(images), wanted)
        total = images.new_zeros(())
        for part in parts.values():
            total = total + part
        return total

    def raw(self, images: Tensor) -> list[Tensor]:
        """What it finds, for another's `seen`; of each thing its best word, whatever the class."""
        found = self.detect(images, score=SEEN, overlap=SAME, most=100)
        return [rows[nms(rows[:, :4], rows[:, 4], SAME)] for rows in found]

    def detect(self, images: Tensor, *, score: float, overlap: float, most: int) -> list[Tensor]:
        """As `raypipe.models.detector.Detector` says."""
        net: Any = self.net
        own = net.roi_heads if hasattr(net, "roi_heads") else net
        own.score_thresh, own.nms_thresh, own.detections_per_img = score, overlap, most
        rows = []
        for found in self(images):
            columns = (found["boxes"], found["scores"][:, None], found["labels"][:, None].to(found["boxes"].dtype))
            rows.append(torch.cat(columns, 1))
        return rows


def _target(targets: Tensor, image: int) -> Target:
    own = targets[targets[:, 0] == image]
    centre, half = own[:, 2:4], own[:, 4:6] / 2
    return {"boxes": torch.cat((centre - half, centre + half), 1), "labels": own[:, 1].long() + 1}


def _beside_others(own: Target, found: Tensor, among: Sequence[int]) -> Target:
    """With what is `found` (x1, y1, x2, y2, score, label) of other classes, but for what has a box of its own.

    They come first: of two boxes with the same best anchor SSD gives it to the last.
    """
    sides = found[:, 2:4] - found[:, :2]
    others = found[(sides.amin(1) > LEAST_SIDE) & ~torch.isin(found[:, 5].long(), found.new_tensor(among).long()), :4]
    if len(own["boxes"]):
        others = others[box_iou(others, own["boxes"]).amax(1) < SAME]
    unnamed = own["labels"].new_full((len(others),), OTHER)
    return {"boxes": torch.cat((others, own["boxes"])), "labels": torch.cat((unnamed, own["labels"]))}


class _Ssd(SSD):  # type: ignore[misc]  # torchvision has no types
    def compute_loss(
        self, targets: list[Target], head_outputs: Target, anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> Target:
        """Its own, where anchors that are matched with OTHER have nothing to learn."""
        pairs = zip(targets, matched_idxs, strict=True)
        left = [_of_other(each["labels"], matched) for each, matched in pairs]
        if any(bool(each.any()) for each in left):
            logits = head_outputs["cls_logits"]
            background = torch.zeros_like(logits[0, 0])
            background[0] = CERTAIN
            known = torch.where(torch.stack(left)[..., None], background, logits)
            head_outputs = {**head_outputs, "cls_logits": known}
            matched_idxs = [matched.masked_fill(each, -1) for matched, each in zip(matched_idxs, left, strict=True)]
        found: Target = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return found


def _of_other(labels: Tensor, matched: Tensor) -> Tensor:
    """Which anchors are matched (n, box or below 0) with one."""
    if not len(labels):
        return torch.zeros_like(matched, dtype=torch.bool)
    return (matched >= 0) & (labels[matched.clamp(min=0)] == OTHER)


class _Rpn(RegionProposalNetwork):  # type: ignore[misc]  # the same
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Its own, where anchors over an OTHER are background no more: what nobody labelled may be there."""
        named = [{"boxes": each["boxes"][each["labels"] != OTHER]} for each in targets]
        labels, boxes = super().assign_targets_to_anchors(anchors, named)
        for place, each in enumerate(targets):
            others = each["boxes"][each["labels"] == OTHER]
            if len(others):
                over = box_iou(others, anchors[place]).amax(0) >= self.proposal_matcher.low_threshold
                labels[place] = torch.where(over & (labels[place] == 0), -1.0, labels[place])
        return labels, boxes
