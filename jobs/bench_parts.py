"""Parts of raypipe, measured for jobs/bench.py: folding over memory bandwidth, and the coordinator without training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raypipe.aggregation.global_model import GlobalModel
from raypipe.aggregation.transforms import transforms
from raypipe.compose import compose, new_machine
from raypipe.config.load import to_dict
from raypipe.config.schema import RunConfig
from raypipe.coordinator.actions import Publish
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.loop import drive
from raypipe.run import new_run_id
from raypipe.store import messages as msg
from raypipe.tracking.journal import Journal
from raypipe.types import Layout, Role

WARM = 10  # versions before this one are start-up, where versions are short
FLOATS = 25_000_000  # an update of 100 MB
READY = 10  # updates folded at once
ALONE = 4  # updates in the object store, folded one after the other: an even number, so that all are added


# -- folding --------------------------------------------------------------------------------------------------


def fold_ratios(num_pairs: int) -> list[tuple[float, float]]:
    """GB/s (read, folded) of ten ready updates; reads and folds alternate, as bandwidth here comes and goes."""
    updates = _updates(READY)
    model = _model()
    return _pairs(num_pairs, updates, lambda: _fold(model, updates), READY)


def fold_single_ratios(num_pairs: int) -> list[tuple[float, float]]:
    """The same, one update at a time, from the object store without a copy. Reads are of ordinary memory."""
    import ray

    updates = _updates(ALONE)
    refs = [ray.put(update) for update in updates]
    model = _model()
    for ref in refs:  # a coordinator's view of the store is mapped once, at its first versions
        ray.get(ref).sum()

    def fold() -> None:
        for ref in refs:
            _fold(model, [ray.get(ref)])

    return _pairs(num_pairs, updates, fold, ALONE)


def _updates(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(FLOATS, np.float32) for _ in range(count)]


def _model() -> GlobalModel:
    layout = Layout.of([("weights", (FLOATS,), "float32", Role.SHARED)])
    transform = transforms.build({"name": "sgd"})
    return GlobalModel(layout, np.zeros(FLOATS, np.float32), transform, how=[], normalise="sum", threads=2)


def _fold(model: GlobalModel, updates: Sequence[np.ndarray]) -> None:
    if model.fold([(update, 1.0, None) for update in updates]):
        raise RuntimeError("an update was refused")


def _pairs(
    count: int, updates: Sequence[np.ndarray], fold: Callable[[], None], num_folded: int
) -> list[tuple[float, float]]:
    """GB/s of `count` pairs; reads take turns over all updates, which no cache can hold."""
    tensors = [torch.from_numpy(update) for update in updates]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    found = []
    for _ in range(count + 2):
        read = len(tensors) * 4e-9 * FLOATS / seconds(lambda: [tensor.sum() for tensor in tensors])
        folded = num_folded * 4e-9 * FLOATS / seconds(fold)
        found.append((read, folded))
    torch.set_num_threads(threads)
    return found[2:]  # the first ones touch new memory


# -- the coordinator ------------------------------------------------------------------------------------------


class NoStore:
    """A store in this process that answers at once; all its updates are the same."""

    def __init__(self, store: str, data: str, update: np.ndarray) -> None:
        self._store, self._data, self._update = store, data, update

    async def join(self) -> msg.Card:
        counts = {self._data: {"train": 200, "validation": 33}}
        parts: dict[str, Any] = {"tasks": (), "models": (), "data_hashes": {}, "limits": {}}
        return msg.Card(self._store, msg.PROTOCOL, counts, cpus=1.0, gpu=None, node="here", process=0, **parts)

    def waiting_for(self, waited_s: float) -> str:
        return ""

    async def train(
        self, ticket: msg.Ticket, plan: bytes, weights: Any, how: list[msg.Part] | None = None
    ) -> msg.Report:
        judged = await self.evaluate(plan, weights, ticket.evaluate) if ticket.evaluate else None
        numbers = {"steps": 7, "examples": 200, "num_train": 200, "skipped": 0, "seconds": 0.01, "loss": 1.0}
        about: dict[str, Any] = {**numbers, "update_bytes": self._update.nbytes, "stopped": "done"}
        return msg.Report(ticket.id, self._store, ticket.version, evaluation=judged, **about)

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        return self._update

    async def evaluate(self, plan: bytes, weights: Any, split: str) -> msg.Evaluation:
        return msg.Evaluation(self._store, split, 33, {"loss": 33.0, "accuracy": 11.0}, 0.01)

    def settle(self, verdict: msg.Verdict) -> None:
        pass

    def tell(self) -> None:
        pass

    def control(self, ticket: str, command: msg.Command) -> None:
        pass

    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]:
        await asyncio.Event().wait()
        return False, ""

    def kill(self) -> None:
        pass

    async def release(self) -> None:
        pass


def coordinator_ms(config: RunConfig, home: Path) -> float:
    """Milliseconds per update in published versions: machine, shell, fold, step, journal, weights, Ray's store."""
    import ray

    run = new_run_id(config.name, time.time())
    made = compose(to_dict(config), run, home=str(home), put=ray.put)
    asyncio.run(_drive(made))
    versions = [r.body for r in Journal(made.folder / "journal.sqlite").read(kinds=["version_published"])][WARM:]
    updates = sum(len(version["contributions"]) for version in versions[1:])
    return 1000 * float(versions[-1]["at"] - versions[0]["at"]) / updates


async def _drive(made: Any) -> None:
    """What the coordinator's actor does, without its actors."""
    shell = made.shell
    await asyncio.to_thread(shell.publisher.begin)
    update = np.full(shell.publisher.model.layout.update_size, 1e-6, np.float32)
    tasks = [asyncio.create_task(shell.run_lane())]
    for store in made.config.stores:
        port = NoStore(store.id, made.config.data, update)
        tasks.append(asyncio.create_task(shell.keep(store.id, port, 5.0, 5.0)))
    try:
        await drive(made.machine, shell.perform, shell.inbox, shell.clock, shell.note, made.first)
    finally:
        for task in tasks:
            task.cancel()


# -- the record -----------------------------------------------------------------------------------------------


def record_seconds(run: Path, config: RunConfig, folder: Path) -> float:
    """What noting and journaling took in a run: all of it is written once more, by the same code on the same disk."""
    found = Diary(run).read()
    assert found is not None, "a run begins with a checkpoint"
    machine = new_machine(config)
    machine.recall(found.memory)
    noted = [(event, machine.handle(event)) for event in found.events]
    records = list(Journal(run / "journal.sqlite").read())
    folder.mkdir()
    diary, journal = Diary(folder), Journal(folder / "journal.sqlite", write=True)
    start = time.perf_counter()
    diary.checkpoint(found.memory)
    for event, actions in noted:
        diary.note(event, actions)
        if any(isinstance(action, Publish) for action in actions):
            diary.sync()
    for record in records:
        journal.append(record.kind, record.body, record.at)
    seconds = time.perf_counter() - start
    diary.close()
    journal.close()
    return seconds
