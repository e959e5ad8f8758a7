"""One label an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from raypipe.errors import ConfigError, did_you_mean
from raypipe.tasks import Task, losses, tasks
from raypipe.tasks.class_list import ClassList, twice
from raypipe.tasks.criteria import among, one_hot, selection
from raypipe.tasks.task import Absent

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
MANY = 1000  # names that are merged or gone
Merge: TypeAlias = dict[str, Annotated[list[str], Field(min_length=1)]]
Unknown: TypeAlias = Literal["refuse", "ignore"]


@tasks("classification")
def classification(
    *,
    classes: Classes = 10,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 28,
    channels: Literal[1, 3] = 1,
    loss: LossPart = {"name": "cross_entropy"},  # noqa: B006  # never changed: pydantic copies it
    mean: Level | list[Level] = 0.5,
    std: Spread | list[Spread] = 0.25,
    merge: Merge = {},  # noqa: B006  # never changed: pydantic copies it
    unknown: Unknown = "refuse",
    absent: Absent = "untouched",
    gone: dict[str, str | None] = {},  # noqa: B006  # the same
    per_class: bool = False,
) -> Task:
    """`classes`: names, by which each store's own numbering is matched, or a number where all stores number alike.

    `mean` and `std` are of pixels in [0, 1], one for all channels or one each. `merge`: other names that count as a
    class, e.g. {shoe: [Sandal, Sneaker]}; `unknown`: what a store does with images of classes that are not listed.
    `absent`: what its training does to classes that its data set does not list: `untouched`, neither their outputs
    nor their rows have a part in it; `negative`: each of its images is an example against them. `gone`: classes that
    are no more, and as what they count (null: left out); see class_list.py. `per_class`: tell each class's recall too.
    """
    if any(isinstance(value, list) and len(value) != channels for value in (mean, std)):
        raise ConfigError(f"classification: mean and std hold one number or {channels}, one a channel")
    criterion = losses.build(loss)

    def levels(value: float | list[float], images: Tensor) -> Any:
        return images.new_tensor(value).view(1, -1, 1, 1) if isinstance(value, list) else value

    def prepare(images: Tensor) -> Tensor:
        images = images.float()
        return images.sub_(levels(mean, images) * 255.0).div_(levels(std, images) * 255.0)

    num_outputs = classes if isinstance(classes, int) else len(classes)
    places, live = numbering(classes, merge, gone, "classification")
    judged = criterion if live is None else among(criterion, live, num_outputs)

    def predict(outputs: Tensor) -> Tensor:
        if live is None:
            return outputs.argmax(1)
        index, _ = selection(live, num_outputs, outputs)
        return index[outputs.index_select(1, index).argmax(1)]

    def sums(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        right = predict(outputs) == labels
        found = {"loss": judged(outputs, labels) * len(labels), "accuracy": right.sum()}
        if per_class:
            found["labels"] = labels.bincount(minlength=num_outputs)
            found["hits"] = labels[right].bincount(minlength=num_outputs)
        return found

    return Task(
        num_outputs=num_outputs,
        channels=channels,
        image_size=image_size,
        classes=None if isinstance(classes, int) else tuple(classes),
        primary="accuracy",
        prepare=prepare,
        loss=criterion,
        sums=sums,
        predict=predict,
        metrics=("accuracy", "loss", *(("recall",) if per_class else ())),
        one_hot=one_hot(num_outputs),
        places=places,
        unknown=unknown,
        absent=absent,
        live=live,
    )


def numbering(
    classes: int | list[str], merge: dict[str, list[str]], gone: dict[str, str | None], task: str
) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...] | None]:
    """`Task.places` and `Task.live`. Raises ConfigError with each name that counts for nothing, or twice."""
    if isinstance(classes, int):
        if merge or gone:
            raise ConfigError(f"{task}: merge and gone name classes; write task.classes as a list of names")
        return (), None
    if (many := len(gone) + sum(map(len, merge.values()))) > MANY:  # a plan comes from elsewhere: no work without end
        raise ConfigError(f"{task}: merge and gone hold {many} names, at most {MANY}")
    names = ClassList(tuple(classes), gone)
    known = names.numbers

    def hint(name: str) -> str:
        return did_you_mean(name, classes) if len(classes) <= MANY else ""

    aliases = [(other, name) for name, others in merge.items() for other in others]
    problems = [f"{task}.merge: no class named {n!r}.{hint(n)}" for n in merge if n not in known]
    problems += [f"{task}.merge: {name!r} counts twice" for name in twice([*classes, *(o for o, _ in aliases)])]
    wrong = [name for old, new in gone.items() for name in (old, new) if name is not None and name not in known]
    problems += [f"{task}.gone: no class named {name!r}.{hint(name)}" for name in wrong]
    problems = problems or [f"{task}.gone: {name!r} counts as itself" for name in names.circular()]
    if problems:
        raise ConfigError(problems)
    places = tuple((name, names.place(name)) for name in classes)
    places += tuple((other, names.place(name)) for other, name in aliases)
    return places, names.live if gone else None
