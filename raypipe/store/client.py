"""The coordinator's side of one store behind Ray: the protocol's calls, and Ray's errors told as ours.

The other side is the actor of actor.py, which this finds by its name, or makes. A process that hears nothing any more
is ended by a task on its own node.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import ray
from ray import exceptions as rex

from raypipe.config.schema import Store, Transport
from raypipe.errors import StoreError, StoreRefused, StoreSuperseded, StoreUnreachable
from raypipe.placement.actor import NAMESPACE
from raypipe.placement.book import troubles
from raypipe.placement.homes import stores_home
from raypipe.placement.plan import missing, missing_advice, store_options
from raypipe.store import messages as msg
from raypipe.store.actor import ORPHAN_S, StoreActor, node_here
from raypipe.store.going import fetched
from raypipe.store.near import Near
from raypipe.vault.transfer import Piece

ANSWER_S = 5.0  # in which an actor that is found has to answer
SETTLE_S = 2.0  # for which verdicts wait for a ticket to travel with
NO_VAULT = "its actor answered without the hash of a vault's code; end what is left of older runs: raypipe down"
GONE = (rex.RayActorError, rex.ObjectLostError, rex.OwnerDiedError, rex.NodeDiedError, rex.RaySystemError)

M = TypeVar("M", msg.Card, msg.Report, msg.Evaluation)


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(process: int) -> None:
    """On the store's node: a frozen process (SIGSTOP) hears nothing but this."""
    os.kill(process, signal.SIGKILL)


@ray.remote(num_cpus=0, max_retries=0)
def _end_holder(store: str, run: str) -> None:
    """The same for a process whose id only its node knows."""
    from raypipe.store.runs import end_holder

    end_holder(stores_home() / store, run)


def call(store: Store, run: str, code: str, transport: Transport) -> Any:
    """A store's actor, where there is none yet: to start takes it seconds, in which nobody need wait for it."""
    with suppress(ValueError):
        ray.get_actor(_name(store, run, code, transport), namespace=NAMESPACE)
        return None
    return _make(store, _name(store, run, code, transport), transport)


class StoreClient:
    """The coordinator's side of one store: the protocol, with Ray's errors told as ours.

    An actor that ended is not restarted by Ray; `join` finds the one that is there or makes a new one, so that there
    is one way back for a store whose process, node, link or coordinator was gone. Once a store says that a newer
    coordinator has the run, this side lets go of the actor and never ends it.
    """

    def __init__(self, store: Store, run: str, epoch: int, code: str, transport: Transport, called: Any = None) -> None:
        """`called`: its actor, if it was just made by `call`."""
        self.store, self._transport = store, transport
        self._run, self._epoch = run, epoch
        self._name = _name(store, run, code, transport)
        self._actor: Any = None
        self._called = called
        self._process: int | None = None
        self._updates: dict[str, Any] = {}  # that came with their reports: they stay at their node until collected
        self._near: Near | None = None  # where the store is on this node, under this process's own eyes
        self._fetching = asyncio.Lock()
        self._verdicts: list[bytes] = []
        self._telling: asyncio.TimerHandle | None = None
        self._given: Any = None  # the frozen weights that the process has

    async def join(self) -> msg.Card:
        """Find the actor or make it, and hear who it is; waits for as long as no node offers the store's resource.

        An actor that trains answers when its ticket is finished. Raises StoreError, StoreSuperseded.
        """
        self._process = self._given = None
        called, self._called = self._called, None
        self._actor = called or await self._found() or _make(self.store, self._name, self._transport)
        waiting = asyncio.create_task(_stay(self._actor))
        try:
            card = self._expect(msg.Card, await self._ask("describe", self._run, self._epoch))
        finally:
            waiting.cancel()
        self._process = card.process
        here = self._transport == "actor" and card.node == node_here()
        self._near = Near(stores_home() / self.store.id, self._run) if here else None
        if self._transport == "vault" and not card.code:
            raise StoreRefused(f"store {self.store.id}: {NO_VAULT}")
        return card

    async def _found(self) -> Any:
        """The actor that an earlier coordinator, or this one, has left; one that does not answer is ended."""
        try:
            actor = ray.get_actor(self._name, namespace=NAMESPACE)
        except ValueError:
            return None
        with suppress(TimeoutError, rex.RayError):
            async with asyncio.timeout(ANSWER_S):
                await actor.heartbeat.remote()
            return actor
        ending = _end_holder.options(resources=self._pin()).remote(self.store.id, self._run)
        try:
            async with asyncio.timeout(ANSWER_S):
                await ending
        except (TimeoutError, rex.RayError):
            ray.cancel(ending)  # its node is away: run later, it would end a process that is well
        ray.kill(actor)
        return None

    def _pin(self) -> Any:
        return store_options(self.store.id, 0, 0)["resources"]

    async def train(
        self, ticket: msg.Ticket, plan: bytes, weights: Any, how: list[msg.Part] | None = None, correction: Any = None
    ) -> msg.Report:
        """Raises StoreError; the weights are an object reference, fetched once a node, the correction is one too. With
        `how` the update comes with the report, for `collect` to take."""
        verdicts, self._verdicts = self._verdicts, []
        moving, still = self._pieces(weights)
        more = (how, verdicts, still, correction, self._near is not None)
        report, update = self._call("train", msg.encode(ticket), plan, moving, *more)
        answer = self._expect(msg.Report, await self._told("train", report))
        self._gave(weights)
        if how is not None:
            self._updates[ticket.id] = update
        return answer

    async def measure(self, plan: bytes, weights: Any, what: str, known: np.ndarray | None = None) -> np.ndarray:
        """Sums over the training split, float64; `known`: statistics in place of the weights'. Raises StoreError."""
        return self._array(await self._ask("measure", plan, weights, what, self._epoch, known))

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        """The encoded update, read-only in shared memory. Raises StoreError."""
        answer = None
        if (update := self._updates.pop(ticket, None)) is not None:
            with suppress(*GONE):  # else the store is asked for it
                answer = await update
                if isinstance(answer, dict):
                    answer = None if self._near is None else self._near.read(answer)
                    if answer is None:  # it will not be had the next time either, and the store counts each sending
                        self._near = None
        if answer is None:  # also of a store whose uploads have a rate
            async with self._fetching:  # together each would take as long as all of them
                answer = await self._ask("collect", ticket, how, self._run, self._epoch)
                if isinstance(answer, dict):
                    answer = await fetched(answer, partial(self._piece, ticket))
        return self._array(answer)

    async def _piece(self, ticket: str, at: int) -> Piece:
        """Raises StoreError."""
        answer = await self._ask("piece", ticket, at)
        if isinstance(answer, bytes):
            self._expect(msg.Report, answer)  # a Refusal, raised
        if type(answer) is not tuple or [type(part) for part in answer] != [int, bytes, bytes]:
            raise StoreError(f"store {self.store.id}: its update came in pieces that are none")
        return Piece(*answer)

    def _array(self, answer: Any) -> np.ndarray:
        if isinstance(answer, bytes):
            self._expect(msg.Report, answer)  # a Refusal, raised
        if type(answer) is not np.ndarray:
            raise StoreError(f"store {self.store.id}: an array was expected, a {type(answer).__name__} came")
        return answer

    async def evaluate(self, plan: bytes, weights: Any, split: str) -> msg.Evaluation:
        """Raises StoreError. Verdicts come first: a store may judge with what its last ticket left there."""
        if (heard := self.tell()) is not None:
            await self._told("settle", heard)
        moving, still = self._pieces(weights)
        answer = self._expect(msg.Evaluation, await self._ask("evaluate", plan, moving, split, self._epoch, still))
        self._gave(weights)
        return answer

    def settle(self, verdict: msg.Verdict) -> None:
        """Tell, with the next ticket or soon; nothing is awaited. A store that has not heard it asks when it joins."""
        self._updates.pop(verdict.ticket, None)
        self._verdicts.append(msg.encode(replace(verdict, run=self._run, epoch=self._epoch)))
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(SETTLE_S, self.tell)

    def tell(self) -> Any:
        """The verdicts that wait, now; where there are any, what is done when the store has heard them."""
        if self._telling is not None:
            self._telling.cancel()
        verdicts, self._verdicts, self._telling = self._verdicts, [], None
        return self._actor.settle.remote(verdicts) if verdicts and self._actor is not None else None

    def control(self, ticket: str, command: msg.Command) -> None:
        """Tell; seen within a batch."""
        if self._actor is not None:
            self._actor.control.remote(ticket, command, self._run, self._epoch)

    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]:
        """Wait until the store is gone or silent: (is it silent, why). `pauses` is told why it does, "" at the end."""
        asked: set[asyncio.Future[bool | str]] = set()
        try:
            return await self._heard(heartbeat_s, pauses, asked)
        finally:
            for question in asked:
                question.cancel()

    async def _heard(
        self, heartbeat_s: float, pauses: Callable[[str], None], asked: set[asyncio.Future[bool | str]]
    ) -> tuple[bool, str]:
        """Over a link that was away for a while the answer to the first of two questions may be what comes."""
        missed, actor, pausing = 0, self._actor, ""
        while missed < 2:
            await asyncio.sleep(heartbeat_s)
            if actor is not self._actor:
                return False, "restarted"
            asked.add(asyncio.ensure_future(_answer(actor.heartbeat.remote())))
            answered, _ = await asyncio.wait(asked, timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if not answered:
                missed += 1
                continue
            try:
                well = next(question.result() for question in answered)
            except rex.RayError as error:
                return False, _why(error)
            if not well:
                return False, "its vault does not answer"
            for question in asked - answered:
                question.cancel()
            asked.clear()
            missed, why = 0, well if isinstance(well, str) else ""
            if bool(why) != bool(pausing):
                pauses(why)
            pausing = why
        return True, f"no heartbeat for {2 * heartbeat_s:.0f} s"

    def waiting_for(self, waited_s: float) -> str:
        """Why `join` takes so long, and what to do about it: one line."""
        if missing([self.store.id], ray.cluster_resources()):
            return missing_advice(self.store.id, waited_s, troubles().get(self.store.id, ""))
        wants = f"{self.store.cpus:g} CPU and {self.store.gpus:g} GPU"
        return f"store {self.store.id}: its node is there but busy or starting (for {waited_s:.0f} s); it needs {wants}"

    def kill(self) -> None:
        """End the process, frozen or not."""
        if self._actor is None:
            return
        self.tell()
        self._updates.clear()
        self._near = None  # its files are closed
        actor, self._actor = self._actor, None
        if self._process is not None:
            _end_process.options(resources=self._pin()).remote(self._process)
        ray.kill(actor)

    async def release(self) -> None:
        """End the process once it has heard its verdicts, or has had time to; one that is not there yet is not made."""
        verdicts, self._verdicts = self._verdicts, []
        if verdicts and self._actor is not None:
            with suppress(TimeoutError, rex.RayError):
                async with asyncio.timeout(ANSWER_S):
                    await self._actor.settle.remote(verdicts)
        self.kill()

    def _expect(self, kind: type[M], answer: bytes) -> M:
        try:
            return msg.expect(kind, answer)
        except StoreSuperseded:
            self._actor = None
            raise

    def _pieces(self, weights: Any) -> tuple[Any, Any]:
        """Weights as they are sent, and frozen ones while the process has not answered to them yet."""
        if not isinstance(weights, msg.Parts):
            return weights, None
        return weights.moving, None if self._given is weights.still else weights.still

    def _gave(self, weights: Any) -> None:
        if isinstance(weights, msg.Parts):
            self._given = weights.still

    async def _ask(self, method: str, *arguments: Any) -> Any:
        return await self._told(method, self._call(method, *arguments))

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise StoreUnreachable(f"store {self.store.id}: it is being started")
        return getattr(self._actor, method).remote(*arguments)

    async def _told(self, method: str, answer: Any) -> Any:
        try:
            return await answer
        except GONE as error:
            raise StoreUnreachable(f"store {self.store.id}: {_why(error)}") from None
        except rex.RayError as error:
            raise StoreError(f"store {self.store.id}: {type(error).__name__} in {method}") from None


def _name(store: Store, run: str, code: str, transport: Transport) -> str:
    return f"store/{run}/{store.id}/{code[:8]}/{transport}"


def _make(store: Store, name: str, transport: Transport) -> Any:
    options = store_options(store.id, store.cpus, store.gpus)
    named = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    wanted = (store.id, store.cpus, store.gpus, store.slowdown)
    return StoreActor.options(**named, **options).remote(*wanted, transport=transport, ranks=store.num_ranks)


async def _stay(actor: Any) -> None:
    """Be heard by an actor that is busy, so that it does not think itself alone."""
    while True:
        await asyncio.sleep(ORPHAN_S / 8)
        with suppress(rex.RayError):
            await actor.heartbeat.remote()


async def _answer(question: Any) -> bool | str:
    return cast("bool | str", await question)


def _why(error: BaseException) -> str:
    """A line for what Ray tells in twenty."""
    text = str(error).lower()
    if isinstance(error, rex.ActorUnavailableError):
        return "its node does not answer"
    if isinstance(error, rex.NodeDiedError) or "node has died" in text or "node was terminated" in text:
        return "its node is gone"
    return "its process ended"
