"""What the shell is to do. Imperative, frozen; performed in the order in which the machine names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from raypipe.tasks.class_list import Change


@dataclass(frozen=True, slots=True)
class Train:
    """Ask a store to train; answered by Trained or TrainingFailed."""

    ticket: str
    store: str
    version: int
    progress: tuple[float, float]
    budget_s: float | None
    max_steps: int | None
    evaluate: bool  # judge the base version on the store's validation split first
    repeat: int = 0  # updates that this store has already handed over from this base


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell a store to stop at the next batch; nothing is awaited."""

    store: str
    ticket: str


@dataclass(frozen=True, slots=True)
class Collect:
    """Fetch an update; answered by UpdateArrived or TrainingFailed."""

    ticket: str
    store: str


@dataclass(frozen=True, slots=True)
class Portion:
    """One update on its way into the sum. `steps` is set when it is normalised by its steps."""

    ticket: str
    store: str
    weight: float
    steps: int | None
    worth: float = 1.0  # its weight were it not stale
    base: int = 0  # the version that it was trained from


@dataclass(frozen=True, slots=True)
class Fold:
    """Add these to the open sum, in this order; answered by Folded."""

    portions: tuple[Portion, ...]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update's part in a version, as the record keeps it."""

    ticket: str
    store: str
    base: int
    staleness: int
    steps: int
    examples: int
    weight: float
    share: float
    seconds: float
    loss: float
    bytes_up: int
    digest: str | None = None  # of the encoded update; it and the store's signature where the run keeps a ledger
    signature: str | None = None
    progress: float | None = None  # this and the next two: what it takes to train it again
    repeat: int | None = None
    after: str | None = None  # the ticket whose kept state it went on from
    data_hash: str | None = None  # of the store's data set as it was then: images may be added in a run
    worth: float | None = None  # its weight were it not stale


@dataclass(frozen=True, slots=True)
class Publish:
    """Make a version of the sum and write down that it is a fact; answered by Published."""

    version: int
    contributions: tuple[Contribution, ...]
    full_weight: float  # what the weights would sum to were nothing stale, for the normalisation by K
    statistic_mix: float  # how far statistics move to the contributors' mean
    change: Change | None = None  # of the class list, from this version on


@dataclass(frozen=True, slots=True)
class Keep:
    """Have a version's weights on the disk, whatever happens to this machine; answered by Kept."""

    version: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Tell a store how its ticket ended."""

    store: str
    ticket: str
    version: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Restart:
    """Kill a store's process and start it again; StoreJoined follows when it is back."""

    store: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Have a store in the run: its actor is made, or found; StoreJoined follows when it is there."""

    store: str


@dataclass(frozen=True, slots=True)
class Release:
    """End a store's process, so that its node is free; it is not expected back until it is asked for."""

    store: str


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Judge a version at a store; answered by Evaluated or EvaluationFailed."""

    version: int
    store: str


@dataclass(frozen=True, slots=True)
class Record:
    """A fact for the journal that needs no answer. `number` counts those of the machine, so that each is written
    once, whatever dies; 0 is the shell's own."""

    kind: str
    body: dict[str, Any] = field(default_factory=dict)
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over."""

    reason: str
    best_version: int
    failed: bool = False


Action: TypeAlias = (
    Train | Cancel | Collect | Fold | Publish | Keep | Settle | Restart | Ask | Release | Evaluate | Record | Finish
)
