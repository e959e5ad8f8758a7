"""A store with several GPUs: each ticket is trained by as many processes, one of them the site's own (rank 0).

Each rank takes every n-th image of a batch, so that together they are the batch that one process would have taken.
Their gradients, each times its number of images, are summed at rank 0 (NCCL on GPUs, gloo on CPUs), which divides by
the images of all, takes the optimizer's step and sends the weights back: what all_reduce moves, and one optimizer,
whose state stays where the outbox is. So an update is that of one process to rounding, but for what a model draws or
measures in a batch: dropout is each rank's own, BatchNorm normalises by the rank's part, its running statistics are
rank 0's. A report's `skipped` counts the unreadable images that rank 0 met.

The other ranks are started with the first ticket and stay, with data and model in their memory. They hear commands on
their standard input, so that a pause costs nothing, and end when it is closed: with the site, however it ends. When
one ends, the ticket fails, all are ended, and the next ticket starts new ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeAlias

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from raypipe.errors import StoreError
from raypipe.models.flat import FlatModel
from raypipe.store.messages import Plan, Ticket, encode

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
START_S = 120.0  # for all ranks to import and find each other
STEP_S = 120.0  # by which a rank may be later than another
LOOK_S = 0.05


def say(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """Raises OSError when the other side is gone."""
    body: bytes = msgpack.packb(message)
    pipe.write(len(body).to_bytes(4, "big") + body)
    pipe.flush()


def hear(pipe: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None at the end."""
    size = pipe.read(4)
    body = pipe.read(int.from_bytes(size, "big")) if len(size) == 4 else b""
    return msgpack.unpackb(body) if body else None


def meet(file: Path, rank: int, num: int, device: torch.device) -> None:
    """Be one of them: in this process's default group."""
    if sys.platform == "linux":  # all are on one machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(file), num)  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=START_S))
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num, timeout=timedelta(seconds=STEP_S))


def gradients(model: FlatModel, num: int, loss: Tensor | None) -> Tensor:
    """What a rank brings: its gradients and its loss times its images, and their number, as one vector."""
    size = sum(parameter.numel() for parameter in model.trained)
    whole = torch.zeros(size + 2, device=model.device)
    if loss is None:
        return whole
    at = 0
    for parameter in model.trained:
        if parameter.grad is not None:
            whole[at : at + parameter.numel()] = parameter.grad.reshape(-1)
        at += parameter.numel()
    whole[size] = loss
    whole[: size + 1] *= num
    whole[size + 1] = num
    return whole


def part(pick: Indices, rank: int, num: int) -> Indices:
    """A rank's images of a batch."""
    return pick[rank::num]


class Ranks:
    """Rank 0's side. `device`: its own, the others have the ones after it. Not for two threads at once.

    `cache_bytes` as rank 0 has it: what is kept decoded decides from which images batches draw.
    """

    def __init__(self, home: Path, num: int, *, threads: int, device: torch.device, cache_bytes: int) -> None:
        self.num, self._home, self._device = num, home, device
        self._numbers = [str(threads), str(cache_bytes)]
        self._others: list[subprocess.Popen[bytes]] = []
        self._amid = False  # a step began and has not ended: the ranks are not in step

    @property
    def processes(self) -> list[int]:
        """Of the other ranks."""
        return [other.pid for other in self._others]

    @contextmanager
    def ticket(self, ticket: Ticket, plan: Plan, base: np.ndarray) -> Iterator[Ranks]:
        """All of them ready for the ticket's first step. Raises StoreError."""
        try:
            if not self._others:
                self._start()
            told = {"ticket": encode(ticket), "plan": encode(plan), "size": int(base.size)}
            for other in self._others:
                say(_stdin(other), told)
            for rank in range(1, self.num):
                self._answer(rank)
            dist.broadcast(torch.tensor(base), 0)
        except (OSError, RuntimeError) as error:
            raise self._lost(error) from None
        self._amid = False
        try:
            yield self
        finally:
            if self._amid:
                self.close()
            else:
                self._tell({"go": False})

    def part(self, pick: Indices) -> Indices:
        """Rank 0's images of a batch."""
        return part(pick, 0, self.num)

    def begin(self) -> None:
        """A step begins at all of them. Raises StoreError."""
        self._amid = True
        for rank, other in enumerate(self._others, 1):
            if other.poll() is not None:
                raise self._lost(RuntimeError(f"rank {rank} ended"))
        self._tell({"go": True})

    def step(self, model: FlatModel, optimizer: Optimizer, num: int, loss: Tensor | None) -> tuple[Tensor, int]:
        """All ranks' gradients into one step, the weights to all: the mean loss and the images. Raises StoreError."""
        try:
            whole = gradients(model, num, loss)
            dist.reduce(whole, 0)
            examples = int(whole[-1])
            if examples:
                whole /= examples
                at = 0
                for parameter in model.trained:
                    parameter.grad = whole[at : at + parameter.numel()].view_as(parameter)
                    at += parameter.numel()
                optimizer.step()
            dist.broadcast(model.vector, 0)
        except RuntimeError as error:
            raise self._lost(error) from None
        self._amid = False
        return whole[-2], examples

    def close(self) -> None:
        """End the others; the next ticket starts new ones."""
        for other in self._others:
            other.kill()
        for other in self._others:
            other.wait()
            for pipe in (other.stdin, other.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._others, self._amid = [], False
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="ranks"))
        try:
            command = [sys.executable, "-m", "raypipe.store.rank", str(self._home), str(folder / "meet")]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            for rank in range(1, self.num):
                said = [self._device.type, str(rank), str(self.num), *self._numbers]
                self._others.append(subprocess.Popen([*command, *said], env=env, **pipes))
            for rank in range(1, self.num):
                self._answer(rank)
            meet(folder / "meet", 0, self.num, self._device)
            for rank in range(1, self.num):  # they have met too: the file is read no more
                self._answer(rank)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _answer(self, rank: int) -> None:
        """Wait for one of the others to be ready. Raises RuntimeError."""
        pipe = self._others[rank - 1].stdout
        assert pipe is not None
        if hear(pipe) is None:
            raise RuntimeError(f"rank {rank} ended")

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            for other in self._others:
                say(_stdin(other), message)
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> StoreError:
        """One of them is gone, or does not answer: which one, if it can be seen."""
        until = time.monotonic() + 1.0  # it may be ending
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(LOOK_S)
        self.close()
        which = f"rank {gone[0]} of {self.num} ended" if gone else f"the {self.num} ranks lost each other"
        return StoreError(f"{which} while it trained; they are started anew. The store's own log may say why")

    def _gone(self) -> list[int]:
        return [rank for rank, other in enumerate(self._others, 1) if other.poll() is not None]


def _stdin(other: subprocess.Popen[bytes]) -> IO[bytes]:
    assert other.stdin is not None
    return other.stdin
