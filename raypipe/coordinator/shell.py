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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from raypipe.aggregation.variates import Learned, Variates
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.attendance import Attendance
from raypipe.coordinator.bases import Bases
from raypipe.coordinator.board import Board
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.notary import Checked, Notary
from raypipe.coordinator.ports import Book, Handle, Model
from raypipe.coordinator.recalibration import Recalibrated
from raypipe.coordinator.stages import Next, Stages
from raypipe.coordinator.state import Memory
from raypipe.errors import ConfigError, RunError, StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.ledger.follow import KINDS
from raypipe.models.growth import Growth
from raypipe.store import messages as msg
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.class_list import Change, ClassList
from raypipe.tasks.metrics import means

UNJUDGED = 64  # versions back to which a judgement may still come
ROOM_S = 2.0  # between two looks whether a full disk has room
ROOM_BYTES = 4 << 20


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
        self.model, self.book, self.board, self.put = model, book, board, put
        self.diary, self.memory = diary, memory
        self.clock, self.wall, self.notary = clock, wall, notary
        self.stages, self.next_stage = stages, next_stage
        self.bases = Bases(stages, book, put, varies=model.variates is not None)
        self.attendance = Attendance(
            stages.at(0).plan.data,
            self.bases,
            record=self._in_lane,
            tell=self.inbox.put_nowait,
            clock=clock,
            notary=notary,
            asks_all=asks_all,
        )
        self.ports, self.keep = self.attendance.ports, self.attendance.keep
        self._run, self._seed, self._epoch, self._how = run, seed, epoch, how
        self._max_epochs, self._max_steps = max_epochs, max_steps
        self._updates: dict[str, np.ndarray] = {}
        self._learned: dict[str, Learned] = {}  # by ticket
        self._collecting: set[str] = set()
        self._owed: dict[int, do.Record] = {}  # decided, perhaps not written yet
        self._unjudged: set[int] = set()  # versions whose judgement may still come: their weights are kept
        self._lane: asyncio.Queue[tuple[do.Action, asyncio.Future[Any]]] = asyncio.Queue()
        self._arithmetic = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
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
                self.attendance.ask(action.store)
            case do.Release():
                self.attendance.release(action.store)
            case do.Finish():
                pass
        return None

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
        self.bases.count_down(action.version, action.store)
        self.bases.hold(action.version)
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
            self.bases.release(action.version)
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
            report.skipped,
        )

    async def _taught(self, action: do.Train, ticket: msg.Ticket) -> msg.Report:
        """Raises StoreError."""
        handle = await self.bases.handle(action.version)
        sent = await self.bases.sent_with(action.version, action.store)
        correction = None if sent is None else await asyncio.to_thread(sent.correction)
        more = []
        if correction is not None:
            more = [self.put(correction)]
            self.bases.moved(correction.nbytes)
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
        self.bases.bytes_total += update.nbytes
        return ev.UpdateArrived(action.ticket, update.nbytes, self.clock(), signed.digest, signed.signature)

    async def _evaluate(self, action: do.Evaluate) -> ev.Event:
        self.bases.count_down(action.version, action.store)
        self.bases.hold(action.version)
        try:
            port, handle = self.ports[action.store], await self.bases.handle(action.version)
            judged = await port.evaluate(self.stages.at(action.version).raw, handle, "validation")
            return self._judged(action.version, action.store, judged)
        except StoreSuperseded:
            raise
        except StoreError:
            return ev.EvaluationFailed(action.version, action.store, self.clock())
        finally:
            self.bases.release(action.version)

    def _judged(self, version: int, store: str, evaluation: msg.Evaluation) -> ev.Event:
        values = means(evaluation.sums, evaluation.num_examples)
        if not values or not all(map(math.isfinite, values.values())):
            return ev.EvaluationFailed(version, store, self.clock())
        return ev.Evaluated(version, store, values, evaluation.num_examples, self.clock())

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
        fetchable = self._beside.submit(self.bases.fetchable, action.version, vector)
        weights = (action.version, vector, stage.layout, self.model.state, stage.plan.task)
        written = self._disk.submit(self._patiently, self.book.write, *weights)
        if (variates := self.model.variates) is not None:
            written = self._disk.submit(self._write_both, written, action.version, variates)
            self.bases.tables[action.version] = variates
        body = {
            **self._facts(action.version, vector, sum(c.bytes_up for c in action.contributions)),
            "contributions": [asdict(c) for c in action.contributions],
            "step_norm": norm,
            "full_weight": action.full_weight,
            "statistic_mix": action.statistic_mix,
            **changed,
        }
        written.result()
        self._patiently(self.diary.sync)
        self.record("version_published", body)
        self._unjudged = {v for v in self._unjudged if v > action.version - UNJUDGED}
        self.bases.handles[action.version] = fetchable.result()
        return ev.Published(action.version, self.clock())

    def _facts(self, version: int, vector: np.ndarray, bytes_up: int) -> dict[str, Any]:
        """What is said of every version; the next one's times and bytes are counted from here."""
        now, down = self.clock(), self.bases.bytes_down  # durations by a clock that never jumps
        times = {"at": self.wall(), "elapsed_s": now - self._started, "seconds": now - self._published}
        moved = {"bytes_up": bytes_up, "bytes_down": down, "bytes_total": self.bases.bytes_total}
        self.bases.bytes_down, self._published = 0, now
        return {"version": version, "parent": version - 1, "hash": self.book.hash(vector), **times, **moved}

    def add(self, version: int, made: Recalibrated, num_images: int) -> None:
        """A version that no update made, when all others are. In a thread, when nothing is in the lane any more."""
        stage = self.stages.at(version)
        about = {"of": made.of, "images": num_images, "stores": made.stores}
        self._patiently(self.book.write, version, made.vector, stage.layout, {}, stage.plan.task)
        body = self._facts(version, made.vector, made.bytes_up)
        nothing = {"contributions": [], "step_norm": 0.0, "full_weight": 0.0, "statistic_mix": 0.0}
        self.record("version_published", {**body, **nothing, "recalibrated": about})
        self._patiently(self.book.keep, version)
        self.record("evaluated", made.evaluated(version))

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
        in_use = frozenset(self._unjudged | self.bases.in_use())
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
        self.bases.bytes_total += num_bytes

    def begin(self) -> None:
        """Version 0: durable and fetchable."""
        self._started = self._published = self.clock()
        facts = {"version": 0, "parent": None, "hash": self.book.hash(self.model.vector), "at": self.wall()}
        nothing = {"elapsed_s": 0.0, "seconds": 0.0, "contributions": [], "bytes_up": 0, "bytes_down": 0}
        step = {"step_norm": 0.0, "full_weight": 0.0, "statistic_mix": 0.0}
        self.book.write(0, self.model.vector, self.model.layout, self.model.state, self.stages.at(0).plan.task)
        if self.model.variates is not None:
            self.book.variates.write(0, self.model.variates)
            self.bases.tables[0] = self.model.variates
        self.book.force(0)  # there is no version before it to go back to
        self.record("version_published", {**facts, **nothing, "bytes_total": self.bases.bytes_total, **step})
        self.book.keep(0)
        self.bases.handles[0] = self.bases.fetchable(0, self.model.vector)

    def resume(self, last: Mapping[str, Any]) -> None:
        """The newest version, by its record, fetchable again."""
        self._started, self._published = self.clock() - last["elapsed_s"], self.clock()
        self.bases.bytes_total = last["bytes_total"]
        self.bases.handles[last["version"]] = self.bases.fetchable(last["version"], self.model.vector)
        if self.model.variates is not None:
            self.bases.tables[last["version"]] = self.model.variates

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
