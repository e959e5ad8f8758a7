"""What a coordinator that takes a run up finds: another one at work, a cut diary, a full disk, other code, changes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_resume import make
from test_shell import NAMES, SitePort, config, records, run

import raypipe.compose as composing
from raypipe.cli import main
from raypipe.compose import compose
from raypipe.config.load import to_dict
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.diary import CUT
from raypipe.errors import ConfigError, StoreSuperseded
from raypipe.run import load_resumed
from raypipe.tracking.journal import FILE, Journal

SHORT: dict[str, Any] = {"ledger": {"keep": False}, "track": {"mlflow": False}}


def composed(home: Path, said: dict[str, Any] | None = None) -> Composition:
    return compose(said or config(**SHORT), "run", home=str(home), put=lambda vector: vector.copy())


def ended(made: Composition) -> None:
    made.shell.publisher.book.close()
    made.shell.diary.close()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The home of a run that has its first version, and whose coordinator is gone."""
    made = composed(tmp_path)
    made.begin()
    ended(made)
    return tmp_path


def ports(home: Path, kind: type[SitePort] = SitePort) -> dict[str, Any]:
    make(home / "stores")
    return {name: kind(home / "stores" / name) for name in NAMES}


def test_a_coordinator_that_another_has_replaced_ends_and_writes_nothing_more(tmp_path: Path) -> None:
    """Its stores have not heard of the other one: the journal alone tells it."""
    others: list[int] = []
    taken_over = threading.Event()

    class Waiting(SitePort):
        """The first coordinator stands still while the second one begins."""

        async def train(self, ticket: Any, *rest: Any) -> Any:
            while ticket.version >= 2 and not taken_over.is_set():
                await asyncio.sleep(0.02)
            return await super().train(ticket, *rest)

    def another(made: Composition) -> None:
        try:
            while not [body for body in records(tmp_path, "weights_kept") if body["version"] == 2]:
                time.sleep(0.05)
            others.append(composed(tmp_path, config(stop={"max_versions": 1000}, **SHORT)).epoch)
        finally:
            taken_over.set()

    with pytest.raises(StoreSuperseded, match="another coordinator has taken this run over"):
        run(config(stop={"max_versions": 1000}, **SHORT), tmp_path, ports(tmp_path, Waiting), beside=another)
    last = list(Journal(tmp_path / "runs" / "run" / FILE).read())[-1]
    assert (last.kind, last.body["epoch"]) == ("run_started", 2)
    assert others == [2]


def test_a_line_of_the_diary_that_was_cut_is_left_out_and_said(begun: Path) -> None:
    ended(made := composed(begun))
    assert CUT not in made.board.lines
    newest = max((begun / "runs" / "run" / "diary").glob("*.jsonl"))
    with newest.open("ab") as file:
        file.write(b'{"event":"Tick","at":3.')
    ended(made := composed(begun))
    assert made.board.lines.count(CUT) == 1
    ended(made := composed(begun))
    assert CUT not in made.board.lines, "the next one begins with a checkpoint of its own"


def test_a_run_that_goes_on_with_other_code_says_so(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(made := composed(begun))
    assert not [line for line in made.board.lines if "code" in line]
    monkeypatch.setattr(composing, "code_hash", lambda: "0123456789abcdef")
    ended(made := composed(begun))
    (line,) = [line for line in made.board.lines if "code" in line]
    assert line.endswith("now; it goes on with this one")
    assert "0123456789ab now" in line
    ended(made := composed(begun))
    assert not [line for line in made.board.lines if "code" in line], "it is compared with the newest start"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounts a small filesystem: needs root")
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "raypipe-test", str(home)], check=True)
    try:
        yield home
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def fill(home: Path) -> None:
    with (home / "rubbish").open("wb", buffering=0) as rubbish:
        try:
            while rubbish.write(bytes(1 << 12)):
                pass
        except OSError:
            pass


@pytest.mark.parametrize("when", ["before it opens the journal", "before it writes its checkpoint"])
def test_a_coordinator_that_comes_back_to_a_full_disk_says_so_and_goes_on_when_there_is_room(
    when: str, small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = composed(small)
    made.begin()
    ended(made)
    monkeypatch.setattr("raypipe.coordinator.room.ROOM_S", 0.1)
    if when == "before it opens the journal":
        fill(small)
    else:
        real = composing.Shell.owe

        def filled(shell: Any, actions: Any) -> None:
            real(shell, actions)
            fill(small)

        monkeypatch.setattr(composing.Shell, "owe", filled)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(composed, small)
        until = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < until and not coming.done():
            time.sleep(0.05)
        threading.Event().wait(0.5)
        waited = not coming.done()
        (small / "rubbish").unlink()
        made = coming.result(timeout=20)
    assert waited
    assert len([line for line in made.board.lines if line.endswith("it goes on when there is room")]) == 1
    assert made.epoch == 2
    ended(made)


# -- --accept-changes --------------------------------------------------------------------------------------------------


@pytest.fixture
def written(begun: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's own configuration as a file."""
    monkeypatch.setenv("RAYPIPE_HOME", str(begun))
    file = begun / "run.yaml"
    file.write_text(yaml.safe_dump(config(**SHORT)))
    return file


def test_a_change_that_does_no_harm_is_shown_and_taken_only_when_it_is_accepted(written: Path) -> None:
    assert load_resumed("run", written, [], accept=False)[0] == "run"
    change = ["stop.max_versions=3"]
    with pytest.raises(ConfigError) as no:
        load_resumed("run", written, change, accept=False)
    (line,) = no.value.problems
    assert line.startswith("stop.max_versions: the run has 2, ")
    assert line.endswith("says 3 (--accept-changes allows it)")
    assert load_resumed("run", written, change, accept=True)[1].stop.max_versions == 3


def test_what_would_be_recorded_and_not_done_is_refused_whatever_is_accepted(written: Path) -> None:
    """The machine goes on judging by the metric and the store that the run began with."""
    changes = [
        "stop.max_versions=3",
        "train.lr=0.5",
        "evaluate.metric=loss",
        "evaluate.central=centre",
        "evaluate.every=2",
    ]
    with pytest.raises(ConfigError) as no:
        load_resumed("run", written, changes, accept=True)
    assert [line.partition(":")[0] for line in no.value.problems] == ["evaluate.central", "evaluate.metric", "train.lr"]
    assert not any("--accept-changes" in line for line in no.value.problems)


def test_an_accepted_change_is_done(written: Path, begun: Path) -> None:
    _, said = load_resumed("run", written, ["stop.max_versions=3"], accept=True)
    run(to_dict(said), begun, ports(begun))
    assert [body["version"] for body in records(begun, "version_published")] == [0, 1, 2, 3]
    assert [body["config"]["stop"]["max_versions"] for body in records(begun, "run_started")] == [2, 3]


def test_where_no_run_died_that_is_said_and_no_cluster_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    assert main(["resume", "--address", "127.0.0.1:1"]) == 0
    assert capsys.readouterr().out == f"raypipe: no run in {tmp_path / 'runs'} is to be taken up\n"
