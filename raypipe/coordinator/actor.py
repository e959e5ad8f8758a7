"""The coordinator as a Ray actor: joins the machine, the shell and the stores, and answers who asks how it goes.

Its parts are made by `raypipe.compose`, which knows all rooms. It lives on the head (or where it was started),
asks for no CPU, and keeps its run's folder there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from pydantic import TypeAdapter

from raypipe.config.schema import RunConfig, Store, Transport
from raypipe.coordinator import events as ev
from raypipe.coordinator.asking import Answers, Question, ask
from raypipe.coordinator.closing import Judged, judged, unjudged
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.loop import drive
from raypipe.coordinator.recalibration import last_version
from raypipe.coordinator.shell import Shell
from raypipe.coordinator.stages import rehearse
from raypipe.errors import ConfigError, RaypipeError, RunError, StoreSuperseded
from raypipe.importing import without_collecting
from raypipe.placement.homes import raypipe_home
from raypipe.store.client import StoreClient, call
from raypipe.store.code import code_hash
from raypipe.tasks.class_list import Change
from raypipe.tracking.actor import FollowerClient
from raypipe.tracking.journal import FILE

RETRY_S = 5.0
FIRST = 1  # the epoch of a run's first coordinator
T = TypeVar("T")
HEARD_S = 10.0  # in which the machine takes up what somebody asks for


class Coordinator:
    """One run. `compose` builds its parts in this process, from plain configuration."""

    def __init__(
        self,
        compose: Callable[..., Composition],
        config: dict[str, Any],
        run: str,
        home: str | None,
        mlflow: dict[str, str],
        prepare: Callable[..., Awaitable[Any]] | None = None,
    ) -> None:
        """`mlflow`: MLFLOW_* settings, logins too, for the follower alone; no store sees them.

        `prepare` asks the stores what the run lacks before its first version; see prelude.py.
        """
        self._mlflow = mlflow
        self._compose = partial(compose, run=run, home=home, put=ray.put)
        self._prepare = None if prepare is None else partial(prepare, config, run, home, self._ask)
        self._config = config
        self._run, self._home = run, Path(home) if home else raypipe_home()
        self._composition: Composition | None = None
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._called: dict[str, Any] = {}  # actors of stores that start while the run is composed
        self._phase = "starting"
        self._follower: FollowerClient | None = None
        self._summary: dict[str, Any] | None = None
        self._stop_reason = ""
        self._stopped = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def work(self) -> dict[str, Any]:
        """The whole run; its summary. Raises RunError when it cannot begin or go on."""
        made = self._composition = await self._composed()
        shell = made.shell
        await asyncio.to_thread(made.begin)
        background = [asyncio.create_task(shell.run_lane())]
        try:
            for store in made.config.stores:
                self._keep(store)
            if made.config.evaluate.central:
                self._keep(Store(id=made.config.evaluate.central, transport="actor"), trains=False)
            self._phase = "waiting for stores"
            if self._stop_reason:
                await self.stop(self._stop_reason)
            running = drive(made.machine, self._perform, shell.inbox, shell.clock, shell.note, made.first)
            await self._race(running, background[0])
            summary = await self._close(made)
            self._end_stores(shell)
            return summary
        except StoreSuperseded:  # its stores and its record are another's now
            raise RunError("another coordinator has taken this run over") from None
        except Exception as error:
            self._end_stores(shell)
            await self._break_off(made, error)
            raise
        finally:
            for task in [*background, *self._keeping.values()]:
                task.cancel()
            if self._follower is not None:
                self._follower.close()
            if made.notary is not None:  # a superseded one writes no more
                made.notary.close()

    async def progress(self, seen: int, timeout_s: float = 1.0) -> dict[str, Any]:
        """How it goes: returns as soon as there are more than `seen` lines, else after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and not (self._composition and len(self._composition.board.lines) > seen):
            await asyncio.sleep(0.05)
        board = self._composition.board.snapshot() if self._composition else None
        return {"phase": self._phase, "board": board, "summary": self._summary}

    async def stop(self, reason: str) -> None:
        """End the run; what was published is kept."""
        self._stop_reason = reason
        self._stopped.set()
        if self._composition is not None:
            shell = self._composition.shell
            shell.inbox.put_nowait(ev.StopAsked(reason, shell.clock()))

    async def rest(self) -> None:
        """End all work at once, and nothing else: the run is as if this process had died, but no store waits for it."""
        if self._running is not None:
            self._running.cancel()
        for task in self._keeping.values():
            task.cancel()
        if self._composition is not None:
            self._end_stores(self._composition.shell)

    async def join(self, store: dict[str, Any]) -> None:
        """Take a store into the running federation."""
        added = Store(**store)
        self._keep(added)
        if self._composition is not None:
            shell = self._composition.shell
            shell.inbox.put_nowait(ev.StoreAdded(added.id, shell.clock()))

    async def classes(self, change: dict[str, Any], wanted: int | None) -> int:
        """Change the class list; the version from which on it is another. Raises ConfigError, RunError."""
        made = self._composition
        if made is None or made.machine.ending is not None:
            raise RunError(f"the run {'has not begun yet' if made is None else 'ends'}: its classes stay as they are")
        if made.config.train.control_variates:
            raise ConfigError("classes stay as they are in a run with train.control_variates")
        if made.config.train.local is not None:
            raise ConfigError("classes stay as they are in a run with train.local")
        asked = TypeAdapter(Change).validate_python(change)
        version, newest = made.machine.place(asked, wanted), made.machine.version
        planned = {v: one for v, one in made.machine.changes.items() if v > newest} | {version: asked}
        await asyncio.to_thread(rehearse, made.stages.at(newest), made.shell.publisher.next_stage, planned)
        last = made.config.stop.max_versions
        if last is not None and version >= last:
            raise ConfigError(f"version {version} is too late for new classes: the run ends with version {last}")
        made.shell.inbox.put_nowait(ev.ClassesAsked(asked, wanted, made.shell.clock()))
        until = time.monotonic() + HEARD_S
        while time.monotonic() < until:
            await asyncio.sleep(0.05)
            if found := [v for v, one in made.machine.changes.items() if one is asked]:
                return found[0]
        raise RunError("the change could not be taken up any more: the run's own lines say why")

    async def leave(self, store: str) -> None:
        """Let a store go; what it has contributed stays."""
        if self._composition is None or store not in self._keeping:
            raise RunError(f"store {store} is not in this run")
        self._keeping.pop(store).cancel()
        shell = self._composition.shell
        shell.inbox.put_nowait(ev.StoreLeft(store, "its operator took it out", shell.clock(), True))
        shell.ports[store].kill()

    async def _composed(self) -> Composition:
        try:
            self._start_others(RunConfig.model_validate(self._config))
            with without_collecting():
                if self._prepare is None:
                    return await asyncio.to_thread(self._compose, self._config)
                self._phase = "asking the stores"
                found = await self._prepare()
                return await asyncio.to_thread(self._compose, found.config, start=found.start, asked=found.asked)
        except Exception:
            if self._follower is not None:
                self._follower.close()
                self._follower = None  # whose process ends with it: there is nothing to follow
            for actor in self._called.values():
                ray.kill(actor)
            raise

    def _start_others(self, config: RunConfig) -> None:
        """Processes that take seconds to start: MLflow's follower, and the stores, where all are had from the start."""
        if config.track.mlflow:
            folder = self._home / "runs" / self._run
            self._follower = FollowerClient(folder, self._home, self._mlflow)
            self._follower.begin(again=(folder / FILE).is_file())
        if config.pacing.max_active_stores is None:
            code = code_hash()
            made = {s.id: call(s, self._run, code, config.transport_of(s)) for s in config.stores}
            self._called = {store: actor for store, actor in made.items() if actor is not None}

    def _client(self, store: Store, epoch: int, code: str, transport: Transport) -> StoreClient:
        return StoreClient(store, self._run, epoch, code, transport, self._called.pop(store.id, None))

    async def _ask(self, config: RunConfig, question: Question) -> Answers:
        """Of all stores, before there is anything else; their processes stay for the run."""
        transports = {store.id: config.transport_of(store) for store in config.stores}
        ports = {s.id: self._client(s, FIRST, question.code, transports[s.id]) for s in config.stores}
        handle = None if question.weights is None else ray.put(question.weights)
        at_once = config.pacing.max_active_stores
        return await ask(ports, question, handle, join_s=config.pacing.join_s, at_once=at_once)

    # -- inside ---------------------------------------------------------------------------------------------

    async def _perform(self, action: Any) -> ev.Event | None:
        assert self._composition is not None
        if self._composition.machine.started_at is not None and self._phase == "waiting for stores":
            self._phase = "training"
        return await self._composition.shell.perform(action)

    def _keep(self, store: Store, *, trains: bool = True) -> None:
        made = self._composition
        if made is None:
            raise RunError("the run has not begun yet")
        if store.id in self._keeping and not self._keeping[store.id].done():
            raise RunError(f"store {store.id} is in this run already")
        port = self._client(store, made.epoch, made.code, made.config.transport_of(store))
        keeping = made.shell.keep(store.id, port, made.config.pacing.heartbeat_s, RETRY_S, trains=trains)
        self._keeping[store.id] = asyncio.create_task(keeping)

    def _end_stores(self, shell: Shell) -> None:
        """Their processes outlive a coordinator that dies, not one that is done."""
        for port in shell.ports.values():
            port.kill()

    async def _race(self, main: Coroutine[Any, Any, None], *others: asyncio.Task[None]) -> None:
        """Run `main`; an error of another task that should never end is the run's."""
        running = self._running = asyncio.create_task(main)
        while not running.done():
            watched = {running, *others, *(task for task in self._keeping.values() if not task.done())}
            done, _ = await asyncio.wait(watched, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {running}:
                if not task.cancelled() and (error := task.exception()) is not None:
                    running.cancel()
                    raise error
        await running

    async def _break_off(self, made: Composition, error: Exception) -> None:
        """The record says that the run failed, if it can still be written."""
        reason = error.message if isinstance(error, RaypipeError) else type(error).__name__
        body = {"reason": reason, "status": "failed", "versions": made.machine.version, "best_version": None}
        with contextlib.suppress(RunError):
            await asyncio.to_thread(made.shell.publisher.record, "run_finished", {**body, "at": time.time()})
            if made.notary is not None:
                await asyncio.to_thread(made.notary.finish)
            if self._follower is not None:
                await self._follower.drain()

    async def _close(self, made: Composition) -> dict[str, Any]:
        shell, machine = made.shell, made.machine
        for port in shell.ports.values():
            port.tell()
        stopped, failed = bool(self._stop_reason), machine.started_at is None
        best = machine.scores.best[0] if machine.scores.best else machine.version
        newest = machine.version
        words = Judged([], {}, {}, {})
        if not failed:
            self._phase = "testing the best version, and each store alone"
            best, words = await self._judged(made, best, test=made.config.evaluate.test and not stopped)
            newest = max(best, newest)
        reason = made.ending(self._stop_reason)
        final = {"best_version": best, "test": words.test, "table": words.table, "reason": reason}
        final |= {name: found for name in ("average", "exported") if (found := getattr(words, name))}
        await asyncio.to_thread(shell.publisher.record, "final", final)
        status = "failed" if failed else "killed" if stopped else "finished"
        finished = {"reason": reason, "status": status, "versions": newest, "best_version": best}
        await asyncio.to_thread(shell.publisher.record, "run_finished", {**finished, "at": time.time()})
        if made.notary is not None:
            await asyncio.to_thread(made.notary.finish)
        self._phase = "handing the record to MLflow"
        tracked = None if self._follower is None else await self._follower.drain()
        self._summary = {**final, **finished, "run": self._run, "folder": str(made.folder), "mlflow": tracked}
        self._phase = "over"
        return {**self._summary, "board": made.board.snapshot()}

    async def _judged(self, made: Composition, best: int, *, test: bool) -> tuple[int, Judged]:
        """The best version, which may be one more, and how it is judged, unless somebody wants the run to end."""
        if best not in made.kept():
            best = made.machine.version
        there = {s: p for s, p in made.shell.ports.items() if s in self._keeping}
        best = await self._unless_stopped(last_version(made, there, best, ray.put)) or best
        judging = judged(made, there, best, test=test, fetchable=ray.put)
        return best, await self._unless_stopped(judging) or Judged(unjudged(made.board), {}, {}, {})

    async def _unless_stopped(self, judging: Coroutine[Any, Any, T]) -> T | None:
        """What it comes to, or nothing when somebody wants the run to end now."""
        task, stopped = asyncio.create_task(judging), asyncio.create_task(self._stopped.wait())
        if not self._stop_reason:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None


# A killed coordinator is started again by Ray, and so is `work`, which finds the run's folder and goes on from there.
CoordinatorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Coordinator)
HEAD = {"node:__internal_head__": 0.001}


def on_head() -> dict[str, Any]:
    """Options that pin the coordinator to the head, whose disk keeps the run."""
    return {"resources": HEAD} if ray.cluster_resources().get("node:__internal_head__") else {}
