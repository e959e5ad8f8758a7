"""What a store's images are labelled with, in the task's own numbering, batch by batch."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from raypipe.data.dataset import BoxTable, ImageSplit
from raypipe.data.decode import fitted
from raypipe.errors import StoreRefused
from raypipe.tasks import Task
from raypipe.tasks.class_list import DROPPED, UNKNOWN

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


class Targets(Protocol):
    """Of the images of a split; see tasks/task.py for their shapes."""

    def __len__(self) -> int: ...
    def take(self, indices: Indices) -> Tensor:
        """Those of these images, as a batch."""

    def only(self, indices: Indices) -> Targets:
        """Those of these images, from now on counted from 0."""


class Labels:
    """A number an image: its label, or its row in a table."""

    def __init__(self, labels: Indices) -> None:
        self._labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, indices: Indices) -> Tensor:
        return self._labels.index_select(0, torch.from_numpy(indices))

    def only(self, indices: Indices) -> Labels:
        return Labels(self._labels[torch.from_numpy(indices)].numpy())


class Boxes:
    """Boxes in pixels of the letterboxed square; `rows` (m, 6) float32: label, centre, width, height, ignored."""

    def __init__(self, offsets: Indices, rows: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        self._offsets, self._rows = offsets, rows

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def take(self, indices: Indices) -> Tensor:
        which, counts = self._which(indices)
        image = np.repeat(np.arange(len(indices), dtype=np.float32), counts)
        return torch.from_numpy(np.concatenate([image[:, None], self._rows[which]], 1))

    def only(self, indices: Indices) -> Boxes:
        which, counts = self._which(indices)
        return Boxes(np.cumsum([0, *counts]), self._rows[which])

    def _which(self, indices: Indices) -> tuple[Indices, Indices]:
        """Rows of these images one after the other, and how many each has."""
        first = self._offsets[indices]
        counts = self._offsets[indices + 1] - first
        ends = np.cumsum(counts)
        return np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0), counts


def targets_of(split: ImageSplit, classes: tuple[str, ...], task: Task, what: str) -> Targets:
    """A split's targets. Raises StoreRefused when they are not what the task needs, without naming one."""
    table: BoxTable | None = getattr(split, "boxes", None)  # a user's own reader may know of none
    if (table is None) != (task.boxes is None):
        has, needs = ("boxes", "one label an image") if task.boxes is None else ("one label an image", "boxes")
        raise StoreRefused(f"{what} has {has}, the task needs {needs}")
    if table is None or task.boxes is None:
        return Labels(numbered(split.labels, classes, task, what))
    labels = _in_task(table.labels, classes, task)
    known = labels >= 0
    if (labels == UNKNOWN).any() and task.unknown == "refuse":
        raise StoreRefused(
            f"{what} holds boxes outside the task's {task.num_outputs} classes; task.unknown: ignore leaves them out"
        )
    return _letterboxed(table, labels, known, task.image_size)


def numbered(labels: Indices, classes: tuple[str, ...], task: Task, what: str) -> Indices:
    """A store's labels in the task's numbering, matched by class name if the task has names.

    Raises StoreRefused, without a label or a name, when an image's class is not the task's.
    """
    found = _in_task(labels, classes, task)
    if found.size and found.min() < 0:  # those to be left out are gone, see `chosen`
        raise StoreRefused(f"{what} holds labels outside the task's {task.num_outputs} classes")
    return found


class Chosen:
    """Some images of a split, from now on counted from 0."""

    boxes: BoxTable | None = None

    def __init__(self, split: ImageSplit, which: Indices) -> None:
        self._split, self._which = split, which

    def __len__(self) -> int:
        return len(self._which)

    @property
    def labels(self) -> Indices:
        return self._split.labels[self._which]

    def decode(self, indices: Any, **how: Any) -> Any:
        """As ImageSplit says."""
        return self._split.decode(self._which[np.asarray(indices)], **how)


def chosen(split: ImageSplit, classes: tuple[str, ...], task: Task) -> ImageSplit:
    """Those images whose classes are the task's; where it refuses others, all but those of classes that are no more.

    Of images with boxes all: some boxes may count.
    """
    if task.boxes is not None or getattr(split, "boxes", None) is not None:
        return split
    places = _in_task(split.labels, classes, task)
    kept = (places != DROPPED) & ((places != UNKNOWN) | (task.unknown == "refuse"))
    return split if kept.all() else cast(ImageSplit, Chosen(split, np.flatnonzero(kept)))


def _in_task(labels: Indices, classes: tuple[str, ...], task: Task) -> Indices:
    """UNKNOWN for what is not the task's, DROPPED for what is no more."""
    if task.classes is None:
        inside = (labels >= 0) & (labels < task.num_outputs)
        return np.where(inside, labels, UNKNOWN).astype(np.int64)
    place = dict(task.places) or {name: index for index, name in enumerate(task.classes)}
    table = np.array([*(place.get(name, UNKNOWN) for name in classes), UNKNOWN], np.int64)
    return np.array(table[np.where((labels >= 0) & (labels < len(classes)), labels, len(classes))], np.int64)


def _letterboxed(table: BoxTable, labels: Indices, known: np.ndarray[Any, np.dtype[np.bool_]], size: int) -> Boxes:
    places = np.array([fitted(int(w), int(h), size) for w, h in table.sizes], np.float64).reshape(-1, 4)
    owner = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    place, whole = places[owner], table.sizes[owner]
    scale = place[:, 2:] / whole
    sides = table.boxes[:, 2:] * scale
    centre = place[:, :2] + table.boxes[:, :2] * scale + sides / 2
    rows = np.concatenate([labels[:, None], centre, sides, table.ignored[:, None]], 1).astype(np.float32)
    counts = np.bincount(owner[known], minlength=len(table))
    return Boxes(np.cumsum([0, *counts]), np.ascontiguousarray(rows[known]))
