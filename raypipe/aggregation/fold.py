"""Many updates to one: the running weighted sum, at memory speed and with bits that repeat.

Two vectors of an update's size, front and back. A group of ready updates is folded block by block: the block of
`front` and those of all updates go through the cache once, their sum goes to `back`, and one dot product of that
block with itself tells whether it is finite (NaN and infinity spread) and gives its norm. Only when the whole
group is through do the two change places; until then `front` is untouched, so a refused update leaves no trace.

Each element is `fma(weight, value, sum)` in the order in which updates come. So the result depends neither on
the size of the blocks, nor on grouping, nor on the number of threads, and in store order it equals, bit for bit,
`acc = 0; for u, w in ...: acc.add_(u, alpha=w)`.

The blocks are shared out to threads that each run torch on one core: forking and joining torch's own threads at
every block costs more than the block (measured: 0.45 of read bandwidth against 0.6 so).

Weights. The shared span sums `weight * scale * delta`, the statistic span `weight * value`. With scale = 1 / steps
the mean is FedNova's (Wang et al. 2020, arXiv:2007.07481): sum(w_i d_i / a_i) / sum(w_i), times the effective
number of steps sum(w_i a_i) / sum(w_i). With scale = 1 that factor is 1 and the mean is FedAvg's.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raypipe.errors import RunError
from raypipe.types import Layout

BLOCK = 1 << 19  # floats, 2 MiB: few enough to stay in the shared cache, so long that starting each costs little
MAX_THREADS = 4  # more only wait for memory
MAX_WEIGHT = 1e30  # above it a weighted value leaves float32 at once


@dataclass(frozen=True, slots=True)
class Weighted:
    """An update as decoded, float32 (update_size,), never written to; scale is 1 / steps or 1."""

    vector: npt.NDArray[np.float32]
    weight: float
    scale: float = 1.0


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
    """The one open version. It holds 2 * update_size floats, however many updates come.

    Not for two threads at once: one caller folds and takes.
    """

    def __init__(self, layout: Layout, *, threads: int | None = None, block: int = BLOCK) -> None:
        self._size = layout.update_size
        self._shared = layout.shared.stop
        self._front, self._back = _vector(self._size), _vector(self._size)
        self._zero = torch.zeros(1)
        spans = ((0, self._shared, True), (self._shared, self._size, False))
        self._blocks = [
            _Block(at, min(at + block, stop), shared)
            for start, stop, shared in spans
            for at in range(start, stop, block)
        ]
        wanted = threads if threads is not None else min(MAX_THREADS, torch.get_num_threads())
        self._threads = max(1, min(wanted, len(self._blocks)))
        self._pool = _single_core_pool(self._threads) if self._threads > 1 else None
        self._weights: list[tuple[float, float]] = []  # (weight, scale) of each folded update
        self._square = 0.0

    def __len__(self) -> int:
        """Updates folded since the last take."""
        return len(self._weights)

    def fold(self, updates: Sequence[Weighted]) -> list[int]:
        """Add these in order; the indices of those refused: not float32 (update_size,), of an impossible weight,
        not finite, or so large that the square of the weighted sum is not. The sum has never seen them."""
        fitting = [i for i, update in enumerate(updates) if self._fits(update)]
        refused = sorted({*range(len(updates))} - {*fitting})
        if not fitting:
            return refused
        square, finite = self._sum([updates[i] for i in fitting])
        if finite:
            self._front, self._back = self._back, self._front
            self._weights += [(updates[i].weight, updates[i].scale) for i in fitting]
            self._square = square
            return refused
        if len(fitting) == 1:
            return sorted([*refused, *fitting])
        return sorted([*refused, *(i for i in fitting if self.fold([updates[i]]))])  # each alone: the same bits

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
        shared.div_(divisor)
        statistic.div_(total or 1.0)
        mean = Mean(shared, statistic, total, len(self._weights), math.sqrt(self._square) / divisor, steps)
        self._weights, self._square = [], 0.0
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

    def _sum(self, updates: Sequence[Weighted]) -> tuple[float, bool]:
        """back = front + the updates; the square of the shared span, and whether all of it is finite."""
        flat = [(_tensor(u.vector), u.weight * u.scale, u.weight) for u in updates]
        if self._pool is None:
            squares = [self._block(block, flat) for block in self._blocks]
        else:
            parts = [self._blocks[i :: self._threads] for i in range(self._threads)]
            run = self._pool.map(lambda blocks: [(b, self._block(b, flat)) for b in blocks], parts)
            done = dict(pair for part in run for pair in part)
            squares = [done[block] for block in self._blocks]
        square = math.fsum(s for s, block in zip(squares, self._blocks, strict=True) if block.shared and s < math.inf)
        return square, all(math.isfinite(s) for s in squares)

    def _block(self, block: _Block, flat: Sequence[tuple[torch.Tensor, float, float]]) -> float:
        out = self._back[block.start : block.stop]
        held = self._front[block.start : block.stop] if self._weights else self._zero.expand(out.numel())
        for vector, delta_weight, value_weight in flat:
            alpha = delta_weight if block.shared else value_weight
            torch.add(held, vector[block.start : block.stop], alpha=alpha, out=out)
            held = out
        return float(torch.dot(out, out))


def _vector(size: int) -> torch.Tensor:
    """Zeros; numpy asks the system for huge pages, torch does not."""
    return torch.from_numpy(np.zeros(size, np.float32))


def _tensor(vector: npt.NDArray[np.float32]) -> torch.Tensor:
    """The same memory as a tensor, also where it is read-only (Ray's object store), of which torch would warn.
    The caller keeps `vector` alive and writes to neither."""
    memory = (ctypes.c_float * vector.size).from_address(vector.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.float32)


def _single_core_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each. The number of the other threads of the process stays as it is:
    torch keeps one a thread, and one for threads to come, which is put back when all have started."""
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # takes effect for this thread now, not at its first sum
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fold", initializer=settle)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(before)
    return pool
