"""Several products in an image: where each is, and what. For any model that is a `raypipe.models.detector.Detector`.

What a store sends of an evaluation is in precision.py: counts that give the precision over all stores together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import AfterValidator, Field

from raypipe.errors import ConfigError
from raypipe.tasks import Task, tasks
from raypipe.tasks.classification import Merge, Unknown, distinct, numbering
from raypipe.tasks.precision import judged
from raypipe.tasks.task import Absent, Boxes

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from the signature without torch
    Tensor: TypeAlias = Any

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
DetectionClasses: TypeAlias = (
    Annotated[int, Field(ge=1, le=100_000)] | Annotated[list[str], Field(min_length=1), AfterValidator(distinct)]
)
MOST_BINS = 32_768  # of all classes together: what a store tells of a judgement stays below a megabyte
MOST = 100  # detections an image that are judged, as COCO has it
KEPT_SHARE = 0.3  # of a box that a mosaic cuts: less left of it teaches nothing


@tasks("detection")
def detection(
    *,
    classes: DetectionClasses,
    image_size: Annotated[int, Field(ge=32, le=2048, multiple_of=32)] = 640,
    channels: Literal[1, 3] = 3,
    merge: Merge = {},  # noqa: B006  # never changed: pydantic copies it
    unknown: Unknown = "refuse",
    absent: Absent = "untouched",
    gone: dict[str, str | None] = {},  # noqa: B006  # the same
    mosaic: Share = 0.5,
    flip: Share = 0.5,
    colour: Share = 0.2,
    score: Annotated[float, Field(gt=0, lt=1)] = 0.001,
    overlap: Annotated[float, Field(gt=0, lt=1)] = 0.6,
    score_bins: Annotated[int, Field(ge=8, le=4096)] | None = None,
) -> Task:
    """Images are letterboxed into the square of `image_size` pixels.

    `merge`: other names that count as a class, e.g. {shoe: [Sandal, Sneaker]}; `unknown`: what a store does with
    boxes of classes that are not listed. `absent`, `gone`: as in classification.py. Of a class that a store cannot
    label nothing is judged there, and nothing taught: where the version that it began with sees one a YOLOv5 goes
    on to, and SSDlite and Faster R-CNN are taught nothing; to ultralytics, whose loss knows of none, it is background.
    `mosaic`, `flip`: share of training batches, and of images, so changed; `colour`: how far brightness, contrast and
    each colour move, at most. `score`, `overlap`: detections below are left out, and of two that overlap more the
    weaker one, when a version is judged. `score_bins`: to which scores are rounded then; None: 256, or fewer where
    there are many classes.
    """
    names = None if isinstance(classes, int) else tuple(classes)
    num = classes if isinstance(classes, int) else len(classes)
    num_bins = score_bins or max(8, min(256, MOST_BINS // num))

    places, live = numbering(classes, merge, gone, "detection")

    def step(
        module: Any, images: Tensor, targets: Tensor, among: Sequence[int] | None = None, version: Any = None
    ) -> Tensor:
        some: dict[str, Any] = {}
        if among is not None and getattr(module, "restricts", False):
            some = {"among": among, "seen": None if version is None else _seen(version, images)}
        loss: Tensor = module.loss(images, targets[targets[:, 6] == 0], **some)
        return loss

    def find(module: Any, images: Tensor, least: float, among: Sequence[int] | None = None) -> list[Tensor]:
        found: list[Tensor] = module.detect(images, score=least, overlap=overlap, most=MOST)
        asked = live if among is None else among
        if asked is None:
            return found
        return [seen[(seen[:, 5:6] == seen.new_tensor(asked)).any(1)] for seen in found]

    def judge(module: Any, images: Tensor, targets: Tensor, among: Sequence[int] | None = None) -> dict[str, float]:
        rows, sums = targets.cpu().numpy(), Counter[str]()
        for image, seen in enumerate(find(module, images, score, among)):
            sums.update(_judged(seen, rows[rows[:, 0] == image], num_bins))
        return {name: float(value) for name, value in sums.items()}

    def augment(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if rng.random() < mosaic:
            images, targets = mosaics(images, targets, rng)
        images, targets = flips(images, targets, flip, rng)
        return (colours(images, colour, rng) if colour else images), targets

    changes = augment if mosaic or flip or colour else None
    return Task(
        num_outputs=num,
        channels=channels,
        image_size=image_size,
        classes=names,
        primary="map50",
        prepare=lambda images: images.float().div_(255.0),
        loss=_no_outputs,
        sums=_no_outputs,
        predict=_no_outputs,
        metrics=("map50", "map"),
        boxes=Boxes(step, judge, find, changes),
        places=places,
        unknown=unknown,
        absent=absent,
        live=live,
    )


def _seen(version: Any, images: Tensor) -> Any:
    import torch

    with torch.no_grad():
        return version.raw(images)


def _no_outputs(*_: Tensor) -> Any:
    raise ConfigError("a detection model finds boxes, not one output an image")


def _judged(found: Tensor, rows: np.ndarray[Any, Any], num_bins: int) -> Counter[str]:
    seen = found.float().cpu().numpy().astype(np.float64)
    corners = np.concatenate([rows[:, 2:4] - rows[:, 4:6] / 2, rows[:, 2:4] + rows[:, 4:6] / 2], 1)
    return judged(seen, corners, rows[:, 1].astype(np.int64), rows[:, 6] > 0, num_bins=num_bins)


def mosaics(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Four images of the batch meet in each new one, around a point that moves from batch to batch.

    Nothing is scaled: each is cut where it meets the others, and boxes with it. After YOLOv4, arXiv:2004.10934.
    """
    import torch

    num, _, size, _ = images.shape
    x, y = (int(v) for v in rng.integers(size // 4, size - size // 4, 2))
    mixed, parts = torch.empty_like(images), []
    for (left, right), (top, bottom) in ((h, v) for v in ((0, y), (y, size)) for h in ((0, x), (x, size))):
        owner = torch.from_numpy(rng.permutation(num)).to(images.device)  # place in the new batch -> its source
        # The part near the meeting point is the source's far corner, so that what is cut differs from batch to batch.
        from_x, from_y = (size - x if left == 0 else 0), (size - y if top == 0 else 0)
        source = images[:, :, from_y : from_y + bottom - top, from_x : from_x + right - left]
        mixed[:, :, top:bottom, left:right] = source[owner]
        place = torch.empty_like(owner)
        place[owner] = torch.arange(num, device=owner.device)
        moved = targets.clone()
        moved[:, 0] = place[targets[:, 0].long()].to(moved.dtype)
        moved[:, 2] += left - from_x
        moved[:, 3] += top - from_y
        parts.append(_cut(moved, left, top, right, bottom))
    return mixed, torch.cat(parts)


def _cut(targets: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Boxes cut to a window; those of which too little is left are dropped."""
    low, high = targets[:, 2:4] - targets[:, 4:6] / 2, targets[:, 2:4] + targets[:, 4:6] / 2
    near = low.new_tensor((left, top))
    low, high = low.clamp(near, low.new_tensor((right, bottom))), high.clamp(near, low.new_tensor((right, bottom)))
    sides, before = high - low, targets[:, 4:6]
    kept = (sides.prod(1) > KEPT_SHARE * before.prod(1)) & (sides.amin(1) >= 2)
    cut = targets.clone()
    cut[:, 2:4], cut[:, 4:6] = (low + high) / 2, sides
    return cut[kept]


def flips(images: Tensor, targets: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Left and right change places in this share of the images."""
    import torch

    flipped = torch.from_numpy(rng.random(len(images)) < share).to(images.device)
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    targets = targets.clone()
    mine = flipped[targets[:, 0].long()]
    targets[:, 2] = torch.where(mine, images.shape[3] - targets[:, 2], targets[:, 2])
    return images, targets


def colours(images: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """Brightness and contrast of each image, and each of its colours, moved by at most this share."""
    import torch

    num, channels = images.shape[:2]
    gain = 1 + most * (rng.uniform(-1, 1, (num, 1)) + 0.5 * rng.uniform(-1, 1, (num, channels)))
    shift = 128 * most * rng.uniform(-1, 1, (num, 1)) + 127.5 * (1 - gain)
    scale, offset = (torch.from_numpy(v).float().to(images.device)[:, :, None, None] for v in (gain, shift))
    return (images.float() * scale + offset).clamp_(0, 255).to(torch.uint8)
