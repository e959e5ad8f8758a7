"""The command as somebody uses it, its processes killed: the coordinator alone, then everything at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT

from raypipe.errors import RaypipeError
from raypipe.ledger.receipts import read_receipts
from raypipe.ledger.verify import verify
from raypipe.tracking.book import run_folder
from raypipe.tracking.journal import Journal
from raypipe.tracking.lineage import History, list_versions, read_history

VERSIONS = 40
SAID = ["stores=[{id: a}, {id: b}]", f"stop.max_versions={VERSIONS}", "train.local_epochs=0.3", "local.max_images=1500",
        "evaluate.alone=false", "track.keep_last=50"]  # fmt: skip


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "RAYPIPE_HOME": str(home), "RAY_TMPDIR": str(home)}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "raypipe", "train", *arguments]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)


def newest(home: Path) -> int:
    try:
        versions = [r.body["version"] for r in Journal(run_folder("last", home) / "journal.sqlite").read()
                    if r.kind == "version_published"]  # fmt: skip
        return max(versions, default=-1)
    except RaypipeError:  # it is being made
        return -1


def wait_for(happened: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.05)


def processes(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(command.pid).children(recursive=True)


def family(history: History) -> list[str]:
    return [c["ticket"] for v in history.versions.values() for c in v["contributions"]]


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="rp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_coordinator_and_a_killed_machine_lose_nothing(home: Path) -> None:
    running = start(home, "configs/sync.yaml", "--set", *SAID)
    wait_for(lambda: running.poll() is not None or newest(home) >= 1, 90, "version 1")
    (coordinator,) = [p for p in processes(running) if "ray::Coordinator" in " ".join(p.cmdline())]
    before = newest(home)
    coordinator.kill()
    killed_at = time.monotonic()
    wait_for(lambda: newest(home) > before + 1, 60, "versions after the coordinator was killed")
    assert time.monotonic() - killed_at < 60

    everything = [*processes(running), psutil.Process(running.pid)]
    for process in everything:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    running.communicate()
    assert newest(home) < VERSIONS, "killed before its end"

    refused = start(home, "configs/sync.yaml", "--resume", "last", "--set", *SAID, "train.lr=0.5")
    said = refused.communicate(timeout=60)[0]
    assert refused.returncode == 2, said
    assert "train.lr: the run has 0.05, configs/sync.yaml says 0.5" in said

    again = start(home, "--resume", "last")
    said = again.communicate(timeout=180)[0]
    assert again.returncode == 0, said
    history = read_history(run_folder("last", home))
    assert list(history.versions) == list(range(VERSIONS + 1))
    assert len(family(history)) == len(set(family(history))) == 2 * VERSIONS
    starts = [r.body["epoch"] for r in Journal(run_folder("last", home) / "journal.sqlite").read(kinds=["run_started"])]
    assert starts == [1, 2, 3]

    found = verify(run_folder("last", home))
    assert found.ok, found.problems
    assert not any("unsigned" in note.line or "never sealed" in note.line for note in found.notes), found.notes
    wanted = {"run": 3, "update": 2 * VERSIONS, "version": VERSIONS + 1, "finished": 1}
    assert {kind: found.counts[kind] for kind in wanted} == wanted
    assert found.counts["cosignatures"] >= VERSIONS
    for store in ("a", "b"):
        kinds = read_receipts(home / "demo" / "sync" / store / "egress" / run_folder("last", home).name).kinds
        assert kinds["update"].messages >= VERSIONS
        assert kinds["report"].messages >= VERSIONS

    over = start(home, "--resume", "last")
    assert f"is over: {VERSIONS} versions" in over.communicate(timeout=60)[0]


def test_ctrl_c_ends_a_run_with_one_line_and_what_was_published_is_kept(home: Path) -> None:
    running = start(home, "configs/sync.yaml", "--set", *SAID, "track.mlflow=false")
    wait_for(lambda: running.poll() is not None or newest(home) >= 1, 90, "version 1")
    children = processes(running)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
    said = running.communicate(timeout=90)[0]
    assert running.returncode == 0, said
    assert [line for line in said.splitlines() if "stop" in line] == [
        "stopping; what was published is kept (Ctrl-C again: at once)",
        "ended: stopped by hand",
    ]
    assert "Traceback" not in said
    history, folder = read_history(run_folder("last", home)), run_folder("last", home)
    assert history.finished is not None
    assert history.finished["status"] == "killed"
    assert f"next: raypipe promote {folder.name} {history.best} --as champion" in said
    newest_kept = list_versions(folder, check=True)[-1]
    assert (newest_kept.version, newest_kept.kept, newest_kept.whole) == (newest(home), True, True)
    assert 1 <= newest(home) < VERSIONS
    wait_for(lambda: not any(child.is_running() for child in children), 20, "its processes have ended")
