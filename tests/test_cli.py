"""The command line as somebody uses it: what it says, and how it says no."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def raypipe(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raypipe", *arguments]
    env = {**os.environ, "RAYPIPE_HOME": str(home), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_check_says_what_would_run_where_and_what_it_would_move(tmp_path: Path) -> None:
    done = raypipe("check", "configs/quickstart.yaml", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "harbour" in done.stdout
    assert "105,962 parameters; for each update 0.42 MB down and 0.42 MB up" in done.stdout
    assert "less than pooling from" in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing was started or written"


def test_all_mistakes_are_shown_together_with_exit_code_2(tmp_path: Path) -> None:
    wrong = ["pace=fedbuf", "train.lr=-1", "trian.lr=2", "model=smal_cnn", "server.lr=x"]
    done = raypipe("train", "--set", *wrong, home=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("raypipe: ") for line in lines)
    assert "Did you mean 'fedbuff'?" in done.stderr
    assert "Did you mean 'small_cnn'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "configs/quikstart.yaml"), "quickstart.yaml"),
        (("versions", "nope"), "no run named 'nope'"),
        (("compare", "nope", "last"), "no run named 'nope'"),
        (("promote", "nope", "3"), "no run named 'nope'"),
        (("classes", "nope"), "no run named 'nope'"),
        (("classes", "nope", "--merge", "boot"), "write OLD=NEW"),
        (("classes", "nope", "--at-version", "3"), "say what changes then"),
        (("predict", "nope:x", "a.png"), "RUN:VERSION"),
        (("predict", "models:/nope@champion", "a.png"), "nope"),
        (("rollback", "nope"), "nope"),
        (("track", "nope"), "no run named 'nope'"),
        (("stop", "last"), "no run named 'last'"),
        (("ledger", "verify", "nope"), "no run named 'nope'"),
        (("ledger", "revoke", "nope"), "store nope has no key"),
        (("evidence", "nope"), "no run named 'nope'"),
    ],
)
def test_a_mistyped_command_gets_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = raypipe(*arguments, home=tmp_path)
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr


def test_a_users_own_model_and_loss_come_in_by_entry_point(tmp_path: Path) -> None:
    own = str(ROOT / "tests" / "own_parts")
    own_parts = ["model=own_linear", "task.loss=own_squared", "model.dropout=0.1"]
    done = raypipe("check", "--set", *own_parts, home=tmp_path, PYTHONPATH=own)
    assert done.returncode == 0, done.stderr
    assert "7,850 parameters" in done.stdout
    assert raypipe("check", "--set", *own_parts, home=tmp_path).returncode == 2, "without the package it is unknown"


def test_private_store_data_sets_are_made_once(tmp_path: Path) -> None:
    out = tmp_path / "stores"
    for _ in range(2):
        done = raypipe("data", "--out", str(out), "--set", "local.max_images=600", home=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"city-centre", "mall", "suburb", "outlet", "harbour"}
    assert "harbour" in done.stdout
