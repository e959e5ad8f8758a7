"""The opponent that federated training is compared with: the same task, model, batches and examples, all in one place.

What a store does to an image, to a label or to a row is done by the same code (Shelf), a step is the trainer's step,
and versions are judged at the same validation and test splits, each store's own, so that the worst store can be named.
The record has the kinds of any run: a version a stretch of training, with one contribution, of `pooled`.

Like every file beside the rooms, it may know them all. It runs where the stores' data lie.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.compose import started
from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError, StoreRefused
from raypipe.models.flat import with_head
from raypipe.plans import plan_of
from raypipe.run import initial_of
from raypipe.store.batches import batches_per_epoch
from raypipe.store.code import code_hash
from raypipe.store.control import Control
from raypipe.store.evaluation import evaluate
from raypipe.store.joined import Joined
from raypipe.store.measure import measured_gram, measured_moments
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits, read_policy
from raypipe.store.schedules import schedules
from raypipe.store.seeds import ticket_seed
from raypipe.store.shelf import Shelf
from raypipe.store.site import CACHE_BYTES
from raypipe.store.trainer import Outcome, Work, smallest_batch, train
from raypipe.tasks import tasks
from raypipe.tasks.metrics import lower_is_better, metrics
from raypipe.tracking.book import RunBook
from raypipe.tracking.compare import training_bytes
from raypipe.tracking.plateau import gained, plateaued

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Say: TypeAlias = Callable[[dict[str, float]], None]
POOLED = "pooled"  # stands where a store's name does
EPOCHS = 100  # over the pooled examples; a model that still gains then is said to


@dataclass(frozen=True, slots=True)
class Until:
    """When training ends: after so many steps, or (None) at the plateau. `every`: steps a version; None: an epoch."""

    steps: int | None = None
    every: int | None = None


def centralize(config: dict[str, Any], run: str, home: Path, stores: Path, until: Until, say: Say) -> None:
    """Train on what all stores of the configuration have in `stores`; the result is the run's folder under `home`.

    `say` is told each version's metrics. Raises RaypipeError.
    """
    said = RunConfig.model_validate(config)
    pooled = _Pooled(said, run, stores, until)  # before there is a folder: what cannot begin leaves none
    every = (said.track.keep_every, said.track.log_model_every)
    book = RunBook(home / "runs" / run, said.track.keep_last, every, time.time)
    try:
        pooled.work(book, say)
    finally:
        book.close()


def shelves_of(said: RunConfig, stores: Path, device: torch.device) -> dict[str, Shelf]:
    """Each store's shelf, by its own policy's word on where the data lie. Raises ConfigError."""
    shelves, threads = {}, max(1, torch.get_num_threads())
    for store in said.stores:
        policy = read_policy(stores / store.id)
        if said.data not in policy.data:
            raise ConfigError(f"store {store.id} has no data set named {said.data!r}")
        shelves[store.id] = Shelf(policy, device, threads=threads, cache_bytes=CACHE_BYTES)
    return shelves


class _Pooled:
    """One pooled run."""

    book: RunBook

    def __init__(self, said: RunConfig, run: str, stores: Path, until: Until) -> None:
        if said.class_changes:
            raise ConfigError("class_changes: pooled training has no versions to change them at; name the last list")
        self.run, self.until = run, until
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shelves = shelves_of(said, stores, self.device)
        self.said = said = self._settled(said)
        self.metric = said.evaluate.metric
        self.falls = lower_is_better(self.metric)
        layout, first = initial_of(said, tasks.build(said.task))
        if said.warm_start:
            from raypipe.tracking.registry import load_weights

            first = load_weights(said.warm_start, layout)
        self.layout, self.plan = layout, plan_of(said, run, layout)
        any_shelf = next(iter(self.shelves.values()))
        self.learner = any_shelf.learner(self.plan, first)
        self.task, self.model = self.learner.task, self.learner.model
        parts = [shelf.images(self.plan, self.task, "train") for shelf in self.shelves.values()]
        self.examples = Joined(parts, boxes=self.task.boxes is not None)
        self.first = first if said.closed_form is None else self._closed_form(first, said.closed_form)
        self.scores: list[float] = []
        self.best: tuple[int, float] | None = None
        self.moved = 0  # bytes of the training examples
        self.began = time.monotonic()

    def work(self, book: RunBook, say: Say) -> None:
        """The whole run, into the book."""
        self.book, self.began = book, time.monotonic()
        self._begin()
        optimizer = optimizers.build(self.plan.optimizer)(self.model.trained)
        smallest = smallest_batch(self.model, self.examples, self.plan.batch_size)
        epoch = batches_per_epoch(self.examples.num, self.plan.batch_size, smallest)
        stretch = min(self.until.every or epoch, self.until.steps or EPOCHS * epoch)
        self.model.load(self.first)
        self._publish(0, None, 0.0)
        say(self._judge(0))
        done = version = 0
        while not (reason := self._over(done, epoch)):
            version, steps = version + 1, min(stretch, (self.until.steps or done + stretch) - done)
            progress = self._progress(done)
            outcome = train(
                self.model, self.task, self.examples, optimizer, self._work(version, steps, done), Control(),
                time.monotonic,
            )  # fmt: skip
            done += outcome.steps
            self._publish(version, outcome, progress)
            say(self._judge(version))
        self._end(version, reason)

    def _settled(self, said: RunConfig) -> RunConfig:
        """With what the task lacks until its data are seen, as prelude.py asks the stores for it."""
        task = tasks.build(said.task)
        if task.settle is None:
            return said
        plan = plan_of(said, self.run, initial_of(said, task)[0])
        sums = [measured_moments(shelf.images(plan, task, "train"), task) for shelf in self.shelves.values()]
        return said.model_copy(update={"task": {**said.task, **task.settle(np.sum(sums, axis=0).tolist())}})

    def _closed_form(self, first: Array, ridge: float) -> Array:
        """Version 0 with its head by least squares on the pooled examples' features."""
        from raypipe.aggregation.closed_form import Gram
        from raypipe.models.heads import head_of

        self.model.load(first)
        name, head = head_of(self.model.module, self.task.num_outputs)
        packed = measured_gram(self.model, self.task, self.examples, self.plan.max_bad_share, lambda: False)
        assert packed is not None
        total = Gram.unpacked(packed, head.in_features, self.task.num_outputs)
        return with_head(self.layout, first, name, total.solve(ridge))

    def _begin(self) -> None:
        """What any run's record begins with."""
        body = started(self.said, self.run, self.layout, self.plan, code_hash(), 1, False)
        self.book.record("run_started", body | {POOLED: True})
        for store, shelf in self.shelves.items():
            data = shelf.data(self.said.data)
            joined: dict[str, Any] = {"store": store, "counts": dict(data.counts), "cpus": 0.0, "gpu": None, "node": ""}
            joined |= {"data_bytes": shelf.num_bytes(self.said.data), "hash": data.content_hash}
            self.book.record("store_joined", joined)
            self.moved += training_bytes(joined["data_bytes"], dict(data.counts))

    def _work(self, version: int, steps: int, done: int) -> Work:
        plan = self.plan
        return Work(
            seed=ticket_seed(self.said.seed, POOLED, version),
            lr=plan.lr,
            schedule=schedules.build(plan.schedule),
            progress=(self._progress(done), self._progress(done + steps)),
            limits=Limits(plan.batch_size, steps, None, None, plan.max_bad_share),
        )

    def _progress(self, done: int) -> float:
        return min(1.0, done / self.until.steps) if self.until.steps else 0.0

    def _over(self, done: int, epoch: int) -> str:
        if self.until.steps is not None:
            return f"{done} steps" if done >= self.until.steps else ""
        if plateaued(self.scores, lower_is_better=self.falls):
            return f"plateau after {done} steps"
        return f"no plateau in {EPOCHS} epochs" if done >= EPOCHS * epoch else ""

    def _publish(self, version: int, outcome: Outcome | None, progress: float) -> None:
        vector = self.model.vector.cpu().numpy()
        self.book.write(version, vector, self.layout, {})
        elapsed = time.monotonic() - self.began
        body: dict[str, Any] = {"version": version, "parent": version - 1 if version else None}
        body |= {"hash": self.book.hash(vector), "at": time.time(), "elapsed_s": elapsed}
        body |= {"seconds": outcome.seconds if outcome else 0.0, "contributions": []}
        body |= {"bytes_up": 0 if version else self.moved, "bytes_down": 0, "bytes_total": self.moved}
        body |= {"step_norm": 0.0, "full_weight": 1.0, "statistic_mix": 1.0}
        if outcome is not None:
            part: dict[str, Any] = {
                "store": POOLED,
                "ticket": f"{version - 1}.{POOLED}",
                "base": version - 1,
                "staleness": 0,
            }
            part |= {"steps": outcome.steps, "examples": outcome.examples, "weight": 1.0, "share": 1.0}
            part |= {"seconds": outcome.seconds, "loss": outcome.loss, "bytes_up": 0}
            body["contributions"] = [part | {"progress": progress, "repeat": 0, "after": ""}]
        self.book.record("version_published", body)
        self.book.keep(version)
        self.book.prune(frozenset({version}), self.best[0] if self.best else None)

    def _judge(self, version: int) -> dict[str, float]:
        rows, found = self._everywhere("validation")
        if (score := found.get(self.metric)) is not None:
            self.scores.append(score)
            sign = -1.0 if self.falls else 1.0
            if self.best is None or sign * score > sign * self.best[1]:
                self.best = (version, score)
        body = {"version": version, "split": "validation", "metrics": found, "stores": rows}
        body |= {"num_examples": sum(int(row["num_examples"]) for row in rows.values())}
        self.book.record("evaluated", body | {"best": self.best is not None and self.best[0] == version})
        return {"version": float(version)} | found

    def _everywhere(self, split: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Each store's own metrics, and those of all stores' examples together."""
        rows: dict[str, dict[str, float]] = {}
        total: Counter[str] = Counter()
        for store, shelf in self.shelves.items():
            if not shelf.data(self.said.data).counts.get(split):
                continue
            examples = shelf.images(self.plan, self.task, split)
            judged = evaluate(self.model, self.task, examples, Control(), self.plan.max_bad_share, time.monotonic)
            assert judged is not None
            sums, num = judged
            rows[store] = {**metrics(sums, num), "num_examples": float(num)}
            total.update(sums)
        if not rows:
            raise StoreRefused(f"no store has a {split} split to judge by")
        return rows, metrics(total, sum(int(row["num_examples"]) for row in rows.values()))

    def _end(self, version: int, reason: str) -> None:
        """Test the best version once, and close the record."""
        best = self.best[0] if self.best else version
        self.model.load(self.book.read(best, self.layout))
        rows, test = self._everywhere("test") if self.said.evaluate.test else ({}, {})
        table = [
            {
                "store": store,
                "images": shelf.data(self.said.data).counts["train"],
                "data_bytes": shelf.num_bytes(self.said.data),
                "shared": rows.get(store, {}).get(self.metric),
                "alone": None,
            }
            for store, shelf in self.shelves.items()
        ]
        first = dict(sorted(test.items(), key=lambda pair: (pair[0] != self.metric, pair[0])))
        final: dict[str, Any] = {"best_version": best, "test": first, "table": table, "reason": reason}
        final |= {"judged": len(self.scores), "gained": gained(self.scores, lower_is_better=self.falls)}
        self.book.record("final", final)
        over = {"reason": reason, "status": "finished", "versions": version, "best_version": best, "at": time.time()}
        self.book.record("run_finished", over)
