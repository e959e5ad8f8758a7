"""A run is made again from its record: real sites, asynchronous too; a record that lies is found."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import make
from test_shell import NAMES, SitePort, config, run

from raypipe.cli import main
from raypipe.errors import ConfigError
from raypipe.replay import Replay
from raypipe.tracking.journal import FILE
from raypipe.tracking.lineage import read_history
from raypipe.tracking.versions import VersionStore

LONG = {"local_steps": 3, "batch_size": 16, "schedule": {"name": "cosine"}}
MOMENTUM = {**LONG, "optimizer": {"name": "sgd", "momentum": 0.9}, "keep_optimizer": True}
TRACK = {"mlflow": False, "keep_last": 100}
SCENARIOS: dict[str, dict[str, Any]] = {
    "fedbuff": {"pace": "fedbuff", "pacing": {"buffer_size": 2}, "train": LONG, "server": {"name": "adam"}},
    "paced": {"pace": "paced", "pacing": {"budget_s": 0.1}, "train": {"batch_size": 16}, "update": ["bfloat16"]},
    "momentum": {
        "pace": "fedbuff",
        "pacing": {"buffer_size": 2, "normalise": "k"},
        "train": MOMENTUM,
        "server": {"name": "momentum"},
    },
    "own": {"pace": "fedbuff", "pacing": {"buffer_size": 2}, "train": {**LONG, "local": "norms"}},
    "variates": {"pace": "fedbuff", "pacing": {"buffer_size": 2}, "train": {**LONG, "control_variates": True}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each scenario, with its stores: name -> home."""
    homes = {}
    for name, said in SCENARIOS.items():
        home = homes[name] = tmp_path_factory.mktemp(name)
        make(home / "stores")
        if name == "paced":  # begins with what another run came to
            said = {**said, "warm_start": str(VersionStore(homes["fedbuff"] / "runs" / "run" / "versions").path(6))}
        said = config(**said, stop={"max_versions": 6}, track=TRACK)
        run(said, home, {n: SitePort(home / "stores" / n) for n in NAMES})
    return homes


@pytest.fixture(params=list(SCENARIOS))
def home(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that may be spoilt; the stores' state is gone, their data is there."""
    shutil.copytree(made[request.param], tmp_path / "copy")
    for name in NAMES:
        shutil.rmtree(tmp_path / "copy" / "stores" / name / "state")
    return tmp_path / "copy"


def verify(home: Path, *more: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPIPE_HOME", str(home))
        patch.setenv("RAYPIPE_STORES", str(home / "stores"))
        return main(["replay", "run", *(more or ["--verify"])])


def rewrite(home: Path, change: Callable[[dict[str, Any]], None], version: int) -> None:
    """Change a version's record behind the journal's back."""
    db = sqlite3.connect(home / "runs" / "run" / FILE)
    db.execute("drop trigger never_updated")
    for seq, text in db.execute("select seq, body from record where kind = 'version_published'").fetchall():
        body = json.loads(text)
        if body["version"] == version:
            change(body)
            db.execute("update record set body = ? where seq = ?", (json.dumps(body), seq))
    db.commit()
    db.close()


def test_any_run_is_made_again_to_the_same_bytes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = read_history(home / "runs" / "run")
    parts = [c for v in history.versions.values() for c in v["contributions"]]
    before = sorted(p for p in (home / "stores").rglob("*"))
    assert verify(home) == 0, capsys.readouterr().err
    assert "7 versions made again, each with the bytes that the record says" in capsys.readouterr().out
    assert sorted(p for p in (home / "stores").rglob("*")) == before, "nothing is written at the stores"
    said = history.run()["config"]
    if said["train"]["keep_optimizer"] or said["train"]["local"]:
        assert len({c["after"] for c in parts}) > 3
    if said["pace"] == "fedbuff":
        assert any(c["staleness"] for c in parts)


def test_without_verify_the_weights_are_written(home: Path, tmp_path: Path) -> None:
    assert verify(home, "--out", str(tmp_path / "again")) == 0
    again, first = VersionStore(tmp_path / "again"), VersionStore(home / "runs" / "run" / "versions")
    assert again.kept() == first.kept() == list(range(7))
    for version in range(7):
        assert again.path(version).read_bytes() == first.path(version).read_bytes()


def flip(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def part(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["contributions"][0].update({key: change(body["contributions"][0][key])})


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(hash=flip(body["hash"])),
        lambda body: body["contributions"].reverse(),
        lambda body: body.update(contributions=body["contributions"][1:]),
        lambda body: body.update(full_weight=1.01 * body["full_weight"]),
        part("weight", lambda w: 1.01 * w),
        part("steps", lambda s: s + 1),
        part("repeat", lambda r: r + 1),
        part("store", lambda s: {"a": "b", "b": "c", "c": "a"}[s]),
    ],
    ids=["hash", "order", "left out", "step", "weight", "steps", "repeat", "store"],
)
def test_a_record_that_was_changed_is_found_at_its_version(
    change: Callable[[dict[str, Any]], None], made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made["momentum"], home := tmp_path / "copy")
    rewrite(home, change, 4)
    assert verify(home) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("raypipe: version 4 differs: made again it is b3:")


def test_a_changed_state_of_the_optimizer_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["momentum"], home := tmp_path / "copy")
    later = [v for v, body in read_history(home / "runs" / "run").versions.items() if _after(body)]
    rewrite(home, lambda body: _after(body)[0].update(after=""), later[-1])
    found = next(m for m in Replay(home / "runs" / "run", home / "stores").versions() if not m.same)
    assert found.version == later[-1]
    assert "trains otherwise" in found.hints[0]


def _after(body: Any) -> list[Any]:
    return [c for c in body["contributions"] if c["after"]]


def test_a_store_whose_data_is_not_here_is_named_in_one_line(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made["fedbuff"], home := tmp_path / "copy")
    shutil.rmtree(home / "stores" / "b")
    assert verify(home) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raypipe: store b: its data is not on this machine")
    shutil.copytree(home / "stores" / "a", home / "stores" / "b")
    policy = home / "stores" / "b" / "policy.yaml"
    policy.write_text(policy.read_text().replace("store: a", "store: b"))
    with pytest.raises(ConfigError, match="store b: its data set 'products' is not what it trained on then"):
        Replay(home / "runs" / "run", home / "stores")
