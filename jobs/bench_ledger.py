"""What the ledger costs a version of ten ResNet-18 updates, over hashing each of them twice, side by side.

The very parts that a run has, one thread a hash: at each store the check of its base, digest and signature of its
update, receipts and the head kept; at the coordinator digest, signature and roster of each update, entries, Merkle
tree, signed head, proofs, and all that is forced to the disk.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.coordinator.actions import Contribution
from raypipe.coordinator.notary import Notary
from raypipe.ledger.keys import digest
from raypipe.ledger.verify import verify
from raypipe.store import messages as msg
from raypipe.store.attest import Attestor
from raypipe.store.policy import Policy
from raypipe.tracking.journal import FILE, Journal

FLOATS = 11_180_000  # ResNet-18 for ten classes: 45 MB
STORES = 10
HELD = 4  # updates in memory, taken in turn
WARM = 2  # versions, which touch new memory


class Versions:
    """A run's ledger and its stores, without training."""

    def __init__(self, folder: Path, floats: int) -> None:
        self.folder = folder / "runs" / "ledger"
        self.folder.mkdir(parents=True)
        self.journal = Journal(self.folder / FILE, write=True)
        self.notary = Notary(
            self.folder, folder, "ledger", roster_file=folder / "roster.json", rule="tofu", threads=1, wall=time.time,
            say=print,
        )  # fmt: skip
        names = [f"store-{i}" for i in range(STORES)]
        self.stores = {n: Attestor(folder / n, Policy(store=n), threads=1, wall=time.time) for n in names}
        for store in self.stores.values():
            store.owns("ledger")
        none: dict[str, Any] = {"name": "none"}
        self.plan = msg.Plan("ledger", none, none, "images", none, 0.1, none, 32, "")
        rng = np.random.default_rng(0)
        self.weights, *self.updates = (rng.standard_normal(floats, np.float32) for _ in range(1 + HELD))
        self.base = digest(self.weights, threads=1)  # every version has the same weights: what they are costs nothing
        started = {"run": "ledger", "epoch": 1, "config": {}, "code_hash": ""}
        self.journal.append("run_started", started, time.time())
        for name, store in self.stores.items():
            card = msg.Card(name, msg.PROTOCOL, {}, (), (), 1.0, None, "", 0, {}, {}, key=store.public)
            self.notary.admit(name, card)
            self.journal.append("store_joined", {"store": name, "key": store.public, "counts": {}}, time.time())
        self.publish(0, [])
        self.notary.open()

    def publish(self, version: int, contributions: list[Contribution]) -> None:
        parent = version - 1 if version else None
        made = [asdict(one) for one in contributions]
        body = {"version": version, "parent": parent, "hash": self.base, "contributions": made}
        self.journal.append("version_published", body, time.time())

    async def ticket(self, store: str, version: int, update: np.ndarray) -> tuple[float, float, Contribution]:
        """Seconds at the store and at the coordinator."""
        name, attestor = f"{version}.{store}", self.stores[store]
        start = time.perf_counter()
        proofs = await self.notary.prove(store, version)
        proved = time.perf_counter()
        ticket = msg.Ticket(name, store, 1, version, 0, (0.0, 0.0), max_steps=1, base=proofs)
        checked = attestor.check(ticket, self.plan, self.weights)
        made = msg.Report(name, store, version, 1, 32, 200, 0, 1.0, 1.0, update.nbytes, "done")
        report = attestor.sign(made, self.plan, checked, update)
        attestor.left("report", "ledger", name, report, "measured")
        attestor.update_left(report, "ledger", [], update, "measured")
        left = time.perf_counter()
        self.notary.heard(store, report)
        signed = await self.notary.checked(store, name, update)
        if signed.reason:
            raise RuntimeError(signed.reason)
        end = time.perf_counter()
        part = Contribution(
            name, store, version, 0, 1, 32, 1.0, 0.1, 1.0, 1.0, update.nbytes, signed.digest, signed.signature
        )
        return left - proved, end - left + proved - start, part

    async def version(self, number: int) -> tuple[float, float]:
        """The same, of a whole version, which begins when the one before is sealed with its first proof."""
        at_stores = at_coordinator = 0.0
        parts = []
        for place, store in enumerate(self.stores):
            there, here, part = await self.ticket(store, number, self.updates[place % HELD])
            at_stores, at_coordinator = at_stores + there, at_coordinator + here
            parts.append(part)
        self.publish(number + 1, parts)
        self.notary.wake()
        return at_stores, at_coordinator

    def hashes(self) -> tuple[float, float]:
        """Seconds to hash every update twice, and every store's base once."""
        start = time.perf_counter()
        for _ in range(2):
            for place in range(STORES):
                digest(self.updates[place % HELD], threads=1)
        twice = time.perf_counter()
        for _ in range(STORES):
            digest(self.weights, threads=1)
        return twice - start, time.perf_counter() - twice


def ledger_seconds(folder: Path, num_pairs: int, floats: int = FLOATS) -> list[dict[str, float]]:
    """Per version: every update hashed twice, every base once; and all of the ledger at stores and coordinator."""
    made = Versions(folder, floats)
    found = []

    async def measure() -> None:
        for number in range(num_pairs + WARM):
            twice, bases = made.hashes()
            stores, coordinator = await made.version(number)
            found.append({"twice": twice, "bases": bases, "stores": stores, "coordinator": coordinator})

    asyncio.run(measure())
    made.notary.finish()
    held = verify(made.folder)
    if not held.ok or held.counts["update"] != STORES * (num_pairs + WARM):
        raise RuntimeError(held.summary())
    return found[WARM:]
