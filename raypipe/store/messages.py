"""The store protocol: what a coordinator and a store say to each other.

Plain, versioned messages. Each is a frozen dataclass that travels as msgpack: names and numbers, never code and
never pickle. Vectors travel beside a message as raw little-endian float32. One conversation about a ticket:

    describe(run, epoch)                    -> Card        with the tickets of the run that wait there
    train(ticket, plan, weights)            -> Report      the update stays at the store
    collect(ticket, how, run, epoch)        -> vector      the update, encoded
    settle(verdict)                         -> None        folded into a version, or refused because ...
    evaluate(plan, weights, split, epoch)   -> Evaluation
    measure(plan, weights, what, epoch)     -> vector      sums over the training split, before a run or at its end
    control(ticket, command, run, epoch)    -> None        seen within a batch

Training and handing over are two steps, so that transfers are timed apart from training and an update outlives
the coordinator that asked for it: one that comes back asks `describe` what waits, and collects that. A ticket sent
again gives the report that waits, or is trained again from its base with its seed.

In a run that keeps a ledger (protocol 3) a ticket brings proofs that its base is on the chain, and a report the
store's signature: over the update as the plan's codecs encode it, and over the head that the proofs were under.

Each side understands the protocol before its own, and does not tell an older peer what that one does not know.

Every call bears the epoch of its coordinator. A store that has heard of a newer one for the same run refuses it:
superseded. Epochs count from 1; 0 is no coordinator's, and is not refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, TypeAlias, TypeVar, cast

import msgpack
from pydantic import TypeAdapter, ValidationError

from raypipe.errors import StoreClosed, StoreError, StoreRefused, StoreSuperseded

PROTOCOL = 3
SPOKEN = (PROTOCOL - 1, PROTOCOL)  # so that stores and coordinators need not be updated on the same day
# What PROTOCOL has brought; all of it has defaults.
NEW = {
    "Card": {"key", "head_size", "code", "machine"},
    "Plan": {"update", "trained", "fix_statistics_from", "local", "own_statistics"},
    "Ticket": {"base"},
    "Report": {"digest", "signature", "cosignature", "after", "data_hash"},
    "Refusal": {"wait_s"},
}

Part: TypeAlias = dict[str, Any]  # a part's name and its settings, as in the configuration
Command: TypeAlias = Literal["stop", "pause", "resume"]


@dataclass(frozen=True, slots=True)
class Card:
    """Who a store is: what it has, by its own policy. Counts only; never a path or a label."""

    store: str
    protocol: int
    data: dict[str, dict[str, int]]  # data set name -> split -> number of images
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    cpus: float
    gpu: str | None
    node: str
    process: int  # the process id on the node, so that a frozen one can be ended
    data_hashes: dict[str, str]  # data set name -> content hash
    limits: dict[str, float]  # max_examples, max_seconds, max_upload_bytes
    data_bytes: dict[str, int] = field(default_factory=dict)  # data set name -> bytes on disk
    outbox: tuple[str, ...] = ()  # tickets of the run asked about that wait to be settled, the oldest first
    key: str | None = None  # the public half of the key that the store signs with, 64 hex digits
    head_size: int = 0  # of the last head of the run's ledger that it co-signed
    code: str = ""  # of a vault: the hash of the code installed there
    machine: str = ""  # what it computes with, see processor.py


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be learned and how: the same for each ticket of a run."""

    run: str
    task: Part
    model: Part
    data: str
    optimizer: Part
    lr: float
    schedule: Part
    batch_size: int
    layout: str  # fingerprint of the vector's layout
    keep_optimizer: bool = False
    max_bad_share: float = 0.01  # undecodable images above this share: the store refuses
    update: list[Part] = field(default_factory=list)  # the codecs by which updates leave, for what is signed
    trained: str | list[str] = "all"  # "head", or patterns of tensors' names: the rest is frozen
    fix_statistics_from: float | None = None  # progress from which BatchNorm's statistics are the version's own
    local: str | list[str] | None = None  # "norms", or patterns of tensors' names: they stay at the store
    own_statistics: int | None = None  # training images over which BatchNorm's are measured before a split is judged

    def fixes_statistics(self, progress: float) -> bool:
        """Of a ticket that begins at this progress."""
        return self.fix_statistics_from is not None and progress >= self.fix_statistics_from


@dataclass(frozen=True, slots=True)
class Parts:
    """A version's weights in two pieces: what training changes, and the rest, which a store is given once.

    Each as a store can fetch it: an object reference, or the array itself.
    """

    moving: Any
    still: Any


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request to train; ends exactly once. At least one of the limits is set; the first reached ends it."""

    id: str
    store: str
    epoch: int  # the coordinator's epoch, for fencing
    version: int  # the base version
    seed: int
    progress: tuple[float, float]  # global progress in [0, 1] at its start and end, for the learning rate
    budget_s: float | None = None
    max_steps: int | None = None
    max_epochs: float | None = None
    evaluate: str | None = None  # a split on which the base version is evaluated before training
    judge: str | None = None  # a split on which the result is evaluated; then no update is kept
    base: tuple[dict[str, Any], ...] = ()  # proofs that the base is on the chain, from each head the store may have


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over a split, so that many stores' add up exactly: metrics = sums / num_examples."""

    store: str
    split: str
    num_examples: int
    sums: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a ticket. The update waits at the store until it is collected and settled."""

    ticket: str
    store: str
    version: int
    steps: int
    examples: int  # images trained on, repeats counted
    num_train: int  # images in the training split
    skipped: int  # images that could not be decoded
    seconds: float
    loss: float
    update_bytes: int
    stopped: Literal["done", "budget", "control"]
    evaluation: Evaluation | None = None
    digest: str = ""  # of the encoded update; it and the signature are empty in a run without a ledger
    signature: str = ""  # over `ledger.offline.update_statement`
    cosignature: dict[str, Any] | None = None  # of the head that the base's proof was under
    after: str = ""  # the ticket whose kept state it went on from, see kept.py; empty: it began anew
    data_hash: str = ""  # of the data set as it was then: images may be added from ticket to ticket


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a ticket, told to the store."""

    ticket: str
    version: int | None  # folded into this version, or None
    reason: str = ""
    run: str = ""
    epoch: int = 0  # the coordinator's epoch, for fencing


@dataclass(frozen=True, slots=True)
class Refusal:
    """A store's no, or its accident; one line that holds nothing of its data."""

    store: str
    kind: Literal["refused", "failed", "superseded"]
    reason: str
    ticket: str = ""
    wait_s: float = 0.0  # above 0: not now; by the store's clock it may be asked again after so long


Message: TypeAlias = Card | Plan | Ticket | Evaluation | Report | Verdict | Refusal
M = TypeVar("M", Card, Plan, Ticket, Evaluation, Report, Verdict, Refusal)
_KINDS = {kind.__name__: kind for kind in (Card, Plan, Ticket, Evaluation, Report, Verdict, Refusal)}


@dataclass(frozen=True)
class _Envelope:
    protocol: int
    kind: str
    body: dict[str, Any] = field(default_factory=dict)


def encode(message: Message, protocol: int = PROTOCOL) -> bytes:
    """A message as msgpack, as a peer of this protocol, PROTOCOL or the one before, understands it."""
    kind = type(message).__name__
    unknown = NEW.get(kind, set()) if protocol < PROTOCOL else set()
    said = {f.name: getattr(message, f.name) for f in fields(message) if f.name not in unknown}
    body = {"protocol": protocol, "kind": kind, "body": said}
    return cast(bytes, msgpack.packb(body, use_bin_type=True, default=asdict))  # what lies in a message: an Evaluation


def decode(raw: bytes) -> Message:
    """A message, every field checked. Raises StoreError for bytes of another kind or protocol."""
    try:
        envelope = _Envelope(**msgpack.unpackb(raw, raw=False, strict_map_key=True))
        kind = _KINDS[envelope.kind]
        if envelope.protocol not in SPOKEN:
            raise StoreError(f"protocol {envelope.protocol} was spoken; this side speaks {PROTOCOL - 1} and {PROTOCOL}")
        if unknown := set(envelope.body) - {f.name for f in fields(kind)}:
            raise TypeError(f"unknown fields {sorted(unknown)}")
        return cast(Message, _adapter(kind).validate_python(envelope.body))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException, ValidationError) as error:
        raise StoreError(f"not a message of the store protocol ({type(error).__name__})") from None


def expect(kind: type[M], raw: bytes) -> M:
    """A message of this kind. A Refusal in its place is raised as the StoreError that it stands for."""
    message = decode(raw)
    if isinstance(message, kind):
        return message
    if isinstance(message, Refusal):
        raise refusal_error(message)
    raise StoreError(f"a {kind.__name__} was expected, a {type(message).__name__} came")


def refusal_error(refusal: Refusal, *, named: bool = True) -> StoreError:
    """A Refusal as an exception of this side; `named` False: for who will say whose it is."""
    said = f"store {refusal.store}: {refusal.reason}" if named else refusal.reason
    if refusal.kind == "refused" and refusal.wait_s > 0:
        return StoreClosed(said, refusal.wait_s)
    kinds = {"refused": StoreRefused, "superseded": StoreSuperseded, "failed": StoreError}
    return kinds[refusal.kind](said)


@lru_cache(maxsize=len(_KINDS))
def _adapter(kind: type[Message]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
