"""After the last version: the test split is read once, and each store learns what it would have had alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from raypipe.coordinator.board import Board
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.ports import Handle, Port
from raypipe.errors import StoreError
from raypipe.store import messages as msg
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.metrics import metrics

if TYPE_CHECKING:
    from raypipe.coordinator.composition import Composition

PATIENCE_S = 600.0  # for all stores together; a store that has trained longer than this trains none alone


class Judged(NamedTuple):
    """A row a store: its numbers from the record, the shared model's and its own model's score on the test split. And
    the shared model's metrics on all stores' test images together, the run's own metric first; then the same of the
    running average of the versions; and of the shared model as it is exported, where stores judge with statistics of
    their own. Empty where there is none."""

    table: list[dict[str, Any]]
    test: dict[str, float]
    average: dict[str, float]
    exported: dict[str, float]


async def judged(
    made: Composition, ports: Mapping[str, Port], best: int, *, test: bool, fetchable: Callable[[Any], Handle]
) -> Judged:
    """What `conclude` says of a run whose best version this is."""
    first, last = await asyncio.to_thread(made.read, 0), await asyncio.to_thread(made.read, best)
    then, now, average = made.stages.at(best), made.stages.at(made.machine.version), made.shell.publisher.model.average
    return await conclude(
        {store: port for store, port in ports.items() if store != made.config.evaluate.central},
        made.board,
        then.plan,
        seed=made.config.seed,
        epoch=made.epoch,
        best=fetchable(last),
        first=fetchable(first),
        # Alone from version 0 a store would have learned other classes: that is no comparison.
        alone=made.config.evaluate.alone and not then.since,
        test=test,
        notary=made.notary,
        average=None if average is None else fetchable(average),
        averaged=now.plan,
    )


async def conclude(
    ports: dict[str, Port],
    board: Board,
    plan: msg.Plan,
    *,
    seed: int,
    epoch: int,
    best: Handle,
    first: Handle,
    alone: bool,
    test: bool,
    notary: Notary | None = None,
    average: Handle | None = None,
    averaged: msg.Plan | None = None,
) -> Judged:
    """`average`: the running average of the versions, where the server keeps one; `averaged`: its plan, where the
    class list has changed since the best version.

    The model trained alone starts from version 0 and takes as many steps as the store's share of the run took; it
    never leaves the store. What a store cannot answer in time stays None.
    """
    raw, newest, alike = (msg.encode(p) for p in (plan, averaged or plan, replace(plan, own_statistics=None)))

    async def shared(store: str, weights: Handle, plan: bytes) -> msg.Evaluation:
        return await ports[store].evaluate(plan, weights, "test")

    async def own(store: str, steps: int) -> msg.Evaluation | None:
        ticket = msg.Ticket(
            id=f"alone.{store}",
            store=store,
            epoch=epoch,
            version=0,
            seed=ticket_seed(seed, f"{store}/alone", 0),
            progress=(0.0, 1.0),
            max_steps=steps,
            judge="test",
            base=() if notary is None else await notary.prove(store, 0),
        )
        report = await ports[store].train(ticket, raw, first)
        if notary is not None:
            notary.heard(store, report)
        return report.evaluation

    rows = {row["store"]: row for row in unjudged(board)}
    there = [s for s, row in rows.items() if row["state"] in ("ready", "training") and s in ports]
    judged = await _all({s: shared(s, best, raw) for s in there if test})
    mean = await _all({s: shared(s, average, newest) for s in there if test and average is not None})
    exported = await _all({s: shared(s, best, alike) for s in there if test and plan.own_statistics is not None})
    able = [s for s in there if test and alone and rows[s]["steps"] and rows[s]["seconds"] < PATIENCE_S]
    alone_judged = await _all({s: own(s, rows[s]["steps"]) for s in able})

    def score(evaluation: msg.Evaluation | None) -> float | None:
        return _metrics([evaluation]).get(board.metric)

    table = [{**r, "shared": score(judged.get(s)), "alone": score(alone_judged.get(s))} for s, r in rows.items()]
    return Judged(table, *(_pooled(answers, board.metric) for answers in (judged, mean, exported)))


def _pooled(judged: dict[str, msg.Evaluation | None], metric: str) -> dict[str, float]:
    """Of all stores' test examples together, this metric first."""
    pooled = _metrics(judged.values())
    return dict(sorted(pooled.items(), key=lambda pair: (pair[0] != metric, pair[0])))


def unjudged(board: Board) -> list[dict[str, Any]]:
    """The table's rows before, or without, the last judgement."""
    rows = [row for row in board.snapshot()["rows"] if row["images"]]
    return [{**row, "shared": None, "alone": None} for row in rows]


async def _all(asked: dict[str, Any]) -> dict[str, msg.Evaluation | None]:
    """Each answer or None; a store's error or silence is its own."""
    tasks = {store: asyncio.ensure_future(answer) for store, answer in asked.items()}
    if tasks:
        _, late = await asyncio.wait(tasks.values(), timeout=PATIENCE_S)
        for task in late:
            task.cancel()
    answers: dict[str, msg.Evaluation | None] = {}
    for store, task in tasks.items():
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, StoreError):
                raise error
            answers[store] = None if error is not None else task.result()
    return answers


def _metrics(evaluations: Iterable[msg.Evaluation | None]) -> dict[str, float]:
    """Of all their images together: their sums add up."""
    there = [evaluation for evaluation in evaluations if evaluation is not None]
    sums: Counter[str] = Counter()
    for evaluation in there:
        sums.update(evaluation.sums)
    return metrics(sums, sum(evaluation.num_examples for evaluation in there))
