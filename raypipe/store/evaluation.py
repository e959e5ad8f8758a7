"""A model judged on a split of a store: sums by metric, which may be added to those of other stores."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from raypipe.models.flat import FlatModel
from raypipe.store.batches import Examples, in_order
from raypipe.store.control import Clock, Control
from raypipe.store.trainer import autocast, num_of, prepared
from raypipe.tasks import Task
from raypipe.tasks.task import Inputs

EVALUATION_BATCH = 256  # images at most, and
EVALUATION_ROWS = 8192  # the same of a table
EVALUATION_PIXELS = 1 << 20  # at most so many, since activations of large images fill a memory


def evaluate(
    model: FlatModel, task: Task, images: Examples, control: Control, max_bad_share: float, clock: Clock
) -> tuple[dict[str, float], int] | None:
    """Sums by metric over the split and the number of images; None if told to stop.

    A product that its store cannot label and that is found all the same is no mistake: nothing is judged of it.
    """
    sums: dict[str, Tensor | float] = {}
    seen = 0
    if task.boxes is not None:
        task = task.among(images.labelled)
    model.eval()
    most = EVALUATION_BATCH if task.channels else EVALUATION_ROWS
    batch_size = max(1, min(most, EVALUATION_PIXELS // task.image_size**2))
    picks = in_order(images.num, batch_size)
    with torch.inference_mode(), closing(images.batches(picks, model.device, max_bad_share)) as stream:
        for inputs, targets in stream:
            if control.stops(clock):
                return None
            if not (num := num_of(task, inputs, targets)):
                continue
            for name, value in _sums(model, task, inputs, targets).items():
                sums[name] = sums[name] + value if name in sums else value
            seen += num
    return _named(sums), seen


def _sums(model: FlatModel, task: Task, inputs: Inputs, targets: Tensor) -> Mapping[str, Tensor | float]:
    if task.boxes is not None:
        with autocast(model.device):
            return task.boxes.judge(model.module, prepared(model, task, inputs)[0], targets)
    with autocast(model.device):
        outputs = model.module(*prepared(model, task, inputs))
    return {name: value.double() for name, value in task.sums(outputs.float(), targets).items()}


def _named(sums: dict[str, Tensor | float]) -> dict[str, float]:
    """Sums by name; a vector's numbers by name and place, those that are not zero."""
    plain = {name: float(value) for name, value in sums.items() if not isinstance(value, Tensor) or value.ndim == 0}
    vectors = ((name, value.cpu().numpy()) for name, value in sums.items() if isinstance(value, Tensor) and value.ndim)
    return plain | {f"{name}/{i}": float(value[i]) for name, value in vectors for i in np.flatnonzero(value)}
