"""A row of a table, with or without an image: regression, and classification of rare cases.

Columns are standardised by the mean and the deviation over all stores' rows. Nobody has those rows in one place: each
store says how many there are, their sum and their sum of squares (`moments` below, in float64), and these add up.
The settings that come of it (`scale`, `class_weights`) are the task's own, told with every ticket, and in the record.

A value that is missing, or the whole column at a store that does not have it, is zero after standardising, which is
the mean, and a second input says that it was there. Every number is two inputs to the model, every value of a category
one.

Targets that are numbers are learned in units of their deviation and judged in their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field

from raypipe.errors import ConfigError
from raypipe.tasks import Task, tasks
from raypipe.tasks.criteria import one_hot
from raypipe.tasks.task import Columns, Inputs, Settings

if TYPE_CHECKING:
    from torch import Tensor
else:  # settings are checked from the signature without torch
    Tensor: TypeAlias = Any

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Names: TypeAlias = list[Annotated[str, Field(min_length=1, max_length=200)]]
Values: TypeAlias = Annotated[list[str | int], Field(min_length=1, max_length=10_000)]
EDGE = 8.0  # logits beyond it share the outermost bins


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("names must be distinct")
    return names


Features: TypeAlias = Annotated[Names, AfterValidator(_distinct)]
Classes: TypeAlias = Annotated[Names, Field(min_length=2), AfterValidator(_distinct)]
Weights: TypeAlias = Literal["balanced"] | list[Positive]
Scale: TypeAlias = dict[str, tuple[Finite, Positive]]


@tasks("tabular")
def tabular(
    *,
    target: str,
    features: Features = [],  # noqa: B006  # never changed
    categories: dict[str, Values] = {},  # noqa: B006  # never changed
    classes: Classes | None = None,
    class_weights: Weights | None = None,
    scale: Scale | None = None,
    score_bins: Annotated[int, Field(ge=8, le=4096)] = 256,
) -> Task:
    """`classes`: values of the target, of two the second is the positive one; without them the target is a number.

    `scale`: column -> (mean, deviation); without it the stores are asked before the first version, as they are for
    `class_weights: balanced`, which gives every class the same say: rows / (classes * rows of the class).
    """
    columns = _columns(features, categories, target, classes, image=False)
    if columns.width == 0:
        raise ConfigError("tabular: at least one of features and categories is needed")
    return _task(columns, 0, 1, class_weights, scale, score_bins, lambda pixels: pixels)


@tasks("multimodal")
def multimodal(
    *,
    target: str,
    features: Features = [],  # noqa: B006  # never changed
    categories: dict[str, Values] = {},  # noqa: B006  # never changed
    classes: Classes | None = None,
    class_weights: Weights | None = None,
    scale: Scale | None = None,
    score_bins: Annotated[int, Field(ge=8, le=4096)] = 256,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 28,
    channels: Literal[1, 3] = 1,
    mean: Annotated[float, Field(ge=0, le=1)] = 0.5,
    std: Annotated[float, Field(gt=0, le=10)] = 0.25,
) -> Task:
    """A table's row and its image (column `image`); without features and categories the image alone.

    `mean` and `std` are of pixels in [0, 1]; all else as in `tabular`.
    """

    def normalised(pixels: Tensor) -> Tensor:
        return pixels.float().sub_(mean * 255.0).div_(std * 255.0)

    columns = _columns(features, categories, target, classes, image=True)
    return _task(columns, channels, image_size, class_weights, scale, score_bins, normalised)


def moments(values: Any) -> list[float]:
    """Count, sum and sum of squares of what is not missing; `values` is a NumPy array (n,)."""
    there = values[values == values].astype("float64")
    return [float(len(there)), float(there.sum()), float((there * there).sum())]


def _columns(
    features: list[str],
    categories: dict[str, list[str | int]],
    target: str,
    classes: list[str] | None,
    *,
    image: bool,
) -> Columns:
    if target in features or target in categories:
        raise ConfigError(f"the target {target!r} is among the features, which would make it its own prediction")
    if twice := sorted(set(features) & set(categories)):
        raise ConfigError(f"column {twice[0]!r} is a feature and a category; it can be one of them")
    values = tuple((name, tuple(str(value) for value in each)) for name, each in categories.items())
    return Columns(tuple(features), values, target, tuple(classes) if classes else None, image)


def _task(
    columns: Columns,
    channels: int,
    image_size: int,
    class_weights: Weights | None,
    scale: Scale | None,
    score_bins: int,
    normalised: Callable[[Tensor], Tensor],
) -> Task:
    classes, wants_weights = columns.classes, class_weights == "balanced"
    if class_weights is not None and (classes is None or (not wants_weights and len(class_weights) != len(classes))):
        raise ConfigError("class_weights: 'balanced' or one number a class, where the target has classes")
    known = {} if scale is None else scale
    prepare = _preparing(columns, known, normalised)
    wants_scale = scale is None and (bool(columns.features) or classes is None)
    settle = _settling(columns, wants_scale, wants_weights) if wants_scale or wants_weights else None
    own = _numbers(known.get(columns.target, (0.0, 1.0)))
    names: tuple[str, ...] = ("r2", "rmse", "loss")
    if classes is not None:
        own = _classes(len(classes), None if isinstance(class_weights, str) else class_weights, score_bins)
        names = ("auc", "average_precision", "accuracy", "loss") if len(classes) == 2 else ("accuracy", "loss")
    loss, sums, predict, least_squares = own
    return Task(
        num_outputs=len(classes) if classes else 1,
        channels=channels,
        image_size=image_size,
        classes=classes,
        primary=names[0],
        prepare=prepare,
        loss=loss,
        sums=sums,
        predict=predict,
        one_hot=least_squares,
        metrics=names,
        table=columns,
        columns=columns.width + len(columns.features),
        settle=settle,
    )


def _preparing(columns: Columns, scale: Scale, normalised: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    num = len(columns.features)
    mean = [scale.get(name, (0.0, 1.0))[0] for name in columns.features]
    deviation = [scale.get(name, (0.0, 1.0))[1] for name in columns.features]

    def of_table(table: Tensor) -> Tensor:
        import torch

        numbers = (table[:, :num] - table.new_tensor(mean)) / table.new_tensor(deviation)
        there = ~numbers.isnan()
        return torch.cat([numbers.nan_to_num(nan=0.0), there.float(), table[:, num:]], 1)

    def prepare(inputs: Inputs) -> Inputs:
        if not columns.image:
            return of_table(inputs)
        if not columns.width:
            return normalised(inputs)
        return normalised(inputs[0]), of_table(inputs[1])

    return prepare


Parts: TypeAlias = tuple[
    Callable[[Tensor, Tensor], Tensor],
    Callable[[Tensor, Tensor], dict[str, Tensor]],
    Callable[[Tensor], Tensor],
    Callable[[Tensor], Tensor],
]


def _numbers(scale: tuple[float, float]) -> Parts:
    """Loss, sums and prediction of a target that is a number; sums of the target are about its mean."""
    mean, deviation = scale

    def errors(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0] - (targets - mean) / deviation

    def sums(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        error, centred = errors(outputs, targets).double(), (targets - mean).double()
        return {
            "loss": error.square().sum(),
            "moments/squared_error": (error * deviation).square().sum(),
            "moments/target": centred.sum(),
            "moments/target_squared": centred.square().sum(),
        }

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return errors(outputs, targets).square().mean()

    def units(targets: Tensor) -> Tensor:
        return ((targets - mean) / deviation).unsqueeze(1)

    return loss, sums, lambda outputs: outputs[:, 0] * deviation + mean, units


def _classes(num_classes: int, weights: Sequence[float] | None, score_bins: int) -> Parts:
    """Loss, sums and prediction of classes. The loss is not divided by the weights in a batch, so that every row has
    the same say at every store."""

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional

        each = functional.cross_entropy(outputs, labels, reduction="none")
        return each if weights is None else each * outputs.new_tensor(list(weights))[labels]

    def histogram(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        score = (outputs[:, 1] - outputs[:, 0] + EDGE) * (score_bins / (2 * EDGE))
        place = score.clamp(0, score_bins - 1).nan_to_num().long()
        return {f"scores/{of}": place[labels == of].bincount(minlength=score_bins) for of in (0, 1)}

    def sums(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = {"loss": losses(outputs, labels).sum(), "accuracy": (outputs.argmax(1) == labels).sum()}
        return found | histogram(outputs, labels) if num_classes == 2 else found

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return losses(outputs, labels).mean()

    return loss, sums, lambda outputs: outputs.argmax(1), one_hot(num_classes)


def _settling(columns: Columns, scale: bool, weights: bool) -> Callable[[Sequence[float]], Settings]:
    """What the stores' sums come to. They measure `moments` of each feature, then of the target, or rows a class."""
    names = list(columns.features) + ([] if columns.classes else [columns.target])

    def settle(sums: Sequence[float]) -> Settings:
        found: Settings = {}
        if scale:
            found["scale"] = {name: _mean_and_deviation(*sums[3 * i : 3 * i + 3]) for i, name in enumerate(names)}
        if weights:
            counts = sums[3 * len(names) :]
            total = sum(counts)
            found["class_weights"] = [total / (len(counts) * max(1.0, count)) for count in counts]
        return found

    return settle


def _mean_and_deviation(count: float, total: float, square: float) -> list[float]:
    """A column that is missing everywhere, or the same everywhere, is left as it is but for its mean."""
    mean = total / max(1.0, count)
    variance = square / max(1.0, count) - mean * mean
    return [mean, math.sqrt(variance) if variance > 1e-12 * max(1.0, mean * mean) else 1.0]
