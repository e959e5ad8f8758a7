"""What may be said in YAML. One model a section; every field has its unit in its name or its comment.

Parts (models, optimizers, transforms, ...) are written as a name or as `{name: ..., setting: ...}`; their
settings are checked against the part's own signature in `run.py`, since this room knows no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


def _as_part(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _named(part: Any) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        raise ValueError("a part is written as a word or as {name: ..., setting: ...}")
    return part


def _or_patterns(word: str) -> BeforeValidator:
    """The word, or patterns of tensors' names: a union would say of what is neither why it is not each of them."""

    def check(value: Any) -> Any:
        if value == word or (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
            return value
        raise ValueError(f"is {word} or a list of patterns of tensors' names")

    return BeforeValidator(check)


def repeated(ids: Iterable[Any]) -> list[str]:
    """Each id that is there more than once."""
    known = [str(i) for i in ids]
    return sorted({i for i in known if known.count(i) > 1})


def _distinct(stores: list[Store]) -> list[Store]:
    if twice := repeated(store.id for store in stores):
        raise ValueError(f"ids must differ, found twice: {', '.join(twice)}")
    return stores


Part: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_named), BeforeValidator(_as_part)]
Transport: TypeAlias = Literal["actor", "vault"]
PACES: TypeAlias = Literal["paced", "wait_for_all", "k_of_n", "fedbuff", "delta_async"]


class Section(BaseModel):
    """A section refuses keys that it does not know and cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class AllStores(Section):
    """What holds for each store that says nothing else."""

    transport: Transport = "actor"


class Store(Section):
    """One store: its id is the custom resource `store:<id>` of its node."""

    id: str
    cpus: Positive = 1.0  # CPU share of the training actor; one torch thread a whole CPU
    gpus: Annotated[float, Field(ge=0)] = 0.0  # GPU share, its memory is capped to the same; above 1 whole ones
    ranks: Count | None = None  # processes that train each ticket together; None: one, or one for each whole GPU
    slowdown: Annotated[float, Field(ge=1)] = 1.0  # sleeps so long after each batch that it is this much slower
    transport: Transport | None = None  # vault: the site is another user's process beside the actor; None: as `store`

    @property
    def num_ranks(self) -> int:
        """Processes that train a ticket."""
        return self.ranks or max(1, int(self.gpus))

    @model_validator(mode="after")
    def _a_gpu_a_rank(self) -> Store:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus:g}: above 1 they are whole")
        if self.gpus > 0 and self.num_ranks != max(1, int(self.gpus)):
            raise ValueError(f"ranks {self.ranks}: with {self.gpus:g} GPUs there is one for each; leave it out")
        return self

    @field_validator("id")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError("a store id holds letters, digits, '.', '_' and '-', at most 63, no spaces")
        return value


class Train(Section):
    """Local training at each store."""

    optimizer: Part = {"name": "sgd"}
    lr: Positive = 0.05
    schedule: Part = {"name": "constant"}  # of the learning rate, by the run's progress
    batch_size: Count = 32
    local_epochs: Positive | None = None  # a ticket ends at the first limit reached; None: no limit by this
    local_steps: Count | None = None
    keep_optimizer: bool = False  # the optimizer's state stays at the store from ticket to ticket
    control_variates: bool = False  # each step as if all stores' examples had a part in it (SCAFFOLD); see README
    fix_statistics_from: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the run; see models/flat.py
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01  # unreadable images above this: the store refuses
    trained: Literal["all", "head"] | Annotated[list[str], Field(min_length=1)] = "all"  # patterns of tensors' names
    local: Annotated[Literal["norms"] | list[str], _or_patterns("norms")] | None = None  # what stays at the store


class Pacing(Section):
    """Overrides of what the pace sets; see coordinator/policy.py for the settings each pace stands for."""

    cohort: Count | None = None
    buffer_size: Count | None = None  # K
    concurrency: Count | None = None  # tickets in training at once
    max_active_stores: Count | None = None  # stores that have an actor at a time; None: all
    turn: Count = 1  # updates that a store hands over before another has its place, where not all have one
    cool_down_s: Annotated[float, Field(ge=0)] = 0.0  # so long a store that was released is not asked for
    budget_s: Positive | None = None  # of training, ends a ticket; None: paced sets it by what the stores' links take
    deadline_s: Positive | None = None  # ends a ticket's hold on its slot, not its worth
    hung_s: Positive = 60.0  # so long after its deadline a store is killed and restarted
    heartbeat_s: Positive = 5.0  # two missed in a row: the same
    quorum: Count | None = None  # stores that must be there to start; None: all but one in five
    join_s: Positive = 120.0  # how long to wait for the quorum
    staleness: Part = {"name": "polynomial"}
    stale_limit: Positive = 10.0  # in multiples of concurrency / K
    stale_action: Literal["floor", "drop"] = "floor"
    floor_weight: Annotated[float, Field(ge=0, le=1)] = 0.05
    weigh: Literal["examples", "steps", "equal"] | None = None
    normalise: Literal["sum", "k"] = "sum"
    max_failures: Count = 3  # in a row, then the store is set aside
    backoff_s: Positive = 1.0  # doubles with each failure


class Stop(Section):
    """When the run ends: the first that holds."""

    max_versions: Count | None = None
    max_seconds: Positive | None = None
    target: Annotated[float, Field(gt=0, le=1)] | None = None  # of the validation metric
    patience: Count | None = None  # versions without a better one

    @model_validator(mode="after")
    def _some_end(self) -> Stop:
        if self.max_versions is None and self.max_seconds is None:
            raise ValueError("set max_versions or max_seconds, else the run has no end")
        return self


class Evaluate(Section):
    """How versions are judged."""

    every: Count = 1  # versions
    metric: str = "accuracy"
    central: str | None = None  # id of a store on the head that only evaluates, if there is one
    alone: bool = True  # at the end, train a model alone at each store with the same number of steps
    test: bool = True  # at the end, read the test split once
    # BatchNorm's statistics, where a model has some:
    recalibrate: Count | None = None  # at the end, measured anew by all stores, over so many images each
    own_statistics: Count | None = None  # each store judges with its own, over so many of its images; None: shared ones


class Tracking(Section):
    """What is kept, and where."""

    experiment: str | None = None  # MLflow experiment; None: the run's name
    register_as: str | None = None  # registered model name for promotion; None: the run's name
    log_model_every: Count = 10  # every Nth version becomes a LoggedModel, as do the best and the final one
    keep_last: Count = 5  # weights kept of the newest versions, beside the first, the best and every Nth
    keep_every: Count = 10
    mlflow: bool = True


class Ledger(Section):
    """A record that others can check: two hashes of each update and one of each base, a ticket."""

    keep: bool = True
    roster: Literal["tofu", "closed"] = "tofu"  # closed: only keys that were enrolled by hand


class ClassChange(Section):
    """The class list from a version on; see tasks/class_list.py. While a run goes on: `raypipe classes`."""

    at_version: Count  # the first with the new list
    add: list[str] = []
    merge: dict[str, str] = {}  # a class that is no more -> the one that its images count for
    retire: list[str] = []


SAMPLES: TypeAlias = Literal[
    "fashion-mnist", "fashion-mnist-full", "fashion-shelves", "orange-juice", "lending-club", "image-sales"
]


class Local(Section):
    """Only where raypipe itself starts Ray on one machine: the private data sets to make there."""

    sample: SAMPLES = "fashion-mnist"
    split: Part = {"name": "dirichlet", "alpha": 0.3}
    size_ratio: Annotated[float, Field(ge=1)] = 10.0  # the largest store's images over the smallest's
    camera_shift: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_images: Count | None = None
    scenes: dict[Literal["train", "validation", "test"], Count] = {}  # of fashion-shelves, all stores together


class RunConfig(Section):
    """A whole run."""

    name: str
    seed: int = 0
    data: str = "products"  # the data set's name; where it lies says each store's own policy file
    task: Part = {"name": "classification"}
    class_changes: list[ClassChange] = []
    model: Part = {"name": "small_cnn"}
    warm_start: str | None = None  # a .safetensors file or models:/NAME@alias
    closed_form: Positive | None = None  # ridge penalty of version 0's head by least squares, from one upload a store
    stores: Annotated[list[Store], Field(min_length=1), AfterValidator(_distinct)]
    store: AllStores = AllStores()
    train: Train = Train()
    pace: PACES = "paced"
    pacing: Pacing = Pacing()
    update: Annotated[list[Part], Field(max_length=8)] = []  # codecs, applied in order at the store
    server: Part = {"name": "sgd"}  # the transform of each aggregated update
    stop: Stop
    evaluate: Evaluate = Evaluate()
    track: Tracking = Tracking()
    ledger: Ledger = Ledger()
    local: Local | None = None

    @field_validator("name", "data")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError("a name holds letters, digits, '.', '_' and '-', at most 63, no spaces")
        return value

    def transport_of(self, store: Store) -> Transport:
        """Its own, or that of all."""
        return store.transport or self.store.transport

    @model_validator(mode="after")
    def _stores_suffice(self) -> RunConfig:
        if self.evaluate.central in {store.id for store in self.stores}:
            raise ValueError(f"evaluate.central {self.evaluate.central} is a store that trains; name one that does not")
        vaults = [s for s in self.stores if self.transport_of(s) == "vault"]
        if slowed := [store.id for store in vaults if store.slowdown > 1]:
            raise ValueError(f"slowdown of {', '.join(slowed)}: a vault is not slowed down from outside")
        if many := [store.id for store in vaults if store.num_ranks > 1]:
            raise ValueError(f"ranks of {', '.join(many)}: a vault trains in one process")
        for key in ("quorum", "cohort"):
            wanted = getattr(self.pacing, key)
            if wanted is not None and wanted > len(self.stores):
                raise ValueError(f"pacing.{key} {wanted} is more than the {len(self.stores)} stores there are")
            most = self.pacing.max_active_stores
            if wanted is not None and most is not None and wanted > most:
                raise ValueError(
                    f"pacing.{key} {wanted} is more than pacing.max_active_stores {most}, which can be there"
                )
        return self
