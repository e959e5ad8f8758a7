"""Kill a whole run at any moment and take it up again: real processes, real sites, no Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_shell import NAMES, SitePort, config, run

from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.errors import RunError
from raypipe.ledger.verify import read_saved, verify
from raypipe.replay import Replay
from raypipe.tracking.journal import Journal
from raypipe.tracking.lineage import read_history
from raypipe.tracking.versions import VersionStore

LONG = {"local_steps": 4, "batch_size": 16, "optimizer": {"name": "sgd", "momentum": 0.9}, "keep_optimizer": True}


def make(folder: Path) -> None:
    split = {"name": "iid"}
    make_stores(folder, NAMES, source=load_sample(), split=split, size_ratio=2.0, camera_shift=0.0, max_images=300)


def child(said: dict[str, Any], home: str, stores: str) -> None:
    """The whole federation in one process, for as long as it is let."""
    run(said, Path(home), {name: SitePort(Path(stores) / name, fresh=False) for name in NAMES})


def start(said: dict[str, Any], home: Path, stores: Path) -> subprocess.Popen[str]:
    code = f"import test_resume as t, json; t.child(json.loads({json.dumps(said)!r}), {str(home)!r}, {str(stores)!r})"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


def last_record(home: Path) -> int:
    file = home / "runs" / "run" / "journal.sqlite"
    try:
        return Journal(file).last() if file.is_file() else 0
    except RunError:  # it is being made
        return 0


def kill_and_resume(said: dict[str, Any], home: Path, stores: Path, seed: int, kills: int) -> int:
    """Run to the end, killed again and again once it has moved; how often it was."""
    chance = random.Random(seed)
    for killed in range(kills + 1):
        before, child_ = last_record(home), start(said, home, stores)
        moved = before + chance.randint(3, 9)  # records that it may write before it dies, then some milliseconds
        while killed < kills and child_.poll() is None and last_record(home) < moved:
            time.sleep(0.02)
        if killed < kills and child_.poll() is None:
            time.sleep(chance.random() * 0.2)
            os.kill(child_.pid, signal.SIGKILL)
            child_.wait()
            continue
        errors = child_.communicate(timeout=120)[1]
        assert child_.returncode == 0, errors
        return killed
    raise AssertionError


def assert_ledger_holds(home: Path, signed: int) -> None:
    """By itself and against the heads that each store kept; every update is in it once, signed."""
    kept = [read_saved(file) for file in sorted(home.glob("stores/*/heads/run.heads.jsonl"))]
    found = verify(home / "runs" / "run", kept)
    assert len(kept) == len(NAMES)
    assert found.ok, found.problems
    assert not any("unsigned" in note.line for note in found.notes)
    assert found.counts["update"] == signed


def check_record(home: Path) -> None:
    """Each of the machine's records is there once, and what is there makes the same versions again."""
    told = [r.body["told"] for r in Journal(home / "runs" / "run" / "journal.sqlite").read() if "told" in r.body]
    assert told == list(range(1, len(told) + 1))
    assert [m.version for m in Replay(home / "runs" / "run", home / "stores").versions() if not m.same] == []


@pytest.mark.parametrize(
    ("server", "train"),
    [("sgd", LONG), ("adam", {**LONG, "control_variates": True, "local": "norms"})],
    ids=["sgd", "adam, control variates and norm layers of their own"],
)
def test_a_run_killed_anywhere_ends_with_the_bytes_of_one_never_killed(
    server: str, train: dict[str, Any], tmp_path: Path
) -> None:
    said = config(train=train, server=server, stop={"max_versions": 6}, track={"mlflow": False, "keep_last": 100})
    for name in ("calm", "killed"):
        make(tmp_path / name / "stores")
    assert kill_and_resume(said, tmp_path / "calm", tmp_path / "calm" / "stores", 0, 0) == 0
    assert kill_and_resume(said, tmp_path / "killed", tmp_path / "killed" / "stores", 7, 4) >= 2
    calm, killed = (read_history(tmp_path / name / "runs" / "run") for name in ("calm", "killed"))
    for name in ("calm", "killed"):
        assert_ledger_holds(tmp_path / name, signed=18)
    assert [v["hash"] for v in killed.versions.values()] == [v["hash"] for v in calm.versions.values()]
    assert list(killed.versions) == list(range(7))
    for name in ("calm", "killed"):
        check_record(tmp_path / name)
    weights = [VersionStore(tmp_path / name / "runs" / "run" / "versions").read(6) for name in ("calm", "killed")]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_an_asynchronous_run_killed_anywhere_counts_each_update_once(tmp_path: Path) -> None:
    stop = {"max_versions": 12}
    said = config(
        train={**LONG, "keep_optimizer": False, "control_variates": True}, pace="fedbuff", pacing={"buffer_size": 2},
        stop=stop,
        track={"mlflow": False, "keep_last": 100},
    )  # fmt: skip
    make(tmp_path / "stores")
    assert kill_and_resume(said, tmp_path, tmp_path / "stores", 3, 4) >= 2
    history = read_history(tmp_path / "runs" / "run")
    assert list(history.versions) == list(range(13))
    tickets = [c["ticket"] for v in history.versions.values() for c in v["contributions"]]
    assert len(tickets) == len(set(tickets))
    assert all(c["staleness"] >= 0 for v in history.versions.values() for c in v["contributions"])
    assert_ledger_holds(tmp_path, signed=len(tickets))
    check_record(tmp_path)
