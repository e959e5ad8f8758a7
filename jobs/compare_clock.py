"""A federation under a virtual clock: real machine, real sums, real training; only seconds and bytes are computed.

The coordinator's machine decides as in any run, updates are folded by the coordinator's own GlobalModel, a ticket is
trained by the store's own trainer. What a step takes at a store, and a vector on its link, is arithmetic; so a run of
minutes over ten unequal stores takes seconds, and repeats to the bit.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from raypipe.aggregation.variates import Learned, Sent
from raypipe.compose import initial_model, new_machine
from raypipe.config.schema import RunConfig
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.errors import StoreError
from raypipe.models.flat import FlatModel
from raypipe.store.batches import Images, batches_per_epoch
from raypipe.store.control import Control
from raypipe.store.correct import correct
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits
from raypipe.store.schedules import schedules
from raypipe.store.seeds import ticket_seed
from raypipe.store.trainer import Outcome, Work, train
from raypipe.tasks import Task

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
DOWN, UP = 20e6 / 8, 5e6 / 8  # bytes a second of each store's own link
STEP_S = 0.05  # of a batch at the fastest store


@dataclass(frozen=True, slots=True)
class Look:
    """How things stood at a moment: recall by class of the newest version, and what it has cost until then."""

    at: float
    recalls: tuple[float, ...]
    up: int = 0
    down: int = 0

    @property
    def quality(self) -> float:
        """Accuracy, the classes being equally frequent."""
        return sum(self.recalls) / len(self.recalls)


@dataclass(slots=True)
class Trace:
    """One run: looks at even distances, and its work."""

    looks: list[Look] = field(default_factory=list)
    versions: int = 0
    steps: int = 0
    images: int = 0
    worst_store: float | None = None  # where each store has a model of its own


@dataclass(frozen=True, slots=True)
class Stores:
    """What is where: `slowness` of the fastest is 1."""

    ids: tuple[str, ...]
    images: dict[str, Images]
    slowness: dict[str, float]


class Clockwork:
    """One federated run of a configuration until its stop.max_seconds."""

    def __init__(
        self, said: RunConfig, stores: Stores, model: FlatModel, task: Task, judge: Callable[[Array], tuple[float, ...]]
    ) -> None:
        assert said.stop.max_seconds is not None
        self.said, self.stores, self.model, self.task, self.judge = said, stores, model, task, judge
        self.machine, self.sum = new_machine(said), initial_model(said)
        self.newest = self.sum.vector.copy()
        self.trace, self.until = Trace(), said.stop.max_seconds
        self.up = self.down = 0
        self._heap: list[tuple[float, int, ev.Event]] = []
        self._order = itertools.count()
        self._updates: dict[str, Array] = {}
        self._learned: dict[str, Learned] = {}
        self._sent: set[tuple[int, str]] = set()
        self._judged = -1  # the version that the last look was at

    def run(self, every_s: float) -> Trace:
        """Looks every so many seconds."""
        dues = [every_s * n for n in range(1, int(self.until / every_s + 1e-9) + 1)]
        for store in self.stores.ids:
            self._later(ev.StoreJoined(store, self.stores.images[store].num, 0.0))
        while not self.machine.finished:
            wake = self.machine.wake_at()
            event = self._next(wake)
            if event is None:
                break
            while dues and dues[0] < event.at:
                self._look(dues.pop(0))
            for action in self.machine.handle(event):
                self._perform(action, event.at)
        for due in dues:
            self._look(due)
        self.trace.versions = self.machine.version
        return self.trace

    def _next(self, wake: float) -> ev.Event | None:
        if self._heap and self._heap[0][0] <= wake:
            return heapq.heappop(self._heap)[2]
        return None if math.isinf(wake) else ev.Tick(wake)

    def _later(self, event: ev.Event) -> None:
        heapq.heappush(self._heap, (event.at, next(self._order), event))

    def _look(self, at: float) -> None:
        last = self.trace.looks[-1] if self.trace.looks else None
        same = last is not None and self._judged == self.machine.version
        recalls = last.recalls if same and last is not None else self.judge(self.newest)
        self._judged = self.machine.version
        self.trace.looks.append(Look(at, recalls, self.up, self.down))

    def _perform(self, action: do.Action, at: float) -> None:
        match action:
            case do.Train():
                self._train(action, at)
            case do.Collect():
                update = self._updates[action.ticket]
                self.up += update.nbytes
                self._later(ev.UpdateArrived(action.ticket, update.nbytes, at + update.nbytes / UP))
            case do.Fold(portions=portions):
                learned = [self._variate_of(portion) for portion in portions]
                refused = self.sum.fold(
                    [(self._updates.pop(p.ticket), p.weight, p.steps) for p in portions], learned=learned
                )
                bad = tuple((portions[index].ticket, reason) for index, reason in refused.items())
                good = tuple(p.ticket for index, p in enumerate(portions) if index not in refused)
                self._later(ev.Folded(good, bad, at))
            case do.Publish():
                self.sum.step(action.full_weight, action.statistic_mix)
                self.newest = self.sum.vector.copy()
                self._later(ev.Published(action.version, at))
            case do.Keep(version=version):
                self._later(ev.Kept(version, at))
            case do.Evaluate():
                self._later(ev.EvaluationFailed(action.version, action.store, at))  # looks are the judgements here
            case do.Restart(store=store):
                raise RuntimeError(f"store {store} was taken for hung at {at:.1f} s: {action.reason}")
            case do.Settle(ticket=ticket):
                self._updates.pop(ticket, None)
                self._learned.pop(ticket, None)
            case do.Cancel() | do.Record() | do.Finish():
                pass

    def _variate_of(self, portion: do.Portion) -> Learned | None:
        learned = self._learned.pop(portion.ticket, None)
        return None if learned is None else replace(learned, worth=portion.worth)

    def _goes_down(self, num_bytes: int) -> float:
        """Seconds."""
        self.down += num_bytes
        return num_bytes / DOWN

    def _train(self, action: do.Train, at: float) -> None:
        """The work is done now, since nothing that happens later changes it; it is heard of when its time is over."""
        ready = at
        if (action.version, action.store) not in self._sent:
            self._sent.add((action.version, action.store))
            ready += self._goes_down(4 * self.sum.layout.size)
        sent = self.sum.variates.sent(action.store) if self.sum.variates is not None else Sent(action.store)
        correction = sent.correction()
        if correction is not None:
            ready += self._goes_down(correction.nbytes)
        step_s = STEP_S * self.stores.slowness[action.store]
        most = [n for n in (self.said.train.local_steps, action.max_steps) if n is not None]
        if action.budget_s is not None:
            most.append(max(1, int(action.budget_s / step_s)))
        epochs = self.said.train.local_epochs
        timed = self.said.pace == "paced" or self.said.pacing.budget_s is not None
        if epochs is None and self.said.train.local_steps is None and not timed:
            epochs = 1.0
        seed = ticket_seed(self.said.seed, action.store, action.version, action.repeat)
        self.model.load(self.newest)
        limits = Limits(self.said.train.batch_size, min(most, default=None), epochs, None, 0.0)
        images = self.stores.images[action.store]
        try:
            outcome = teach(self.said, self.model, self.task, images, limits, seed, action.progress, correction)
        except StoreError as error:  # a loss that is not finite
            self._later(ev.TrainingFailed(action.ticket, error.message, ready + step_s))
            return
        update, finite = self.model.update(self.newest)
        done = ready + outcome.steps * step_s
        self.trace.steps += outcome.steps
        self.trace.images += outcome.examples
        if not finite:
            self._later(ev.TrainingFailed(action.ticket, "the update is not finite", done))
            return
        self._updates[action.ticket] = update
        if self.sum.variates is not None:
            progress = action.progress[0]
            self._learned[action.ticket] = Learned(sent, outcome.steps, progress, 1.0, action.version)
        counts = (outcome.steps, outcome.examples, images.num)
        self._later(ev.Trained(action.ticket, *counts, outcome.steps * step_s, outcome.loss, done))


def teach(
    said: RunConfig, model: FlatModel, task: Task, images: Images, limits: Limits, seed: int,
    progress: tuple[float, float] = (0.0, 1.0), correction: Array | None = None, optimizer: Any = None,
) -> Outcome:  # fmt: skip
    """The store's own trainer on the model as it is loaded. `optimizer`: one to go on with."""
    optimizer = optimizer or optimizers.build(said.train.optimizer)(model.trained)
    if correction is not None:
        correct(optimizer, model, correction, said.train.optimizer, kept=said.train.keep_optimizer)
    work = Work(seed, said.train.lr, schedules.build(said.train.schedule), progress, limits)
    return train(model, task, images, optimizer, work, Control(), time.monotonic)


def epoch_steps(images: Images, batch_size: int) -> int:
    """Steps of one pass."""
    return batches_per_epoch(images.num, batch_size, 1)
