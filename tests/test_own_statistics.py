"""Stores that judge with BatchNorm's statistics of their own: nothing more leaves, and no version is another."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_recalibration import SAID, images, measured, taken_up
from test_resume import make
from test_shell import NAMES, SitePort, config, records, run

from raypipe.coordinator.closing import Judged, conclude
from raypipe.coordinator.recalibration import Recalibrated
from raypipe.errors import ConfigError
from raypipe.models import build_for
from raypipe.models.flat import FlatModel
from raypipe.run import load_run
from raypipe.store.messages import Evaluation
from raypipe.tasks import tasks

ROOT = Path(__file__).resolve().parent.parent
ALL = 1000  # images, more than a store has
OWN: dict[str, Any] = {**SAID, "evaluate": {"metric": "loss", "own_statistics": ALL}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a run whose stores judge with their own, and of the same with the versions'."""
    made = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("shared")
    for home, said in zip(made, (OWN, {**SAID, "evaluate": {"metric": "loss"}}), strict=True):
        make(home / "stores")
        shell = run(config(**said), home, {name: SitePort(home / "stores" / name) for name in NAMES}).shell
        shell.publisher.book.close()
        shell.diary.close()
    return made


@pytest.fixture
def home(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(runs[0], tmp_path / "home")
    return tmp_path / "home"


def test_a_store_judges_with_the_statistics_of_its_own_images(home: Path) -> None:
    made, ports = taken_up(home, OWN)
    task, vector = tasks.build(made.config.task), made.read(2)
    model = FlatModel(build_for(task, made.config.model), made.stages.at(2).layout)
    for name, port in ports.items():
        model.load(vector)
        for norm in model._norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.module.train()
            model.module(task.prepare(torch.stack(images(port, made.plan, task))))  # one batch of all of them
            model.module.eval()
            held = port.site._shelf.images(made.plan, task, "validation")
            ((inputs, targets),) = held.batches([np.arange(held.num)], torch.device("cpu"), 0.0)
            mean = float(task.loss(model.module(task.prepare(inputs)), targets))
        told = port.site.evaluate(made.plan, vector, "validation")
        assert told.sums["loss"] / told.num_examples == pytest.approx(mean, rel=1e-4), name
        plain = port.site.evaluate(replace(made.plan, own_statistics=None), vector, "validation")
        assert abs(plain.sums["loss"] / plain.num_examples - mean) > 1e-3, "the version's own are others"


def test_the_versions_are_the_same_bytes_as_without(runs: tuple[Path, Path]) -> None:
    """Each ticket judges its base before it trains from it: what it measured for that must be gone by then."""
    own, shared = ([body["hash"] for body in records(home, "version_published")] for home in runs)
    assert own == shared
    losses = [[b["metrics"]["loss"] for b in records(home, "evaluated")] for home in runs]
    assert losses[0] != losses[1]


def test_what_is_exported_has_statistics_measured_anew_and_is_tested_beside(home: Path) -> None:
    """Those of the version are in no store's score; so it is the last version though it scores like the one before."""
    said = {**OWN, "evaluate": {**OWN["evaluate"], "recalibrate": ALL}}
    made, ports = taken_up(home, said)
    newest = made.machine.version
    assert measured(made, ports) == newest + 1
    judged = {body["version"]: body["metrics"]["loss"] for body in records(home, "evaluated")}
    best = min(loss for version, loss in judged.items() if version <= newest)
    assert judged[newest + 1] == pytest.approx(best, rel=1e-6)
    found = asyncio.run(_concluded(made, ports, newest + 1))
    of_stores = [row["shared"] for row in found.table]
    assert all(score is not None for score in of_stores)
    assert set(found.test) == set(found.exported) != set()
    assert found.test["loss"] != found.exported["loss"]
    plain = asyncio.run(_concluded(made, ports, newest + 1, own=False))
    assert plain.exported == {}
    assert plain.test == found.exported


def test_which_weights_are_exported_is_judged_with_the_statistics_that_are_exported() -> None:
    judged, exported = ({"a": Evaluation("a", "validation", 2, {"loss": loss}, 0.1)} for loss in (2.0, 6.0))
    found = Recalibrated(None, np.zeros(1, np.float32), judged=judged, exported=exported)
    assert found.score("loss") == 3.0
    assert found.evaluated(9)["metrics"] == {"loss": 1.0}, "versions are compared as stores judge them"


async def _concluded(made: Any, ports: Any, version: int, *, own: bool = True) -> Judged:
    plan = made.plan if own else replace(made.plan, own_statistics=None)
    about = {"seed": 0, "epoch": made.epoch, "best": made.read(version), "first": made.read(0)}
    return await conclude(ports, made.board, plan, **about, alone=False, test=True)


def test_what_it_does_not_go_with_is_one_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(ROOT / "configs/sync.yaml", ["evaluate.own_statistics=10", "evaluate.central=x", "train.local=[a*]"])
    assert [line for line in caught.value.problems if line.startswith("evaluate.own_statistics")] == [
        "evaluate.own_statistics: not with evaluate.central, which judges as no store does",
        "evaluate.own_statistics: not with train.local, by which stores keep statistics",
    ]
