"""The Ray shell of a store: an actor pinned to the store's node. The coordinator's side of it is in client.py.

The actor is a sync class: `train` occupies its one main thread; `control` and `heartbeat` are answered meanwhile by
a concurrency group of their own (one async method would put all of them on an event loop and block it). Whatever
goes wrong inside leaves as a Refusal of one safe line; details go to the store's own log on its own disk.

It is detached, named `store/<run>/<store>/<code>/<transport>`: it outlives its coordinator, and one that comes back
finds it by name. An actor that no coordinator speaks to ends itself, so nothing stays on a cluster whose coordinator is
gone for good. `code` is in the name because a detached actor keeps the code of the job that made it, the transport
because a site that lives in the actor must never be taken for the vault that was asked for.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray

from raypipe.errors import StoreError
from raypipe.importing import without_collecting
from raypipe.ledger.keys import digest
from raypipe.ledger.receipts import write_apart
from raypipe.placement.homes import stores_home
from raypipe.store import messages as msg
from raypipe.store.going import Going, Pace
from raypipe.store.pieces import Pieces
from raypipe.store.safety import refusal, site_log

if TYPE_CHECKING:
    from raypipe.config.schema import Transport

ORPHAN_S = 120.0  # an actor that no coordinator has spoken to for so long ends itself
MAX_GOING = 2  # updates kept to be fetched in pieces: the one on its way, and the next


class SiteActor:
    """A site behind Ray. Every answer is bytes of the store protocol, or a vector."""

    def __init__(
        self,
        store: str,
        cpus: float,
        gpus: float,
        slowdown: float,
        orphan_s: float = ORPHAN_S,
        transport: Transport = "actor",
        ranks: int = 1,
    ) -> None:
        self._store, self._here = store, transport == "actor"
        self._site: Any = None
        if transport == "vault":  # this process has nothing of the store's, and no disk for a log
            self._log = logging.getLogger("raypipe.proxy")
            self._log.propagate = False
            self._log.addHandler(logging.NullHandler())
            self._make: Callable[[], Any] = lambda: _make_proxy(store)
        else:
            self._log = site_log(stores_home() / store, store)
            self._make = lambda: _make_site(store, cpus, gpus, slowdown, ranks)
        self._heard = time.monotonic()
        self._pieces = Pieces()
        self._going: OrderedDict[str, Going] = OrderedDict()  # by ticket: one may train while another's is fetched
        self._pace: Pace | None = None  # of all of them
        Thread(target=self._end_when_orphaned, args=(orphan_s,), name="orphan", daemon=True).start()

    def describe(self, run: str, epoch: int) -> bytes:
        return cast(bytes, self._answer("describe", lambda site: msg.encode(site.describe(run, epoch))))

    @ray.method(num_returns=2)
    def train(
        self,
        ticket: bytes,
        plan: bytes,
        weights: np.ndarray,
        how: list[msg.Part] | None,
        verdicts: list[bytes],
        still: np.ndarray | None = None,
        correction: np.ndarray | None = None,
        near: bool = False,
    ) -> tuple[bytes, np.ndarray | bytes | dict[str, int] | None]:
        """The report, and where `how` is said what `collect` would give: a call less. Verdicts come first.

        Of a store whose uploads have a rate there is the report alone; to a coordinator that is `near` it is told
        where the update lies.
        """
        self.settle(verdicts)
        done: list[Callable[[Any], Any]] = []

        def run(site: Any) -> bytes:
            asked, learned = msg.expect(msg.Ticket, ticket), msg.expect(msg.Plan, plan)
            report = msg.encode(site.train(asked, learned, self._pieces.whole(plan, weights, still), correction))
            if site.rate is None:
                done.append(
                    partial(_collected, ticket=asked.id, run=learned.run, epoch=asked.epoch, how=how, near=near)
                )
            return report

        report = cast(bytes, self._answer("train", run))
        return report, self._answer("collect", done[0]) if done and how is not None else None

    def collect(self, ticket: str, how: list[msg.Part], run: str, epoch: int) -> np.ndarray | bytes | dict[str, Any]:
        """The update; of a store whose uploads have a rate what is to be fetched by `piece`."""
        answer = self._answer("collect", lambda site: site.collect(ticket, how, run, epoch))
        if isinstance(answer, bytes) or self._site.rate is None:
            return cast("np.ndarray | bytes", answer)
        if self._pace is None or self._pace.rate != self._site.rate:
            self._pace = Pace(self._site.rate, time.monotonic())
        going = self._going[ticket] = Going(answer, self._pace, run)
        while len(self._going) > MAX_GOING:
            self._going.popitem(last=False)
        return going.about

    @ray.method(concurrency_group="upload")
    def piece(self, ticket: str, at: int) -> tuple[int, bytes, bytes] | bytes:
        """A Piece of an update that is on its way, from an offset on, not before its time."""
        going = self._going.get(ticket)
        try:
            if going is None:
                raise StoreError("it is kept no longer; collect it again")
            sent = going.sent
            piece, due_at = going.piece(at, time.monotonic())
            if at < sent and self._here:  # what a vault gave out whole, only its actor sends again
                self._site.sent_again(going.run, ticket, piece.data[: sent - at])
        except StoreError as error:
            return self._refused(error, "piece")
        time.sleep(max(0.0, due_at - time.monotonic()))
        return piece.at, piece.data, piece.check

    def settle(self, verdicts: list[bytes]) -> None:
        """Nothing leaves, whatever comes of it."""

        def run(site: Any) -> None:
            for raw in verdicts:
                verdict = msg.expect(msg.Verdict, raw)
                site.settle(verdict)
                self._going.pop(verdict.ticket, None)

        self._answer("settle", run, told=False)

    def evaluate(
        self, plan: bytes, weights: np.ndarray, split: str, epoch: int, still: np.ndarray | None = None
    ) -> bytes:
        def run(site: Any) -> bytes:
            whole = self._pieces.whole(plan, weights, still)
            return msg.encode(site.evaluate(msg.expect(msg.Plan, plan), whole, split, epoch))

        return cast(bytes, self._answer("evaluate", run))

    def measure(
        self, plan: bytes, weights: np.ndarray | None, what: str, epoch: int, known: np.ndarray | None = None
    ) -> np.ndarray | bytes:
        def run(site: Any) -> Any:
            return site.measure(msg.expect(msg.Plan, plan), weights, what, epoch, known)

        return cast("np.ndarray | bytes", self._answer("measure", run))

    @ray.method(concurrency_group="control")
    def control(self, ticket: str, command: msg.Command, run: str, epoch: int) -> None:
        self._heard = time.monotonic()
        if self._site is not None:
            self._site.control(ticket, command, run, epoch)

    @ray.method(concurrency_group="control")
    def heartbeat(self) -> bool | str:
        """Whether the site, wherever it is, is well; why it pauses, where it does."""
        self._heard = time.monotonic()
        if self._site is None:
            return True
        ping = getattr(self._site, "ping", None)  # a vault's; a site that is here answers by being here
        return cast("bool | str", self._site.pausing() or True if ping is None else ping())

    def _end_when_orphaned(self, orphan_s: float) -> None:
        while (silent_s := time.monotonic() - self._heard) < orphan_s:
            time.sleep(min(1.0, orphan_s - silent_s))
        self._log.warning("no coordinator was heard of for %.0f s: this process ends", orphan_s)
        os._exit(0)

    def _answer(self, method: str, run: Callable[[Any], Any], *, told: bool = True) -> Any:
        """Run one method of the site; nothing but a safe line leaves when it fails, and not that where not `told`."""
        self._heard = time.monotonic()
        try:
            if self._site is None:
                self._site = self._make()
            return run(self._site)
        except Exception as error:  # noqa: BLE001  the shell: whatever it is, it must not carry private data out
            return self._refused(error, method) if told else refusal(error, self._store, method, self._log)

    def _refused(self, error: BaseException, method: str) -> bytes:
        """A Refusal that leaves, with the store's receipt; a vault has written its own."""
        if self._here and self._site is not None:
            return msg.encode(self._site.refusal(error, method))
        raw = msg.encode(refusal(error, self._store, method, self._log))
        if self._here and (home := stores_home() / self._store).is_dir():
            about = {"kind": "refusal", "run": "", "ticket": "", "why": f"{method} was asked for, and there is no site"}
            with suppress(StoreError):
                write_apart(home / "egress", at=time.time(), num_bytes=len(raw), digest=digest(raw), **about)
        return raw


_with_options: Any = ray.remote  # its stubs do not know concurrency groups
_options: dict[str, Any] = {"concurrency_groups": {"control": 2, "upload": 1}}
# No restarts by Ray: a coordinator would not learn of them, and `join` has to make new ones anyway when a node returns.
_options |= {"max_restarts": 0, "max_task_retries": 0}
# Else nothing is answered while the weights of a ticket are on their way: Ray keeps calls in order, and one that lacks
# its arguments holds up those after it. On a thin line a store was taken for hung, and its update stood still.
_options |= {"allow_out_of_order_execution": True}
StoreActor: Any = _with_options(**_options)(SiteActor)


def node_here() -> str:
    """This node, as cards name it."""
    return str(ray.get_runtime_context().get_node_id())[:12]


def _collected(site: Any, ticket: str, run: str, epoch: int, how: list[msg.Part] | None, near: bool) -> Any:
    update = site.collect(ticket, how, run, epoch)
    return (site.place(ticket, run, update) if near else None) or update


def _make_site(store: str, cpus: float, gpus: float, slowdown: float, ranks: int) -> Any:
    with without_collecting():
        from raypipe.store.site import Site

    return Site(stores_home() / store, cpus=cpus, gpus=gpus, ranks=ranks, slowdown=slowdown, node=node_here())


def _make_proxy(store: str) -> Any:
    from raypipe.vault.client import VaultSite
    from raypipe.vault.place import Place

    return VaultSite(Place(store).socket, store, node=node_here())
