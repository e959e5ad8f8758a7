"""Many updates to one: the running weighted sum, at memory speed and with bits that repeat.

Two vectors of an update's size, front and back. A group of ready updates is folded block by block: the block of
`front` and those of all updates go through the cache once, their sum goes to `back`, and one dot product of that
block with itself tells whether it is finite (NaN and infinity spread) and gives its norm. Only when the whole
group is through do the two change places; until then `front` is untouched, so a refused update leaves no trace.

An update that comes alone is read once, to see that it is finite and that with it the sum stays so (by the triangle
inequality). It is then as good as folded, and held until others come: they are added to `front` in place together,
and share the sum's way to memory and back. Held, an update is where it came from, in the object store; of those that
had to be decoded one is held, as they are in this process's own memory.

Each element is `fma(weight, value, sum)` in the order in which updates come. So the result depends neither on
the size of the blocks, nor on grouping, nor on the number of threads, and in store order it equals, bit for bit,
`acc = 0; for u, w in ...: acc.add_(u, alpha=w)`.

The blocks are as long as the caches of a few cores allow: torch forks and joins its threads at each.

Weights. The shared span sums `weight * scale * delta`, the statistic span `weight * value`. With scale = 1 / steps
the mean is FedNova's (Wang et al. 2020, arXiv:2007.07481): sum(w_i d_i / a_i) / sum(w_i), times the effective
number of steps sum(w_i a_i) / sum(w_i). With scale = 1 that factor is 1 and the mean is FedAvg's.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raypipe.errors import RunError
from raypipe.types import Layout

BLOCK = 3 << 18  # floats for each thread, 3 MiB: they stay in the caches, and starting a block costs little beside it
MAX_THREADS = 4  # more only wait for memory
HELD = 3  # updates that wait to be added, the fourth brings them in; in this process's own memory one
MAX_NORM = 1e18  # of the sum; its square is still a float32
MAX_WEIGHT = 1e30  # above it a weighted value leaves float32 at once


@dataclass(frozen=True, slots=True)
class Weighted:
    """An update as decoded, float32 (update_size,), never written to; scale is 1 / steps or 1."""

    vector: npt.NDArray[np.float32]
    weight: float
    scale: float = 1.0
    borrowed: bool = False  # it is in nobody's memory but the object store's, or a file's


@dataclass(frozen=True, slots=True)
class Mean:
    """What a version's updates come to. `shared` and `statistic` borrow the accumulator's memory: apply them
    before the next fold. `norm` is that of the shared step; `steps` is FedNova's effective number (1 without)."""

    shared: torch.Tensor
    statistic: torch.Tensor
    weight: float
    count: int
    norm: float
    steps: float


class _Block(NamedTuple):
    start: int
    stop: int
    shared: bool


class Accumulator:
    """The one open version. It holds 2 * update_size floats, however many updates come, and HELD of these at most.

    Not for two threads at once: one caller folds and takes.
    """

    def __init__(self, layout: Layout, *, threads: int | None = None, block: int | None = None) -> None:
        self._size = layout.update_size
        self._shared = layout.shared.stop
        self._front, self._back = _vector(self._size), _vector(self._size)
        self._zero = torch.zeros(1)
        self._threads = threads if threads is not None else min(MAX_THREADS, len(os.sched_getaffinity(0)))
        block = block or BLOCK * self._threads
        spans = ((0, self._shared, True), (self._shared, self._size, False))
        self._blocks = [
            _Block(at, min(at + block, stop), shared)
            for start, stop, shared in spans
            for at in range(start, stop, block)
        ]
        self._begin()

    def _begin(self) -> None:
        self._weights: list[tuple[float, float]] = []  # (weight, scale) of each folded update
        self._held: list[Weighted] = []  # folded, but not added yet
        self._bound = 0.0  # the sum's norm, with the held one, is not larger
        self._squares: list[float] | None = None  # of the sum's blocks; None: not known

    def __len__(self) -> int:
        """Updates folded since the last take."""
        return len(self._weights)

    def fold(self, updates: Sequence[Weighted]) -> list[int]:
        """Add these in order; the indices of those refused: not float32 (update_size,), of an impossible weight,
        not finite, or so large that the square of the weighted sum is not. The sum has never seen them."""
        fitting = [i for i, update in enumerate(updates) if self._fits(update)]
        refused = {*range(len(updates))} - {*fitting}
        with _threads(self._threads):
            if fitting and not self._add([updates[i] for i in fitting]):
                # each alone: the same bits
                refused |= {i for i in fitting if len(fitting) == 1 or not self._add([updates[i]])}
        return sorted(refused)

    def take(self, *, normalise: Literal["sum", "k"] = "sum", expected: float | None = None) -> Mean:
        """The mean, and the next version begins. Raises RunError when nothing was folded.

        `sum` divides by the sum of weights: the step keeps its size. `k` divides the shared span by `expected`,
        what the weights would sum to were nothing stale (by default their number, the K of FedBuff,
        arXiv:2106.06639): the step shrinks with staleness. Statistics are values and always divide by the sum.
        """
        if not self._weights:
            raise RunError("no update was folded, so there is no mean to take")
        total = math.fsum(weight for weight, _ in self._weights)
        steps = math.fsum(weight / scale for weight, scale in self._weights) / total if total else 1.0
        divisor = (total if normalise == "sum" else expected or float(len(self._weights))) / steps if total else 1.0
        shared, statistic = self._front[: self._shared], self._front[self._shared :]
        with _threads(self._threads):
            if self._held or self._squares is None:
                self._squares = self._sum(self._held, self._front, squares=True)
            shared.div_(divisor)
            statistic.div_(total or 1.0)
        norm = math.sqrt(math.fsum(s for s, block in zip(self._squares, self._blocks, strict=True) if block.shared))
        mean = Mean(shared, statistic, total, len(self._weights), norm / divisor, steps)
        self._begin()
        return mean

    def _fits(self, update: Weighted) -> bool:
        vector = update.vector
        return (
            vector.dtype == np.float32
            and vector.shape == (self._size,)
            and vector.flags.c_contiguous
            and 0.0 <= update.weight < MAX_WEIGHT
            and 0.0 < update.scale < MAX_WEIGHT
            and update.weight * update.scale < MAX_WEIGHT
        )

    def _add(self, updates: Sequence[Weighted]) -> bool:
        """Whether these could be folded, in order; if not, the sum is as it was."""
        if len(updates) == 1 and (bound := self._bound + _reach(updates[0])) < MAX_NORM:
            held = [*self._held, *updates]
            if len(held) > (HELD if all(update.borrowed for update in held) else 1):
                self._sum(held, self._front)
                self._squares, held = None, []
        else:
            squares = self._sum([*self._held, *updates], self._back, squares=True)
            if not all(map(math.isfinite, squares)):
                return False
            self._front, self._back = self._back, self._front
            self._squares, held, bound = squares, [], math.sqrt(math.fsum(squares))
        self._weights += [(update.weight, update.scale) for update in updates]
        self._held, self._bound = held, bound
        return True

    def _sum(self, updates: Sequence[Weighted], out: torch.Tensor, *, squares: bool = False) -> list[float]:
        """out = front + the updates; if asked for, the square of each block, while that is in the cache."""
        flat = [(_tensor(u.vector), u.weight * u.scale, u.weight) for u in updates]
        found = []
        for block in self._blocks:
            part = out[block.start : block.stop]
            self._block(block, flat, part)
            if squares:
                found.append(float(torch.dot(part, part)))
        return found

    def _block(self, block: _Block, flat: Sequence[tuple[torch.Tensor, float, float]], out: torch.Tensor) -> None:
        begun = len(self._weights) > len(self._held)
        held = self._front[block.start : block.stop] if begun else self._zero.expand(out.numel())
        for vector, delta_weight, value_weight in flat:
            alpha = delta_weight if block.shared else value_weight
            torch.add(held, vector[block.start : block.stop], alpha=alpha, out=out)
            held = out


def _reach(update: Weighted) -> float:
    """How much larger it can make the sum's norm; NaN or infinity when it is not finite."""
    low, high = torch.aminmax(_tensor(update.vector))
    largest = max(-float(low), float(high))
    return update.weight * max(update.scale, 1.0) * largest * math.sqrt(update.vector.size)


def _vector(size: int) -> torch.Tensor:
    """Zeros; numpy asks the system for huge pages, torch does not."""
    return torch.from_numpy(np.zeros(size, np.float32))


def _tensor(vector: npt.NDArray[np.float32]) -> torch.Tensor:
    """The same memory as a tensor, also where it is read-only (Ray's object store), of which torch would warn.
    The caller keeps `vector` alive and writes to neither."""
    memory = (ctypes.c_float * vector.size).from_address(vector.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.float32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Have torch use so many here; the process's number is as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
