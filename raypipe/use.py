"""What a version is used for, away from any run: labels or boxes for images, and a copy of it for one store.

    predict    one label an image, or the boxes found in it, in the image's own pixels
    adapt      the version with BatchNorm's statistics of one store's images, as `evaluate.own_statistics` judges it

With `statistics_of` a version predicts as its adapted copy would. Like every file beside the rooms, it may know all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from raypipe.data.decode import decode_sized, unfitted
from raypipe.errors import ConfigError, StoreRefused
from raypipe.models.tensors import Array, state_dict_from
from raypipe.tracking.registry import module_of, open_weights
from raypipe.tracking.versions import HEADER, Tensors
from raypipe.types import Role

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raypipe.models.flat import FlatModel
    from raypipe.tasks import Task

BATCH, PIXELS = 64, 1 << 22  # images predicted at once, and their pixels
SCORE = 0.25  # boxes below are not told
IMAGES = 64  # that a store's own statistics are measured over, where a run has not said

Corners: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image as it is seen


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable label, its index as text where the task names no classes; or one box and what is in it.

    Of an image in which no box was found there is one without a label.
    """

    path: Path
    label: str | None
    probability: float
    box: Corners | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A version that can be used: `module` is in evaluation mode and holds the tensors."""

    source: str
    tensors: Tensors
    card: Mapping[str, Any]
    module: nn.Module
    task: Task


def predict(
    source: str,
    images: Sequence[Path],
    *,
    version: int | None = None,
    statistics_of: Path | None = None,
    score: float | None = None,
    uri: str | None = None,
    home: Path | None = None,
) -> list[Prediction]:
    """Labels or boxes for images, decoded and normalised as in training; of an image's boxes the best first.

    `source`: `models:/NAME@alias`, a .safetensors file that raypipe wrote, or a run's folder (then `version`; None
    for the best one). `statistics_of`: see `adapt`. `score`: boxes below are left out (SCORE). Raises ConfigError with
    every image that cannot be read, a line each.
    """
    import torch

    opened = _opened(source, version, uri, home)
    task = opened.task
    if task.table is not None:
        raise ConfigError(f"{source} reads rows of a table, and `raypipe predict` reads images")
    if score is not None and task.boxes is None:
        raise ConfigError(f"{source} says one label an image; a score is for models that find boxes")
    if score is not None and not 0 <= score < 1:
        raise ConfigError(f"a score is at least 0 and below 1, found {score:g}")
    pixels, sizes = _decode(images, task)
    found: list[Prediction] = []
    size = max(1, min(BATCH, PIXELS // task.image_size**2))
    within: AbstractContextManager[object] = nullcontext()
    if statistics_of is not None:
        within = _own_statistics(opened, statistics_of)
    with within, torch.inference_mode():
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            inputs = task.prepare(torch.from_numpy(pixels[part]))
            if task.boxes is None:
                found += _labels(opened, images[part], inputs)
                continue
            rows = task.boxes.find(opened.module, inputs, SCORE if score is None else score)
            for path, image, shape in zip(images[part], rows, sizes[part].tolist(), strict=True):
                found += _boxes(task, path, image.double().cpu().numpy(), shape)
    return found


def adapt(
    source: str,
    statistics_of: Path,
    to: Path,
    *,
    version: int | None = None,
    uri: str | None = None,
    home: Path | None = None,
) -> None:
    """A version with BatchNorm's statistics of a data set's training images, and the same card, into a new file.

    They are sums over private images: the file is the store's own, as what it keeps of `train.local` is.
    `source`, `version`: as in `predict`; as many images are taken as the run measured stores' own over, else IMAGES.
    Raises ConfigError: no statistics that move, no such data set, fewer than two images, or `to` cannot be written.
    """
    if to.suffix != ".safetensors":
        raise ConfigError(f"{to}: the file's name ends in .safetensors")
    if os.path.lexists(to):
        raise ConfigError(f"{to} is there already: name another file")
    if not to.parent.is_dir():
        raise ConfigError(f"{to} could not be written: there is no folder {to.parent}")
    if not os.access(to.parent, os.W_OK):
        raise ConfigError(f"{to} could not be written: its folder may not be written to")
    opened = _opened(source, version, uri, home)
    with _own_statistics(opened, statistics_of) as model:
        layout = model.layout
        moved = {entry.name for entry in layout.entries if entry.role is Role.STATISTIC}
        now = state_dict_from(layout, model.vector.numpy())
        tensors = {name: now[name].copy() if name in moved else old for name, old in opened.tensors.items()}
    _write(to, tensors, opened.card)


def _opened(source: str, version: int | None, uri: str | None, home: Path | None) -> Opened:
    tensors, card = open_weights(source, uri, home, version)
    if not {"task", "model"} <= set(card):
        raise ConfigError(f"{source} does not say to which model its weights belong: only raypipe's own files do")
    module, task = module_of(card, tensors)
    return Opened(source, tensors, card, module, task)


@contextmanager
def _own_statistics(opened: Opened, folder: Path) -> Iterator[FlatModel]:
    """Within it the version's module has statistics of these training images, see store/measure.py."""
    from raypipe.models.flat import FlatModel, layout_of
    from raypipe.models.heads import freeze
    from raypipe.store.measure import own_statistics
    from raypipe.store.shelf import training_images

    freeze(opened.module, opened.card.get("trained", "all"), opened.task.num_outputs)
    model = FlatModel(opened.module, layout_of(opened.module))
    if not model.moving_norms:
        raise ConfigError(f"{opened.source} has no BatchNorm statistics that move; it is used as it is")
    num_images = opened.card.get("own_statistics", IMAGES)
    try:
        examples, max_bad_share = training_images(folder, opened.task)
        with own_statistics(model, opened.task, examples, num_images, max_bad_share, lambda: False):
            yield model
    except (ConfigError, StoreRefused) as error:
        raise ConfigError(f"{folder}: {line}" for line in error.message.splitlines()) from None


def _labels(opened: Opened, paths: Sequence[Path], inputs: Any) -> Iterator[Prediction]:
    task, outputs = opened.task, opened.module(inputs)
    if task.live is not None:  # the others are no answer
        outputs[:, sorted({*range(task.num_outputs)} - {*task.live})] = -np.inf
    chances: Tensor = outputs.softmax(1)
    for path, label, own in zip(paths, task.predict(outputs).tolist(), chances, strict=True):
        yield Prediction(path, _name(task, label), float(own[label]))


def _boxes(task: Task, path: Path, rows: Array, shape: tuple[int, int]) -> list[Prediction]:
    """Of rows (k, 6) as models/detector.py has them, in pixels of the square."""
    corners = unfitted(rows[:, :4], *shape, task.image_size)
    found = [
        Prediction(path, _name(task, int(label)), float(chance), (left, top, right, bottom))
        for (left, top, right, bottom), (chance, label) in zip(corners.tolist(), rows[:, 4:].tolist(), strict=True)
        if left < right and top < bottom
    ]
    return found or [Prediction(path, None, 0.0)]


def _name(task: Task, label: int) -> str:
    return task.classes[label] if task.classes else str(label)


def _decode(images: Sequence[Path], task: Task) -> tuple[Array, Array]:
    """Pixels (n, channels, image_size, image_size) of all images, and each one's own width and height (n, 2)."""
    missing = [f"{path}: no such file" for path in images if not path.is_file()]
    if missing:
        raise ConfigError(missing)
    how: Any = {"size": task.image_size, "channels": task.channels, "letterbox": task.boxes is not None}
    pixels, good, sizes = decode_sized([p.read_bytes() for p in images], **how)
    if not good.all():
        broken = [path for path, fine in zip(images, good, strict=True) if not fine]
        raise ConfigError(f"{path}: no whole PNG or JPEG image" for path in broken)
    return pixels, sizes


def _write(to: Path, tensors: Tensors, card: Mapping[str, Any]) -> None:
    """Whole under its name or not at all."""
    part = to.with_name(f".{to.name}.part")
    try:
        save_file(tensors, part, metadata={HEADER: json.dumps(card, sort_keys=True)})
        part.rename(to)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise ConfigError(f"{to} could not be written: {reason}") from None
