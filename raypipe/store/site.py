"""The plain server of the store protocol: no Ray, no network. A shell around it carries messages in and out.

    train      fencing -> policy -> model and data, built once -> [evaluate the base] -> train -> update to the outbox
    collect    the update, encoded, as often as it is asked for
    settle     the update is forgotten; the optimizer's state is kept only if the update became part of a version

`control` is called from another thread. What a Site raises on purpose is safe to send; for anything else see
`Site.refusal`, which keeps the details on the store's own disk.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.errors import ConfigError, StoreError, StoreRefused
from raypipe.models import models
from raypipe.store.batches import Images
from raypipe.store.messages import PROTOCOL, Card, Command, Evaluation, Part, Plan, Refusal, Report, Ticket, Verdict
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits, read_policy
from raypipe.store.safety import refusal, site_log
from raypipe.store.schedules import schedules
from raypipe.store.shelf import Learner, Shelf
from raypipe.store.trainer import Clock, Control, Outcome, Work, evaluate, train
from raypipe.tasks import tasks

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

CACHE_BYTES = 2 << 30  # decoded images of a data set that are kept in memory
OUTBOX = 8  # updates that wait to be settled; a coordinator that forgot older ones has lost them
EARLY = 64  # commands kept for tickets that have not begun


@dataclass(frozen=True, slots=True)
class Pending:
    """A ticket's result until it is settled; `state` of the optimizer is kept under `key` if it is folded."""

    report: Report
    update: Array
    key: str
    state: dict[str, Any] | None


class Site:
    """One store. `cpus` sets torch's threads of this process, `gpus` caps its share of the GPU's memory."""

    def __init__(
        self,
        home: Path,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        slowdown: float = 1.0,
        node: str = "",
        clock: Clock = time.monotonic,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.policy = read_policy(home)
        self.store = self.policy.store
        self._cpus, self._gpus, self._slowdown, self._node, self._clock = cpus, gpus, slowdown, node, clock
        self._threads = max(1, int(cpus))
        self._device = self._take_device()
        self._shelf = Shelf(self.policy, self._device, threads=self._threads, cache_bytes=cache_bytes)
        self._log = site_log(home, self.store)
        self._outbox: OrderedDict[str, Pending] = OrderedDict()
        self._kept: dict[str, dict[str, Any]] = {}  # optimizer states, by run and plan
        self._epochs: dict[str, int] = {}
        self._work = Lock()  # one ticket or evaluation at a time
        self._flags = Lock()
        self._current: tuple[str, Control] | None = None
        self._early: OrderedDict[str, Command] = OrderedDict()

    def describe(self) -> Card:
        """Opens every data set of the policy; one that cannot be read is left out, and refused when asked for."""
        data = {}
        for name in self.policy.data:
            try:
                data[name] = self._shelf.data(name)
            except (ConfigError, StoreRefused) as error:
                self._log.error("data set left out: %s", error.message)
        return Card(
            store=self.store,
            protocol=PROTOCOL,
            data={name: dict(opened.counts) for name, opened in data.items()},
            tasks=_listed(self.policy.tasks, tasks.names),
            models=_listed(self.policy.models, models.names),
            cpus=self._cpus,
            gpu=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None,
            node=self._node,
            process=os.getpid(),
            data_hashes={name: opened.content_hash for name, opened in data.items()},
            limits=self.policy.limits(),
            data_bytes={name: self._shelf.num_bytes(name) for name in data},
        )

    def train(self, ticket: Ticket, plan: Plan, weights: Array) -> Report:
        """The update stays in the outbox. A ticket that waits there already gives the same report again."""
        with self._work:
            self._fence(plan.run, ticket.epoch)
            if ticket.id in self._outbox:
                return self._outbox[ticket.id].report
            limits = self.policy.admit(ticket, plan)
            learner = self._shelf.learner(plan, weights)
            images = self._shelf.images(plan, learner.task, "train")
            with self._controlled(ticket.id) as control:
                return self._train(ticket, plan, weights, learner, images, limits, control)

    def collect(self, ticket_id: str, how: list[Part]) -> Array:
        """The update through this chain of codecs; with none, the float32 vector itself, not a copy."""
        pending = self._outbox.get(ticket_id)
        if pending is None:
            raise StoreRefused("no update waits for this ticket: it was settled, lost in a restart, or never made")
        encoded = pending.update
        if how:
            from raypipe.update.codec import encode_chain

            encoded = encode_chain(how, encoded)
        most = self.policy.max_upload_bytes
        if most is not None and encoded.nbytes > most:
            raise StoreRefused(f"the update has {encoded.nbytes} bytes, the store's policy allows {most}")
        return encoded

    def settle(self, verdict: Verdict) -> None:
        """Forget the update; commit the optimizer's state if it was folded. Settling twice does nothing."""
        pending = self._outbox.pop(verdict.ticket, None)
        if pending is not None and pending.state is not None and verdict.version is not None:
            self._kept[pending.key] = pending.state

    def evaluate(self, plan: Plan, weights: Array, split: str) -> Evaluation:
        """Sums over a split. Raises StoreRefused."""
        with self._work:
            self.policy.check(plan)
            learner = self._shelf.learner(plan, weights)
            learner.model.load(weights)
            with self._controlled("") as control:
                evaluation = self._evaluate(plan, learner, split, control)
        if evaluation is None:
            raise StoreRefused("the evaluation was stopped")
        return evaluation

    def control(self, ticket_id: str, command: Command) -> None:
        """Seen within a batch; "" and "*" mean what runs now. A ticket that has not begun yet obeys as it begins."""
        with self._flags:
            if self._current is not None and ticket_id in ("", "*", self._current[0]):
                self._current[1].give(command)
            elif ticket_id not in ("", "*"):
                self._early[ticket_id] = command
                while len(self._early) > EARLY:
                    self._early.popitem(last=False)

    def refusal(self, error: BaseException, method: str, ticket_id: str = "") -> Refusal:
        """An exception as a message; what may not leave the store goes to its own log."""
        return refusal(error, self.store, method, self._log, ticket_id)

    def _judge_base(self, plan: Plan, learner: Learner, split: str, control: Control) -> Evaluation | None:
        """None where the store has no such split, or nothing in it: it trains all the same."""
        if self._shelf.data(plan.data).counts.get(split, 0) == 0:
            return None
        return self._evaluate(plan, learner, split, control)

    def _train(
        self,
        ticket: Ticket,
        plan: Plan,
        weights: Array,
        learner: Learner,
        images: Images,
        limits: Limits,
        control: Control,
    ) -> Report:
        model, task = learner.model, learner.task
        model.load(weights)
        evaluation = None
        if ticket.evaluate is not None and ticket.judge is None:
            evaluation = self._judge_base(plan, learner, ticket.evaluate, control)
        optimizer = optimizers.build(plan.optimizer)(model.trained)
        key = json.dumps([plan.run, plan.layout, plan.optimizer], sort_keys=True)
        if plan.keep_optimizer and key in self._kept:
            optimizer.load_state_dict(copy.deepcopy(self._kept[key]))  # a refused ticket must not have changed it
        work = Work(
            seed=ticket.seed,
            lr=plan.lr,
            schedule=schedules.build(plan.schedule),
            progress=ticket.progress,
            limits=limits,
            slowdown=1.0 if ticket.judge is not None else self._slowdown,
        )
        outcome = train(model, task, images, optimizer, work, control, self._clock)
        if ticket.judge is not None:
            judged = self._evaluate(plan, learner, ticket.judge, control)
            return self._report(ticket, images, outcome, 0, judged)
        update = model.update(weights)
        with np.errstate(all="ignore"):
            finite = np.isfinite(update.sum())
        if not finite:
            raise StoreError(f"the update is not finite after {outcome.steps} steps; lower lr")
        report = self._report(ticket, images, outcome, update.nbytes, evaluation)
        state = optimizer.state_dict() if plan.keep_optimizer else None
        self._outbox[ticket.id] = Pending(report, update, key, state)
        while len(self._outbox) > OUTBOX:
            self._outbox.popitem(last=False)
        return report

    def _report(
        self, ticket: Ticket, images: Images, outcome: Outcome, update_bytes: int, evaluation: Evaluation | None
    ) -> Report:
        return Report(
            ticket=ticket.id,
            store=self.store,
            version=ticket.version,
            steps=outcome.steps,
            examples=outcome.examples,
            num_train=images.total,
            skipped=len(images.bad),
            seconds=outcome.seconds,
            loss=outcome.loss,
            update_bytes=update_bytes,
            stopped=outcome.stopped,
            evaluation=evaluation,
        )

    def _evaluate(self, plan: Plan, learner: Learner, split: str, control: Control) -> Evaluation | None:
        images = self._shelf.images(plan, learner.task, split)
        start = self._clock()
        result = evaluate(learner.model, learner.task, images, control, self._shelf.max_bad_share(plan))
        if result is None:
            return None
        return Evaluation(self.store, split, result[1], result[0], self._clock() - start)

    def _fence(self, run: str, epoch: int) -> None:
        newest = max(epoch, self._epochs.get(run, epoch))
        if epoch < newest:
            raise StoreRefused(f"epoch {epoch} of this run is over, epoch {newest} has begun")
        self._epochs[run] = newest

    @contextmanager
    def _controlled(self, ticket_id: str) -> Iterator[Control]:
        control = Control()
        with self._flags:
            self._current = ticket_id, control
            if early := self._early.pop(ticket_id, None):
                control.give(early)
        try:
            yield control
        finally:
            with self._flags:
                self._current = None

    def _take_device(self) -> torch.device:
        torch.set_num_threads(self._threads)
        if self._gpus <= 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ConfigError(f"store {self.store} is given {self._gpus:g} GPUs, but torch sees none on this node")
        torch.cuda.set_per_process_memory_fraction(min(1.0, self._gpus))
        return torch.device("cuda", 0)


def _listed(allowed: str | list[str], names: Callable[[], list[str]]) -> tuple[str, ...]:
    return tuple(names()) if allowed == "all" else tuple(allowed)
