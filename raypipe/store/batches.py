"""A store's images as batches: decoded once and kept as uint8 while they fit, else decoded one batch ahead."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raypipe.data.dataset import ImageSplit, RowImages
from raypipe.errors import StoreRefused
from raypipe.store.targets import Targets
from raypipe.tasks import Task

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Batch: TypeAlias = tuple[Any, Tensor]  # inputs as a task prepares them, and targets; both as tasks/task.py says
CHUNK = 4096  # images decoded at once into the cache


class Examples(Protocol):
    """A split of a store's data as batches, whatever one of them holds."""

    @property
    def total(self) -> int: ...

    @property
    def num(self) -> int:
        """What batches draw from."""

    @property
    def num_bytes(self) -> int:
        """Kept in memory."""

    @property
    def bad(self) -> AbstractSet[int]:
        """Those of `total` that cannot be read."""

    @property
    def labelled(self) -> tuple[int, ...] | None:
        """Outputs that training is about, by number, see Task.labelled; None: all."""

    def check(self, max_bad_share: float) -> None:
        """Raises StoreRefused when there is nothing, or more than this share cannot be read."""

    def batches(
        self, picks: Iterable[Indices], device: torch.device, max_bad_share: float
    ) -> Generator[Batch, None, None]:
        """A batch for each array of indices below `num`."""


class Images:
    """A split of a store's data with its targets, numbered as the task numbers its classes.

    `num` is what batches draw from: the readable images when they are cached, else all, of which unreadable ones
    drop out of their batches.
    """

    def __init__(
        self,
        split: ImageSplit | RowImages,
        targets: Targets,
        task: Task,
        *,
        what: str,
        max_bytes: int,
        threads: int = 1,
        labelled: tuple[int, ...] | None = None,
    ) -> None:
        self.total, self.labelled = len(split), labelled
        self.num_bytes = self.total * task.channels * task.image_size**2
        self.bad: set[int] = set()
        self._split, self._task, self._what, self._threads = split, task, what, threads
        self._targets = targets
        self._pixels: Tensor | None = None
        if self.num_bytes <= max_bytes:
            self._cache()
        else:
            self.num_bytes = 0
        self.num = len(self._targets)

    def check(self, max_bad_share: float) -> None:
        """Raises StoreRefused when more images than this share could not be read so far."""
        if self.total == 0:
            raise StoreRefused(f"{self._what} is empty")
        if len(self.bad) > max_bad_share * self.total or len(self.bad) == self.total:
            share = f"{100 * len(self.bad) / self.total:.2g} %"
            raise StoreRefused(
                f"{len(self.bad)} of {self.total} images of {self._what} cannot be read ({share}), "
                f"more than the {100 * max_bad_share:.2g} % allowed"
            )

    def batches(
        self, picks: Iterable[Indices], device: torch.device, max_bad_share: float
    ) -> Generator[Batch, None, None]:
        """A batch for each array of indices below `num`; smaller by its unreadable images."""
        source = self._decoded(picks, max_bad_share) if self._pixels is None else self._cached(picks)
        if device.type == "cpu":
            yield from source
            return
        for pixels, targets in source:
            yield (
                pixels.pin_memory().to(device, non_blocking=True),
                targets.pin_memory().to(device, non_blocking=True),
            )

    def _decode(self, indices: Indices) -> tuple[Tensor, Indices]:
        task, square = self._task, {} if self._task.boxes is None else {"letterbox": True}
        decode: Any = partial(self._split.decode, size=task.image_size, channels=task.channels, threads=self._threads)
        pixels, good = decode(indices, **square)  # a user's own reader of labels may know of no letterbox
        if good.all():
            return torch.from_numpy(pixels), indices
        self.bad.update(indices[~good].tolist())
        return torch.from_numpy(pixels[good]), indices[good]

    def _cache(self) -> None:
        size = (self.total, self._task.channels, self._task.image_size, self._task.image_size)
        pixels = torch.empty(size, dtype=torch.uint8)
        kept: list[Indices] = []
        filled = 0
        for start in range(0, self.total, CHUNK):
            chunk, good = self._decode(np.arange(start, min(start + CHUNK, self.total)))
            pixels[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            kept.append(good)
        self._pixels = pixels[:filled]
        if self.bad:
            self._targets = self._targets.only(np.concatenate(kept))

    def _cached(self, picks: Iterable[Indices]) -> Iterator[Batch]:
        assert self._pixels is not None
        for pick in picks:
            yield self._pixels.index_select(0, torch.from_numpy(pick)), self._targets.take(pick)

    def _decoded(self, picks: Iterable[Indices], max_bad_share: float) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "decode") as pool:
            ahead = iter(picks)
            waiting = [pool.submit(self._decode, pick) for pick in _first(ahead)]
            while waiting:
                pixels, good = waiting.pop().result()
                waiting = [pool.submit(self._decode, pick) for pick in _first(ahead)]
                self.check(max_bad_share)
                yield pixels, self._targets.take(good)


def _first(picks: Iterator[Indices]) -> list[Indices]:
    pick = next(picks, None)
    return [] if pick is None else [pick]


def shuffled(num: int, batch_size: int, smallest: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Endless: a new permutation each epoch, its last batch smaller, or left out below `smallest`."""
    while True:
        order = rng.permutation(num)
        for start in range(0, num, batch_size):
            if len(pick := order[start : start + batch_size]) >= smallest:
                yield pick


def batches_per_epoch(num: int, batch_size: int, smallest: int) -> int:
    """What `shuffled` gives of one permutation."""
    return num // batch_size + (num % batch_size >= smallest)


def in_order(num: int, batch_size: int) -> Iterator[Indices]:
    """Each image once."""
    return (np.arange(start, min(start + batch_size, num)) for start in range(0, num, batch_size))
