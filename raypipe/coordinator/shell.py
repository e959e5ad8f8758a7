"""The shell: performs one action, returns one event. It knows stores by a port, weights by a handle.

What is done at the stores is here; what comes of it, versions and their record, is made in the lane: see publisher.py.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from raypipe.aggregation.variates import Learned
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.attendance import Attendance
from raypipe.coordinator.lane import Lane
from raypipe.coordinator.notary import Checked
from raypipe.coordinator.ports import Handle
from raypipe.coordinator.publisher import Publisher
from raypipe.coordinator.state import Memory
from raypipe.errors import ConfigError, StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.store import messages as msg
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.metrics import means


class Shell:
    """Effects of one run. `put` makes a version fetchable and is called once a version."""

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        epoch: int,
        how: list[msg.Part],
        max_epochs: float | None,
        max_steps: int | None,
        publisher: Publisher,
        memory: Callable[[], Memory],
        put: Callable[[np.ndarray], Handle],
        asks_all: bool = True,
    ) -> None:
        """`asks_all`: stores are had in the run from the start; else when the machine asks for them."""
        self.inbox: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.publisher, self.memory, self.put, self.notary = publisher, memory, put, publisher.notary
        self.stages, self.bases, self.updates = publisher.stages, publisher.bases, publisher.updates
        self.board, self.diary, self.clock = publisher.board, publisher.diary, publisher.clock
        self._lane = Lane(self._work)
        self.run_lane = self._lane.run
        self.attendance = Attendance(
            self.stages.at(0).plan.data,
            self.bases,
            record=self._lane.perform,
            tell=self.inbox.put_nowait,
            clock=self.clock,
            notary=self.notary,
            asks_all=asks_all,
        )
        self.ports, self.keep = self.attendance.ports, self.attendance.keep
        self._run, self._seed, self._epoch, self._how = run, seed, epoch, how
        self._max_epochs, self._max_steps = max_epochs, max_steps
        self._owed: dict[int, do.Record] = {}  # decided, perhaps not written yet

    async def perform(self, action: do.Action) -> ev.Event | None:
        """The effect of an action; None where nothing is answered. Raises StoreSuperseded: the run is another's."""
        match action:
            case do.Train():
                return await self._train(action)
            case do.Collect():
                return await self._collect(action)
            case do.Fold() | do.Publish() | do.Record():
                return await self._lane.perform(action)
            case do.Keep():
                bases = frozenset(ticket.base for ticket in self.memory().tickets.values())
                return await self.publisher.keep(action.version, bases)
            case do.Evaluate():
                return await self._evaluate(action)
            case do.Settle():
                self._settle(action)
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

    def _settle(self, action: do.Settle) -> None:
        self.updates.settle(action.ticket)
        if self.notary is not None:
            self.notary.forget(action.ticket)
        version = action.version if action.version is not None else self.publisher.book.folded_into(action.ticket)
        if action.store in self.ports:  # else it hears of it when it is back
            self.ports[action.store].settle(msg.Verdict(action.ticket, version, action.reason))

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
            self.publisher.unjudged.add(action.version)
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
            self.updates.learned[action.ticket] = Learned(sent, report.steps, action.progress[0], 1.0, action.version)
        return report

    def _without_update(self, action: do.Train | do.Collect, error: StoreError) -> ev.Event:
        reason = _bare(error, action.store)
        self.updates.learned.pop(action.ticket, None)
        if isinstance(error, StoreClosed):
            return ev.Deferred(action.ticket, reason, error.wait_s, self.clock())
        return ev.TrainingFailed(action.ticket, reason, self.clock(), isinstance(error, StoreRefused))

    async def _collect(self, action: do.Collect) -> ev.Event:
        self.updates.ask(action.ticket)
        try:
            update = await self.ports[action.store].collect(action.ticket, self._how)
        except StoreError as error:
            self.updates.give_up(action.ticket)
            return self._without_update(action, error)
        signed = Checked() if self.notary is None else await self.notary.checked(action.store, action.ticket, update)
        if signed.reason:
            self.updates.give_up(action.ticket)
            return ev.UpdateRefused(action.ticket, signed.reason, self.clock(), signed.digest)
        if not self.updates.arrive(action.ticket, update):
            return ev.TrainingFailed(action.ticket, "it came too late", self.clock())
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

    def _work(self, actions: Sequence[do.Action]) -> list[ev.Event | None]:
        """In the lane's thread."""
        first = actions[0]
        if isinstance(first, do.Fold):
            return self.publisher.fold([a for a in actions if isinstance(a, do.Fold)])
        if isinstance(first, do.Publish):
            return [self.publisher.publish(first)]
        assert isinstance(first, do.Record)
        self.publisher.record(first.kind, first.body | ({"told": first.number} if first.number else {}))
        self._owed.pop(first.number, None)
        return [None]

    def owe(self, actions: Sequence[do.Action]) -> None:
        """Records that were decided: until they are written, a checkpoint holds them."""
        self._owed |= {a.number: a for a in actions if isinstance(a, do.Record)}

    async def note(self, event: ev.Event, actions: list[do.Action]) -> None:
        """Into the diary, before anything is done; where there is no room, when there is."""
        await self.publisher.room.soon(self.diary.note, event, actions)
        self.owe(actions)
        if self.diary.long and any(isinstance(action, do.Publish) for action in actions):
            await self.publisher.room.soon(self._checkpoint)

    def _checkpoint(self) -> None:
        self.diary.checkpoint(self.memory(), list(self._owed.values()))


def _bare(error: StoreError | ConfigError, store: str) -> str:
    return error.message.removeprefix(f"store {store}: ")
