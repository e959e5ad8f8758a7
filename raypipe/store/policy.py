"""The store's own word on its data: `policy.yaml` on the store's machine, which no coordinator can change.

    store: south
    data:
      products: {folder: data/products, reader: parquet}   # relative to this file, or absolute
      # with names: {Trainers: Sneaker}, where a class is called otherwise here than in federations
    tasks: [classification]    # or all
    models: all                # or a list of names
    max_examples: 100000       # images per ticket; a ticket that asks for more is cut short
    max_seconds: 600           # per ticket; the same
    max_upload_bytes: 1000000000
    max_bad_share: 0.05        # images that cannot be read; above it the store refuses to train
    coordinators: []           # public keys; with any, only what one of these has signed a ledger of is trained on
    measures: all              # sums over all its rows that it may tell: moments, gram, statistics; or a list of them
    min_measured: 10           # rows; a sum over fewer is not told, since a sum over one is that one
    hours: 22:00-06:00         # when it trains, in its local time, or a list of such; without: always; see hours.py
    upload_bytes_a_day: 500000000   # then it is closed until 00:00 UTC; see terms.py for this and the next two
    max_upload_bytes_s: 250000
    yield_file: busy           # while this file is there training pauses; relative to this file, or absolute
    yield_gpu_load: 0.3        # or while others have so much of a GPU's time, see gpu_load.py

Messages name keys and what is asked for, never a folder: they may leave the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raypipe.config.schema import NAME
from raypipe.errors import ConfigError, StoreRefused, did_you_mean
from raypipe.store.hours import Range, parse
from raypipe.store.messages import Plan, Ticket

FILE = "policy.yaml"
MAX_LR = 1e6  # beyond float32's range torch raises, far below it weights do not stay finite
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
PublicKey: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name: TypeAlias = Annotated[str, Field(pattern=NAME.pattern)]
N = TypeVar("N", int, float)


def _hours(said: Any) -> Any:
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list | tuple) or not all(isinstance(one, str | Range) for one in said):
        raise ValueError("hours are written HH:MM-HH:MM, or a list of such")
    return tuple(parse(one) if isinstance(one, str) else one for one in said)


Hours: TypeAlias = Annotated[tuple[Range, ...], BeforeValidator(_hours)]


class DataSet(BaseModel):
    """Where a data set lies and what reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    reader: str = "parquet"
    names: dict[str, str] = {}  # classes as they are called here -> as federations call them


@dataclass(frozen=True, slots=True)
class Limits:
    """What a ticket may take, by ticket, plan and policy together; None: no limit by this."""

    batch_size: int
    max_steps: int | None
    max_epochs: float | None
    budget_s: float | None
    max_bad_share: float


class Policy(BaseModel):
    """See the top of this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Name
    data: dict[Name, DataSet] = {}
    tasks: Literal["all"] | list[str] = "all"
    models: Literal["all"] | list[str] = "all"
    max_examples: Count | None = None
    max_seconds: Positive | None = None
    max_upload_bytes: Count | None = None
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    coordinators: tuple[PublicKey, ...] = ()
    measures: Literal["all"] | list[str] = "all"
    min_measured: Count = 10
    hours: Hours = ()
    upload_bytes_a_day: Count | None = None
    max_upload_bytes_s: Positive | None = None
    yield_file: Path | None = None
    yield_gpu_load: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def tickets_a_day(self) -> int | None:
        """A vault's limits bound these, a policy does not."""
        return None

    def limits(self) -> dict[str, float]:
        """As a Card tells them; only those that are set."""
        named = {"max_examples": self.max_examples, "max_seconds": self.max_seconds}
        named["max_upload_bytes"] = self.max_upload_bytes
        named |= {"upload_bytes_a_day": self.upload_bytes_a_day, "max_upload_bytes_s": self.max_upload_bytes_s}
        return {name: float(value) for name, value in named.items() if value is not None}

    def check(self, plan: Plan) -> None:
        """Raises StoreRefused for what may not be done here, whatever the ticket."""
        if plan.data not in self.data:
            raise StoreRefused(f"no data set named {plan.data!r} is offered.{did_you_mean(plan.data, self.data)}")
        for kind, allowed, part in (("task", self.tasks, plan.task), ("model", self.models, plan.model)):
            name = part.get("name")
            if allowed != "all" and name not in allowed:
                listed = ", ".join(sorted(allowed)) or "none"
                raise StoreRefused(f"the store's policy does not allow {kind} {name!r}. Allowed: {listed}.")
        if plan.batch_size < 1:
            raise StoreRefused(f"batch_size is at least 1, found {plan.batch_size}")
        if not 0 < plan.lr <= MAX_LR:
            raise StoreRefused(f"lr is above 0 and at most {MAX_LR:g}, found {plan.lr}")

    def may_measure(self, what: str, num: int) -> None:
        """Raises StoreRefused for a sum that may not be told, or is of too few rows."""
        if self.measures != "all" and what not in self.measures:
            raise StoreRefused(f"the store's policy does not allow to measure {what!r}")
        if num < self.min_measured:
            raise StoreRefused(f"a sum over fewer than {self.min_measured} rows is not told, by the store's policy")

    def admit(self, ticket: Ticket, plan: Plan) -> Limits:
        """What the ticket may take. Raises StoreRefused; a limit above the policy's is cut to it, not refused."""
        self.check(plan)
        if ticket.store != self.store:
            raise StoreRefused(f"the ticket is for store {ticket.store!r}, this is {self.store!r}")
        asked = (ticket.budget_s, ticket.max_steps, ticket.max_epochs)
        if all(limit is None for limit in asked):
            raise StoreRefused("the ticket has no end: set budget_s, max_steps or max_epochs")
        if any(limit is not None and not limit > 0 for limit in asked):
            raise StoreRefused("budget_s, max_steps and max_epochs are above 0")
        batch_size = min(plan.batch_size, self.max_examples or plan.batch_size)
        by_examples = None if self.max_examples is None else self.max_examples // batch_size
        return Limits(
            batch_size=batch_size,
            max_steps=_least(ticket.max_steps, by_examples),
            max_epochs=ticket.max_epochs,
            budget_s=_least(ticket.budget_s, self.max_seconds),
            max_bad_share=min(plan.max_bad_share, self.max_bad_share),
        )


def _least(a: N | None, b: N | None) -> N | None:
    return min((limit for limit in (a, b) if limit is not None), default=None)


def read_policy(home: Path) -> Policy:
    """The policy of the store whose folder this is. Raises ConfigError with every problem, a line each."""
    try:
        raw = yaml.safe_load((home / FILE).read_text("utf-8"))
        policy = Policy.model_validate(raw if raw is not None else {})
    except OSError as error:
        raise ConfigError(f"{FILE} of the store cannot be read: {error.strerror or type(error).__name__}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{FILE} is not YAML" + (f": see line {mark.line + 1}" if mark else "")) from None
    except ValidationError as error:
        raise ConfigError([_problem(list(e["loc"]), e["type"], e["msg"]) for e in error.errors()]) from None
    folders = {name: data.model_copy(update={"folder": home / data.folder}) for name, data in policy.data.items()}
    file = None if policy.yield_file is None else home / policy.yield_file
    return policy.model_copy(update={"data": folders, "yield_file": file})


def _problem(place: list[int | str], kind: str, message: str) -> str:
    if len(place) > 1 and place[0] == "data":  # the names of data sets are the store's own
        place = ["data", "<name>", *place[2:]]
    key = ".".join(map(str, place))
    if kind == "extra_forbidden":
        known = DataSet.model_fields if len(place) > 1 else Policy.model_fields
        return f"{FILE}: no key {key!r}.{did_you_mean(str(place[-1]), known)}"
    if kind == "value_error":
        return f"{FILE}: {message.removeprefix('Value error, ')}"
    return f"{FILE}: {key or 'the file'}: {message.lower()}"
