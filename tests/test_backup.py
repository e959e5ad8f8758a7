"""A run is saved while it goes on, its home is wiped, it is put back and goes on; what is damaged is said."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import CLASSES
from test_resume import last_record, make, start
from test_shell import NAMES, SitePort, config, run

from raypipe.cli import main
from raypipe.errors import RunError
from raypipe.replay import Replay
from raypipe.tracking.backup import backup, restore
from raypipe.tracking.journal import FILE, Journal
from raypipe.tracking.lineage import read_history
from raypipe.tracking.versions import VersionStore

TRACK = {"mlflow": False, "keep_last": 3, "keep_every": 5}
KINDS: Any = ["version_published", "version_withdrawn"]
TRAIN = {"local_steps": 4, "batch_size": 16}
VARIED = {**TRAIN, "control_variates": True}


def command(home: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPIPE_HOME", str(home))
        return main(arguments)


def saved_on_the_way(said: dict[str, Any], home: Path, after: int) -> list[Path]:
    """Backups of a run that goes on, the last one just before it is killed."""
    child, files = start(said, home, home / "stores"), list[Path]()
    until = time.monotonic() + 60
    while last_record(home) < after:
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    for number in range(3):
        assert command(home, "backup", "last", str(home / f"saved-{number}.tar")) == 0
        files.append(home / f"saved-{number}.tar")
    moved = last_record(home) + 8
    while last_record(home) < moved and child.poll() is None:  # its stores see more than the backups do
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    return files


def test_a_run_is_saved_while_it_goes_on_and_goes_on_from_there(tmp_path: Path) -> None:
    said = config(train=TRAIN, server={"name": "adam"}, stop={"max_versions": 12}, track=TRACK)
    home, calm_home = tmp_path / "saved", tmp_path / "calm"
    make(home / "stores")
    shutil.copytree(home / "stores", calm_home / "stores")
    run(said, calm_home, {n: SitePort(calm_home / "stores" / n) for n in NAMES})
    files = saved_on_the_way(said, home, 12)
    versions = len(read_history(home / "runs" / "run").versions)
    assert versions < 12, "saved on the way"
    shutil.rmtree(home / "runs")
    assert command(home, "restore", str(files[0])) == 0
    ports = {n: SitePort(home / "stores" / n, fresh=False) for n in NAMES}
    refused = run(said, home, ports)
    assert refused.machine.version < versions, "its stores have seen a longer history than the backup's"
    assert "the store has a head of size" in refused.board.lines[0]
    for port in ports.values():
        port.site.close()

    shutil.rmtree(home / "runs")
    assert command(home, "restore", str(files[0])) == 0
    for name in NAMES:  # each store's operator accepts that a part of the history is gone
        (home / "stores" / name / "heads" / "run.heads.jsonl").unlink()
    run(said, home, {n: SitePort(home / "stores" / n, fresh=False) for n in NAMES})
    calm, again = (read_history(h / "runs" / "run") for h in (calm_home, home))
    assert [v["hash"] for v in again.versions.values()] == [v["hash"] for v in calm.versions.values()]
    tickets = [c["ticket"] for v in again.versions.values() for c in v["contributions"]]
    assert len(tickets) == len(set(tickets)) == 12 * len(NAMES)
    starts = [r.body["epoch"] for r in Journal(home / "runs" / "run" / FILE).read(kinds=["run_started"])]
    assert starts == [1, 1002], "its stores may have heard of epochs that the backup knows nothing of"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("ended")
    make(home / "stores")
    said = config(train=VARIED, stop={"max_versions": 4}, track=TRACK, server={"name": "momentum"})
    run(said, home, {n: SitePort(home / "stores" / n) for n in NAMES})
    return home


def test_a_backup_is_all_that_the_run_was(ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended / "runs" / "run", folder := tmp_path / "runs" / "run")
    (folder / "coordinator.pem").write_text("secret")
    (tmp_path / "keys").mkdir()
    saved = backup(folder, tmp_path)
    assert (saved.path, saved.version, saved.left_out) == (tmp_path / "run.tar", 4, ("keys",))
    back = restore(saved.path, tmp_path / "home")
    there = {str(p.relative_to(back.path)): p for p in back.path.rglob("*") if p.is_file()}
    before = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    left = {"coordinator.pem", "versions/spare", *(n for n in before if n.startswith(f"{FILE}-"))}
    assert set(before) - set(there) == left
    same = [name for name in there if name != FILE and there[name].read_bytes() == before[name].read_bytes()]
    assert len(same) == len(there) - 1
    assert list(Journal(back.path / FILE).read())[:-1] == list(Journal(folder / FILE).read())
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["runs"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["run.tar"], "nothing half-made is left"


def test_a_damaged_backup_is_refused_in_one_line_and_nothing_is_put_in_place(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = backup(ended / "runs" / "run", tmp_path / "whole.tar").path.read_bytes()
    damaged = [whole[:-20_000], whole[: len(whole) // 2], b"", b"no tar at all" * 999]
    step = len(whole) // 12
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(30_000, len(whole) - 12_000, step)
    ]
    for number, content in enumerate(damaged):
        (file := tmp_path / f"{number}.tar").write_bytes(content)
        assert command(tmp_path / "home", "restore", str(file)) == 1, number
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line
        assert not list((tmp_path / "home").glob("runs/*"))


def test_what_cannot_be_saved_or_put_back_is_said_in_one_line(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = backup(ended / "runs" / "run", tmp_path / "one.tar").path
    for arguments, said in [
        (("backup", "run", str(file)), "is there already"),
        (("backup", "nope", str(file)), "no run named 'nope'"),
        (("restore", str(tmp_path / "none.tar")), "no such backup"),
        (("restore", str(file)), "run run is here already"),
    ]:
        assert command(ended, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    make_empty(tmp_path / "runs" / "run")
    with pytest.raises(RunError, match="no version yet"):
        backup(tmp_path / "runs" / "run", tmp_path / "two.tar")


def make_empty(folder: Path) -> None:
    folder.mkdir(parents=True)
    Journal(folder / FILE, write=True).close()


def test_a_backup_of_a_run_whose_newest_weights_are_damaged_is_made_and_says_so(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ended / "runs" / "run", folder := tmp_path / "runs" / "run")
    (newest,) = (folder / "versions").glob("v00004-*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert command(tmp_path, "backup", "run", str(tmp_path / "one.tar")) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "version 4 is damaged or lost: who restores this goes on from an earlier one" in line
    assert restore(tmp_path / "one.tar", tmp_path / "home").version == 4


def damage(run_dir: Path, version: int) -> None:
    (file,) = (run_dir / "versions").glob(f"v{version:05d}-*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_weights_are_said_in_one_line_and_an_earlier_version_is_used(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ended / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "run"
    best = read_history(folder).best
    assert best is not None
    damage(folder, best)
    cv2.imwrite(image := str(tmp_path / "image.png"), np.zeros((28, 28), np.uint8))

    def said(*arguments: str) -> tuple[int, str]:
        code = command(tmp_path, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        return code, line

    code, line = said("predict", "run", image)
    assert code == 0
    assert f"version {best} are damaged" in line
    assert "is used instead" in line
    for asked in (("predict", f"run:{best}", image), ("promote", "run", str(best))):
        code, line = said(*asked)
        assert code == 1
        assert f"the weights of version {best} are damaged" in line
        assert "the nearest whole one is" in line
    code, line = said("versions", "run")
    assert code == 1
    assert f"version {best} are damaged" in line
    assert command(tmp_path, "versions", "run", "--quick") == 0


def test_a_run_whose_newest_weights_are_damaged_goes_on_from_the_version_before_and_says_so(
    ended: Path, tmp_path: Path
) -> None:
    shutil.copytree(ended, home := tmp_path / "copy")
    damage(home / "runs" / "run", 4)
    said = config(train=VARIED, stop={"max_versions": 4}, track=TRACK, server={"name": "momentum"})
    made = run(said, home, {n: SitePort(home / "stores" / n, fresh=False) for n in NAMES})
    assert "version 4 is withdrawn and will be made again: its weights were lost" in made.board.lines
    assert made.machine.version == 4
    records = [(r.kind, r.body["version"]) for r in Journal(home / "runs" / "run" / FILE).read(kinds=KINDS)]
    assert records[-2:] == [("version_withdrawn", 4), ("version_published", 4)]
    again = list(Replay(home / "runs" / "run", home / "stores").versions())
    assert [m.version for m in again] == [0, 1, 2, 3, 4, 4]
    assert all(m.same for m in again), "also the version that was withdrawn"


def test_a_run_is_tracked_promoted_used_and_rolled_back_by_the_command(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(ended / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "run"
    best = read_history(folder).best
    other = next(version for version in VersionStore(folder / "versions").kept() if version not in (0, best))
    image = np.zeros((28, 28), np.uint8)
    image[6:22, 10:18] = 200
    cv2.imwrite(str(tmp_path / "image.png"), image)

    def said(*arguments: str) -> list[str]:
        assert command(tmp_path, *arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    (line,) = said("track", "last")
    assert line == f"sqlite:///{tmp_path}/mlflow.db"
    assert said("promote", "last", "best", "--as", "champion") == ["models:/shell@champion is now version 1 of shell"]
    (marked,) = [line for line in said("versions", "last") if "promoted" in line]
    assert marked.split()[0] == f"v{best}"
    assert marked.endswith("kept, promoted, best")
    label, probability = by_hand(folder, best, image)
    found = said("predict", "models:/shell@champion", str(tmp_path / "image.png"))
    assert found == [f"{tmp_path / 'image.png'}  {label}  {probability:.1%}"]
    assert said("promote", "run", str(other)) == [
        "models:/shell@champion is now version 2 of shell (before: version 1)"
    ]
    assert said("rollback", "shell") == ["models:/shell@champion is version 1 again (it was 2)"]
    assert said("predict", "models:/shell@champion", str(tmp_path / "image.png")) == found
    assert said("track", "run") == [line], "nothing is told twice"

    table = [{**ROW, "store": f"store-{number}"} for number in range(9)]
    final: Any = {"best_version": best, "test": {}, "table": table, "reason": "enough"}
    journal = Journal(folder / FILE, write=True)
    journal.append("final", final, 1.0)
    journal.close()
    assert sum(line.startswith("store-") for line in said("versions", "run")) == 9, "more than the screen showed"


ROW = {"images": 10, "speed": 1.0, "updates": 2, "steps": 4, "share": 0.1, "mean_staleness": 0.0, "alone": 0.5,
       "shared": 0.7}  # fmt: skip


def by_hand(folder: Path, version: int | None, image: np.ndarray) -> tuple[str, float]:
    """The label of a version's plain weights and how sure it is of it."""
    import torch

    from raypipe.models import build_for
    from raypipe.tasks import tasks

    assert version is not None
    said = read_history(folder).run()["config"]
    module = build_for(tasks.build(said["task"]), said["model"]).eval()
    weights = VersionStore(folder / "versions").read(version)
    module.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in weights.items()})
    with torch.inference_mode():
        chances = module((torch.from_numpy(image)[None, None].float() / 255 - 0.5) / 0.25).softmax(1)[0]
    return CLASSES[int(chances.argmax())], float(chances.max())
