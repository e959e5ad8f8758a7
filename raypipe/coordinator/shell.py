"""The shell: performs one action, returns one event. It knows stores by a port, weights by a handle.

Arithmetic and the record share one lane, a thread that does one thing at a time in the order in which the machine
named it: so a sum never sees an update twice, and the journal reads in the order in which things became true. Folds
that wait together are folded together, block by block.

A version is a fact when its record (number, parent, hash, contributions) is on the disk and its weights would
outlive this process; then it is announced. That its weights outlive the machine too takes longer, and is had beside
the training of the next version; only then are its updates settled: until then they wait in the stores' outboxes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np

from raypipe.aggregation.variates import Learned, Sent, Variates
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.board import Board
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.notary import Checked, Notary
from raypipe.coordinator.stages import Next, Stages
from raypipe.coordinator.state import Memory
from raypipe.errors import ConfigError, RunError, StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.ledger.follow import KINDS
from raypipe.models.growth import Form, Growth
from raypipe.store import messages as msg
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.class_list import Change, ClassList
from raypipe.tasks.metrics import means
from raypipe.types import Layout

UNJUDGED = 64  # versions back to which a judgement may still come
MAX_RETRY_S = 300.0  # between two tries to have a store in
PATIENCE_S = 20.0  # before a store that does not come is spoken of
ROOM_S = 2.0  # between two looks whether a full disk has room
ROOM_BYTES = 4 << 20
Handle: TypeAlias = Any  # a version's weights as stores can fetch them


class Port(Protocol):
    """One store, wherever it is; see store/messages.py."""

    async def join(self) -> msg.Card: ...
    def waiting_for(self, waited_s: float) -> str: ...
    async def train(
        self,
        ticket: msg.Ticket,
        plan: bytes,
        weights: Handle,
        how: list[msg.Part] | None = None,
        correction: Handle = None,
    ) -> msg.Report: ...
    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray: ...
    async def evaluate(self, plan: bytes, weights: Handle, split: str) -> msg.Evaluation: ...
    def settle(self, verdict: msg.Verdict) -> None: ...
    def tell(self) -> None: ...
    def control(self, ticket: str, command: msg.Command) -> None: ...
    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]: ...
    def kill(self) -> None: ...
    async def release(self) -> None: ...


class Model(Protocol):
    """The global model; see aggregation/global_model.py."""

    variates: Variates | None  # of the newest version; None in a run without

    @property
    def layout(self) -> Layout: ...
    @property
    def vector(self) -> np.ndarray: ...
    def fold(
        self,
        portions: Sequence[tuple[np.ndarray, float, int | None]],
        forms: Sequence[Form] | None,
        learned: Sequence[Learned | None],
    ) -> dict[int, str]: ...
    def grow(self, growth: Growth) -> None: ...
    @property
    def state(self) -> Mapping[str, np.ndarray]: ...
    @property
    def average(self) -> np.ndarray | None: ...
    def step(self, full_weight: float, statistic_mix: float) -> float: ...


class Tables(Protocol):
    """The stores' control variates on the disk; see tracking/variates.py."""

    def write(self, version: int, variates: Variates) -> None: ...
    def read(self, version: int) -> Variates | None: ...
    def prune(self, keep: frozenset[int]) -> None: ...


class Book(Protocol):
    """The durable record; see tracking/."""

    @property
    def variates(self) -> Tables: ...
    def record(self, kind: str, body: Mapping[str, Any]) -> None: ...
    def hash(self, vector: np.ndarray) -> str: ...
    def write(
        self, version: int, vector: np.ndarray, layout: Layout, state: Mapping[str, np.ndarray], task: msg.Part
    ) -> None: ...
    def force(self, version: int) -> None: ...
    def keep(self, version: int) -> None: ...
    def read(self, version: int, layout: Layout) -> np.ndarray: ...
    def folded_into(self, ticket: str) -> int | None: ...
    def prune(self, in_use: frozenset[int], best: int | None) -> None: ...
    def room(self) -> int: ...


class Shell:
    """Effects of one run. `put` makes a version fetchable and is called once a version."""

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        epoch: int,
        stages: Stages,
        next_stage: Next,
        how: list[msg.Part],
        max_epochs: float | None,
        max_steps: int | None,
        model: Model,
        book: Book,
        diary: Diary,
        memory: Callable[[], Memory],
        board: Board,
        put: Callable[[np.ndarray], Handle],
        clock: Callable[[], float],
        wall: Callable[[], float],
        notary: Notary | None = None,
        asks_all: bool = True,
    ) -> None:
        """`asks_all`: stores are had in the run from the start; else when the machine asks for them.

        `next_stage`: what follows one at a version whose class list changes.
        """
        self.inbox: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.ports: dict[str, Port] = {}
        self.model, self.book, self.board, self.put = model, book, board, put
        self.diary, self.memory = diary, memory
        self.clock, self.wall, self.notary = clock, wall, notary
        self._asks_all = asks_all
        self._asked: dict[str, asyncio.Event] = {}
        self._visits: dict[str, asyncio.Task[None]] = {}
        self.stages, self.next_stage = stages, next_stage
        self._run, self._seed, self._epoch, self._how = run, seed, epoch, how
        self._max_epochs, self._max_steps = max_epochs, max_steps
        self._handles: dict[int, Handle] = {}
        self._holds: Counter[int] = Counter()  # tickets in flight on each version
        self._sent: set[tuple[int, str]] = set()
        self._updates: dict[str, np.ndarray] = {}
        self._tables: dict[int, Variates] = {}  # as _handles, in a run with control variates
        self._learned: dict[str, Learned] = {}  # by ticket
        self._collecting: set[str] = set()
        self._owed: dict[int, do.Record] = {}  # decided, perhaps not written yet
        self._unjudged: set[int] = set()  # versions whose judgement may still come: their weights are kept
        self._lane: asyncio.Queue[tuple[do.Action, asyncio.Future[Any]]] = asyncio.Queue()
        self._arithmetic = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._bytes_down = self._bytes_total = 0
        self._still: dict[int, Handle] = {}  # of frozen weights, made at the first version of a stage
        self._has_still: set[tuple[str, int]] = set()  # stores that were given them
        self._started = self._published = clock()

    async def perform(self, action: do.Action) -> ev.Event | None:
        """The effect of an action; None where nothing is answered. Raises StoreSuperseded: the run is another's."""
        match action:
            case do.Train():
                return await self._train(action)
            case do.Collect():
                return await self._collect(action)
            case do.Fold() | do.Publish() | do.Record():
                return await self._in_lane(action)
            case do.Keep():
                return await self._keep(action)
            case do.Evaluate():
                return await self._evaluate(action)
            case do.Settle():
                self._updates.pop(action.ticket, None)
                self._learned.pop(action.ticket, None)
                self._collecting.discard(action.ticket)
                if self.notary is not None:
                    self.notary.forget(action.ticket)
                version = action.version if action.version is not None else self.book.folded_into(action.ticket)
                if action.store in self.ports:  # else it hears of it when it is back
                    self.ports[action.store].settle(msg.Verdict(action.ticket, version, action.reason))
            case do.Cancel():
                self.ports[action.store].control(action.ticket, "stop")
            case do.Restart():
                self.ports[action.store].kill()
            case do.Ask():
                self._asked.setdefault(action.store, asyncio.Event()).set()
            case do.Release():
                self._asked[action.store].clear()
                if (visit := self._visits.get(action.store)) is not None:
                    visit.cancel()
            case do.Finish():
                pass
        return None

    # -- stores ---------------------------------------------------------------------------------------------

    async def keep(self, store: str, port: Port, heartbeat_s: float, retry_s: float, *, trains: bool = True) -> None:
        """Have a store in the run for as long as the run lasts, and as it is asked for."""
        self.ports[store], asked = port, self._asked.setdefault(store, asyncio.Event())
        if self._asks_all or not trains:
            asked.set()
        while True:
            await asked.wait()
            visit = self._visits[store] = asyncio.ensure_future(
                self._visited(store, port, heartbeat_s, retry_s, trains)
            )
            try:
                await asyncio.wait({visit})
            finally:
                visit.cancel()
            if not visit.cancelled():
                visit.result()
            await port.release()

    async def _visited(self, store: str, port: Port, heartbeat_s: float, retry_s: float, trains: bool) -> None:
        """Join, watch, and take it in again when it returns; until cancelled."""
        said, tries = "", 0
        while True:
            try:
                card = await self._joined(store, port)
            except StoreSuperseded:
                raise
            except StoreError as error:
                kind = "store_set_aside" if isinstance(error, StoreRefused) else "store_missing"
                if said != error.message:
                    await self._in_lane(do.Record(kind, {"store": store, "reason": error.message}))
                said = error.message
                port.kill()
                await asyncio.sleep(min(MAX_RETRY_S, retry_s * 2**tries))
                tries = min(tries + 1, 16)
                continue
            said, tries = "", 0
            self._has_still = {(s, stage) for s, stage in self._has_still if s != store}  # it may be another process
            counts = card.data.get(self._data, {})
            body = {"store": store, "counts": counts, "cpus": card.cpus, "gpu": card.gpu, "node": card.node}
            body |= {"key": card.key, "limits": card.limits}
            body |= {"data_bytes": card.data_bytes.get(self._data, 0), "hash": card.data_hashes.get(self._data)}
            if card.code:
                body["vault_code"] = card.code
            await self._in_lane(do.Record("store_joined", body))
            if trains:
                rate = card.limits.get("max_upload_bytes_s")
                self.inbox.put_nowait(ev.StoreJoined(store, counts.get("train", 0), self.clock(), card.outbox, rate))
            silent, why = await port.watch(heartbeat_s, partial(self._pauses, store, trains))
            event = ev.StoreHung if silent else ev.StoreLeft
            if trains:
                self.inbox.put_nowait(event(store, why, self.clock()))
            else:
                port.kill()
            if silent:
                await asyncio.sleep(retry_s)  # the machine has its process ended

    def _pauses(self, store: str, trains: bool, reason: str) -> None:
        """Or goes on, where there is no reason."""
        if trains:
            at = self.clock()
            self.inbox.put_nowait(ev.StorePaused(store, reason, at) if reason else ev.StoreWentOn(store, at))

    async def _joined(self, store: str, port: Port) -> msg.Card:
        """The store's card; who waits long is told what for."""
        joining = asyncio.ensure_future(port.join())
        try:
            await asyncio.wait({joining}, timeout=PATIENCE_S)
            if not joining.done():
                reason = port.waiting_for(PATIENCE_S)
                await self._in_lane(do.Record("store_missing", {"store": store, "reason": reason}))
            card = await joining
            if self.notary is not None:
                await asyncio.to_thread(self.notary.admit, store, card)
            return card
        finally:
            joining.cancel()

    @property
    def _data(self) -> str:
        return self.stages.at(0).plan.data

    # -- tickets --------------------------------------------------------------------------------------------

    async def _train(self, action: do.Train) -> ev.Event:
        self.board.training(action.store, action.version)
        ticket = msg.Ticket(
            id=action.ticket,
            store=action.store,
            epoch=self._epoch,
            version=action.version,
            seed=ticket_seed(self._seed, action.store, action.version, action.repeat),
            progress=action.progress,
            budget_s=action.budget_s,
            max_steps=min((n for n in (action.max_steps, self._max_steps) if n is not None), default=None),
            max_epochs=self._max_epochs,
            evaluate="validation" if action.evaluate else None,
        )
        self._count_down(action.version, action.store)
        self._holds[action.version] += 1
        if action.evaluate:
            self._unjudged.add(action.version)
        try:
            if self.notary is not None:
                ticket = replace(ticket, base=await self.notary.prove(action.store, action.version))
            report = await self._taught(action, ticket)
        except StoreSuperseded:
            raise
        except StoreError as error:
            return self._without_update(action, error)
        finally:
            self._release(action.version)
            self.board.ready(action.store)
        if self.notary is not None:
            self.notary.heard(action.store, replace(report, ticket=action.ticket, version=action.version))
        if report.evaluation is not None:
            self.inbox.put_nowait(self._judged(action.version, action.store, report.evaluation))
        return ev.Trained(
            action.ticket,
            report.steps,
            report.examples,
            report.num_train,
            report.seconds,
            report.loss,
            self.clock(),
            report.after,
            report.data_hash,
            report.update_bytes,
        )

    async def _taught(self, action: do.Train, ticket: msg.Ticket) -> msg.Report:
        """Raises StoreError."""
        handle = await self._handle(action.version)
        sent = await self._sent_with(action)
        correction = None if sent is None else await asyncio.to_thread(sent.correction)
        more = []
        if correction is not None:
            more = [self.put(correction)]
            self._bytes_down += correction.nbytes
            self._bytes_total += correction.nbytes
        plan = self.stages.at(action.version).raw
        report = await self.ports[action.store].train(ticket, plan, handle, self._how, *more)
        if sent is not None:
            self._learned[action.ticket] = Learned(sent, report.steps, action.progress[0], 1.0, action.version)
        return report

    def _without_update(self, action: do.Train | do.Collect, error: StoreError) -> ev.Event:
        reason = _bare(error, action.store)
        self._learned.pop(action.ticket, None)
        if isinstance(error, StoreClosed):
            return ev.Deferred(action.ticket, reason, error.wait_s, self.clock())
        return ev.TrainingFailed(action.ticket, reason, self.clock(), isinstance(error, StoreRefused))

    async def _collect(self, action: do.Collect) -> ev.Event:
        self._collecting.add(action.ticket)
        try:
            update = await self.ports[action.store].collect(action.ticket, self._how)
        except StoreError as error:
            self._collecting.discard(action.ticket)
            return self._without_update(action, error)
        signed = Checked() if self.notary is None else await self.notary.checked(action.store, action.ticket, update)
        if signed.reason:
            self._collecting.discard(action.ticket)
            return ev.UpdateRefused(action.ticket, signed.reason, self.clock(), signed.digest)
        if action.ticket not in self._collecting:  # settled while it was on its way
            return ev.TrainingFailed(action.ticket, "it came too late", self.clock())
        self._collecting.discard(action.ticket)
        self._updates[action.ticket] = update
        self._bytes_total += update.nbytes
        return ev.UpdateArrived(action.ticket, update.nbytes, self.clock(), signed.digest, signed.signature)

    async def _evaluate(self, action: do.Evaluate) -> ev.Event:
        self._count_down(action.version, action.store)
        self._holds[action.version] += 1
        try:
            port, handle = self.ports[action.store], await self._handle(action.version)
            judged = await port.evaluate(self.stages.at(action.version).raw, handle, "validation")
            return self._judged(action.version, action.store, judged)
        except StoreSuperseded:
            raise
        except StoreError:
            return ev.EvaluationFailed(action.version, action.store, self.clock())
        finally:
            self._release(action.version)

    def _judged(self, version: int, store: str, evaluation: msg.Evaluation) -> ev.Event:
        values = means(evaluation.sums, evaluation.num_examples)
        if not values or not all(map(math.isfinite, values.values())):
            return ev.EvaluationFailed(version, store, self.clock())
        return ev.Evaluated(version, store, values, evaluation.num_examples, self.clock())

    async def _handle(self, version: int) -> Handle:
        """An older one only after the coordinator was away: from the disk. Raises StoreError where it is gone."""
        if version not in self._handles:
            try:
                vector = await asyncio.to_thread(self.book.read, version, self.stages.at(version).layout)
            except (ConfigError, RunError) as error:
                raise StoreError(error.message) from None
            self._handles[version] = self._fetchable(version, vector)
        return self._handles[version]

    async def _sent_with(self, action: do.Train) -> Sent | None:
        """The store's control variates as they were in the ticket's base version. Raises StoreError: they are gone."""
        if self.model.variates is None:
            return None
        if action.version not in self._tables:
            table = await asyncio.to_thread(self.book.variates.read, action.version)
            if table is None:
                raise StoreError(f"the control variates of version {action.version} are not kept")
            self._tables[action.version] = table
        return self._tables[action.version].sent(action.store)

    def _fetchable(self, version: int, vector: np.ndarray) -> Handle:
        """A version for the stores; frozen weights are those of its stage's first version, fetchable once for all."""
        stage = self.stages.at(version)
        layout = stage.layout
        if not layout.splits:
            return self.put(vector)
        if stage.since not in self._still:
            self._still[stage.since] = self.put(vector[layout.update_size :].copy())
        return msg.Parts(self.put(vector[: layout.update_size]), self._still[stage.since])

    def _count_down(self, version: int, store: str) -> None:
        if (version, store) in self._sent:
            return
        self._sent.add((version, store))
        stage = self.stages.at(version)
        layout, given = stage.layout, (store, stage.since)
        num_bytes = 4 * (layout.update_size if layout.splits and given in self._has_still else layout.size)
        self._has_still.add(given)
        self._bytes_down += num_bytes
        self._bytes_total += num_bytes

    def _release(self, version: int) -> None:
        """The weights leave the object store when the last ticket on them ended and a newer version is there."""
        self._holds[version] -= 1
        newest = max(self._handles)
        for old in [v for v in list(self._handles) if v < newest and self._holds[v] <= 0]:
            del self._handles[old]
            self._tables.pop(old, None)
            self._holds.pop(old, None)
            self._sent = {(v, s) for v, s in self._sent if v != old}

    # -- the lane -------------------------------------------------------------------------------------------

    async def _in_lane(self, action: do.Action) -> ev.Event | None:
        answer: asyncio.Future[ev.Event | None] = asyncio.get_running_loop().create_future()
        self._lane.put_nowait((action, answer))
        return await answer

    async def run_lane(self) -> None:
        """Work the lane off until cancelled; consecutive folds are taken together."""
        loop = asyncio.get_running_loop()
        waiting: deque[tuple[do.Action, asyncio.Future[Any]]] = deque()
        while True:
            waiting.append(await self._lane.get())
            while not self._lane.empty():
                waiting.append(self._lane.get_nowait())
            while waiting:
                jobs = [waiting.popleft()]
                while isinstance(jobs[0][0], do.Fold) and waiting and isinstance(waiting[0][0], do.Fold):
                    jobs.append(waiting.popleft())
                try:
                    answers = await loop.run_in_executor(self._arithmetic, self._work, [action for action, _ in jobs])
                except BaseException as error:
                    for _, future in jobs:
                        if not future.done():
                            future.set_exception(error)
                    raise
                for (_, future), answer in zip(jobs, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

    def _work(self, actions: Sequence[do.Action]) -> list[ev.Event | None]:
        """In the lane's thread."""
        first = actions[0]
        if isinstance(first, do.Fold):
            return self._fold([a for a in actions if isinstance(a, do.Fold)])
        if isinstance(first, do.Publish):
            return [self._publish(first)]
        assert isinstance(first, do.Record)
        self.record(first.kind, first.body | ({"told": first.number} if first.number else {}))
        self._owed.pop(first.number, None)
        return [None]

    def _fold(self, folds: Sequence[do.Fold]) -> list[ev.Event | None]:
        asked = [portion for fold in folds for portion in fold.portions]
        portions = [p for p in asked if p.ticket in self._updates]  # those settled since, at the end, are gone
        arrays = [self._updates.pop(p.ticket) for p in portions]
        told = [(self._learned.pop(p.ticket, None), p.worth) for p in portions]
        learned = [None if what is None else replace(what, worth=worth) for what, worth in told]
        ready = [(a, p.weight, p.steps) for a, p in zip(arrays, portions, strict=True)]
        refused = self.model.fold(ready, [self.stages.at(p.base).form for p in portions], learned)
        reasons = {portions[index].ticket: reason for index, reason in refused.items()}
        at = self.clock()
        answers: list[ev.Event | None] = []
        for fold in folds:
            good = tuple(p.ticket for p in fold.portions if p.ticket not in reasons)
            bad = tuple((p.ticket, reasons[p.ticket]) for p in fold.portions if p.ticket in reasons)
            answers.append(ev.Folded(good, bad, at))
        return answers

    def _publish(self, action: do.Publish) -> ev.Event:
        """Step, then hash and hand out side by side; the record is the last word."""
        norm = self.model.step(action.full_weight, action.statistic_mix)
        changed = {} if action.change is None else {"classes": self._change_classes(action.version, action.change)}
        vector, stage = self.model.vector, self.stages.at(action.version)
        fetchable = self._beside.submit(self._fetchable, action.version, vector)
        weights = (action.version, vector, stage.layout, self.model.state, stage.plan.task)
        written = self._disk.submit(self._patiently, self.book.write, *weights)
        if (variates := self.model.variates) is not None:
            written = self._disk.submit(self._write_both, written, action.version, variates)
            self._tables[action.version] = variates
        digest = self.book.hash(vector)
        now = self.clock()  # durations by a clock that never jumps
        body = {
            "version": action.version,
            "parent": action.version - 1,
            "hash": digest,
            "at": self.wall(),
            "elapsed_s": now - self._started,
            "seconds": now - self._published,
            "contributions": [asdict(c) for c in action.contributions],
            "bytes_up": sum(c.bytes_up for c in action.contributions),
            "bytes_down": self._bytes_down,
            "bytes_total": self._bytes_total,
            "step_norm": norm,
            "full_weight": action.full_weight,
            "statistic_mix": action.statistic_mix,
            **changed,
        }
        self._bytes_down, self._published = 0, now
        written.result()
        self._patiently(self.diary.sync)
        self.record("version_published", body)
        self._unjudged = {v for v in self._unjudged if v > action.version - UNJUDGED}
        self._handles[action.version] = fetchable.result()
        return ev.Published(action.version, self.clock())

    def _write_both(self, weights: Future[None], version: int, variates: Variates) -> None:
        """In the disk's thread, after the weights."""
        weights.result()
        self._patiently(self.book.variates.write, version, variates)

    def _change_classes(self, version: int, change: Change) -> dict[str, Any]:
        """The newest version in its next stage; what the record says of it."""
        stage, classes = self.stages.at(version - 1), ClassList.of(self.stages.at(version - 1).plan.task)
        then = self.next_stage(stage, version, change)
        self.model.grow(Growth(stage.form, then.form, classes.live, classes.begins(change)))
        self.stages.add(then)
        return {"change": asdict(change), "task": then.plan.task, "layout": then.layout.to_json()}

    async def _keep(self, action: do.Keep) -> ev.Event:
        in_use = frozenset(self._unjudged | {v for v, held in self._holds.items() if held > 0})
        best = self.board.best[0] if self.board.best else None

        bases = frozenset(ticket.base for ticket in self.memory().tickets.values())

        def keep() -> None:
            self._patiently(self.book.keep, action.version)
            self.book.prune(in_use, best)
            if self.model.variates is not None:
                self.book.variates.prune(bases)

        await asyncio.wrap_future(self._disk.submit(keep))
        return ev.Kept(action.version, self.clock())

    def record(self, kind: str, body: Mapping[str, Any]) -> None:
        """Write a fact down, then let it be seen. In the lane's thread, or before the lane runs."""
        self._patiently(self.book.record, kind, body)
        self.board.add(kind, body)
        if self.notary is not None and kind in KINDS:
            self.notary.wake()
        if kind == "evaluated":
            self._unjudged.discard(body["version"])

    def moved_before(self, num_bytes: int) -> None:
        """So much has moved before the first version."""
        self._bytes_total += num_bytes

    def begin(self) -> None:
        """Version 0: durable and fetchable."""
        self._started = self._published = self.clock()
        facts = {"version": 0, "parent": None, "hash": self.book.hash(self.model.vector), "at": self.wall()}
        nothing = {"elapsed_s": 0.0, "seconds": 0.0, "contributions": [], "bytes_up": 0, "bytes_down": 0}
        step = {"step_norm": 0.0, "full_weight": 0.0, "statistic_mix": 0.0}
        self.book.write(0, self.model.vector, self.model.layout, self.model.state, self.stages.at(0).plan.task)
        if self.model.variates is not None:
            self.book.variates.write(0, self.model.variates)
            self._tables[0] = self.model.variates
        self.book.force(0)  # there is no version before it to go back to
        self.record("version_published", {**facts, **nothing, "bytes_total": self._bytes_total, **step})
        self.book.keep(0)
        self._handles[0] = self._fetchable(0, self.model.vector)

    def resume(self, last: Mapping[str, Any]) -> None:
        """The newest version, by its record, fetchable again."""
        self._started, self._published = self.clock() - last["elapsed_s"], self.clock()
        self._bytes_total = last["bytes_total"]
        self._handles[last["version"]] = self._fetchable(last["version"], self.model.vector)
        if self.model.variates is not None:
            self._tables[last["version"]] = self.model.variates

    def owe(self, actions: Sequence[do.Action]) -> None:
        """Records that were decided: until they are written, a checkpoint holds them."""
        self._owed |= {a.number: a for a in actions if isinstance(a, do.Record)}

    async def note(self, event: ev.Event, actions: list[do.Action]) -> None:
        """Into the diary, before anything is done; where there is no room, when there is."""
        noted = False
        while True:
            try:
                if not noted:
                    self.diary.note(event, actions)
                    self.owe(actions)
                noted = True
                if self.diary.long and any(isinstance(action, do.Publish) for action in actions):
                    self.diary.checkpoint(self.memory(), list(self._owed.values()))
                return
            except RunError as error:
                self._wait_for_room(error)
                await asyncio.sleep(ROOM_S)

    def _patiently(self, write: Callable[..., None], *arguments: Any) -> None:
        """In the lane's or the disk's thread: a full disk is waited for, everything else is an error."""
        while True:
            try:
                return write(*arguments)
            except RunError as error:
                self._wait_for_room(error)
                time.sleep(ROOM_S)

    def _wait_for_room(self, error: RunError) -> None:
        """Say it once. Raises the error when there is room: it is another one."""
        if self.book.room() > self.model.vector.nbytes + ROOM_BYTES:
            raise error
        if self.board.lines[-1:] != [said := f"{error.message}: it goes on when there is room"]:
            self.board.lines.append(said)


def _bare(error: StoreError | ConfigError, store: str) -> str:
    return error.message.removeprefix(f"store {store}: ")
