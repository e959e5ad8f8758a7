"""The arms of the comparison, each a configuration of raypipe or an opponent, and what one run of one comes to.

Time: the pooled machine is as fast as the fastest store, and begins when the slowest upload of images is there. Alone,
each store trains for the whole time. A pass for the closed-form head costs a third of a training pass.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from compare_clock import DOWN, STEP_S, UP, Clockwork, Look, Trace, epoch_steps, teach
from compare_world import IDS, TASK, TWIN, Scale, World

from raypipe.aggregation.closed_form import Gram
from raypipe.compose import initial_model
from raypipe.config.schema import RunConfig
from raypipe.errors import StoreError
from raypipe.models.flat import FlatModel, with_head
from raypipe.models.heads import head_of
from raypipe.store.batches import Images
from raypipe.store.measure import measured_gram
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits
from raypipe.store.seeds import ticket_seed
from raypipe.tracking.plateau import plateaued

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
MODEL = {"name": "small_cnn", "width": 8, "hidden": 32}
WIDE = {"name": "small_cnn", "width": 16, "hidden": 512}  # random features for the closed-form head
BATCH = 32
NUM_CLASSES = 10
LRS = (0.01, 0.03, 0.1)
RIDGES = (1e-4, 1e-2, 1.0)  # as many trials for the closed form
LONGEST = 4.0  # times the others' seconds that the pooled arm may go on until its plateau
FEDERATED: dict[str, dict[str, Any]] = {
    "wait for all": {"pace": "wait_for_all", "train": {"local_epochs": 1}},
    "k of n": {"pace": "k_of_n", "train": {"local_epochs": 1}},
    "paced": {"pace": "paced"},
    "paced with control variates": {"pace": "paced", "train": {"control_variates": True}},
    "FedBuff, long tickets": {"pace": "fedbuff", "train": {"local_epochs": 1}},
    "FedBuff, short tickets": {"pace": "fedbuff", "train": {"local_epochs": 0.2}},
}
ARMS = ("alone", "pooled", *FEDERATED, "closed form")


@dataclass(frozen=True, slots=True)
class Unit:
    """One run of one arm. `rate`: the learning rate, or the ridge of the closed form."""

    arm: str
    split: str
    seed: int
    rate: float
    scale: Scale
    judge_by: str = "test"
    twin_slowness: float = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """A unit's trace; the worst store's accuracy at the end, on classes as it has them; recall of the twin's own."""

    unit: Unit
    trace: Trace
    worst_store: float
    own_recall: float
    cpu_s: float = field(default=0.0, compare=False)  # that it took here

    @property
    def quality(self) -> float:
        """Of the last fifth of the looks: what somebody gets who stops at the end, whenever that is."""
        late = [look.quality for look in self.trace.looks]
        return float(np.mean(late[-max(1, len(late) // 5) :]))

    @property
    def worst_late(self) -> float:
        """The worst look of the last third."""
        late = [look.quality for look in self.trace.looks]
        return min(late[-max(1, len(late) // 3) :])

    def reached(self, target: float) -> Look | None:
        """The first look that is at least as good."""
        return next((look for look in self.trace.looks if look.quality >= target), None)


def rates(arm: str) -> tuple[float, ...]:
    """The trials of an arm: equally many for each."""
    return RIDGES if arm == "closed form" else LRS


def run(unit: Unit) -> Result:
    """One run, alone in its process and thread."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    world = _world(unit.split, unit.seed, unit.scale, unit.judge_by, unit.twin_slowness)
    said = configuration(unit)
    own = {"alone": _alone, "pooled": _pooled, "closed form": _closed_form}
    trace = own[unit.arm](unit, world, said) if unit.arm in own else _federated(unit, world, said)
    last = trace.looks[-max(1, len(trace.looks) // 5) :]
    recalls = np.mean([look.recalls for look in last], axis=0)
    worst = float((world.mixes @ recalls).min()) if trace.worst_store is None else trace.worst_store
    own_recall = float(np.mean([recalls[c] for c in world.own]))
    return Result(unit, trace, worst, own_recall, time.process_time() - began)


def configuration(unit: Unit) -> RunConfig:
    """As it would be written in YAML."""
    changes = FEDERATED.get(unit.arm, {})
    rate = LRS[0] if unit.arm == "closed form" else unit.rate
    train = {"lr": rate, "batch_size": BATCH, "optimizer": {"name": "sgd", "momentum": 0.9}}
    said = {
        "name": "compare",
        "seed": unit.seed,
        "task": TASK,
        "model": WIDE if unit.arm == "closed form" else MODEL,
        "stores": [{"id": store} for store in IDS],
        "pace": "paced",
        "stop": {"max_seconds": unit.scale.seconds},
        "evaluate": {"every": 10**6},
    }
    return RunConfig.model_validate({**said, **changes, "train": {**train, **changes.get("train", {})}})


@lru_cache(maxsize=2)
def _world(split: str, seed: int, scale: Scale, judge_by: str, twin_slowness: float) -> World:
    return World(split, seed, scale, judge_by=judge_by, twin_slowness=twin_slowness)


def _federated(unit: Unit, world: World, said: RunConfig) -> Trace:
    model, judged = world.model(said.model), world.model(said.model)

    def judge(vector: Array) -> tuple[float, ...]:
        judged.load(vector)
        return world.recalls(judged)

    return Clockwork(said, world.stores, model, world.task, judge).run(unit.scale.every_s)


def _pooled(unit: Unit, world: World, said: RunConfig) -> Trace:
    """To its plateau, and at least as long as the others."""
    trace, model, images = Trace(versions=0), world.model(said.model), world.pooled
    model.load(initial_model(said).vector)
    optimizer = optimizers.build(said.train.optimizer)(model.trained)
    moved, begin = round(sum(world.pooling_bytes)), max(world.pooling_bytes) / UP
    most = LONGEST * unit.scale.seconds
    at, done = unit.scale.every_s, 0
    while at <= most + 1e-9:
        wanted = math.floor(max(0.0, at - begin) / STEP_S)
        if wanted > done:
            seed = ticket_seed(unit.seed, "pooled", trace.versions)
            _count(trace, teach_steps(said, model, world, images, wanted - done, seed, optimizer))
            trace.versions, done = trace.versions + 1, wanted
        trace.looks.append(Look(at, world.recalls(model), up=moved))
        if at >= unit.scale.seconds - 1e-9 and plateaued([look.quality for look in trace.looks]):
            break
        at += unit.scale.every_s
    return trace


def _alone(unit: Unit, world: World, said: RunConfig) -> Trace:
    """Each store by itself: the mean of their models' recalls, at four moments. Nothing moves."""
    trace, model = Trace(), world.model(said.model)
    first, quarter = initial_model(said).vector, unit.scale.seconds / 4
    recalls = np.zeros((4, len(IDS), NUM_CLASSES))
    for place, store in enumerate(IDS):
        model.load(first)
        optimizer = optimizers.build(said.train.optimizer)(model.trained)
        steps = max(1, math.floor(quarter / (STEP_S * world.stores.slowness[store])))
        for moment in range(4):
            seed = ticket_seed(unit.seed, f"{store}/alone", moment)
            _count(trace, teach_steps(said, model, world, world.stores.images[store], steps, seed, optimizer))
            recalls[moment, place] = world.recalls(model)
    trace.worst_store = float((world.mixes * recalls[-1]).sum(1).min())
    trace.looks = [Look(quarter * (n + 1), tuple(row.tolist())) for n, row in enumerate(recalls.mean(1))]
    return trace


def _closed_form(unit: Unit, world: World, said: RunConfig) -> Trace:
    """One pass and one upload a store; the head is there when the slowest has sent its sums."""
    trace, model, start = Trace(versions=1), world.model(said.model), initial_model(said)
    first, layout = start.vector.copy(), start.layout
    model.load(first)
    name, head = head_of(model.module, NUM_CLASSES)
    total, ready, up = Gram.zero(head.in_features, NUM_CLASSES), 0.0, 0
    for store in IDS:
        images = world.stores.images[store]
        packed = measured_gram(model, world.task, images, 0.0, lambda: False)
        assert packed is not None
        total, up = total + Gram.unpacked(packed, head.in_features, NUM_CLASSES), up + packed.nbytes
        passed = epoch_steps(images, BATCH) * STEP_S / 3 * world.stores.slowness[store]
        ready = max(ready, 4 * layout.size / DOWN + passed + packed.nbytes / UP)
        trace.images += images.num
    before = world.recalls(model)
    model.load(with_head(layout, first, name, total.solve(unit.rate)))
    after, down = world.recalls(model), 4 * layout.size * len(IDS)
    moments = np.arange(1, int(unit.scale.seconds / unit.scale.every_s + 1e-9) + 1) * unit.scale.every_s
    trace.looks = [Look(float(at), after if at >= ready else before, up if at >= ready else 0, down) for at in moments]
    if ready <= unit.scale.seconds:  # the moment itself, between two looks
        trace.looks = sorted([*trace.looks, Look(ready, after, up, down)], key=lambda look: look.at)
    return trace


def teach_steps(
    said: RunConfig, model: FlatModel, world: World, images: Images, steps: int, seed: int, optimizer: Any
) -> tuple[int, int]:
    """So many steps with an optimizer that is kept: steps and images; none where the loss is not finite any more."""
    limits = Limits(said.train.batch_size, steps, None, None, 0.0)
    try:
        outcome = teach(said, model, world.task, images, limits, seed, optimizer=optimizer)
    except StoreError:
        return 0, 0
    return outcome.steps, outcome.examples


def _count(trace: Trace, done: tuple[int, int]) -> None:
    trace.steps, trace.images = trace.steps + done[0], trace.images + done[1]


def twins(unit: Unit) -> tuple[Unit, Unit]:
    """The same data at a store as fast as the fastest, and at one ten times slower."""
    return replace(unit, split="twin", twin_slowness=1.0), replace(unit, split="twin", twin_slowness=10.0)


__all__ = ["ARMS", "FEDERATED", "TWIN", "Result", "Scale", "Unit", "rates", "run", "twins"]
