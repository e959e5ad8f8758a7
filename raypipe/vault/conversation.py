"""What may be asked of a vault: the store protocol's own verbs, and nothing else.

Training and evaluation are done by the main thread, one at a time; `control` is answered beside them. A connection
that ends takes nothing with it: the same ticket asked for again joins the work that goes on. Work that nobody has
waited for in a while is abandoned, and leaves nothing.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from raypipe.errors import ConfigError, RaypipeError, StoreError, StoreRefused
from raypipe.ledger.keys import digest
from raypipe.store import messages as msg
from raypipe.store.budget import Budget
from raypipe.vault.fields import Array, Body, number, raw_bytes, run_of, text, vector
from raypipe.vault.frames import Channel, Cut
from raypipe.vault.guard import Limits, check_codecs, check_plan, check_vector
from raypipe.vault.jobs import Job, Jobs, Pool
from raypipe.vault.memory import Inlet, Outlet
from raypipe.vault.transfer import Incoming, Piece, pieces

HELLO_S = 10.0
LOOK_S = 0.5  # between two looks whether who waits is still there
MAX_TRANSFERS = 2  # in pieces, each way, that are kept to go on with


@dataclass
class Outgoing:
    """What is fetched in pieces; `sent`: so many bytes of it have been, some of which may not have come."""

    raw: Array
    run: str
    ticket: str
    sent: int = 0


@dataclass
class Vault:
    """What all conversations share. `site` is a raypipe.store.site.Site, `code` the hash of what is installed here."""

    site: Any
    limits: Limits
    budget: Budget
    code: str
    log: logging.Logger
    abandon_s: float = 15.0
    pool: Pool = field(default_factory=Pool)
    coming: OrderedDict[str, Incoming] = field(default_factory=OrderedDict)  # by announced hash
    going: OrderedDict[str, Outgoing] = field(default_factory=OrderedDict)  # the same, outwards
    jobs: Jobs = field(init=False)

    def __post_init__(self) -> None:
        self.jobs, self.site.code = Jobs(self.site.abandon), self.code


class Conversation:
    """One connection."""

    def __init__(self, vault: Vault, sock: socket.socket) -> None:
        self.channel = Channel(sock)
        self.heard, self.busy, self.greeted = time.monotonic(), False, False
        self._vault, self._site = vault, vault.site
        self._protocol = msg.PROTOCOL
        self._inlet: Inlet | None = None
        self._outlet: Outlet | None = None
        self._verbs: Mapping[str, Callable[[Body], Any]] = {
            "describe": self._describe,
            "train": self._train,
            "evaluate": self._evaluate,
            "measure": self._measure,
            "collect": self._collect,
            "settle": self._settle,
            "control": self._control,
            "ping": lambda body: (self._site.pausing() if self._protocol > 2 else "") or True,
            "announce": self._announce,
            "piece": self._piece,
            "pull": self._pull,
        }

    def close(self) -> None:
        self.channel.close()
        for end in (self._inlet, self._outlet):
            if end is not None:
                end.close()

    def run(self) -> None:
        """Raises Cut when the other side is gone, StoreError when it speaks no protocol."""
        self._greet(self.channel.receive(HELLO_S))
        self.greeted = True
        while True:
            body = self.channel.receive(None)
            self.heard, self.busy = time.monotonic(), True
            self._answer(body)
            self.busy = False

    def _greet(self, body: Body) -> None:
        store, speaks, problem = self._site.store, body.get("speaks"), ""
        common = [p for p in msg.SPOKEN if isinstance(speaks, list) and p in speaks]
        if body.get("verb") != "hello" or body.get("store") != store:
            problem = f"this is the vault of store {store}"
        elif not common:
            problem = f"the vault speaks protocol {msg.SPOKEN[0]} and {msg.SPOKEN[-1]}; update the older side"
        if problem:
            self._hello({"error": problem})
            raise StoreError(problem)
        self._protocol = common[-1]
        if body.get("pipe") is True:
            self._inlet = Inlet()
        hello = {"speaks": self._protocol, "store": store, "code": self._vault.code, "pipe": self._inlet is not None}
        self._hello(hello, [self._inlet.writer] if self._inlet else [])

    def _hello(self, body: Body, files: Sequence[int] = ()) -> None:
        self._site.greets(msgpack.packb(body))
        self.channel.send(body, files)

    def _answer(self, body: Body) -> None:
        verb = body.get("verb")
        act = self._verbs.get(verb) if isinstance(verb, str) else None
        if act is None:
            raise StoreError("not a verb of the store protocol")
        try:
            answer = act(body)
        except (Cut, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  the shell: it must not carry private data out
            refusal = self._site.refusal(error, verb, run=run_of(body))
            self.channel.send({"refusal": msg.encode(refusal, self._protocol)})
            if not isinstance(error, RaypipeError):
                raise StoreError(f"{type(error).__name__} in {verb}") from None
            return
        if answer is not None:
            self.channel.send({"answer": answer})

    # -- verbs ----------------------------------------------------------------------------------------------

    def _describe(self, body: Body) -> bytes:
        return msg.encode(self._site.describe(text(body, "run"), number(body, "epoch", 0)), self._protocol)

    def _train(self, body: Body) -> bytes:
        key = (raw_bytes(body, "ticket"), raw_bytes(body, "plan"))
        ticket, plan = msg.expect(msg.Ticket, key[0]), msg.expect(msg.Plan, key[1])
        if ticket.epoch < 1:
            raise StoreRefused("a ticket bears its coordinator's epoch, from 1 on")
        if (job := self._vault.jobs.joined(key)) is not None:
            self._skip_weights(body)
            again = self._waited(job, joined=True)
            self._site.left_again(plan.run, again)
            return msg.encode(again, self._protocol)
        self._site.policy.admit(ticket, plan)
        check_plan(plan, self._vault.limits)
        behind = number(body, "corrected", 0) if "corrected" in body else 0  # floats behind the weights

        def run(whole: Array) -> msg.Report:
            weights, correction = whole[: max(0, whole.size - behind)], whole[max(0, whole.size - behind) :]
            given = (ticket, plan, weights, *([correction] if behind else []))
            report: msg.Report = self._paid(lambda: self._site.train(*given))
            return report

        return msg.encode(self._waited(self._job(body, key, ticket.id, run)), self._protocol)

    def _evaluate(self, body: Body) -> bytes:
        plan, split, epoch = (
            msg.expect(msg.Plan, raw_bytes(body, "plan")),
            text(body, "split"),
            number(body, "epoch", 1),
        )
        self._site.policy.check(plan)
        check_plan(plan, self._vault.limits)

        def run(weights: Array) -> msg.Evaluation:
            evaluation: msg.Evaluation = self._paid(lambda: self._site.evaluate(plan, weights, split, epoch))
            return evaluation

        return msg.encode(self._waited(self._job(body, None, "", run)), self._protocol)

    def _measure(self, body: Body) -> Body | None:
        plan, what = msg.expect(msg.Plan, raw_bytes(body, "plan")), text(body, "what")
        epoch = number(body, "epoch", 1)
        self._site.policy.check(plan)
        check_plan(plan, self._vault.limits)
        weighed = "num_bytes" in body or "digest" in body
        known = vector(body, "known") if "known" in body else None

        def run(weights: Array | None) -> Array:
            sums: Array = self._paid(lambda: self._site.measure(plan, weights, what, epoch, known))
            return sums

        if weighed:
            job = self._job(body, None, "", run)
        else:
            job = self._vault.jobs.add(None, "", lambda: run(None), lambda: None)
        return self._handed_out(np.ascontiguousarray(self._waited(job), "<f8"), plan.run)

    def _collect(self, body: Body) -> Body | None:
        ticket, run, epoch = text(body, "ticket"), text(body, "run"), number(body, "epoch", 1)
        if not run:
            raise StoreRefused("an update is collected by its run")
        array = self._site.collect(ticket, check_codecs(body.get("how")), run, epoch)
        return self._handed_out(array, run, ticket)

    def _handed_out(self, array: Array, run: str, ticket: str = "") -> Body | None:
        """What is to be fetched, or in memory that goes with the answer; then that is sent here."""
        self._vault.budget.spend(upload_bytes=array.nbytes)
        about: Body = {"num_bytes": array.nbytes, "dtype": array.dtype.str}
        if self._inlet is None:
            raw = array.reshape(-1).view(np.uint8).copy()
            about["digest"] = digest(raw)
            _keep(self._vault.going, about["digest"], Outgoing(raw, run, ticket))
            return about
        about["new"] = self._outlet is None or self._outlet.data.size != array.nbytes
        if self._outlet is None or about["new"]:
            if self._outlet is not None:
                self._outlet.close()
            self._outlet = Outlet(array.nbytes)
        self._outlet.put(array)
        self.channel.send({"answer": about}, [self._outlet.file] if about["new"] else [])
        return None

    def _settle(self, body: Body) -> bool:
        verdict = msg.expect(msg.Verdict, raw_bytes(body, "verdict"))
        if not verdict.run or verdict.epoch < 1:
            raise StoreRefused("a verdict bears its run and its coordinator's epoch")
        self._site.settle(verdict)
        return True

    def _control(self, body: Body) -> bool:
        ticket, command, run = text(body, "ticket"), text(body, "command"), text(body, "run")
        if command not in ("stop", "pause", "resume"):
            raise StoreRefused("a command is stop, pause or resume")
        self._site.control(ticket, command, run, number(body, "epoch", 1))
        return True

    # -- work and its weights -------------------------------------------------------------------------------

    def _paid(self, work: Callable[[], Any]) -> Any:
        """One of the day's tickets; what is refused costs none."""
        self._vault.budget.spend(tickets=1)
        try:
            return work()
        except (StoreRefused, ConfigError):
            self._vault.budget.spend(tickets=-1)
            raise

    def _job(self, body: Body, key: Any, ticket: str, run: Callable[[Array], Any]) -> Job:
        weights, end = self._weights(body)
        return self._vault.jobs.add(key, ticket, lambda: run(weights), end)

    def _waited(self, job: Job, *, joined: bool = False) -> Any:
        return self._vault.jobs.wait(job, self.channel.gone, LOOK_S, self._vault.abandon_s, joined=joined)

    def _weights(self, body: Body) -> tuple[Array, Callable[[], None]]:
        """float32 in the vault's own memory, and what to call when they are no longer needed."""
        if "digest" in body:
            coming = self._vault.coming.pop(text(body, "digest"), None)
            if coming is None or not coming.whole():
                raise StoreRefused("these weights did not come whole; announce them again")
            return coming.data.view(np.float32), lambda: None
        num_bytes = check_vector(body.get("num_bytes"), self._vault.limits)
        if self._inlet is None:
            raise StoreRefused("without a pipe, weights come in pieces")
        room = self._vault.pool.take(num_bytes)
        try:
            self.channel.send({"go": True})
            self._inlet.read(room, self.channel.gone)
        except BaseException:
            self._vault.pool.give(room)
            raise
        return room.view(np.float32), lambda: self._vault.pool.give(room)

    def _skip_weights(self, body: Body) -> None:
        """They are here already."""
        if "digest" not in body:
            self.channel.send({"go": False})

    # -- in pieces ------------------------------------------------------------------------------------------

    def _announce(self, body: Body) -> int:
        """A vector is to come in pieces; how much of it is here already, in bytes."""
        name, size = text(body, "digest"), check_vector(body.get("num_bytes"), self._vault.limits)
        coming = self._vault.coming.get(name)
        if coming is None or coming.data.size != size:
            _keep(self._vault.coming, name, Incoming(name, size))
        return self._vault.coming[name].have

    def _piece(self, body: Body) -> bool | None:
        """Not answered but for the last one."""
        coming = self._vault.coming.get(text(body, "digest"))
        if coming is None:
            raise Cut("another vector came between")
        try:
            coming.take(Piece(number(body, "at", 0), raw_bytes(body, "data"), raw_bytes(body, "check")))
        except StoreError as error:
            raise Cut(error.message) from None  # what else is on its way is of no use
        return coming.whole() or None

    def _pull(self, body: Body) -> None:
        """The pieces of what was collected, from an offset on."""
        going, at = self._vault.going.get(text(body, "digest")), number(body, "at", 0)
        if going is None:
            raise StoreRefused("it is kept no longer; collect it again")
        if at < going.sent:
            self._site.sent_again(going.run, going.ticket, going.raw[at : going.sent].tobytes())
        for piece in pieces(going.raw, at):
            going.sent = max(going.sent, piece.at + len(piece.data))
            self.channel.send({"at": piece.at, "data": piece.data, "check": piece.check})


def _keep(table: OrderedDict[str, Any], name: str, value: Any) -> None:
    table[name] = value
    table.move_to_end(name)
    while len(table) > MAX_TRANSFERS:
        table.popitem(last=False)
