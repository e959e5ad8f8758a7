"""The plain server of the store protocol: no Ray, no network. A shell around it carries messages in and out.

    train      fencing -> policy -> is the base on the ledger? -> model and data, built once -> [evaluate the base]
               -> train -> signed -> update to the outbox
    collect    the update, encoded, as often as it is asked for
    settle     the update is forgotten; what is kept (kept.py) is the ticket's only if its update is in a version

What has to outlive the process lies in the outbox, see outbox.py; it is read when a run is first spoken of.

`control` is called from another thread. What a Site raises on purpose is safe to send; for anything else see
`Site.refusal`, which keeps the details on the store's own disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.errors import ConfigError, StoreClosed, StoreError, StoreRefused
from raypipe.models import models
from raypipe.store.attest import Attestor
from raypipe.store.control import Clock, Control, Controls
from raypipe.store.evaluation import evaluate
from raypipe.store.kept import begin, keeps, key_of, left
from raypipe.store.lesson import Admitted, learn, report_of
from raypipe.store.measure import What, measured, own_statistics
from raypipe.store.messages import PROTOCOL, Card, Command, Evaluation, Part, Plan, Refusal, Report, Ticket, Verdict
from raypipe.store.outbox import Outbox, Point, open_outbox
from raypipe.store.policy import read_policy
from raypipe.store.processor import machine, take_device
from raypipe.store.ranks import Ranks
from raypipe.store.runs import tidy
from raypipe.store.safety import refusal, site_log
from raypipe.store.shelf import Learner, Shelf
from raypipe.store.terms import Terms
from raypipe.tasks import tasks
from raypipe.update.codec import encoded_bytes

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

CACHE_BYTES = 2 << 30  # decoded images of a data set that are kept in memory


class Site:
    """One store. `cpus` sets torch's threads, `gpus` caps its share of the GPU's memory.

    `ranks`: so many processes train each ticket together, one of them this; they share the CPUs, each has its GPU.

    `wall` gives seconds since the epoch; `point` is told of each step to the disk.
    """

    def __init__(
        self,
        home: Path,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        ranks: int = 1,
        slowdown: float = 1.0,
        node: str = "",
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        point: Point = lambda done: None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.policy = read_policy(home)
        self.store = self.policy.store
        self._cpus, self._gpus, self._slowdown, self._node, self._clock = cpus, gpus, slowdown, node, clock
        self._threads = max(1, int(cpus / ranks))
        self._device = take_device(self.store, self._threads, gpus)
        shared = {"threads": self._threads, "cache_bytes": cache_bytes}
        self._ranks = Ranks(home, ranks, device=self._device, **shared) if ranks > 1 else None
        self._shelf = Shelf(self.policy, self._device, threads=self._threads, cache_bytes=cache_bytes)
        self._log = site_log(home, self.store)
        self._attestor = Attestor(home, self.policy, threads=self._threads, wall=wall)
        self._terms = Terms(home, self.policy, wall)
        self._home, self._point = home, point
        self._outboxes: dict[str, Outbox] = {}
        self._opening = Lock()
        self._work = Lock()  # one ticket or evaluation at a time
        self._controls = Controls(self._terms.taken, self._terms.closed, self._attestor.paused)
        self.code = ""  # of a vault: the hash of what is installed there
        tidy(home, wall(), self._log)

    def close(self) -> None:
        """Let another process have this one's runs."""
        for outbox in self._outboxes.values():
            outbox.close()
        self._outboxes.clear()
        if self._ranks is not None:
            self._ranks.close()
        self._attestor.close()

    def describe(self, run: str = "", epoch: int = 0) -> Card:
        """Opens every data set of the policy; one that cannot be read is left out, and refused when asked for.

        Raises StoreSuperseded; StoreError when another process of this store is at work on the run.
        """
        waiting = self._fenced(run, epoch).tickets() if run else ()
        data = {}
        for name in self.policy.data:
            try:
                data[name] = self._shelf.data(name)
            except (ConfigError, StoreRefused) as error:
                self._log.error("data set left out: %s", error.message)
        card = Card(
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
            outbox=waiting,
            key=self._attestor.public,
            head_size=self._attestor.head_size(run) if run else 0,
            code=self.code,
            machine=machine(),
        )
        who = "the coordinator" if run else "somebody, for no run,"
        self._attestor.left("card", run, "", card, f"{who} asked who this is")
        return card

    def train(self, ticket: Ticket, plan: Plan, weights: Array, correction: Array | None = None) -> Report:
        """The update stays in the outbox. A ticket that waits there already gives the same report again.

        `correction`: of each step, where the run has control variates; see correct.py.
        """
        with self._work:
            outbox = self._fenced(plan.run, ticket.epoch)
            report = outbox.report(ticket.id) or self._made(ticket, plan, weights, outbox, correction)
            self._attestor.left("report", plan.run, ticket.id, report, f"trained from version {report.version}")
            return report

    def left_again(self, run: str, report: Report) -> None:
        """A report is told to one more who asked. Raises StoreError: it may not leave."""
        why = f"trained from version {report.version}; asked for once more while it was made"
        self._attestor.left("report", run, report.ticket, report, why)

    def sent_again(self, run: str, ticket_id: str, part: bytes) -> None:
        """A part of what was collected is sent once more. Raises StoreError: it may not leave."""
        self._attestor.said("again", run, ticket_id, part, "asked for once more: it did not come, or came damaged")

    def greets(self, hello: bytes) -> None:
        """A vault's greeting leaves it."""
        with suppress(StoreError):  # a full disk: it holds nothing that may not leave
            self._attestor.said("hello", "", "", hello, "somebody connected")

    def _made(self, ticket: Ticket, plan: Plan, weights: Array, outbox: Outbox, correction: Array | None) -> Report:
        limits = self.policy.admit(ticket, plan)
        base = self._attestor.check(ticket, plan, weights)
        learner = self._shelf.learner(plan, weights)
        size = learner.model.layout.update_size
        left_s = self._terms.begin(encoded_bytes(plan.update, size) if ticket.judge is None else 0)
        if left_s is not None:
            limits = replace(limits, budget_s=min(left_s, limits.budget_s or left_s))
        images = self._shelf.images(plan, learner.task, "train")
        data_hash = self._shelf.data(plan.data).content_hash
        with self._controls.running(ticket.id, plan.run) as control:
            admitted = Admitted(ticket, plan, weights, learner, images, limits, control, base, data_hash, correction)
            return self._judged(admitted) if ticket.judge is not None else self._finished(admitted, outbox)

    def collect(self, ticket_id: str, how: list[Part], run: str = "", epoch: int = 0) -> Array:
        """The update through this chain of codecs; with none, the float32 vector itself, not a copy.

        It is whole until its ticket is settled. Raises StoreRefused, StoreSuperseded.
        """
        run, outbox = self._asked(ticket_id, run, epoch)
        update = outbox.update(ticket_id) if outbox is not None else None
        report = outbox.report(ticket_id) if outbox is not None else None
        if update is None or report is None:
            raise StoreRefused("no update waits for this ticket: it was settled, dropped, or never made")
        encoded = self._attestor.encoded(ticket_id, how, update)
        most = self.policy.max_upload_bytes
        if most is not None and encoded.nbytes > most:
            raise StoreRefused(f"the update has {encoded.nbytes} bytes, the store's policy allows {most}")
        self._terms.leave(encoded.nbytes)
        asked = f"the coordinator of epoch {epoch}" if epoch else "somebody without an epoch"
        self._attestor.update_left(report, run, how, encoded, f"asked for by {asked}")
        return encoded

    def place(self, ticket_id: str, run: str, collected: Array) -> dict[str, int] | None:
        """Where on this machine lies what was collected, for a process that is here too; see near.py."""
        outbox = self._outboxes.get(run)
        return None if outbox is None else outbox.place(ticket_id, collected)

    def settle(self, verdict: Verdict) -> None:
        """Forget the update; commit what is kept if it was folded. Settling twice does nothing."""
        _, outbox = self._asked(verdict.ticket, verdict.run, verdict.epoch)
        if outbox is not None:
            outbox.settle(verdict.ticket, verdict.version)

    def evaluate(self, plan: Plan, weights: Array, split: str, epoch: int = 0) -> Evaluation:
        """Sums over a split, of the store's own model. Raises StoreRefused, StoreSuperseded."""
        with self._work:
            outbox = self._fenced(plan.run, epoch) if epoch or plan.local is not None else None
            self.policy.check(plan)
            self._terms.begin()
            learner = self._shelf.learner(plan, weights)
            kept = outbox.kept(key_of(plan)) if outbox is not None and plan.local is not None else None
            begin(learner.model, plan, weights, kept[1] if kept else None)
            with self._controls.running("", plan.run) as control:
                evaluation = self._evaluate(plan, learner, split, control)
        if evaluation is None:
            raise StoreRefused("the evaluation was stopped")
        self._attestor.left("evaluation", plan.run, "", evaluation, f"a version was judged on {split}")
        return evaluation

    def measure(
        self, plan: Plan, weights: Array | None, what: What, epoch: int = 0, known: Array | None = None
    ) -> Array:
        """Sums over the training split, float64; see measure.py. Raises StoreRefused, StoreSuperseded.

        `known`: a model's statistics, float32 of the layout's length, where they are not those of the weights.
        """
        with self._work:
            if epoch:
                self._fenced(plan.run, epoch)
            self.policy.check(plan)
            self._terms.begin()
            with self._controls.running("", plan.run) as control:
                stopped = partial(control.stops, self._clock)
                sums = measured(self._shelf, self.policy, plan, weights, what, known, stopped)
        self._terms.leave(sums.nbytes)
        self._attestor.sums_left(what, plan.run, sums)
        return sums

    def control(self, ticket_id: str, command: Command, run: str = "", epoch: int = 0) -> None:
        """Seen within a batch; "" and "*" mean what runs now. A ticket that has not begun yet obeys as it begins.

        A coordinator that is superseded is not listened to.
        """
        known = self._outboxes.get(run)
        if known is None or not 0 < epoch < known.epoch:
            self._controls.give(ticket_id, command)

    def abandon(self, ticket_id: str) -> None:
        """Nobody waits for what runs under this id: it ends within a batch and leaves nothing."""
        self._controls.abandon(ticket_id)

    @property
    def rate(self) -> float | None:
        """Of what leaves, in bytes a second, by the store's policy."""
        return self.policy.max_upload_bytes_s

    def pausing(self) -> str:
        """Why what runs now computes nothing; empty when it does, or nothing runs. It is to leave: see receipts.py."""
        return self._controls.pausing()

    def refusal(self, error: BaseException, method: str, ticket_id: str = "", run: str = "") -> Refusal:
        """An exception as a message, which leaves; what may not leave the store goes to its own log."""
        made = refusal(error, self.store, method, self._log, ticket_id)
        run = run or next(reversed(self._outboxes), "")  # an actor's process works on one run
        with suppress(StoreError):  # a full disk: a refusal holds nothing that may not leave
            self._attestor.left("refusal", run, ticket_id, made, f"{method} was refused or failed")
        return made

    def _judge_base(self, plan: Plan, learner: Learner, split: str, control: Control) -> Evaluation | None:
        """None where the store has no such split, or nothing in it: it trains all the same."""
        if self._shelf.data(plan.data).counts.get(split, 0) == 0:
            return None
        with suppress(StoreClosed):  # nothing of the task's classes
            return self._evaluate(plan, learner, split, control)
        return None

    def _finished(self, asked: Admitted, outbox: Outbox) -> Report:
        """The ticket trained, its update in the outbox; room for it is made first, so that no work is lost for lack."""
        ticket, plan, model = asked.ticket, asked.plan, asked.learner.model
        key = key_of(plan)
        after, state = (outbox.kept(key) if keeps(plan) else None) or ("", None)
        kept = begin(model, plan, asked.weights, state)
        evaluation = None
        if ticket.evaluate is not None:
            evaluation = self._judge_base(plan, asked.learner, ticket.evaluate, asked.control)
        with outbox.room(4 * model.layout.update_size) as slot:
            outcome, optimizer = learn(asked, kept, clock=self._clock, slowdown=self._slowdown, ranks=self._ranks)
            if asked.control.abandoned:
                raise StoreError("the ticket was abandoned: nobody waited for it any more")
            update, finite = model.update(asked.weights, out=slot.floats)
            if not finite:
                raise StoreError(f"the update is not finite after {outcome.steps} steps; lower lr")
            state = left(model, plan, optimizer)
            report = report_of(asked, self.store, outcome, update.nbytes, evaluation, after)
            report = self._attestor.sign(report, plan, asked.base, update)
            outbox.put(report, slot, key, state)
        return report

    def _judged(self, asked: Admitted) -> Report:
        """The ticket trained and its result evaluated: alone, so from the version itself; nothing of it is kept."""
        asked.learner.model.load(asked.weights)
        outcome, _ = learn(asked, None, clock=self._clock, ranks=self._ranks)
        assert asked.ticket.judge is not None
        judged = self._evaluate(asked.plan, asked.learner, asked.ticket.judge, asked.control)
        report = report_of(asked, self.store, outcome, 0, judged)
        return self._attestor.sign(report, asked.plan, asked.base, None)

    def _evaluate(self, plan: Plan, learner: Learner, split: str, control: Control) -> Evaluation | None:
        images = self._shelf.images(plan, learner.task, split)
        start = self._clock()
        share = self._shelf.max_bad_share(plan)
        with self._own_statistics(plan, learner, control):
            result = evaluate(learner.model, learner.task, images, control, share, self._clock)
        if result is None:
            return None
        return Evaluation(self.store, split, result[1], result[0], self._clock() - start)

    def _own_statistics(self, plan: Plan, learner: Learner, control: Control) -> AbstractContextManager[None]:
        """Within it the store's own stand in the model, where the plan says so and it has some."""
        if plan.own_statistics is None or not learner.model.moving_norms:
            return nullcontext()
        examples, share = self._shelf.images(plan, learner.task, "train"), self._shelf.max_bad_share(plan)
        about = (learner.model, learner.task, examples, plan.own_statistics, share)
        return own_statistics(*about, lambda: control.stops(self._clock))

    def _fenced(self, run: str, epoch: int) -> Outbox:
        """The run's outbox, for a coordinator of this epoch. Raises StoreSuperseded."""
        with self._opening:
            if run not in self._outboxes:
                self._outboxes[run] = open_outbox(self._home, run, self._log, self._point)
                self._attestor.owns(run)
        if epoch:
            self._outboxes[run].fence(epoch)
        return self._outboxes[run]

    def _asked(self, ticket_id: str, run: str, epoch: int) -> tuple[str, Outbox | None]:
        """The run and its outbox, or those where the ticket waits."""
        if run:
            return run, self._fenced(run, epoch)
        waits = ((run, o) for run, o in list(self._outboxes.items()) if o.report(ticket_id) is not None)
        return next(waits, ("", None))


def _listed(allowed: str | list[str], names: Callable[[], list[str]]) -> tuple[str, ...]:
    return tuple(names()) if allowed == "all" else tuple(allowed)
