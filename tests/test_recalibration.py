"""Statistics measured anew at a run's end: those of one batch of all stores' images, and a version like any other."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_chaos_reader import read_run
from test_replay import verify
from test_resume import make
from test_shell import NAMES, SitePort, config, records, run

from raypipe.aggregation.statistics import pooled
from raypipe.cli import main
from raypipe.compose import compose
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.recalibration import last_version
from raypipe.errors import StoreError
from raypipe.models import build_for
from raypipe.models.flat import FlatModel
from raypipe.run import check, load_run
from raypipe.store import messages as msg
from raypipe.store.messages import Plan
from raypipe.tasks import tasks
from raypipe.types import Role

ROOT = Path(__file__).resolve().parent.parent
SAID: dict[str, Any] = {
    "model": {"name": "small_cnn", "width": 8, "norm": "batch"},
    "train": {"local_steps": 2, "batch_size": 16, "lr": 0.01},
    "evaluate": {"metric": "loss", "recalibrate": 1000},
    "track": {"mlflow": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that has its updates' versions, and whose stores are there."""
    home = tmp_path_factory.mktemp("trained")
    make(home / "stores")
    made = run(config(**SAID), home, {name: SitePort(home / "stores" / name) for name in NAMES})
    made.shell.publisher.book.close()
    made.shell.diary.close()
    return home


class Again(SitePort):
    """Of a run that is taken up; `fails`: from this question on."""

    def __init__(self, home: Path, fails: int | None = None) -> None:
        super().__init__(home, fresh=False)
        self.asked, self.fails = 0, fails

    async def measure(self, plan: bytes, weights: Any, what: str, known: Any = None) -> np.ndarray:
        self.asked += 1
        if self.fails is not None and self.asked >= self.fails:
            raise StoreError("its disk is on fire")
        return await self._ask("measure", msg.expect(msg.Plan, plan), weights, what, self.epoch, known)


def taken_up(home: Path, said: dict[str, Any] = SAID, **fails: int) -> tuple[Composition, dict[str, Any]]:
    made = compose(config(**said), "run", home=str(home), put=lambda vector: vector.copy())
    ports: dict[str, Any] = {name: Again(home / "stores" / name, fails.get(name)) for name in NAMES}
    for port in ports.values():
        port.epoch = made.epoch
    return made, ports


def measured(made: Composition, ports: dict[str, Any]) -> int:
    best = made.machine.scores.best
    assert best is not None
    made.begin()
    try:
        return asyncio.run(last_version(made, ports, best[0], lambda vector: vector.copy()))
    finally:
        for port in ports.values():
            port.site.close()
        made.shell.publisher.book.close()
        made.shell.diary.close()
        if made.notary is not None:
            made.notary.finish()


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "home")
    return tmp_path / "home"


def test_the_last_version_has_the_statistics_of_one_batch_of_all_stores_images(home: Path) -> None:
    made, ports = taken_up(home)
    newest = made.machine.version
    assert measured(made, ports) == newest + 1
    layout, found = made.stages.at(newest).layout, made.read(newest + 1)
    (version,) = [b for b in records(home, "version_published") if b.get("recalibrated")]
    stores = version["recalibrated"]["stores"]
    assert (version["version"], version["contributions"], set(stores)) == (newest + 1, [], set(NAMES))
    base = made.read(version["recalibrated"]["of"])
    assert np.array_equal(found[layout.shared], base[layout.shared])
    task = tasks.build(made.config.task)
    model = FlatModel(build_for(task, made.config.model), layout)
    model.load(base)
    pixels = [image for port in ports.values() for image in images(port, made.plan, task)]
    assert len(pixels) == sum(stores.values())
    for norm in model._norms:
        norm.momentum = 1.0
    model.module.train()
    with torch.no_grad():
        model.module(task.prepare(torch.stack(pixels)))
    for entry in (e for e in layout.entries if e.role is Role.STATISTIC):
        of_batch = model.vector[entry.slice].numpy()
        assert np.allclose(found[entry.slice], of_batch, rtol=5e-3, atol=1e-5), entry.name


def images(port: Any, plan: Plan, task: Any) -> list[torch.Tensor]:
    split = port.site._shelf.images(plan, task, "train")
    (batch,) = split.batches([np.arange(split.num)], torch.device("cpu"), 0.0)
    return list(batch[0])


def test_it_is_in_ledger_and_replay_like_any_other(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = measured(*taken_up(home))
    judged = {body["version"]: body for body in records(home, "evaluated")}
    assert judged[newest]["best"]
    assert judged[newest]["metrics"]["loss"] < min(b["metrics"]["loss"] for v, b in judged.items() if v < newest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPIPE_HOME", str(home))
        assert main(["ledger", "verify", "run"]) == 0, capsys.readouterr()
    assert read_run(home / "runs" / "run") == []
    assert verify(home) == 0, capsys.readouterr()
    assert f"{newest + 1} versions made again" in capsys.readouterr().out


def test_a_coordinator_that_died_after_it_measures_again_and_comes_to_the_same(home: Path) -> None:
    newest = measured(*taken_up(home))
    (first,) = [b for b in records(home, "version_published") if b.get("recalibrated")]
    made, ports = taken_up(home)
    assert [b["version"] for b in records(home, "version_withdrawn")] == [newest]
    assert made.machine.version == newest - 1
    assert measured(made, ports) == newest
    assert [b["hash"] for b in records(home, "version_published") if b.get("recalibrated")] == [first["hash"]] * 2
    assert read_run(home / "runs" / "run") == []
    assert verify(home) == 0


def test_who_fails_is_left_out_and_where_all_fail_the_best_version_stays(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "other")
    made, ports = taken_up(home, a=2)
    measured(made, ports)
    (version,) = [b for b in records(home, "version_published") if b.get("recalibrated")]
    assert set(version["recalibrated"]["stores"]) == {"b", "c"}
    assert ports["a"].asked == 2
    made, ports = taken_up(tmp_path / "other", a=1, b=1, c=1)
    best = made.machine.scores.best
    assert best is not None
    assert measured(made, ports) == best[0]
    assert not [b for b in records(tmp_path / "other", "version_published") if b.get("recalibrated")]


def test_the_running_average_is_a_version_where_it_is_the_best(tmp_path: Path) -> None:
    """A liar throws the last version far off; the average has little of it. There are no statistics to be measured."""
    first, home, told = tmp_path / "first", tmp_path / "home", list[int]()
    make(first / "stores")

    def lie(update: np.ndarray) -> np.ndarray:
        told.append(1)
        return update if len(told) < 10 else -9 * update

    said = {**SAID, "model": {"name": "small_cnn", "width": 8}, "server": {"name": "ema", "decay": 0.8, "ramp": 1.0}}
    said |= {"evaluate": {"metric": "loss", "every": 10}, "stop": {"max_versions": 10}, "ledger": {"keep": False}}
    said |= {"train": {"local_steps": 4, "batch_size": 16, "lr": 0.05}}
    ports = {name: SitePort(first / "stores" / name, lie if name == "a" else None) for name in NAMES}
    average = run(config(**said), first, ports).shell.publisher.model.average
    shutil.copytree(first, home)
    made, again = taken_up(home, said)
    assert measured(made, again) == 11
    (version,) = [b for b in records(home, "version_published") if b.get("recalibrated")]
    assert version["recalibrated"] == {"of": None, "images": 0, "stores": {}}
    assert np.array_equal(made.read(11), average)
    assert read_run(home / "runs" / "run") == []


def test_what_cannot_be_measured_is_refused(home: Path) -> None:
    made, ports = taken_up(home)
    site, plan, vector = ports["a"].site, made.plan, made.read(0)
    small = np.zeros(3, np.float32)
    for what, known, said in (
        ("statistics:10:nowhere", None, "the model has no layer 'nowhere'"),
        ("statistics:0:1", None, "what is to be measured is moments, or gram or statistics of a model"),
        ("statistics:10:1", small, r"statistics are float32 of shape \(3,\), not float32"),
    ):
        with pytest.raises(StoreError, match=said):
            site.measure(plan, vector, what, known=known)
    site.policy = site.policy.model_copy(update={"measures": ["gram"]})
    with pytest.raises(StoreError, match="does not allow to measure 'statistics'"):
        site.measure(plan, vector, "statistics:10:1")
    assert check(load_run(ROOT / "configs/sync.yaml", ["evaluate.recalibrate=10"])), (
        "a model without any has none to do"
    )


def test_each_store_counts_by_its_images_and_the_spread_between_stores_counts_too() -> None:
    sums = {"a": np.array([4.0, 4.0, 4.0]), "b": np.array([2.0, 6.0, 18.0])}  # all 1; all 3
    found = pooled(sums, {"a": 30, "b": 10})
    assert found is not None
    assert np.allclose(found, [[1.5], [0.75]])
    assert pooled({"a": np.array([4.0, np.nan, 4.0])}, {"a": 1}) is None
    assert pooled({"a": sums["a"], "b": np.zeros(5)}, {"a": 1, "b": 1}) is None
