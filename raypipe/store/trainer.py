"""The training loop of a store.

A ticket ends at the first of its limits. Clock, flags and the seed come in, so that a ticket done again gives the
same bits (on a CPU), and nothing in the loop waits for the device: losses stay tensors until they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from raypipe.errors import StoreError, StoreRefused
from raypipe.models.flat import FlatModel
from raypipe.store.batches import Examples, batches_per_epoch, shuffled
from raypipe.store.control import Clock, Control
from raypipe.store.policy import Limits
from raypipe.store.ranks import Ranks
from raypipe.store.schedules import Schedule
from raypipe.tasks import Task
from raypipe.tasks.task import Inputs

Stopped: TypeAlias = Literal["done", "budget", "control"]
AUGMENTED = 1  # beside the seed: how images are changed does not hang on how they are shuffled
CHECK_EVERY = 32  # steps between looks at whether the losses are finite: each look waits for a GPU
_GENERATOR = Lock()


@dataclass(frozen=True, slots=True)
class Work:
    """A ticket's numbers: `progress` is the run's at the ticket's start and end."""

    seed: int
    lr: float
    schedule: Schedule
    progress: tuple[float, float]
    limits: Limits
    fixed: bool = False  # BatchNorm's statistics stay as loaded
    slowdown: float = 1.0  # after each batch sleeps so long that it took this many times longer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a ticket came to; `loss` is the mean over the images seen."""

    steps: int
    examples: int
    seconds: float
    loss: float
    stopped: Stopped


def train(
    model: FlatModel,
    task: Task,
    images: Examples,
    optimizer: Optimizer,
    work: Work,
    control: Control,
    clock: Clock,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train the model, already loaded, in place; at least one step. `ranks`: others that are ready for this ticket.

    Raises StoreError.
    """
    limits, smallest = work.limits, smallest_batch(model, images, work.limits.batch_size)
    num_steps = _num_steps(limits, images.num, smallest)
    picks = shuffled(images.num, limits.batch_size, smallest, np.random.default_rng(work.seed))
    mine = picks if ranks is None else map(ranks.part, picks)
    losses, steps = Losses(model.device), 0
    chance = np.random.default_rng((work.seed, AUGMENTED))
    stopped: Stopped | None = None
    with (
        seeded(work.seed, model.device),
        closing(images.batches(mine, model.device, limits.max_bad_share)) as stream,
    ):
        model.train(fixed=work.fixed)
        control.give_way(clock)
        start = began = clock()
        for inputs, targets in stream:
            num = num_of(task, inputs, targets)
            if ranks is None and num < smallest:  # its images cannot be read
                continue
            _set_lr(optimizer, work.lr * work.schedule(_progress(work, steps, num_steps, began - start)))
            batch = augmented(task, inputs, targets, chance)
            if ranks is None:
                loss = _step(model, task, optimizer, *batch)
            else:
                loss, num = _shared_step(model, task, optimizer, *batch, num, smallest, ranks)
            if not num:
                continue
            losses.add(loss, num)
            steps += 1
            if work.slowdown > 1:
                control.sleep((work.slowdown - 1) * (clock() - began))
            control.wait_while_paused(_left(limits, clock() - start))
            start += control.give_way(clock)
            began = clock()
            if stopped := _ended(steps, num_steps, _left(limits, began - start), control):
                break
        mean = losses.mean()
        seconds = clock() - start
    return Outcome(steps, losses.examples, seconds, mean, stopped or "done")


def _left(limits: Limits, elapsed: float) -> float | None:
    return None if limits.budget_s is None else limits.budget_s - elapsed


class Losses:
    """Losses of a ticket, kept on the device and looked at now and then, and how far the device may lag behind."""

    def __init__(self, device: torch.device) -> None:
        self.examples = 0
        self._steps = 0
        self._sum = 0.0
        self._new: list[tuple[Tensor, int]] = []
        self._behind: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def add(self, loss: Tensor, num: int) -> None:
        self._new.append((loss, num))
        self.examples += num
        if len(self._new) >= CHECK_EVERY:
            self._look()
        if self._behind is not None:  # two batches: enough to keep a GPU busy, few enough for budgets to hold
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._behind.append(event)
            if len(self._behind) > 2:
                self._behind.popleft().synchronize()

    def mean(self) -> float:
        """Over the images. Raises StoreError when a loss was not finite."""
        self._look()
        return self._sum / max(1, self.examples)

    def _look(self) -> None:
        if not self._new:
            return
        values = torch.stack([loss for loss, _ in self._new]).double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise StoreError(f"the loss is not finite at step {self._steps + int(bad[0]) + 1}; lower lr")
        self._sum += float(values @ np.array([num for _, num in self._new], np.float64))
        self._steps += len(self._new)
        self._new.clear()


def num_of(task: Task, inputs: Inputs, targets: Tensor) -> int:
    """Examples of a batch."""
    return len(targets) if task.boxes is None else len(inputs)


def augmented(task: Task, inputs: Inputs, targets: Tensor, chance: np.random.Generator) -> tuple[Inputs, Tensor]:
    """A training batch as the task changes it; where it does not, the batch itself."""
    augment = None if task.boxes is None else task.boxes.augment
    return (inputs, targets) if augment is None or not len(inputs) else augment(inputs, targets, chance)


def _step(model: FlatModel, task: Task, optimizer: Optimizer, inputs: Inputs, targets: Tensor) -> Tensor:
    loss = backward(model, task, inputs, targets)
    optimizer.step()
    return loss


def _shared_step(
    model: FlatModel,
    task: Task,
    optimizer: Optimizer,
    inputs: Inputs,
    targets: Tensor,
    num: int,
    smallest: int,
    ranks: Ranks,
) -> tuple[Tensor, int]:
    """The mean loss over all ranks' examples, and their number."""
    ranks.begin()
    loss = backward(model, task, inputs, targets) if num >= smallest else None
    return ranks.step(model, optimizer, num, loss)


def backward(model: FlatModel, task: Task, inputs: Inputs, targets: Tensor) -> Tensor:
    """The mean loss of a batch; gradients stay at the parameters."""
    model.clear()
    loss = _loss(model, task, prepared(model, task, inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _loss(model: FlatModel, task: Task, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    if task.boxes is not None:
        with autocast(model.device):
            return task.boxes.step(model.module, inputs[0], targets)
    with autocast(model.device):
        outputs = model.module(*inputs)
    return task.loss(outputs.float(), targets)


def prepared(model: FlatModel, task: Task, pixels: Inputs) -> tuple[Tensor, ...]:
    """The module's arguments."""
    inputs = task.prepare(pixels)
    return tuple(model.laid_out(each) for each in (inputs if isinstance(inputs, tuple) else (inputs,)))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 where there is a GPU."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout by the ticket's seed; the process's own random state untouched.

    Sites in threads of one process take turns at its generator: torch holds its lock while it waits for Python's.
    """
    kept = torch.random.fork_rng(devices=[] if device.type == "cpu" else [device])
    with _GENERATOR:
        kept.__enter__()
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # a millisecond less: the other looks for who called it
        else:
            torch.manual_seed(seed)
    try:
        yield
    finally:
        with _GENERATOR:
            kept.__exit__(None, None, None)


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def smallest_batch(model: FlatModel, images: Examples, batch_size: int) -> int:
    """BatchNorm cannot learn from one image: such a batch is left out, a store of one image refuses."""
    if not model.has_batch_norm:
        return 1
    if min(images.num, batch_size) < 2:
        raise StoreRefused("a model with BatchNorm needs at least 2 images a batch; set norm: group")
    return 2


def _num_steps(limits: Limits, num: int, smallest: int) -> int | None:
    """Steps by max_steps and max_epochs, at least one; None when only time ends the ticket."""
    known = [] if limits.max_steps is None else [limits.max_steps]
    if limits.max_epochs is not None:
        known.append(round(limits.max_epochs * batches_per_epoch(num, limits.batch_size, smallest)))
    return max(1, min(known)) if known else None


def _progress(work: Work, steps: int, num_steps: int | None, elapsed: float) -> float:
    """The run's progress now: by steps, where their number is known, so that equal tickets give equal bits."""
    done = min(1.0, elapsed / (work.limits.budget_s or 1.0)) if num_steps is None else steps / num_steps
    start, end = work.progress
    return start + (end - start) * done


def _ended(steps: int, num_steps: int | None, left: float | None, control: Control) -> Stopped | None:
    if control.stopped:
        return "control"
    if steps == num_steps:
        return "done"
    return "budget" if left is not None and left <= 0 else None
