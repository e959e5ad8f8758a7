"""When a run ends: BatchNorm's statistics are measured anew, and what is better so becomes the run's last version.

    the best version, the newest, the running average  ->  statistics by all stores, layer after layer
                                                       ->  judged on validation  ->  better than the best? a version

See aggregation/statistics.py for why. Where stores judge with statistics of their own (`evaluate.own_statistics`) the
version's do not show in a score: then the best of those with statistics measured anew is the last version anyhow, since
it is what is exported; which one that is is told by a judgement with what is exported. The running average (`server:
ema`) is judged also where nothing is measured. A store that fails or is late is left out from then on: what is had
without it is judged like any other. A coordinator that dies meanwhile begins with this anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from raypipe.aggregation.statistics import pooled, put
from raypipe.coordinator.ports import Handle, Port
from raypipe.coordinator.stages import Stage
from raypipe.errors import StoreError
from raypipe.store import messages as msg
from raypipe.tasks.metrics import lower_is_better, metrics

if TYPE_CHECKING:
    from raypipe.coordinator.composition import Composition

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
T = TypeVar("T")
PATIENCE_S = 600.0  # for an answer
LATE_S = 30.0  # once half of the stores have answered, the others have three times as long, and this


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights whose statistics may be worth measuring anew; `of`: a version, or the running average of all."""

    of: int | None
    vector: Array


@dataclass(slots=True)
class Recalibrated:
    """Those weights with the stores' statistics, and how they are judged: sums by store."""

    of: int | None
    vector: Array
    stores: dict[str, int] = field(default_factory=dict)  # who measured -> its images by which its part is weighed
    judged: dict[str, msg.Evaluation] = field(default_factory=dict)
    exported: dict[str, msg.Evaluation] = field(default_factory=dict)  # where stores judge with their own statistics
    bytes_up: int = 0
    bytes_down: int = 0

    def score(self, metric: str) -> float | None:
        """Over all stores' validation images, with these statistics."""
        return _metrics(self.exported or self.judged).get(metric)

    def evaluated(self, version: int) -> dict[str, Any]:
        """The record's body."""
        stores = {
            store: {**metrics(one.sums, one.num_examples), "num_examples": one.num_examples}
            for store, one in sorted(self.judged.items())
        }
        total = sum(one.num_examples for one in self.judged.values())
        about = {"version": version, "split": "validation", "best": True, "num_examples": total}
        return {**about, "metrics": _metrics(self.judged), "stores": stores}


async def last_version(
    made: Composition, ports: Mapping[str, Port], best: int, fetchable: Callable[[Array], Handle]
) -> int:
    """The best version: one more, where statistics measured anew make a better one; else the best so far."""
    num_images, newest, central = made.config.evaluate.recalibrate, made.machine.version, made.config.evaluate.central
    order = await asyncio.to_thread(made.norms, newest) if num_images is not None else []
    stage, scores, shell = made.stages.at(newest), made.machine.scores, made.shell
    images = {row["store"]: int(row["images"]) for row in made.board.snapshot()["rows"]}
    hidden = bool(order) and stage.plan.own_statistics is not None
    than, found = None if hidden or scores.best is None else scores.best[1], None
    versions = sorted({best, newest}) if order else []
    candidates = [Candidate(v, await asyncio.to_thread(made.read, v)) for v in versions]
    candidates = [one for one in candidates if made.stages.at(one.of or 0) is stage]
    if (average := shell.publisher.model.average) is not None:
        candidates.append(Candidate(None, average))
    for candidate in candidates:
        about: dict[str, Any] = {"num_images": num_images or 0, "fetchable": fetchable, "judge": central}
        measured = await recalibrated(ports, images, stage, order, candidate, **about)
        if measured is None:
            continue
        shell.bases.moved(measured.bytes_down)
        shell.bases.bytes_total += measured.bytes_up
        if better(scores.metric, score := measured.score(scores.metric), than):
            than, found = score, measured
    if found is None:
        return best
    await asyncio.to_thread(shell.publisher.add, newest + 1, found, num_images or 0)
    return newest + 1


async def recalibrated(
    ports: Mapping[str, Port],
    images: Mapping[str, int],
    stage: Stage,
    order: Sequence[str],
    candidate: Candidate,
    *,
    num_images: int,
    fetchable: Callable[[Array], Handle],
    judge: str | None,
) -> Recalibrated | None:
    """A candidate measured and judged; None where no store could. `images`: of each store, its weight. `judge`: whose
    word alone counts, where there is a central validation set."""
    found = Recalibrated(candidate.of, candidate.vector.copy())
    handle, layout = fetchable(candidate.vector), stage.layout
    there = {store: port for store, port in ports.items() if images.get(store) and store != judge}
    found.bytes_down += candidate.vector.nbytes * len(there)
    for layer in order:
        known = found.vector[layout.statistic].copy()
        what = f"statistics:{num_images}:{layer}"
        asked = {store: port.measure(stage.raw, handle, what, known) for store, port in there.items()}
        answers = await answered(asked)
        there = {store: port for store, port in there.items() if store in answers}
        found.bytes_up += sum(answer.nbytes for answer in answers.values())
        found.bytes_down += known.nbytes * len(asked)
        both = pooled(answers, images) if answers else None
        if both is None or not put(found.vector, layout, layer, both):
            return None
    found.stores = {store: images[store] for store in sorted(there)} if order else {}
    judges = ports if judge is None else {judge: ports[judge]}
    whole = fetchable(found.vector)
    found.bytes_down += found.vector.nbytes * len(judges)
    found.judged = await answered({s: port.evaluate(stage.raw, whole, "validation") for s, port in judges.items()})
    if stage.plan.own_statistics is not None:
        alike = msg.encode(replace(stage.plan, own_statistics=None))
        found.exported = await answered({s: port.evaluate(alike, whole, "validation") for s, port in judges.items()})
    return found if found.judged else None


def _metrics(judged: Mapping[str, msg.Evaluation]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for one in judged.values():
        sums.update(one.sums)
    return metrics(sums, sum(one.num_examples for one in judged.values()))


async def answered(asked: Mapping[str, Awaitable[T]]) -> dict[str, T]:
    """What came, by store; who fails, or is late by the others' measure, is not in it."""
    began, half_s = time.monotonic(), None  # type: float, float | None
    tasks = {store: asyncio.ensure_future(answer) for store, answer in asked.items()}
    try:
        while pending := [task for task in tasks.values() if not task.done()]:
            if half_s is None and 2 * len(pending) <= len(tasks):
                half_s = time.monotonic() - began
            most = PATIENCE_S if half_s is None else min(PATIENCE_S, 4 * half_s + LATE_S)
            if (left := began + most - time.monotonic()) <= 0:
                break
            await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks.values():
            task.cancel()
    found: dict[str, T] = {}
    for store, task in tasks.items():
        if not task.done() or task.cancelled():
            continue
        error = task.exception()
        if error is None:
            found[store] = task.result()
        elif not isinstance(error, StoreError):
            raise error
    return found


def better(metric: str, score: float | None, than: float | None) -> bool:
    """Whether a score is better; none is better than none."""
    if score is None or than is None:
        return score is not None
    return score < than if lower_is_better(metric) else score > than
