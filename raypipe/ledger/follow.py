"""From the journal to the ledger: what the run wrote down for itself becomes entries that others can check.

Each entry says up to which journal record all is accounted for, and all entries of a record go in together: so the
ledger itself tells how far it is, and after a crash or a full disk it goes on from there, telling nothing twice. All
that is written is computed from the records: but for co-signatures, a run that crashed has the ledger that it would
have had. One head is signed for each version, and one at the end; what comes between is under the next.

    run_started        run
    store_joined       store, where its key or card is another than before; revoked first where its key is
    version_published  an update for each contribution, then version; sealed
    weights_kept       kept
    version_withdrawn  withdrawn
    update_rejected    refused
    run_finished       finished; sealed

A joining store's record may hold its public `key`, a contribution its `digest` and `signature`, a rejected update
its `digest`. Without them, the entries say so: the store has no key, the update is unsigned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from raypipe.errors import RunError
from raypipe.ledger import entries
from raypipe.ledger.chain import Ledger
from raypipe.ledger.entries import Body
from raypipe.ledger.heads import Head
from raypipe.ledger.offline import canonical
from raypipe.tracking.journal import Record
from raypipe.tracking.records import Kind

KINDS: tuple[Kind, ...] = (
    "run_started",
    "store_joined",
    "update_rejected",
    "version_published",
    "weights_kept",
    "version_withdrawn",
    "run_finished",
)
_SEALED = ("version_published", "run_finished")


def record(ledger: Ledger, records: Iterable[Record]) -> Head | None:
    """Take in those of a run's records, in order, that the ledger does not have; the last head that was signed for it.

    For instance `record(ledger, journal.read(after=ledger.recorded, kinds=KINDS))`. One caller at a time. Raises
    RunError: the ledger could not be written, and a later call goes on from there; or a record is not of its kind.
    """
    head = None if ledger.owed is None else ledger.seal(at=ledger.owed)
    for one in records:
        if one.seq <= ledger.recorded:
            continue
        try:
            ledger.extend(_bodies(ledger, one), at=one.at, record=one.seq)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"journal record {one.seq} is not of kind {one.kind}: {error}") from None
        except RunError as error:
            raise RunError(f"journal record {one.seq} ({one.kind}): {error.message}") from None
        if one.kind in _SEALED:
            head = ledger.seal(at=one.at)
    return head


def _bodies(ledger: Ledger, one: Record) -> list[Body]:
    body = one.body
    match one.kind:
        case "run_started":
            return [_run(ledger, body)]
        case "store_joined":
            return _store(ledger, body)
        case "version_published":
            return _version(ledger, body)
        case "weights_kept":
            return [entries.Kept(body["version"], body["file"], body["hash"], body["num_bytes"])]
        case "version_withdrawn":
            return [entries.Withdrawn(body["version"], body["reason"])]
        case "update_rejected":
            return [entries.Refused(body["store"], body["ticket"], body["reason"], body.get("digest"))]
        case "run_finished":
            return [entries.Finished(body["reason"], body["versions"], body["best_version"])]
        case _:
            return []


def _run(ledger: Ledger, body: Mapping[str, Any]) -> Body:
    config = body["config"]
    hashed = sha256(canonical(config)).hexdigest()
    return entries.Run(body["run"], body["epoch"], ledger.coordinator, hashed, body["code_hash"], config)


def _store(ledger: Ledger, body: Mapping[str, Any]) -> list[Body]:
    """Nothing for a store that is back as it was."""
    started = ledger.started
    data = str((started.config or {}).get("data", "data")) if started else "data"
    made = entries.Store(
        store=body["store"],
        key=body.get("key"),
        limits=body.get("limits", {}),
        data_hashes={data: body["hash"]} if body.get("hash") else {},
        counts={data: body["counts"]},
    )
    standing = ledger.store(made.store)
    if standing is None or standing == made:
        return [] if standing else [made]
    if standing.key in (None, made.key):
        return [made]
    why = f"the store came with {'another' if made.key else 'none'}"
    return [entries.Revoked(made.store, standing.key, why), made]


def _version(ledger: Ledger, body: Mapping[str, Any]) -> list[Body]:
    number, parent = body["version"], body["parent"]
    updates: list[Body] = [
        entries.Update(
            version=number,
            store=one["store"],
            ticket=one["ticket"],
            base=one["base"],
            base_digest=_digest(ledger, one["base"]),
            staleness=one["staleness"],
            steps=one["steps"],
            examples=one["examples"],
            weight=one["weight"],
            digest=one.get("digest"),
            signature=one.get("signature"),
        )
        for one in body["contributions"]
    ]
    if measured := body.get("recalibrated"):
        updates = [entries.Recalibrated(number, measured["of"], measured["images"], measured["stores"])]
    before = None if parent is None else _digest(ledger, parent)
    return [*updates, entries.Version(number, parent, before, body["hash"], len(body["contributions"]))]


def _digest(ledger: Ledger, version: int) -> str:
    found = ledger.version(version)
    if found is None:
        raise RunError(f"the ledger has no version {version} that it builds on")
    return found.digest
