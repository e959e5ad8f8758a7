"""The command line as somebody uses it: what it says, and how it says no."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from raypipe.cli import main
from raypipe.config.shipped import shipped
from raypipe.data_verbs import NAMED


def raypipe(*arguments: str, home: Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raypipe", *arguments]
    env = {**os.environ, "RAYPIPE_HOME": str(home), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


ENDED = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot ..."
RETRIED = "Task Coordinator.work failed. There are infinite retries remaining, so the task will be retried."
MEMORY = "1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons"


def test_of_what_ray_says_by_itself_only_what_no_line_of_the_run_says_is_shown() -> None:
    said = "; ".join(
        f"worker.print_to_stdstream({{'lines': [{line!r}], 'pid': 'raylet', 'is_err': False}}, False)"
        for line in (ENDED, RETRIED, MEMORY)
    )
    code = f"import raypipe.cli; from ray._private import worker; {said}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert [line.partition(" ")[2] for line in done.stdout.splitlines()] == [MEMORY]


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


def test_what_comes_with_raypipe_is_found_from_any_working_directory(tmp_path: Path) -> None:
    few = [f"local.scenes.{split}=12" for split in ("train", "validation", "test")]
    said = ("data", "shelves", "--out", str(tmp_path / "stores"), "--set", *few)
    done = raypipe(*said, home=tmp_path, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert {p.parent.parent.parent.name for p in (tmp_path / "stores").glob("*/data/shelves/train.parquet")} == {
        "city-centre", "mall", "suburb", "harbour"
    }  # fmt: skip


def test_configurations_lie_beside_the_package_or_in_a_wheel_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert inside["force-include"] == {"configs": "raypipe/configs"}, "what a wheel has them from, and where"
    for name in NAMED.values():
        assert shipped(name).is_file()
        assert shipped(name).is_relative_to(ROOT)
    package = tmp_path / "site" / "raypipe"
    (package / "configs").mkdir(parents=True)
    (tmp_path / "site" / "configs").mkdir()
    monkeypatch.setattr("raypipe.__file__", str(package / "__init__.py"))
    assert shipped("sync.yaml") == package / "configs" / "sync.yaml"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "verb 'trian': there is none such. Did you mean 'train'?"),
        ("ledger verfy", "verb 'verfy': there is none such. Did you mean 'verify'?"),
        ("promote last 3 --az=champion", "promote knows no '--az'. Did you mean '--as'?"),
        ("train a b", "train knows no 'b'; usage: raypipe train "),
        ("promote last", "the following arguments are required: VERSION; usage: raypipe promote "),
        ("promote last x", "argument VERSION: 'x' is neither a version's number nor best; usage: raypipe promote "),
        ("", "the following arguments are required: VERB; usage: raypipe VERB ..."),
    ],
)
def test_a_mistyped_command_is_told_in_one_line_with_what_would_be_right(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"raypipe: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("model", ["/nope.safetensors", "runs/nope", "nope.safetensors"])
def test_a_file_that_is_not_there_is_not_taken_for_a_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model, "image.png"]) == 2
    assert capsys.readouterr().err == f"raypipe: {model}: no such file\n"


def test_the_help_of_source_says_what_comes_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "instead of the sample that comes with raypipe" in said
    assert "without it: from the Debian archive" in said
