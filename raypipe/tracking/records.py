"""What a run writes down: one body a kind, JSON-plain, ids and numbers only (no path, no label, no image).

The coordinator writes them, in this order for a version: `version_published` before any store is told of it,
`weights_kept` before any store is told that its update is in it, `evaluated` when its evaluation came (any number of
versions later). Every other account of a run (MLflow, tables, the ledger) is computed from these and can be computed
again. Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, get_args

Kind: TypeAlias = Literal[
    "run_started",
    "store_joined",
    "store_left",
    "store_missing",
    "store_set_aside",
    "store_asked",
    "store_released",
    "store_closed",
    "store_paused",
    "store_went_on",
    "images_skipped",
    "ticket_failed",
    "update_rejected",
    "classes_planned",
    "classes_refused",
    "version_published",
    "weights_kept",
    "version_withdrawn",
    "evaluated",
    "final",
    "run_finished",
    "run_restored",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Status: TypeAlias = Literal["finished", "killed", "failed"]


class RunStarted(TypedDict):
    """A coordinator takes the run up; one that resumes writes another with a higher epoch."""

    run: str
    name: str
    config: dict[str, Any]  # the whole resolved configuration
    layout: dict[str, Any]  # Layout.to_json()
    plan: dict[str, Any]
    code_hash: str
    at: float
    stores: list[str]
    experiment: str
    register_as: str
    epoch: int
    cluster: NotRequired[bool]  # its coordinator is on a cluster's head, not on Ray started for this run alone
    machine: NotRequired[str]  # what the coordinator computes with
    pooled: NotRequired[bool]  # trained on the stores' data in one place: the opponent, not a federation
    licence: NotRequired[str]  # what the model's licence asks of whoever runs it
    asked: NotRequired[list[dict[str, Any]]]  # of the stores, before the first version: what, of whom, bytes


class StoreJoined(TypedDict):
    """A store is there, by its card; `node` stays in the journal and never goes to MLflow."""

    store: str
    counts: dict[str, int]  # split -> images
    data_bytes: NotRequired[int]  # of the data set on the store's disk, all splits
    hash: NotRequired[str | None]  # of the data set's content
    cpus: float
    gpu: str | None
    node: str
    key: NotRequired[str | None]  # public; what it signs its updates with
    limits: NotRequired[dict[str, float]]  # by its own policy
    machine: NotRequired[str]  # what it computes with: with another, bits may differ
    vault_code: NotRequired[str]  # the hash of the code installed in the store's vault, where there is one


class StoreLeft(TypedDict):
    """A store is gone, for now or for good."""

    store: str
    reason: str


class StoreSetAside(TypedDict):
    """A store failed too often and is asked no more."""

    store: str
    reason: str


class StoreClosed(TypedDict):
    """A store's own policy says not now: by its hours, or its budget of today; `wait_s` until it may be asked again."""

    store: str
    ticket: str  # that it did not take
    reason: str
    wait_s: float


class StoreAsked(TypedDict):
    """A store is to have an actor; where not all have one."""

    store: str


class StoreReleased(TypedDict):
    """A store's actor was ended, so that its node is free."""

    store: str
    reason: str


class StorePaused(TypedDict):
    """A store's training stands still, since who owns its machine needs it."""

    store: str
    reason: str


class StoreWentOn(TypedDict):
    """The end of a pause of so many seconds."""

    store: str
    seconds: float


class ImagesSkipped(TypedDict):
    """A store has met images that cannot be read, or rows without a target: it trains on the others."""

    store: str
    skipped: int  # so far; more than was said before
    of: int  # in its training split


class UpdateRejected(TypedDict):
    """An update that was not folded."""

    store: str
    ticket: str
    reason: str
    digest: NotRequired[str | None]


class Contribution(TypedDict):
    """One update in one version."""

    store: str
    ticket: str
    base: int  # the version it was trained from
    staleness: int  # versions between base and the fold
    steps: int
    examples: int
    weight: float  # as given by the weighing rule
    share: float  # of all weight in this version, in [0, 1]
    seconds: float
    loss: float
    bytes_up: int
    digest: NotRequired[str | None]  # of the encoded update
    signature: NotRequired[str | None]  # the store's, over `ledger.offline.update_statement`
    # What it takes to train it again; None in what an older raypipe wrote.
    progress: float | None  # of the run, when it was asked for: the learning rate follows it
    repeat: int | None  # updates that the store had handed over from this base before
    after: str | None  # the ticket whose kept state it went on from; empty: it began anew
    data_hash: NotRequired[str | None]  # of the store's data set as it was then: images may be added in a run
    worth: NotRequired[float | None]  # its weight were it not stale


class ClassesPlanned(TypedDict):
    """Somebody has asked for another class list; from this version on."""

    version: int
    change: str  # in words


class ClassesRefused(TypedDict):
    """A change of the class list that was not possible any more when it came."""

    reason: str


class ClassesChanged(TypedDict):
    """What a version's change of the class list has brought; it holds until the next."""

    change: dict[str, Any]  # tasks/class_list.Change
    task: dict[str, Any]  # the whole part
    layout: dict[str, Any]  # Layout.to_json()


class Measured(TypedDict):
    """A version that differs from another, or from the running average of all, in BatchNorm's statistics at most: see
    coordinator/recalibration.py."""

    of: int | None  # that version; None: the running average of all
    images: int  # of each store, at most; 0: nothing was measured
    stores: dict[str, int]  # who measured, and by how many images its part is weighed


class VersionPublished(TypedDict):
    """A global version is a fact."""

    version: int
    parent: int | None
    hash: str  # `b3:` and the blake3 of the float32 values in the layout's order; once `sha256:` and the file's
    at: float
    elapsed_s: float  # of the run
    seconds: float  # since the previous version
    contributions: list[Contribution]
    bytes_up: int
    bytes_down: int
    bytes_total: int  # both ways, of the whole run
    step_norm: float
    full_weight: float | None  # what the weights would sum to were nothing stale; None: an older raypipe wrote it
    statistic_mix: float | None  # how far statistics moved to the contributors' mean
    recalibrated: NotRequired[Measured]  # of no update: the last version of a run
    classes: NotRequired[ClassesChanged]  # only where the class list is another from this version on


class WeightsKept(TypedDict):
    """A version's weights are on the disk, and what else it takes to go on from it."""

    version: int
    file: str  # its name in the version store, no folder
    hash: str  # blake3 of the file
    num_bytes: int
    state: NotRequired[str]  # hash of the server transform's state, where it has one
    variates: NotRequired[str]  # hash of the table of control variates, where there is one


class VersionWithdrawn(TypedDict):
    """The newest version's weights were lost before they were on the disk; another will have its number."""

    version: int
    reason: str


class Evaluated(TypedDict):
    """A version was judged; `best` says that no earlier judged one was better."""

    version: int
    split: str
    metrics: dict[str, float]  # of all stores' examples together; tasks/metrics.py says which
    num_examples: int
    stores: dict[str, dict[str, float]]  # each store's own metrics, and num_examples
    best: bool


class Final(TypedDict):
    """The last word about a run: the test set is read once."""

    best_version: int
    test: dict[str, float]
    average: NotRequired[dict[str, float]]  # the running average of the versions, on the test set, where there is one
    exported: NotRequired[dict[str, float]]  # where stores judge with statistics of their own: with the version's
    table: list[dict[str, Any]]  # a row a store
    reason: str
    judged: NotRequired[int]  # of a pooled run: how often it was judged by its validation metric
    gained: NotRequired[float | None]  # and what the last fifth of these scores brought; None: too few to say


class RunFinished(TypedDict):
    """The run is over; only a resumed coordinator may write after it."""

    reason: str
    status: NotRequired[Status]  # finished, if it is not there
    versions: int
    best_version: int | None
    at: float


class RunRestored(TypedDict):
    """The run's folder was put back from a backup: what was recorded after `saved_at` is not in this record."""

    version: int  # the newest
    epoch: int  # the next coordinator's is higher: stores may have heard of many since
    saved_at: float
    at: float
