"""YOLOv5's layers, decoding and loss; where they come from is said in yolov5.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import complete_box_iou_loss

from raypipe.models.autocast import full_precision
from raypipe.models.detector import SEEN, boxes_of

STRIDES = (8, 16, 32)
BALANCE = (4.0, 1.0, 0.4)  # of the object loss: small objects are many and hard
LEAST_SIDE = 1e-3  # strides, added in the loss: of a box without height the ratio of sides has no gradient
USUAL_SIZE, USUAL_OBJECTS, USUAL_CLASS = 640, 8, 0.6  # the priors: so many objects in such an image


@dataclass(frozen=True, slots=True)
class Gains:
    """Weights of the loss' three parts, and up to which ratio of sides a box and an anchor match."""

    box: float
    objects: float
    classes: float
    match_ratio: float


def _norm(kind: Literal["batch", "group"], num: int) -> nn.Module:
    return nn.BatchNorm2d(num, eps=1e-3, momentum=0.03) if kind == "batch" else nn.GroupNorm(8, num, eps=1e-3)


class Conv(nn.Module):
    """Convolution, norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: Literal["batch", "group"]) -> None:
        super().__init__()
        padding = 2 if kernel == 6 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.bn(self.conv(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1 and 3x3, with a shortcut in the backbone."""

    def __init__(self, width: int, shortcut: bool, norm: Literal["batch", "group"]) -> None:
        super().__init__()
        self.cv1 = Conv(width, width, 1, 1, norm)
        self.cv2 = Conv(width, width, 3, 1, norm)
        self._shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self._shortcut else y


class C3(nn.Module):
    """Cross-stage partial block with three convolutions."""

    def __init__(
        self, inputs: int, outputs: int, depth: int, norm: Literal["batch", "group"], *, shortcut: bool = True
    ) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Conv(inputs, half, 1, 1, norm)
        self.cv2 = Conv(inputs, half, 1, 1, norm)
        self.cv3 = Conv(2 * half, outputs, 1, 1, norm)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut, norm) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return joined


class SPPF(nn.Module):
    """Spatial pyramid pooling, one small pool thrice."""

    def __init__(self, inputs: int, outputs: int, norm: Literal["batch", "group"]) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, inputs // 2, 1, 1, norm)
        self.cv2 = Conv(2 * inputs, outputs, 1, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.cv1(x)]
        for _ in range(3):
            pools.append(functional.max_pool2d(pools[-1], 5, 1, 2))
        pooled: Tensor = self.cv2(torch.cat(pools, 1))
        return pooled


class Detect(nn.Module):
    """One 1x1 convolution a level; `anchors` (3 levels, 3, 2) in strides, a buffer: it comes with each version."""

    anchors: Tensor

    def __init__(self, num_classes: int, inputs: Sequence[int], sides: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        each = len(sides) // len(inputs)
        anchors = torch.tensor(sides, dtype=torch.float32).view(len(inputs), each, 2)
        self.register_buffer("anchors", anchors / torch.tensor(STRIDES).view(-1, 1, 1))
        self.m = nn.ModuleList(nn.Conv2d(width, each * (5 + num_classes), 1) for width in inputs)
        for conv, stride in zip(self.m, STRIDES, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            bias = conv.bias.detach().view(each, -1)
            bias[:, 4] += math.log(USUAL_OBJECTS / (USUAL_SIZE / stride) ** 2)
            bias[:, 5:] += math.log(USUAL_CLASS / (num_classes - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (n, anchors, height, width, 5 + classes): x, y, width, height, object, a class each; before sigmoid."""
        maps = []
        for conv, x in zip(self.m, features, strict=True):
            n, _, height, width = x.shape
            maps.append(conv(x).view(n, self.anchors.shape[1], -1, height, width).permute(0, 1, 3, 4, 2))
        return maps


class Yolov5(nn.Module):
    """See yolov5.py. `model.24` is the head; the parts without parameters have their numbers too."""

    restricts = True  # `loss` takes `among` and `seen`

    def __init__(
        self,
        num_classes: int,
        channels: int,
        depth: float,
        width: float,
        sides: Sequence[tuple[float, float]],
        norm: Literal["batch", "group"],
        gains: Gains,
    ) -> None:
        super().__init__()
        self.num_classes, self._gains = num_classes, gains
        c1, c2, c3, c4, c5 = (math.ceil(c * width / 8) * 8 for c in (64, 128, 256, 512, 1024))
        d3, d6, d9 = (max(1, round(d * depth)) for d in (3, 6, 9))
        empty = nn.Identity()
        self.model = nn.ModuleList(
            [
                *(Conv(channels, c1, 6, 2, norm), Conv(c1, c2, 3, 2, norm), C3(c2, c2, d3, norm)),
                *(Conv(c2, c3, 3, 2, norm), C3(c3, c3, d6, norm), Conv(c3, c4, 3, 2, norm), C3(c4, c4, d9, norm)),
                *(Conv(c4, c5, 3, 2, norm), C3(c5, c5, d3, norm), SPPF(c5, c5, norm)),
                *(Conv(c5, c4, 1, 1, norm), empty, empty, C3(2 * c4, c4, d3, norm, shortcut=False)),
                *(Conv(c4, c3, 1, 1, norm), empty, empty, C3(2 * c3, c3, d3, norm, shortcut=False)),
                *(Conv(c3, c3, 3, 2, norm), empty, C3(2 * c3, c4, d3, norm, shortcut=False)),
                *(Conv(c4, c4, 3, 2, norm), empty, C3(2 * c4, c5, d3, norm, shortcut=False)),
                Detect(num_classes, (c3, c4, c5), sides),
            ]
        )

    @property
    def head(self) -> Detect:
        head = self.model[24]
        assert isinstance(head, Detect)
        return head

    def raw(self, images: Tensor) -> list[Tensor]:
        """The head's maps for images (n, channels, height, width) in [0, 1], sides multiples of 32."""
        x, kept = images, {}
        for number in range(10):
            x = self.model[number](x)
            kept[number] = x
        lateral5 = self.model[10](x)
        x = self.model[13](torch.cat((_doubled(lateral5), kept[6]), 1))
        lateral4 = self.model[14](x)
        p3 = self.model[17](torch.cat((_doubled(lateral4), kept[4]), 1))
        p4 = self.model[20](torch.cat((self.model[18](p3), lateral4), 1))
        p5 = self.model[23](torch.cat((self.model[21](p4), lateral5), 1))
        maps: list[Tensor] = self.head([p3, p4, p5])
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """All predictions (n, all, 5 + classes): centre x, y, width, height in pixels, object and class in [0, 1]."""
        flat = []
        for level, found in enumerate(self.raw(images)):
            stride, (height, width) = STRIDES[level], found.shape[2:4]
            y, x = torch.meshgrid(
                torch.arange(height, device=found.device), torch.arange(width, device=found.device), indexing="ij"
            )
            share = found.float().sigmoid()
            centre = (2 * share[..., :2] - 0.5 + torch.stack((x, y), -1)) * stride
            sides = (2 * share[..., 2:4]) ** 2 * (self.head.anchors[level] * stride)[:, None, None]
            flat.append(torch.cat((centre, sides, share[..., 4:]), -1).flatten(1, 3))
        return torch.cat(flat, 1)

    def loss(
        self, images: Tensor, targets: Tensor, among: Sequence[int] | None = None, seen: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Box, object and class loss together, a scalar.

        `among`: the only classes whose boxes are labelled; the class loss is over these alone. `seen`: what another
        model's `raw` has of the same images; where that sees an object of another class its word stands.
        """
        maps = self.raw(images)
        chosen = None if among is None else torch.tensor(among, dtype=torch.long, device=images.device)
        with full_precision(images.device):
            others: list[Tensor | None] = [None] * len(maps)
            if chosen is not None and seen is not None:
                others = [_others(each, chosen) for each in seen]
            parts = [self._level(n, found.float(), targets, chosen, others[n]) for n, found in enumerate(maps)]
            box, objects, classes = (torch.stack(part).sum() for part in zip(*parts, strict=True))
            gains = self._gains
            return gains.box * box + gains.objects * objects + gains.classes * classes

    def _level(
        self, level: int, found: Tensor, targets: Tensor, among: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A box is the business of each anchor of like sides, in its own cell and in the two nearest ones."""
        anchors, (height, width) = self.head.anchors[level], found.shape[2:4]
        wanted = found.new_zeros(found.shape[:4])
        boxed = torch.zeros_like(wanted, dtype=torch.bool)
        box = classes = found.sum() * 0.0
        owners, cells, target = self._matches(anchors, (height, width), targets, STRIDES[level])
        if len(target):
            image, anchor = target[:, 0].long(), owners
            mine = found[image, anchor, cells[:, 1], cells[:, 0]]
            centre = 2 * mine[:, :2].sigmoid() - 0.5
            sides = (2 * mine[:, 2:4].sigmoid()) ** 2 * anchors[anchor] + LEAST_SIDE
            true_centre, true_sides = target[:, 2:4] - cells, target[:, 4:6]
            off = complete_box_iou_loss(_corners(centre, sides), _corners(true_centre, true_sides))
            box = off.mean()
            place = ((image * anchors.shape[0] + anchor) * height + cells[:, 1]) * width + cells[:, 0]
            boxed.view(-1)[place] = True
            quality = (1 - off.detach()).clamp(0)
            wanted.view(-1).scatter_reduce_(0, place, quality, "amax")  # of two boxes on one place the better counts
            if self.num_classes > 1:
                label = functional.one_hot(target[:, 1].long(), self.num_classes).to(mine.dtype)
                guess = mine[:, 5:]
                if among is not None:
                    guess, label = guess.index_select(1, among), label.index_select(1, among)
                classes = functional.binary_cross_entropy_with_logits(guess, label)
        if others is not None:
            wanted = torch.where(boxed, wanted, others)
        objects = functional.binary_cross_entropy_with_logits(found[..., 4], wanted)
        return box, BALANCE[level] * objects, classes

    def _matches(
        self, anchors: Tensor, size: tuple[int, int], targets: Tensor, stride: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor, cell (x, y) and target row, box in strides, of each pair that belongs together."""
        scaled = torch.cat((targets[:, :2], targets[:, 2:6] / stride), 1)
        ratio = scaled[None, :, 4:6] / anchors[:, None]
        fits = torch.maximum(ratio, 1 / ratio).amax(2) < self._gains.match_ratio
        owners, rows = fits.nonzero(as_tuple=True)
        target = scaled[rows]
        height, width = size
        bound = torch.tensor((width - 1, height - 1), device=targets.device)
        own = torch.minimum(target[:, 2:4].floor().clamp(0), bound)
        side = torch.where(target[:, 2:4] - own < 0.5, -1, 1)
        steps = [torch.zeros_like(side), side * side.new_tensor((1, 0)), side * side.new_tensor((0, 1))]
        cells = torch.cat([own + step for step in steps])
        inside = ((cells >= 0) & (cells <= bound)).all(1)
        return owners.repeat(3)[inside], cells[inside].long(), target.repeat(3, 1)[inside]

    def detect(self, images: Tensor, *, score: float, overlap: float, most: int) -> list[Tensor]:
        """As `raypipe.models.detector.Detector` says."""
        found = self(images)
        chances = found[..., 4:5] * found[..., 5:]
        corners = _corners(found[..., :2], found[..., 2:4])
        return [boxes_of(c, p, score, overlap, most) for c, p in zip(corners, chances, strict=True)]


def _others(found: Tensor, among: Tensor) -> Tensor:
    """How sure a model is of an object (n, anchors, height, width) where it sees a class that is not labelled; else 0.

    Where there is no box nobody has said what is there: as background it would be unlearned at each store that cannot
    label it. Missing annotations by the model's own word: background recalibration, Zhang et al. 2020,
    arXiv:2002.05274; the word of the model before, so that it is kept: Shmelkov et al. 2017, arXiv:1708.06977. Here it
    is that of the version that a ticket began with: at first such a place teaches nothing, and then not to drift.
    """
    found = found.float()
    chances = found[..., 5:].sigmoid()
    labelled = torch.zeros(chances.shape[-1], dtype=torch.bool, device=found.device).index_fill(0, among, True)
    theirs, own = chances.masked_fill(labelled, 0).amax(-1), chances.masked_fill(~labelled, 0).amax(-1)
    sure = found[..., 4].sigmoid()
    return sure * ((theirs > own) & (sure * theirs > SEEN))


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _corners(centre: Tensor, sides: Tensor) -> Tensor:
    return torch.cat((centre - sides / 2, centre + sides / 2), -1)
