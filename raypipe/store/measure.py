"""Sums over a store's training split that are asked for before a run's first version, all in float64, all additive:

    moments   of each column that is to be standardised: how many, sum, sum of squares; and rows by class
    gram      for a head in closed form: see aggregation/closed_form.py

And one that is asked for when a run ends, for a version's statistics to be those of its own weights:

    statistics:IMAGES:LAYER   of what comes to a norm layer, over so many of the images: see models/norms.py

They are of all rows at once, and the policy says whether they may leave the store, and of how many rows at least.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.aggregation.closed_form import Gram
from raypipe.errors import StoreRefused
from raypipe.models.flat import FlatModel
from raypipe.models.heads import head_of
from raypipe.models.norms import reach, summing
from raypipe.store.batches import Examples, in_order
from raypipe.store.messages import Plan
from raypipe.store.policy import Policy
from raypipe.store.rows import Rows
from raypipe.store.shelf import Learner, Shelf
from raypipe.tasks import Task, tasks
from raypipe.tasks.tabular import moments

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Weights: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"  # float32
What: TypeAlias = str
STATISTICS = re.compile(r"statistics:([1-9][0-9]{0,6}):(.+)")
BATCH = 256
PIXELS = 1 << 20  # a batch has at most


def measured(
    shelf: Shelf,
    policy: Policy,
    plan: Plan,
    weights: Weights | None,
    what: What,
    known: Weights | None,
    stopped: Callable[[], bool],
) -> Array:
    """What is asked for, where the policy allows it; `known`: a model's statistics, where they are not the weights'.

    Raises StoreRefused.
    """
    if what == "moments":
        task = tasks.build(plan.task)
        rows = shelf.images(plan, task, "train")
        policy.may_measure(what, rows.num)
        return measured_moments(rows, task)
    layer = layer_of(what)
    if weights is None or (what != "gram" and layer is None):
        raise StoreRefused(f"what is to be measured is moments, or gram or statistics of a model, not {what!r}")
    learner = shelf.learner(plan, weights)
    learner.model.load(weights if known is None else _completed(learner, weights, known))
    examples = shelf.images(plan, learner.task, "train")
    policy.may_measure("gram" if layer is None else "statistics", examples.num)
    about, more = (learner.model, learner.task, examples), (shelf.max_bad_share(plan), stopped)
    sums = measured_gram(*about, *more) if layer is None else measured_statistics(*about, *layer, *more)
    if sums is None:
        raise StoreRefused("the measuring was stopped")
    return sums


def _completed(learner: Learner, weights: Weights, known: Weights) -> Weights:
    """Weights with statistics that were measured anew. Raises StoreRefused."""
    layout = learner.model.layout
    size = layout.statistic.stop - layout.statistic.start
    if known.shape != (size,) or known.dtype != np.float32:
        raise StoreRefused(f"statistics are {known.dtype} of shape {known.shape}, not float32 ({size},)")
    return layout.with_statistics(weights, known)


def measured_moments(rows: Examples, task: Task) -> Array:
    """Of each feature, then of a target that is a number, three numbers each; then rows by class."""
    if not isinstance(rows, Rows) or task.table is None:
        raise StoreRefused("only columns of rows have moments; the task reads none")
    columns = [rows.table[:, place] for place in range(len(task.table.features))]
    if task.table.classes is None:
        return np.array([number for column in [*columns, rows.targets] for number in moments(column)])
    counts = np.bincount(rows.targets, minlength=task.num_outputs).tolist()
    return np.array([*(number for column in columns for number in moments(column)), *counts], np.float64)


def measured_gram(
    model: FlatModel, task: Task, examples: Examples, max_bad_share: float, stopped: Callable[[], bool]
) -> Array | None:
    """Sums of the features before the head of the model as it is loaded, and of the targets; None if told to stop.

    A target that is a number is taken in units of its deviation, as the task learns it.
    """
    if task.one_hot is None:
        raise StoreRefused("this task has no head in closed form")
    _, head = head_of(model.module, task.num_outputs)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    total = Gram.zero(head.in_features, task.num_outputs)
    model.eval()
    picks = in_order(examples.num, _batch(task))
    try:
        with torch.inference_mode(), closing(examples.batches(picks, model.device, max_bad_share)) as stream:
            for inputs, targets in stream:
                if stopped():
                    return None
                if not len(targets):
                    continue
                seen.clear()
                prepared = task.prepare(inputs)
                model.module(*(prepared if isinstance(prepared, tuple) else (prepared,)))
                features = seen[0].double().cpu().numpy()
                total = total + Gram.of(features, task.one_hot(targets).double().cpu().numpy())
    finally:
        hook.remove()
    return total.packed()


def measured_statistics(
    model: FlatModel,
    task: Task,
    examples: Examples,
    num_images: int,
    layer: str,
    max_bad_share: float,
    stopped: Callable[[], bool],
) -> Array | None:
    """Of the inputs of a norm layer of the model as it is loaded, over so many images, evenly chosen: see
    models/norms.Sums.packed. None if told to stop. Raises StoreRefused for a layer that the model does not have."""
    if layer not in dict(model.module.named_modules()):
        raise StoreRefused(f"the model has no layer {layer!r}")
    chosen = _evenly(examples, num_images)
    picks = (chosen[start : start + _batch(task)] for start in range(0, len(chosen), _batch(task)))
    model.eval()
    with (
        torch.inference_mode(),
        summing(model.module, layer) as sums,
        closing(examples.batches(picks, model.device, max_bad_share)) as stream,
    ):
        for inputs, targets in stream:
            if stopped():
                return None
            if len(inputs):
                reach(forward(model.module, task, inputs, targets))
    if not sums.num:
        raise StoreRefused("none of the images chosen to measure by can be read")
    return sums.packed()


@contextmanager
def own_statistics(
    model: FlatModel, task: Task, examples: Examples, num_images: int, max_bad_share: float, stopped: Callable[[], bool]
) -> Iterator[None]:
    """Within it BatchNorm has the statistics of these images, as the loaded weights see them, evenly chosen and so many
    at most; after it those that were loaded. AdaBN, Li et al. 2016, arXiv:1603.04779; shared weights with statistics of
    each site's own are SiloBN, Andreux et al. 2020, arXiv:2008.07424.

    Each layer is normalised by what it is given, so that those behind it see what they will see when it is judged.
    Raises StoreRefused: there are not two images that can be read.
    """
    norms, chosen = model.moving_norms, _evenly(examples, num_images)
    size = max(2, _batch(task))  # of one image alone nothing is measured
    alike = np.array_split(chosen, -(-len(chosen) // size))  # so that each image counts about as much
    loaded = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        seen = 0
        with torch.inference_mode(), closing(examples.batches(iter(alike), model.device, max_bad_share)) as stream:
            for inputs, targets in stream:
                if stopped():
                    break  # nor will it be judged
                if len(inputs) > 1:
                    forward(model.module, task, inputs, targets)()
                    seen += len(inputs)
        if not seen and not stopped():
            raise StoreRefused("statistics of the store's own need at least 2 training images that can be read")
        model.eval()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, before in loaded:
            buffer.copy_(before)


def _evenly(examples: Examples, num_images: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """So many examples, from all over the split."""
    return np.unique(np.linspace(0, examples.num - 1, min(num_images, examples.num)).astype(np.int64))


def forward(module: Any, task: Task, inputs: Any, targets: torch.Tensor) -> Callable[[], object]:
    """A batch through a model, as it is judged."""
    prepared = task.prepare(inputs)
    if task.boxes is not None:
        return partial(task.boxes.judge, module, prepared, targets)
    return partial(module, *(prepared if isinstance(prepared, tuple) else (prepared,)))


def layer_of(what: str) -> tuple[int, str] | None:
    """How many images, and which layer, where statistics are to be measured."""
    asked = STATISTICS.fullmatch(what)
    return None if asked is None else (int(asked[1]), asked[2])


def _batch(task: Task) -> int:
    return max(1, min(BATCH, PIXELS // max(1, task.image_size) ** 2))
