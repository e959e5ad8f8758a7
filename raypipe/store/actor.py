"""The Ray shell of a store: an actor pinned to the store's node, and the coordinator's side of it.

The actor is a sync class: `train` occupies its one main thread; `control` and `heartbeat` are answered meanwhile by
a concurrency group of their own (one async method would put all of them on an event loop and block it). Whatever
goes wrong inside leaves as a Refusal of one safe line; details go to the store's own log on its own disk.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import ray
from ray import exceptions as rex

from raypipe.config.schema import Store
from raypipe.errors import StoreError, StoreUnreachable
from raypipe.placement.homes import stores_home
from raypipe.placement.plan import missing, missing_advice, store_options
from raypipe.store import messages as msg
from raypipe.store.safety import refusal, site_log

NAMESPACE = "raypipe"
GONE = (rex.RayActorError, rex.ObjectLostError, rex.OwnerDiedError, rex.NodeDiedError, rex.RaySystemError)


class SiteActor:
    """A site behind Ray. Every answer is bytes of the store protocol, or a vector."""

    def __init__(self, store: str, cpus: float, gpus: float, slowdown: float) -> None:
        self._store = store
        self._make = lambda: _make_site(store, cpus, gpus, slowdown)
        self._site: Any = None
        self._log = site_log(stores_home() / store, store)

    def describe(self) -> bytes:
        return cast(bytes, self._answer("describe", lambda site: msg.encode(site.describe())))

    def train(self, ticket: bytes, plan: bytes, weights: np.ndarray) -> bytes:
        def run(site: Any) -> bytes:
            asked, how = msg.expect(msg.Ticket, ticket), msg.expect(msg.Plan, plan)
            return msg.encode(site.train(asked, how, weights))

        return cast(bytes, self._answer("train", run))

    def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray | bytes:
        return cast("np.ndarray | bytes", self._answer("collect", lambda site: site.collect(ticket, how)))

    def settle(self, verdict: bytes) -> None:
        self._answer("settle", lambda site: site.settle(msg.expect(msg.Verdict, verdict)) or b"")

    def evaluate(self, plan: bytes, weights: np.ndarray, split: str) -> bytes:
        def run(site: Any) -> bytes:
            return msg.encode(site.evaluate(msg.expect(msg.Plan, plan), weights, split))

        return cast(bytes, self._answer("evaluate", run))

    @ray.method(concurrency_group="control")
    def control(self, ticket: str, command: msg.Command) -> None:
        if self._site is not None:
            self._site.control(ticket, command)

    @ray.method(concurrency_group="control")
    def heartbeat(self) -> bool:
        return True

    def _answer(self, method: str, run: Callable[[Any], Any]) -> Any:
        """Run one method of the site; nothing but a safe line leaves when it fails."""
        try:
            if self._site is None:
                self._site = self._make()
            return run(self._site)
        except Exception as error:  # noqa: BLE001  the shell: whatever it is, it must not carry private data out
            return msg.encode(refusal(error, self._store, method, self._log))


_with_options: Any = ray.remote  # its stubs do not know concurrency groups
StoreActor: Any = _with_options(concurrency_groups={"control": 2}, max_restarts=0, max_task_retries=0)(SiteActor)


def _make_site(store: str, cpus: float, gpus: float, slowdown: float) -> Any:
    from raypipe.store.site import Site

    node = ray.get_runtime_context().get_node_id()[:12]
    return Site(stores_home() / store, cpus=cpus, gpus=gpus, slowdown=slowdown, node=node)


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(process: int) -> None:
    """On the store's node: a frozen process (SIGSTOP) hears nothing but this."""
    os.kill(process, signal.SIGKILL)


class StoreClient:
    """The coordinator's side of one store: the protocol, with Ray's errors told as ours.

    An actor that ended is not restarted by Ray; `join` makes a new one, so that there is one way back for a store
    whose process, node or link was gone.
    """

    def __init__(self, store: Store, run: str, epoch: int, code: str) -> None:
        self.store = store
        self._name = f"{run}/{store.id}/{epoch}/{code[:8]}-{secrets.token_hex(2)}"
        self._lives = 0
        self._actor: Any = None
        self._process: int | None = None

    async def join(self) -> msg.Card:
        """Make the actor and hear who it is; waits for as long as no node offers the store's resource."""
        self._lives, self._process = self._lives + 1, None
        options = store_options(self.store.id, self.store.cpus, self.store.gpus)
        name = f"{self._name}/{self._lives}"
        self._actor = StoreActor.options(name=name, namespace=NAMESPACE, **options).remote(
            self.store.id, self.store.cpus, self.store.gpus, self.store.slowdown
        )
        card = msg.expect(msg.Card, await self._ask("describe"))
        self._process = card.process
        return card

    async def train(self, ticket: msg.Ticket, plan: bytes, weights: Any) -> msg.Report:
        """Raises StoreError; the weights are an object reference, fetched once a node."""
        return msg.expect(msg.Report, await self._ask("train", msg.encode(ticket), plan, weights))

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        """The encoded update, read-only in shared memory. Raises StoreError."""
        answer = await self._ask("collect", ticket, how)
        if isinstance(answer, bytes):
            msg.expect(msg.Report, answer)  # a Refusal, raised
        if type(answer) is not np.ndarray:
            raise StoreError(f"store {self.store.id}: an array was expected, a {type(answer).__name__} came")
        return answer

    async def evaluate(self, plan: bytes, weights: Any, split: str) -> msg.Evaluation:
        """Raises StoreError."""
        return msg.expect(msg.Evaluation, await self._ask("evaluate", plan, weights, split))

    def settle(self, verdict: msg.Verdict) -> None:
        """Tell; nothing is awaited."""
        if self._actor is not None:
            self._actor.settle.remote(msg.encode(verdict))

    def control(self, ticket: str, command: msg.Command) -> None:
        """Tell; seen within a batch."""
        if self._actor is not None:
            self._actor.control.remote(ticket, command)

    async def watch(self, heartbeat_s: float) -> tuple[bool, str]:
        """Wait until the store is gone or silent: (is it silent, why)."""
        missed, actor = 0, self._actor
        while missed < 2:
            await asyncio.sleep(heartbeat_s)
            if actor is not self._actor:
                return False, "restarted"
            try:
                async with asyncio.timeout(heartbeat_s):
                    await actor.heartbeat.remote()
                missed = 0
            except TimeoutError:
                missed += 1
            except rex.RayError as error:
                return False, _why(error)
        return True, f"no heartbeat for {2 * heartbeat_s:.0f} s"

    def waiting_for(self, waited_s: float) -> str:
        """Why `join` takes so long, and what to do about it: one line."""
        if missing([self.store.id], ray.cluster_resources()):
            return missing_advice(self.store.id, waited_s)
        wants = f"{self.store.cpus:g} CPU and {self.store.gpus:g} GPU"
        return f"store {self.store.id}: its node is there but busy or starting (for {waited_s:.0f} s); it needs {wants}"

    def kill(self) -> None:
        """End the process, frozen or not."""
        if self._actor is None:
            return
        actor, self._actor = self._actor, None
        if self._process is not None:
            resources = store_options(self.store.id, 0, 0)["resources"]
            _end_process.options(resources=resources).remote(self._process)
        ray.kill(actor)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise StoreUnreachable(f"store {self.store.id}: it is being started")
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except GONE as error:
            raise StoreUnreachable(f"store {self.store.id}: {_why(error)}") from None
        except rex.RayError as error:
            raise StoreError(f"store {self.store.id}: {type(error).__name__} in {method}") from None


def _why(error: BaseException) -> str:
    """A line for what Ray tells in twenty."""
    text = str(error).lower()
    if isinstance(error, rex.ActorUnavailableError):
        return "its node does not answer"
    if "node" in text and ("died" in text or "terminated" in text or "dead" in text):
        return "its node is gone"
    return "its process ended"
