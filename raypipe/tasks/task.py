"""What a task is: plain functions over batches, so that the trainer knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from signatures without torch
    Tensor: TypeAlias = Any

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> the mean over the batch, a scalar
Inputs: TypeAlias = Any  # a Tensor, or a tuple of them, one an argument of the module
Settings: TypeAlias = dict[str, Any]


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
class Task:
    """Batches are uint8 (n, channels, image_size, image_size), labels int64 (n,), outputs float (n, num_outputs).

    Of rows: a table float32 (n, width), with uint8 images a pair of both; targets float32 (n,) where they are numbers.
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
    columns: int = 0  # of the prepared table, as the model gets it
    # Settings that the task still lacks, from the sum of what the stores measured; None: it lacks none.
    settle: Callable[[Sequence[float]], Settings] | None = None
    one_hot: Callable[[Tensor], Tensor] | None = None  # labels -> what a least-squares head is to put out (n, outputs)
