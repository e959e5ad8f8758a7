"""After the last version: the test split is read once, and each store learns what it would have had alone."""

from __future__ import annotations

import asyncio
from typing import Any

from raypipe.coordinator.board import Board
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.shell import Handle, Port
from raypipe.errors import StoreError
from raypipe.store import messages as msg
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.metrics import metrics

PATIENCE_S = 600.0  # for all stores together; a store that has trained longer than this trains none alone


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
) -> list[dict[str, Any]]:
    """A row a store: its numbers from the record, the shared model's and its own model's score on the test split.

    The model trained alone starts from version 0 and takes as many steps as the store's share of the run took; it
    never leaves the store. What a store cannot answer in time stays None.
    """
    raw = msg.encode(plan)

    async def shared(store: str) -> float | None:
        return _score(await ports[store].evaluate(raw, best, "test"), board.metric)

    async def own(store: str, steps: int) -> float | None:
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
        return _score(report.evaluation, board.metric)

    rows = {row["store"]: row for row in unjudged(board)}
    there = [s for s, row in rows.items() if row["state"] in ("ready", "training") and s in ports]
    shared_scores = await _all({s: shared(s) for s in there if test})
    able = [s for s in there if test and alone and rows[s]["steps"] and rows[s]["seconds"] < PATIENCE_S]
    own_scores = await _all({s: own(s, rows[s]["steps"]) for s in able})
    return [{**row, "shared": shared_scores.get(s), "alone": own_scores.get(s)} for s, row in rows.items()]


def unjudged(board: Board) -> list[dict[str, Any]]:
    """The table's rows before, or without, the last judgement."""
    rows = [row for row in board.snapshot()["rows"] if row["images"]]
    return [{**row, "shared": None, "alone": None} for row in rows]


async def _all(asked: dict[str, Any]) -> dict[str, float | None]:
    """Each answer or None; a store's error or silence is its own."""
    tasks = {store: asyncio.ensure_future(answer) for store, answer in asked.items()}
    if tasks:
        _, late = await asyncio.wait(tasks.values(), timeout=PATIENCE_S)
        for task in late:
            task.cancel()
    answers: dict[str, float | None] = {}
    for store, task in tasks.items():
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, StoreError):
                raise error
            answers[store] = None if error is not None else task.result()
    return answers


def _score(evaluation: msg.Evaluation | None, metric: str) -> float | None:
    if evaluation is None or not evaluation.num_examples:
        return None
    return metrics(evaluation.sums, evaluation.num_examples).get(metric)
