"""What happened, told to the machine. Past tense, frozen; `at` is the shell's monotonic clock in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from raypipe.tasks.class_list import Change


@dataclass(frozen=True, slots=True)
class StoreJoined:
    """A store answered for the first time, or came back. `outbox`: tickets whose updates wait there."""

    store: str
    num_train: int
    at: float
    outbox: tuple[str, ...] = ()
    max_upload_bytes_s: float | None = None  # by its own policy


@dataclass(frozen=True, slots=True)
class Resumed:
    """The coordinator died and is back, with the state that its diary gives. Stores may take `grace_s` to return."""

    epoch: int
    grace_s: float
    at: float


@dataclass(frozen=True, slots=True)
class StoreAdded:
    """By its operator's command a store belongs to the run; it is asked for when its turn comes."""

    store: str
    at: float


@dataclass(frozen=True, slots=True)
class StoreLeft:
    """A store's node, process or link is gone, or its operator took it out (`for_good`)."""

    store: str
    reason: str
    at: float
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class StoreHung:
    """A store in training answers nothing, not even its heartbeat."""

    store: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A ticket's training ended; its update waits at the store."""

    ticket: str
    steps: int
    examples: int
    num_train: int
    seconds: float
    loss: float
    at: float
    after: str = ""  # the ticket whose kept state it went on from
    data_hash: str = ""  # of the store's data set as it was then
    update_bytes: int = 0  # at most, of what is to be fetched
    skipped: int = 0  # of num_train, those that cannot be read, as far as the store knows


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """A ticket ended without an update. `final`: the store's policy refuses, and asking again would not help."""

    ticket: str
    reason: str
    at: float
    final: bool = False


@dataclass(frozen=True, slots=True)
class Deferred:
    """A ticket ended without an update, since its store is closed for now: by its hours, or its budget of today."""

    ticket: str
    reason: str
    wait_s: float  # until it may be asked again
    at: float


@dataclass(frozen=True, slots=True)
class StorePaused:
    """Who owns the store's machine needs it: its training stands still, and is not hung."""

    store: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class StoreWentOn:
    """The end of a pause."""

    store: str
    at: float


@dataclass(frozen=True, slots=True)
class UpdateArrived:
    """An update can be folded; the machine knows its size and no more."""

    ticket: str
    num_bytes: int
    at: float
    digest: str | None = None  # as its store signed it
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class UpdateRefused:
    """An update came that is not what its store signed, or whose store may not sign."""

    ticket: str
    reason: str
    at: float
    digest: str | None = None  # of what came


@dataclass(frozen=True, slots=True)
class Folded:
    """A group was folded but for `rejected`: (ticket, reason) pairs that left no trace in the sum."""

    tickets: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    at: float


@dataclass(frozen=True, slots=True)
class Published:
    """A version is a fact: its record is durable, its weights can be fetched."""

    version: int
    at: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A version's weights are on the disk: the updates in it need not be folded again, ever."""

    version: int
    at: float


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The newest version's weights were lost with the machine, or damaged: the one before it is the newest again."""

    version: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A store's (or the central evaluator's) judgement of a version: means per image, see tasks/metrics.py."""

    version: int
    store: str
    metrics: dict[str, float]
    num_examples: int
    at: float


@dataclass(frozen=True, slots=True)
class EvaluationFailed:
    """A store did not judge a version."""

    version: int
    store: str
    at: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""

    at: float


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the run to end now."""

    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class ClassesAsked:
    """Somebody wants the class list to be another: from a version on, or (None) from the next one that is possible."""

    change: Change
    version: int | None
    at: float


Event: TypeAlias = (
    StoreJoined
    | Resumed
    | StoreAdded
    | StoreLeft
    | StoreHung
    | Trained
    | TrainingFailed
    | Deferred
    | StorePaused
    | StoreWentOn
    | UpdateArrived
    | UpdateRefused
    | Folded
    | Published
    | Kept
    | Withdrawn
    | Evaluated
    | EvaluationFailed
    | Tick
    | StopAsked
    | ClassesAsked
)
