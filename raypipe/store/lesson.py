"""A ticket's training itself, the same at a store and when a run is replayed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.optim import Optimizer

from raypipe.models.growth import Form
from raypipe.store.attest import Base
from raypipe.store.batches import Examples
from raypipe.store.control import Clock, Control
from raypipe.store.correct import correct
from raypipe.store.messages import Evaluation, Plan, Report, Ticket
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits
from raypipe.store.ranks import Ranks
from raypipe.store.schedules import schedules
from raypipe.store.shelf import Learner
from raypipe.store.trainer import Outcome, Work, train

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A ticket that was admitted, with all that it needs."""

    ticket: Ticket
    plan: Plan
    weights: Array
    learner: Learner
    images: Examples
    limits: Limits
    control: Control
    base: Base | None = None  # in a run that keeps a ledger
    data_hash: str = ""  # of the data set that the images are of
    correction: Array | None = None  # what each step is corrected by: control variates


def learn(
    asked: Admitted, kept: dict[str, Any] | None, *, clock: Clock, slowdown: float = 1.0, ranks: Ranks | None = None
) -> tuple[Outcome, Optimizer]:
    """Train the model in place, loaded by `kept.begin`, whose answer `kept` is. Raises StoreError."""
    optimizer = optimizers.build(asked.plan.optimizer)(asked.learner.model.trained)
    if kept is not None:
        optimizer.load_state_dict(kept)
    if asked.correction is not None:
        plan = asked.plan
        correct(optimizer, asked.learner.model, asked.correction, plan.optimizer, kept=plan.keep_optimizer)
    work = Work(
        seed=asked.ticket.seed,
        lr=asked.plan.lr,
        schedule=schedules.build(asked.plan.schedule),
        progress=asked.ticket.progress,
        limits=asked.limits,
        fixed=asked.plan.fixes_statistics(asked.ticket.progress[0]),
        slowdown=slowdown,
    )
    learner, control, labelled = asked.learner, asked.control, asked.images.labelled
    task = learner.task.among(labelled, learner.model.module)
    base = asked.weights if asked.plan.local is None or ranks is None else learner.model.vector.cpu().numpy()
    with nullcontext() if ranks is None else ranks.ticket(asked.ticket, asked.plan, base) as team:
        outcome = train(learner.model, task, asked.images, optimizer, work, control, clock, team)
    if labelled is not None:
        _leave(learner, asked.weights, labelled)
    return outcome, optimizer


def report_of(
    asked: Admitted,
    store: str,
    outcome: Outcome,
    update_bytes: int,
    evaluation: Evaluation | None,
    after: str = "",
) -> Report:
    """What the store tells of a ticket; `after`: the one whose kept state it began with."""
    return Report(
        ticket=asked.ticket.id,
        store=store,
        version=asked.ticket.version,
        steps=outcome.steps,
        examples=outcome.examples,
        num_train=asked.images.total,
        skipped=len(asked.images.bad),
        seconds=outcome.seconds,
        loss=outcome.loss,
        update_bytes=update_bytes,
        stopped=outcome.stopped,
        evaluation=evaluation,
        after=after,
        data_hash=asked.data_hash,
    )


def _leave(learner: Learner, base: Array, labelled: tuple[int, ...]) -> None:
    """Rows of classes that training was not about, as they were: weight decay moved them too."""
    task, model = learner.task, learner.model
    others = sorted({*range(task.num_outputs)} - {*labelled})
    for row in Form.of(model.layout, task.num_outputs, boxes=task.boxes is not None).rows:
        now = model.vector[row.entry.slice].view(row.repeats, row.entry.shape[0] // row.repeats, -1)
        places = [row.before + other for other in others]
        now[:, places] = torch.from_numpy(row.of(base)[:, places]).to(now.device)
