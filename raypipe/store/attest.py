"""The store's part in the ledger: what it checks before it trains, what it signs, and its receipts of what left.

    <store home>/keys/store.pem          its private key; made here, never sent
    <store home>/heads/RUN.heads.jsonl   every head of the run's ledger that it co-signed: for `ledger verify --against`
    <store home>/egress/RUN/, egress/_/  receipts, see ledger/receipts.py

A run that began with a ledger goes on with it: once this store has co-signed a head of a run, it trains on nothing of
that run without a proof. A store whose policy names `coordinators` never does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import ConfigError, StoreRefused
from raypipe.ledger.keys import digest, load_or_make_key
from raypipe.ledger.offline import update_statement
from raypipe.ledger.receipts import Receipts, write_apart
from raypipe.ledger.witness import Witness
from raypipe.store.messages import Message, Part, Plan, Report, Ticket, encode
from raypipe.store.policy import Policy
from raypipe.update.codec import encode_chain

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
SIGNED = 16  # tickets of which the digest of what leaves is known without hashing it again


@dataclass(frozen=True, slots=True)
class Base:
    """A base that is on the chain: the digest of its vector, and the co-signature of the head that says so."""

    digest: str
    cosignature: dict[str, Any]


class Attestor:
    """One a site; threads of its process may share it. `threads` hash a vector, `wall` gives seconds since the epoch.

    A run's files are written by the one process that has the run's outbox.
    """

    def __init__(self, home: Path, policy: Policy, *, threads: int, wall: Callable[[], float]) -> None:
        """Raises ConfigError: others can read the key, or it cannot be made."""
        self._home, self._store, self._threads, self._wall = home, policy.store, threads, wall
        try:
            self._key = load_or_make_key(home / "keys" / "store.pem")
        except ConfigError as error:  # it may leave the store, where things lie there may not
            raise ConfigError(error.message.replace(f"{home}/", "")) from None
        self._required = bool(policy.coordinators)
        self._witness = Witness(home / "heads", self._key, self._store, policy.coordinators)
        self._receipts: dict[str, Receipts] = {}
        self._owned: set[str] = set()
        self._signed: OrderedDict[str, tuple[list[Part], str, Array | None]] = OrderedDict()
        self._lock = Lock()

    def owns(self, run: str) -> None:
        """This process has the run's outbox, and so is the one that writes its receipts."""
        self._owned.add(run)

    @property
    def public(self) -> str:
        """The public half of the store's key."""
        return self._key.public

    def head_size(self, run: str) -> int:
        """Of the last head of the run's ledger that this store co-signed, 0 for none."""
        with self._lock:
            return self._witness.size(run)

    def check(self, ticket: Ticket, plan: Plan, weights: Array) -> Base | None:
        """Before anything is trained. None in a run without a ledger. Raises StoreRefused saying what is wrong."""
        if not ticket.base:
            if self._required:
                raise StoreRefused("the store's policy names coordinators: a ticket needs a proof of its base")
            if self.head_size(plan.run):
                raise StoreRefused("this run keeps a ledger, and the ticket brings no proof that its base is on it")
            return None
        found = digest(weights, threads=self._threads)
        with self._lock:
            last = self._witness.size(plan.run)
            proof = next((one for one in ticket.base if one.get("since") == last), ticket.base[-1])
            return Base(found, self._witness.check(proof, run=plan.run, version=ticket.version, digest=found))

    def sign(self, report: Report, plan: Plan, base: Base | None, update: Array | None) -> Report:
        """The report with the store's word on its update, and on the head that it has seen."""
        if base is None:
            return report
        if update is None:
            return replace(report, cosignature=base.cosignature)
        encoded = encode_chain(plan.update, update) if plan.update else update
        found = digest(encoded, threads=self._threads)
        said = update_statement(
            run=plan.run,
            store=self._store,
            ticket=report.ticket,
            base_version=report.version,
            base_digest=base.digest,
            update_digest=found,
            steps=report.steps,
            examples=report.examples,
        )
        with self._lock:
            self._forget_encoded()
            self._signed[report.ticket] = plan.update, found, None if encoded is update else encoded
            while len(self._signed) > SIGNED:
                self._signed.popitem(last=False)
        signature = self._key.sign("update", said)
        return replace(report, digest=found, signature=signature, cosignature=base.cosignature)

    def encoded(self, ticket: str, how: list[Part], update: Array) -> Array:
        """An update as it leaves; what was encoded to be signed is not encoded again."""
        with self._lock:
            known = self._signed.get(ticket)
        if known is not None and known[0] == how and known[2] is not None:
            return known[2]
        return encode_chain(how, update) if how else update

    def left(self, kind: str, run: str, ticket: str, message: Message, why: str) -> None:
        """A receipt for a message. Raises StoreError (disk full): then it may not leave."""
        self.said(kind, run, ticket, encode(message), why)

    def said(self, kind: str, run: str, ticket: str, raw: bytes, why: str) -> None:
        """The same, for what is no message of the protocol, or only a part of one."""
        self._write(kind, run, ticket, len(raw), digest(raw), why)

    def paused(self, run: str, ticket: str, why: str) -> None:
        """Why a ticket pauses leaves the store. Raises StoreError: it may not."""
        self.said("pause", run, ticket, why.encode(), "told at each heartbeat until it changes")

    def update_left(self, report: Report, run: str, how: list[Part], encoded: Array, why: str) -> None:
        """A receipt for an update; in a run without a ledger it says how many bytes and not which."""
        with self._lock:
            known = self._signed.get(report.ticket)
            self._forget_encoded()
        found = ""
        if report.digest:
            found = known[1] if known is not None and known[0] == how else digest(encoded, threads=self._threads)
        self._write("update", run, report.ticket, encoded.nbytes, found, why)

    def sums_left(self, what: str, run: str, sums: Array) -> None:
        """A receipt for sums over the training split."""
        self._write("sums", run, "", sums.nbytes, digest(sums), f"sums over the training split were asked for: {what}")

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            for receipts in self._receipts.values():
                receipts.close()
            self._receipts.clear()
            self._owned.clear()

    def _forget_encoded(self) -> None:
        """One encoded update is kept, until it left or another was made."""
        for ticket, (how, found, encoded) in self._signed.items():
            if encoded is not None:
                self._signed[ticket] = how, found, None

    def _write(self, kind: str, run: str, ticket: str, num_bytes: int, found: str, why: str) -> None:
        egress, about = self._home / "egress", {"kind": kind, "run": run, "ticket": ticket, "why": why}
        said: dict[str, Any] = {"at": self._wall(), **about, "num_bytes": num_bytes, "digest": found}
        with self._lock:
            mine = run in self._owned
            if mine and run not in self._receipts:
                self._receipts[run] = Receipts(egress / run)
            receipts = self._receipts.get(run)
        if mine and receipts is not None:
            receipts.write(**said)
        else:
            write_apart(egress, **said)
