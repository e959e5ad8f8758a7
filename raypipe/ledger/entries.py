"""The entries of a ledger: one dataclass a kind; import the module, not its names.

    run        a coordinator takes the run up, under its key
    store      a store may contribute from here on, with this key; its card: limits and data sets
    revoked    a store's key counts no more from here on
    update     one store's update in one version, signed by the store or said to be unsigned; stands before its version
    version    a global version: the digest of its vector, its parent's digest
    recalibrated   before a version without updates: what it was made of
    kept       a version's weights are on the disk, in this file
    withdrawn  the newest version was lost before its weights were kept; its number and its updates are free again
    refused    an update that was not folded
    witnessed  stores that co-signed an earlier head
    finished   the run is over; only a resumed coordinator writes after it

An entry's line is `{"entry":{actor,at,body,index,kind,prev,record},"hash":...}`, canonical JSON and a line feed; `hash`
is sha256 of the inner part, `prev` the hash of the entry before. So every byte of it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from raypipe.ledger.offline import canonical, entry_hash

FIRST = "0" * 64  # `prev` of entry 0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """Hashes are sha256; `config_hash` that of the canonical JSON of `config`, which may be left out."""

    run: str
    epoch: int
    coordinator: str  # public key
    config_hash: str
    code_hash: str
    config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """From the store's card; counts are images."""

    store: str
    key: str | None  # public; None in a run without signatures
    limits: dict[str, float] = field(default_factory=dict)
    data_hashes: dict[str, str] = field(default_factory=dict)  # data set name -> content hash
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # data set name -> split -> images


@dataclass(frozen=True, slots=True)
class Revoked:
    """A key that was enrolled."""

    store: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Update:
    """`digest` is of the bytes as they left the store; `signature` covers what `update_statement` says.

    Both are None in a run without signatures: then the entry is the coordinator's word alone.
    """

    version: int  # that it was folded into
    store: str
    ticket: str
    base: int  # the version it was trained from
    base_digest: str  # of the weights it was trained from; the store's signature is over what the store saw
    staleness: int
    steps: int
    examples: int
    weight: float
    digest: str | None
    signature: str | None


@dataclass(frozen=True, slots=True)
class Version:
    """`digest` is of the flat vector that the stores are given."""

    version: int
    parent: int | None
    parent_digest: str | None
    digest: str
    updates: int  # how many `update` entries are its own


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """What makes a version that has no updates: another's weights with statistics that stores measured anew."""

    version: int
    of: int | None  # a version; None: the running average of all
    images: int  # of each store, at most
    stores: dict[str, int]  # store -> its images, by which its part is weighed


@dataclass(frozen=True, slots=True)
class Kept:
    """Written when the file is; it need not stay for ever. As `tracking.records.WeightsKept`."""

    version: int
    file: str  # a name in the version store, no folder
    hash: str  # blake3 of the file, 64 hex digits
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The newest version counts no more; another will have its number, and may have its updates."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """`digest` is None where nothing came."""

    store: str
    ticket: str
    reason: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Store -> its signature over the head of `size` entries (`witness_statement`)."""

    size: int
    cosignatures: dict[str, str]


@dataclass(frozen=True, slots=True)
class Finished:
    """The coordinator's last word."""

    reason: str
    versions: int
    best_version: int | None


Body: TypeAlias = (
    Run | Store | Revoked | Update | Version | Recalibrated | Kept | Withdrawn | Refused | Witnessed | Finished
)
KINDS: dict[str, type[Body]] = {
    kind.__name__.lower(): kind
    for kind in (Run, Store, Revoked, Update, Version, Recalibrated, Kept, Withdrawn, Refused, Witnessed, Finished)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """`at` is in seconds since the epoch; `actor` is the store it is about, else "coordinator"; all journal records up
    to number `record` are accounted for when this entry is there."""

    index: int
    prev: str
    kind: str
    at: float
    actor: str
    body: dict[str, Any]
    record: int = 0

    @property
    def hash(self) -> bytes:
        """32 bytes; the leaf of the tree."""
        return entry_hash(plain(self))

    def typed(self) -> Body:
        """The body as the dataclass of its kind. Raises ValueError in one line when it is not one."""
        if self.kind not in KINDS:
            raise ValueError(f"no entry is of kind {self.kind!r}")
        return typed(KINDS[self.kind], self.body)


def make_entry(index: int, prev: str, body: Body, at: float, record: int = 0) -> Entry:
    """Raises ValueError for a body with NaN, or with fields of other types than its kind has."""
    fields = plain(typed(type(body), plain(body)))
    actor = str(fields.get("store", "coordinator"))
    return Entry(index, prev, type(body).__name__.lower(), float(at), actor, fields, record)


def line_of(entry: Entry) -> tuple[bytes, bytes]:
    """The line with its line feed, and the entry's hash."""
    inner = canonical(plain(entry))
    found = sha256(inner).digest()
    return b'{"entry":' + inner + b',"hash":"' + found.hex().encode() + b'"}\n', found


def plain(fact: object) -> dict[str, Any]:
    """A dataclass of this room as JSON holds it; none has another inside, so this is `asdict` without its copies."""
    return {name: getattr(fact, name) for name in cast(Any, fact).__slots__}


def typed(kind: type[T], given: object) -> T:
    """Plain JSON values as a dataclass. Raises ValueError in one line."""
    try:
        return cast(T, _validator(cast(Any, kind))(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{kind.__name__.lower()}: {place}: {first['msg'].lower()}") from None


def exact(kind: type[T], given: object) -> T:
    """The same, of values that are already as the dataclass would write them: nothing left out, added or coerced."""
    found = typed(kind, given)
    if canonical(plain(found)) != canonical(given):
        raise ValueError(f"{kind.__name__.lower()}: the fields are not exactly those of its kind")
    return found


@lru_cache(maxsize=32)
def _validator(kind: type[Any]) -> Callable[[object], object]:
    return TypeAdapter(kind).validate_python
