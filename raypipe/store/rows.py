"""A store's rows as batches: their columns lie in memory as one float32 table, their images as in `Images`."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.data.dataset import TableSplit
from raypipe.errors import StoreRefused
from raypipe.store.batches import Batch, Images, Indices
from raypipe.store.targets import Labels
from raypipe.tasks import Task
from raypipe.tasks.task import Columns

Table: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


class Rows:
    """A split whose rows have a target; those without one are left out, and counted as what cannot be read.

    `table` is (num, width) as `Columns` says, `targets` (num,): float64 numbers or int64 classes.
    """

    labelled: tuple[int, ...] | None = None

    def __init__(
        self, split: TableSplit, task: Task, columns: Columns, *, what: str, max_bytes: int, threads: int = 1
    ) -> None:
        self.total, self._what = len(split), what
        targets = _targets(split, columns, what)
        good = np.flatnonzero(np.isfinite(targets) & ((targets >= 0) | (columns.classes is None)))
        self._without_target = set(np.setdiff1d(np.arange(self.total), good).tolist())
        self.table = _table(split, columns)[good]
        self.targets = targets[good].astype(np.float64 if columns.classes is None else np.int64)
        kind = torch.float32 if columns.classes is None else torch.int64
        self._numbers, self._answers = torch.from_numpy(self.table), torch.from_numpy(self.targets).to(kind)
        self._width = columns.width
        self._images: Images | None = None
        if columns.image:
            place = np.arange(len(good))  # in the table, in an image's label's stead
            room = max(0, max_bytes - self.table.nbytes)
            self._images = Images(split.images(good), Labels(place), task, what=what, max_bytes=room, threads=threads)

    @property
    def num(self) -> int:
        return len(self.targets) if self._images is None else self._images.num

    @property
    def num_bytes(self) -> int:
        return self.table.nbytes + (0 if self._images is None else self._images.num_bytes)

    @property
    def bad(self) -> set[int]:
        return self._without_target | (set() if self._images is None else {-1 - i for i in self._images.bad})

    def check(self, max_bad_share: float) -> None:
        """Raises StoreRefused when more rows than this share have no target or an image that cannot be read."""
        if self.total == 0:
            raise StoreRefused(f"{self._what} is empty")
        if len(self.bad) > max_bad_share * self.total or len(self.bad) == self.total:
            raise StoreRefused(
                f"{len(self.bad)} of {self.total} rows of {self._what} have no target that the task knows, or an image "
                f"that cannot be read: more than the {100 * max_bad_share:.2g} % allowed"
            )

    def batches(
        self, picks: Iterable[Indices], device: torch.device, max_bad_share: float
    ) -> Generator[Batch, None, None]:
        """A batch for each array of indices below `num`; smaller by its unreadable images."""
        if self._images is None:
            for pick in picks:
                index = torch.from_numpy(pick)
                yield (
                    self._numbers.index_select(0, index).to(device, non_blocking=True),
                    self._answers.index_select(0, index).to(device, non_blocking=True),
                )
            return
        for pixels, place in self._images.batches(picks, device, max_bad_share):
            index = place.cpu()
            answers = self._answers.index_select(0, index).to(device, non_blocking=True)
            numbers = self._numbers.index_select(0, index).to(device, non_blocking=True)
            yield ((pixels, numbers) if self._width else pixels), answers


def _targets(split: TableSplit, columns: Columns, what: str) -> np.ndarray:
    """(N,) float64: the number, or the class's place; NaN or -1 where there is none."""
    found = split.numbers(columns.target) if columns.classes is None else split.places(columns.target, columns.classes)
    if found is None:
        raise StoreRefused(f"{what} has no column {columns.target!r}, which is what the task learns")
    return np.asarray(found, np.float64)


def _table(split: TableSplit, columns: Columns) -> Table:
    """(N, width): numbers, NaN where missing or not finite; then 0 or 1 for each value of each category."""
    table = np.zeros((len(split), columns.width), np.float32)
    for at, name in enumerate(columns.features):
        found = split.numbers(name)
        table[:, at] = np.nan if found is None else np.where(np.isfinite(found), found, np.nan)
    at = len(columns.features)
    for name, values in columns.categories:
        places = split.places(name, values)
        if places is not None:
            rows = np.flatnonzero(places >= 0)
            table[rows, at + places[rows]] = 1.0
        at += len(values)
    return table
