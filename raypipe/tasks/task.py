"""What a task is: plain functions over batches, so that the trainer knows none by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from signatures without torch
    Tensor: TypeAlias = Any

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> the mean over the batch, a scalar


@dataclass(frozen=True, slots=True)
class Task:
    """Batches are uint8 (n, channels, image_size, image_size), labels int64 (n,), outputs float (n, num_outputs)."""

    num_outputs: int
    channels: int
    image_size: int
    classes: tuple[str, ...] | None  # by index; None: labels are taken as they are numbered at the stores
    primary: str  # the metric that says which version is best, unless the configuration names another
    prepare: Callable[[Tensor], Tensor]  # uint8 -> normalised float32, on the batch's own device
    loss: Loss
    sums: Callable[[Tensor, Tensor], dict[str, Tensor]]  # (outputs, labels) -> a scalar sum per metric
    predict: Callable[[Tensor], Tensor]  # outputs -> label indices (n,)
