"""What a task is: plain functions over batches, so that the trainer knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from signatures without torch
    Tensor: TypeAlias = Any

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> the mean over the batch, a scalar
Inputs: TypeAlias = Any  # a Tensor, or a tuple of them, one an argument of the module
Settings: TypeAlias = dict[str, Any]
Absent: TypeAlias = Literal["untouched", "negative"]


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of each row: a table (n, width) float32, numbers first (NaN: missing), then a 0/1 a category."""

    features: tuple[str, ...]
    categories: tuple[tuple[str, tuple[str, ...]], ...]  # column -> its values, each an input of its own
    target: str
    classes: tuple[str, ...] | None  # values of the target; None: it is a number
    image: bool = False  # the row's image too

    @property
    def width(self) -> int:
        return len(self.features) + sum(len(values) for _, values in self.categories)


@dataclass(frozen=True, slots=True)
class Boxes:
    """Of a task whose images have boxes; its models have a loss of their own (models/detector.py).

    Targets are float32 (m, 7): image in the batch, label, centre x, centre y, width, height in pixels of the square
    image, into which others are letterboxed; 1 where the box is to be ignored.
    """

    # (module, prepared images, targets) -> the mean over the batch; `among`: of these classes alone, by number;
    # `version`: a module as it was at first, by which is known where others stand
    step: Callable[..., Tensor]
    judge: Callable[..., dict[str, float]]  # the same arguments -> sums by name
    # (module, prepared images, `least`) -> for each image rows as models/detector.py has them, those of classes that
    # there are, above this score
    find: Callable[..., list[Tensor]]
    augment: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]] | None  # of a uint8 batch, to train


@dataclass(frozen=True, slots=True)
class Task:
    """Batches are uint8 (n, channels, image_size, image_size), labels int64 (n,), outputs float (n, num_outputs).

    Of rows: a table float32 (n, width), with uint8 images a pair of both; targets float32 (n,) where they are numbers.
    Of images with boxes: see `Boxes`; then `loss`, `sums` and `predict` raise ConfigError.
    """

    num_outputs: int
    channels: int
    image_size: int
    classes: tuple[str, ...] | None  # by index; None: labels are taken as they are numbered at the stores
    primary: str  # the metric that says which version is best, unless the configuration names another
    prepare: Callable[[Inputs], Inputs]  # uint8 -> normalised float32, on the batch's own device
    loss: Loss
    sums: Callable[[Tensor, Tensor], dict[str, Tensor]]  # (outputs, labels) -> sums by name; a vector is name/0, /1, ..
    predict: Callable[[Tensor], Tensor]  # outputs -> label indices (n,), or numbers (n,)
    metrics: tuple[str, ...] = ("accuracy", "loss")  # what the sums come to; see tasks/metrics.py
    table: Columns | None = None  # None: labelled images are read
    boxes: Boxes | None = None  # None: each image has one label
    columns: int = 0  # of the prepared table, as the model gets it
    # Settings that the task still lacks, from the sum of what the stores measured; None: it lacks none.
    settle: Callable[[Sequence[float]], Settings] | None = None
    one_hot: Callable[[Tensor], Tensor] | None = None  # labels -> what a least-squares head is to put out (n, outputs)
    # Names as stores may call them -> the class's number, see class_list.py; (): those of `classes`.
    places: tuple[tuple[str, int], ...] = ()
    unknown: Literal["refuse", "ignore"] = "refuse"  # what a store does with images or boxes of other classes
    absent: Absent = "untouched"  # classes that a store cannot label, when it trains
    live: tuple[int, ...] | None = None  # outputs that are an answer; None: all

    def labelled(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """What training at a store with these names of its own is about, by number; None: all outputs."""
        live = range(self.num_outputs) if self.live is None else self.live
        known = {place for name, place in self.places if name in names}
        some = self.places and self.absent == "untouched" and (self.boxes is not None or len(known) > 1)
        chosen = tuple(place for place in live if place in known) if some else tuple(live)
        return None if len(chosen) == self.num_outputs else chosen

    def among(self, some: Sequence[int] | None, module: Any = None) -> Task:
        """The same, its loss over some outputs alone; of boxes the judgement too.

        `module`, before it is trained: of boxes a copy tells where others stand, see models/yolov5_net.py.
        """
        if some is None:
            return self
        if self.boxes is not None:
            version = None if module is None or not getattr(module, "restricts", False) else deepcopy(module).eval()
            step, judge = partial(self.boxes.step, among=some, version=version), partial(self.boxes.judge, among=some)
            return replace(self, boxes=replace(self.boxes, step=step, judge=judge))
        from raypipe.tasks.criteria import among

        return replace(self, loss=among(self.loss, some, self.num_outputs))
