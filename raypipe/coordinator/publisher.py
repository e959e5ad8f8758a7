"""How a version comes about: updates are folded, the model steps, the record says so, the weights are kept.

A version is a fact when its record (number, parent, hash, contributions) is on the disk and its weights would
outlive this process; then it is announced. That its weights outlive the machine too takes longer, and is had beside
the training of the next version; only then are its updates settled: until then they wait in the stores' outboxes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from raypipe.aggregation.variates import Variates
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.bases import Bases
from raypipe.coordinator.board import Board
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.ports import Book, Model
from raypipe.coordinator.recalibration import Recalibrated
from raypipe.coordinator.room import Room
from raypipe.coordinator.stages import Next, Stages
from raypipe.coordinator.updates import Updates
from raypipe.ledger.follow import KINDS
from raypipe.models.growth import Growth
from raypipe.tasks.class_list import Change, ClassList

UNJUDGED = 64  # versions back to which a judgement may still come


class Publisher:
    """The model and the record of one run. Where nothing is awaited: in the lane's thread, or before it is there."""

    def __init__(
        self,
        *,
        stages: Stages,
        next_stage: Next,
        model: Model,
        book: Book,
        diary: Diary,
        board: Board,
        bases: Bases,
        clock: Callable[[], float],
        wall: Callable[[], float],
        notary: Notary | None = None,
    ) -> None:
        """`next_stage`: what follows one at a version whose class list changes."""
        self.model, self.book, self.diary, self.board, self.bases = model, book, diary, board, bases
        self.stages, self.next_stage = stages, next_stage
        self.clock, self.wall, self.notary = clock, wall, notary
        self.updates = Updates()
        self.room = Room(book.room, lambda: model.vector.nbytes, board.lines)
        self.unjudged: set[int] = set()  # versions whose judgement may still come: their weights are kept
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._started = self._published = clock()

    def fold(self, folds: Sequence[do.Fold]) -> list[ev.Event | None]:
        asked = [portion for fold in folds for portion in fold.portions]
        portions, arrays, learned = self.updates.take(asked)
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

    def publish(self, action: do.Publish) -> ev.Event:
        """Step, then hash and hand out side by side; the record is the last word."""
        norm = self.model.step(action.full_weight, action.statistic_mix)
        changed = {} if action.change is None else {"classes": self._change_classes(action.version, action.change)}
        vector, stage = self.model.vector, self.stages.at(action.version)
        fetchable = self._beside.submit(self.bases.fetchable, action.version, vector)
        weights = (action.version, vector, stage.layout, self.model.state, stage.plan.task)
        written = self._disk.submit(self.room.patiently, self.book.write, *weights)
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
        self.room.patiently(self.diary.sync)
        self.record("version_published", body)
        self.unjudged -= {v for v in tuple(self.unjudged) if v <= action.version - UNJUDGED}  # the loop's thread adds
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
        self.room.patiently(self.book.write, version, made.vector, stage.layout, {}, stage.plan.task)
        body = self._facts(version, made.vector, made.bytes_up)
        nothing = {"contributions": [], "step_norm": 0.0, "full_weight": 0.0, "statistic_mix": 0.0}
        self.record("version_published", {**body, **nothing, "recalibrated": about})
        self.room.patiently(self.book.keep, version)
        self.record("evaluated", made.evaluated(version))

    def _write_both(self, weights: Future[None], version: int, variates: Variates) -> None:
        """In the disk's thread, after the weights."""
        weights.result()
        self.room.patiently(self.book.variates.write, version, variates)

    def _change_classes(self, version: int, change: Change) -> dict[str, Any]:
        """The newest version in its next stage; what the record says of it."""
        stage, classes = self.stages.at(version - 1), ClassList.of(self.stages.at(version - 1).plan.task)
        then = self.next_stage(stage, version, change)
        self.model.grow(Growth(stage.form, then.form, classes.live, classes.begins(change)))
        self.stages.add(then)
        return {"change": asdict(change), "task": then.plan.task, "layout": then.layout.to_json()}

    async def keep(self, version: int, bases: frozenset[int]) -> ev.Event:
        """Its weights outlive the machine, and what nobody needs any more goes; `bases`: of all tickets."""
        in_use = frozenset(self.unjudged | self.bases.in_use())
        best = self.board.best[0] if self.board.best else None

        def keep() -> None:
            self.room.patiently(self.book.keep, version)
            self.book.prune(in_use, best)
            if self.model.variates is not None:
                self.book.variates.prune(bases)

        await asyncio.wrap_future(self._disk.submit(keep))
        return ev.Kept(version, self.clock())

    def record(self, kind: str, body: Mapping[str, Any]) -> None:
        """Write a fact down, then let it be seen. In the lane's thread, or before the lane runs."""
        self.room.patiently(self.book.record, kind, body)
        self.board.add(kind, body)
        if self.notary is not None and kind in KINDS:
            self.notary.wake()
        if kind == "evaluated":
            self.unjudged.discard(body["version"])

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
        self.book.prune(frozenset(), None)  # which lays a file by for the next one
        self.bases.handles[0] = self.bases.fetchable(0, self.model.vector)

    def resume(self, last: Mapping[str, Any]) -> None:
        """The newest version, by its record, fetchable again."""
        self._started, self._published = self.clock() - last["elapsed_s"], self.clock()
        self.bases.bytes_total = last["bytes_total"]
        self.bases.handles[last["version"]] = self.bases.fetchable(last["version"], self.model.vector)
        if self.model.variates is not None:
            self.bases.tables[last["version"]] = self.model.variates
