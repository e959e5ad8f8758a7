"""Losses of classification, and its targets in least squares.

A user's own loss is such a function in a package of the user's, by entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from raypipe.tasks import Loss, losses

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from signatures without torch
    Tensor: TypeAlias = Any


@losses("cross_entropy")
def cross_entropy(*, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Loss:
    """Smoothing helps where labels are wrong now and then. Szegedy et al. 2015, arXiv:1512.00567."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(outputs, labels, label_smoothing=label_smoothing)

    return loss


@losses("focal")
def focal(*, gamma: Annotated[float, Field(ge=0, le=10)] = 2.0) -> Loss:
    """Weighs easy examples less, for rare classes. Lin et al. 2017, arXiv:1708.02002."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional

        cross = functional.cross_entropy(outputs, labels, reduction="none")
        return ((1 - (-cross).exp()) ** gamma * cross).mean()

    return loss


def among(loss: Loss, places: Sequence[int], num_classes: int) -> Loss:
    """A loss over some outputs alone: the others get no gradient, whatever the labels are.

    Of a store that cannot label some classes (restricted softmax: FedRS, Li and Zhan, KDD 2021; masked as in HeteroFL,
    arXiv:2010.01264), and of classes that are no more.
    """

    def restricted(outputs: Tensor, labels: Tensor) -> Tensor:
        index, number = selection(places, num_classes, outputs)
        return loss(outputs.index_select(1, index), number[labels])

    return restricted


def selection(places: Sequence[int], num_classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """These outputs as an index, and each label's number among them (-1 for the others); on the tensor's device."""
    import torch

    index = torch.tensor(places, device=like.device)
    number = torch.full((num_classes,), -1, device=like.device)
    number[index] = torch.arange(len(places), device=like.device)
    return index, number


def one_hot(num_classes: int) -> Callable[[Tensor], Tensor]:
    """Labels (n,) to float (n, num_classes), a 1 at the label."""

    def encode(labels: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.one_hot(labels, num_classes).float()

    return encode
