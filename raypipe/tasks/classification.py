"""One label an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from raypipe.errors import ConfigError
from raypipe.tasks import Task, losses, tasks
from raypipe.tasks.criteria import one_hot

if TYPE_CHECKING:
    from torch import Tensor


def _as_part(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _known_loss(part: dict[str, Any]) -> dict[str, Any]:
    problems = losses.problems(part, "loss") if "name" in part else ["a loss needs a name"]
    if problems:
        raise ValueError("; ".join(problems))
    return part


def distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("class names must be distinct")
    return names


Classes: TypeAlias = (
    Annotated[int, Field(ge=2, le=1_000_000)] | Annotated[list[str], Field(min_length=2), AfterValidator(distinct)]
)
LossPart: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_as_part), AfterValidator(_known_loss)]
Level: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Spread: TypeAlias = Annotated[float, Field(gt=0, le=10)]


@tasks("classification")
def classification(
    *,
    classes: Classes = 10,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 28,
    channels: Literal[1, 3] = 1,
    loss: LossPart = {"name": "cross_entropy"},  # noqa: B006  # never changed: pydantic copies it
    mean: Level | list[Level] = 0.5,
    std: Spread | list[Spread] = 0.25,
) -> Task:
    """`classes`: names, by which each store's own numbering is matched, or a number where all stores number alike.

    `mean` and `std` are of pixels in [0, 1], one for all channels or one each.
    """
    if any(isinstance(value, list) and len(value) != channels for value in (mean, std)):
        raise ConfigError(f"classification: mean and std hold one number or {channels}, one a channel")
    criterion = losses.build(loss)

    def levels(value: float | list[float], images: Tensor) -> Any:
        return images.new_tensor(value).view(1, -1, 1, 1) if isinstance(value, list) else value

    def prepare(images: Tensor) -> Tensor:
        images = images.float()
        return images.sub_(levels(mean, images) * 255.0).div_(levels(std, images) * 255.0)

    def sums(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "loss": criterion(outputs, labels) * len(labels),
            "accuracy": (outputs.argmax(1) == labels).sum(),
        }

    num_outputs = classes if isinstance(classes, int) else len(classes)
    return Task(
        num_outputs=num_outputs,
        channels=channels,
        image_size=image_size,
        classes=None if isinstance(classes, int) else tuple(classes),
        primary="accuracy",
        prepare=prepare,
        loss=criterion,
        sums=sums,
        predict=lambda outputs: outputs.argmax(1),
        one_hot=one_hot(num_outputs),
    )
