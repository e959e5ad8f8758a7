"""The extra `ultralytics` without the package: a stand-in has its names, reads the environment and writes settings."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from raypipe.compose import started
from raypipe.models import models
from raypipe.plans import plan_of
from raypipe.run import initial_of, load_run
from raypipe.tasks import tasks

UTILS = """\
import json, os
from pathlib import Path

FILE = Path(os.environ["YOLO_CONFIG_DIR"]) / "Ultralytics" / "settings.json"
OFFLINE = os.environ.get("YOLO_OFFLINE")


class Settings(dict):
    def __init__(self):
        super().__init__({"sync": True, "mlflow": True, "uuid": "x"})
        if FILE.exists():
            super().update(json.loads(FILE.read_text()))
        self.save()

    def save(self):
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(self))

    def update(self, *what):
        super().update(*what)
        self.save()


SETTINGS = Settings()
"""
TASKS = """\
import torch


class DetectionModel(torch.nn.Module):
    def __init__(self, architecture, ch, nc, verbose):
        super().__init__()
        if architecture != "yolov5n.yaml":
            raise FileNotFoundError(architecture)
        self.conv = torch.nn.Conv2d(ch, 4 + nc, 1)

    def forward(self, images):
        return (self.conv(images).flatten(2),)

    def loss(self, batch):
        self.seen = batch
        return self.conv(batch["img"]).mean().repeat(3), None
"""
FILES = {
    "__init__.py": "",
    "cfg.py": "def get_cfg(): return None",
    "nn/__init__.py": "",
    "nn/tasks.py": TASKS,
    "utils/__init__.py": UTILS,
}
MINE = {"sync": True, "mlflow": True, "uuid": "the user's"}


def forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "ultralytics"]:
        del sys.modules[name]
    sys.modules.pop("raypipe.models.ultralytics_adapter", None)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The settings of a user who has the package; the stand-in is found in its place."""
    for name, text in FILES.items():
        file = tmp_path / "site" / "ultralytics" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    settings = tmp_path / "user" / "Ultralytics" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(MINE))
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "user"))
    for name in ("YOLO_OFFLINE", "YOLO_VERBOSE"):
        monkeypatch.setenv(name, "the user's")
    forget()
    yield settings
    forget()


def test_it_is_kept_off_line_and_has_a_folder_of_its_own(mine: Path) -> None:
    models.build({"name": "ultralytics"}, 2, 3, 64)
    utils: Any = importlib.import_module("ultralytics.utils")
    assert utils.OFFLINE == "true", "when it was imported"
    assert not utils.FILE.is_relative_to(mine.parent.parent)
    assert utils.FILE.exists(), "in the folder that we named"
    assert dict(utils.SETTINGS) == {"sync": False, "mlflow": False, "uuid": "x"}
    assert json.loads(mine.read_text()) == MINE
    folder = os.environ["YOLO_CONFIG_DIR"]
    models.build({"name": "ultralytics"}, 2, 3, 64)
    assert os.environ["YOLO_CONFIG_DIR"] == folder, "one a process"


def test_the_users_settings_stay_as_they_are_where_it_was_imported_before(mine: Path) -> None:
    utils: Any = importlib.import_module("ultralytics.utils")
    assert mine == utils.FILE
    models.build({"name": "ultralytics"}, 2, 3, 64)
    assert dict(utils.SETTINGS) == {"sync": False, "mlflow": False, "uuid": "the user's"}, "in this process"
    assert json.loads(mine.read_text()) == MINE


def test_its_loss_is_told_shares_of_the_image_sorted_by_image(mine: Path) -> None:
    module = models.build({"name": "ultralytics"}, 2, 3, 64)
    targets = torch.tensor([[1.0, 0, 32, 32, 16, 8], [0, 1, 16, 48, 32, 32]])
    module.loss(torch.rand(2, 3, 64, 64), targets).backward()
    seen = module.net.seen
    assert seen["batch_idx"].tolist() == [0, 1]
    assert seen["bboxes"].tolist() == [[0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 0.25, 0.125]]
    assert seen["cls"].tolist() == [[1], [0]]


def test_a_run_with_it_begins_its_record_with_the_licence(mine: Path) -> None:
    said = load_run(ROOT / "configs" / "shelves_detection.yaml", ["model=ultralytics"])
    layout, _ = initial_of(said, tasks.build(said.task))
    body = started(said, "r", layout, plan_of(said, "r", layout), "code", 1, False)
    assert "AGPL-3.0" in body["licence"]
    own = load_run(ROOT / "configs" / "shelves_detection.yaml")
    layout, _ = initial_of(own, tasks.build(own.task))
    assert "licence" not in started(own, "r", layout, plan_of(own, "r", layout), "code", 1, False)
