"""Models of table rows: `mlp` of the columns alone, `two_towers` of an image and its columns."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from raypipe.errors import ConfigError
from raypipe.models import build, models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from signatures without torch
    Module: TypeAlias = Any

Width: TypeAlias = Annotated[int, Field(ge=1, le=8192)]
Widths: TypeAlias = Annotated[list[Width], Field(max_length=8)]
Dropout: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


def _known_model(part: dict[str, Any]) -> dict[str, Any]:
    problems = models.problems(part, "image") if "name" in part else ["an image tower needs a name"]
    if problems:
        raise ValueError("; ".join(problems))
    return part


ImagePart: TypeAlias = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
    AfterValidator(_known_model),
]


@models("mlp")
def mlp(
    num_outputs: int,
    channels: int,
    image_size: int,
    columns: int,
    *,
    hidden: Widths = [64, 32],  # noqa: B006  # never changed
    dropout: Dropout = 0.0,
) -> Module:
    """Dense layers with ReLU, a linear model without `hidden`. The columns come standardised: no layer does it."""
    from torch import nn

    if channels:
        raise ConfigError("model mlp reads columns only, the task's rows have images: take two_towers")
    return nn.Sequential(*_dense(columns, hidden, dropout), nn.Linear([columns, *hidden][-1], num_outputs))


@models("two_towers")
def two_towers(
    num_outputs: int,
    channels: int,
    image_size: int,
    columns: int,
    *,
    image: ImagePart = {"name": "small_cnn"},  # noqa: B006  # never changed
    image_width: Width = 32,
    hidden: Widths = [32],  # noqa: B006  # never changed
    joint: Width = 64,
    dropout: Dropout = 0.0,
) -> Module:
    """One tower reads the image (any image model, with `image_width` outputs), one the columns, a head reads both."""
    from torch import nn

    from raypipe.models.towers_net import TwoTowers

    if not channels:
        raise ConfigError("model two_towers reads images too, the task's rows have none: take mlp")
    width = image_width + [columns, *hidden][-1]
    return TwoTowers(
        build(image, image_width, channels, image_size),
        nn.Sequential(*_dense(columns, hidden, dropout)),
        nn.Sequential(nn.Linear(width, joint), nn.ReLU(), nn.Linear(joint, num_outputs)),
    )


def _dense(inputs: int, hidden: list[int], dropout: float) -> list[Module]:
    from torch import nn

    layers: list[Module] = []
    for before, after in pairwise([inputs, *hidden]):
        layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return layers
