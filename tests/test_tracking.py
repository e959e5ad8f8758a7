"""The record of a run: journal, weights, MLflow after them, and the registry."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from raypipe.errors import ConfigError, RunError
from raypipe.models.flat import initial
from raypipe.tracking import follow as follow_module
from raypipe.tracking.follow import Follower, follow
from raypipe.tracking.journal import FILE, Journal
from raypipe.tracking.lineage import flat_params, list_versions, model_card
from raypipe.tracking.mlflow_sink import Sink, hide_login
from raypipe.tracking.records import RunStarted
from raypipe.tracking.registry import load_weights, promote, rollback
from raypipe.tracking.versions import FOLDER, Retention, VersionStore, read_file
from raypipe.types import Layout, Role
from raypipe.use import predict

RUN = "shelf.1"  # a dot, since MLflow's models may not have one in their names
TASK = {"name": "classification", "classes": ["boot", "coat", "hat"], "image_size": 8, "channels": 1}
MODEL = {"name": "small_cnn", "width": 8, "hidden": 8}
LAYOUT, WEIGHTS = initial(MODEL, 3, 1, 8, seed=0)
TINY = Layout.of([("w", (2, 2), "float32", Role.SHARED), ("n", (), "int64", Role.FIXED)])


class Run:
    """Writes what a coordinator would."""

    def __init__(self, folder: Path, *, every: int = 5) -> None:
        self.folder = folder
        folder.mkdir()
        self.journal = Journal(folder / FILE, write=True)
        self.versions = VersionStore(folder / FOLDER)
        self.started: RunStarted = {
            "run": RUN,
            "name": "shelf",
            "config": {"train": {"lr": 0.05}, "task": TASK, "model": MODEL, "track": {"log_model_every": every}},
            "layout": LAYOUT.to_json(),
            "plan": {},
            "code_hash": "c0de",
            "at": 1000.0,
            "stores": ["north", "south"],
            "experiment": "shelves",
            "register_as": "shelf-model",
            "epoch": 1,
        }
        self.journal.append("run_started", self.started, 1000.0)

    def publish(self, version: int, *, judged: bool = True, classes: dict[str, Any] | None = None) -> None:
        self.versions.write(version, WEIGHTS + version, LAYOUT, model_card(self.started, version))
        stored = self.versions.keep(version)
        share = {"ticket": "t", "base": max(0, version - 2), "steps": 4, "examples": 64, "seconds": 1.0, "loss": 1.0}
        stores = [
            {**share, "store": "north", "staleness": 0, "weight": 3.0, "share": 0.75, "bytes_up": 10},
            {**share, "store": "south", "staleness": 1, "weight": 1.0, "share": 0.25, "bytes_up": 10},
        ]
        at = 1000.0 + version
        body = {
            "version": version,
            "parent": version - 1 if version else None,
            "hash": f"b3:{version:064x}",
            "at": at,
            "elapsed_s": float(version),
            "seconds": 1.0,
            "contributions": stores if version else [],
            "bytes_up": 20,
            "bytes_down": 40,
            "bytes_total": 60 * version,
            "step_norm": 0.5,
            **({} if classes is None else {"classes": classes}),
        }
        self.journal.append("version_published", body, at)
        self.journal.append("weights_kept", {"version": version, **asdict(stored)}, at)
        if judged:
            self.judge(version, at + 0.5)

    def judge(self, version: int, at: float, *, best: bool = True) -> None:
        score = {"accuracy": version / 100, "loss": 1.0, "num_examples": 10}
        metrics = {"accuracy": version / 100, "loss": 1.0}
        body = {"version": version, "split": "validation", "metrics": metrics, "num_examples": 20}
        self.journal.append("evaluated", {**body, "stores": {"north": score, "south": score}, "best": best}, at)

    def finish(self, best: int, last: int) -> None:
        table = [{"store": "north", "updates": 3}, {"store": "south", "updates": 1}]
        test = {"accuracy": 0.5}
        self.journal.append(
            "final", {"best_version": best, "test": test, "table": table, "reason": "max_versions"}, 2000
        )
        end = {"reason": "max_versions", "status": "finished", "versions": last, "best_version": best, "at": 2000.0}
        self.journal.append("run_finished", end, 2000.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes seconds."""
    home = tmp_path_factory.mktemp("mlflow")
    Sink(home=home).client.search_experiments()
    return home


@pytest.fixture
def home(tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlflow.db").write_bytes((empty_home / "mlflow.db").read_bytes())
    return tmp_path / "home"


def _the_run(sink: Sink) -> Any:
    experiment = sink.client.get_experiment_by_name("shelves")
    (found,) = sink.client.search_runs([experiment.experiment_id], f"tags.`fed.run_key` = '{RUN}'")
    return found


def _steps(sink: Sink, metric: str) -> list[int]:
    return [m.step for m in sink.client.get_metric_history(_the_run(sink).info.run_id, metric)]


def _models(sink: Sink) -> list[str]:
    run = _the_run(sink)
    found = sink.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return sorted(model.name for model in found)


# --- the journal ---------------------------------------------------------------------------------------------------


def _python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own, which imports only what it needs."""
    head = (
        "import os, resource, signal, sys\nfrom pathlib import Path\nimport numpy as np\nfolder = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_appended_survives_a_kill_and_is_read_by_others(tmp_path: Path) -> None:
    writer = _python(
        """
        from raypipe.tracking.journal import FILE, Journal
        journal = Journal(folder / FILE, write=True)
        for i in range(10):
            journal.append("store_left", {"store": str(i), "reason": ""}, float(i))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert writer.returncode == -signal.SIGKILL
    reader = Journal(tmp_path / FILE)
    assert [(r.seq, r.at, r.body["store"]) for r in reader.read(after=7)] == [(8, 7, "7"), (9, 8, "8"), (10, 9, "9")]
    assert list(reader.read(kinds=["final"])) == []
    assert reader.last() == 10
    assert Journal(tmp_path / FILE, write=True).append("store_left", {}, 0.0) == 11


def test_a_record_once_written_cannot_be_changed(run: Run) -> None:
    for change in ("update record set at = 0", "delete from record"):
        with pytest.raises(RunError, match="append-only"):
            run.journal._rows(change)
    assert run.journal.last() == 1


def test_a_journal_that_cannot_be_used_says_why_in_one_line(tmp_path: Path, run: Run) -> None:
    with pytest.raises(RunError, match="no run here"):
        Journal(tmp_path / "none" / FILE)
    with pytest.raises(RunError, match="no record of kind 'finale'"):
        run.journal.append("finale", {}, 0.0)  # type: ignore[arg-type]
    run.journal._rows("pragma max_page_count = 1")
    with pytest.raises(RunError, match="could not be written: database or disk is full"):
        run.journal.append("store_left", {"store": "x" * 100_000}, 0.0)
    run.journal._rows("pragma user_version = 99")
    with pytest.raises(RunError, match="schema 99; this raypipe reads schema"):
        Journal(run.folder / FILE)


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_version_comes_back_as_it_was_written_by_name_and_dtype(tmp_path: Path) -> None:
    vector = np.zeros(TINY.size, np.float32)
    vector[:4], vector[16] = [1, 2, 3, 4], 7
    store = VersionStore(tmp_path)
    store.write(3, vector, TINY, {"task": TASK})
    stored = store.keep(3)
    assert stored.file == f"v00003-{stored.hash[:12]}.safetensors"
    assert stored.num_bytes == (tmp_path / stored.file).stat().st_size
    tensors = store.read(3, stored.hash)
    assert tensors["w"].tolist() == [[1, 2], [3, 4]]
    assert (tensors["n"].dtype, tensors["n"].item()) == (np.int64, 7)
    assert read_file(tmp_path / stored.file)[1] == {"task": TASK}
    assert [p.name for p in tmp_path.iterdir()] == [stored.file]


def test_a_version_is_written_over_one_that_was_removed_in_the_very_bytes_of_the_library(tmp_path: Path) -> None:
    store, again = VersionStore(tmp_path / "run"), VersionStore(tmp_path / "again")
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(TINY.size).astype(np.float32) for _ in range(4)]
    for version, vector in enumerate(vectors[:2]):
        store.write(version, vector, TINY, {"task": TASK, "n": "ä" * 50})
        store.keep(version)
    removed = store.path(1)
    inode = removed.stat().st_ino
    store.write(2, vectors[2], TINY, {})
    store.keep(2)
    assert store.prune(Retention(last=1)) == [1]
    store.write(3, vectors[3], TINY, {"task": TASK})
    stored = store.keep(3)
    assert store.path(3).stat().st_ino == inode, "the pages are used again"
    again.write(3, vectors[3], TINY, {"task": TASK})
    assert again.keep(3) == stored, "and hold what a new file would"
    assert sorted(store.read(3)) == ["n", "w"]
    assert store.prune(Retention(last=1)) == [2]
    assert store.path(3).stat().st_ino == inode
    assert again.prune(Retention(last=1)) == [], "where none is removed one is laid by"
    laid_by = (again.folder / "spare").stat()
    assert laid_by.st_size == stored.num_bytes
    again.write(4, vectors[3], TINY, {})
    again.keep(4)
    assert again.path(4).stat().st_ino == laid_by.st_ino
    for one in (store, again):
        one.tidy()
    assert [store.kept(), again.kept()] == [[0, 3], [3, 4]]
    assert len(list(store.folder.iterdir())) == 2


def test_a_removed_version_that_somebody_has_open_is_not_written_over(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    for version in range(3):
        store.write(version, np.full(TINY.size, version, np.float32), TINY, {})
        store.keep(version)
    with store.path(1).open("rb") as opened:
        before = opened.read()
        assert store.prune(Retention(last=1)) == [1]
        store.write(3, np.full(TINY.size, 3, np.float32), TINY, {})
        opened.seek(0)
        assert opened.read() == before
    store.keep(3)
    assert store.read(3)["w"].tolist() == [[3, 3], [3, 3]]


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.write(3, np.zeros(TINY.size, np.float32), TINY, {})
    stored = store.keep(3)
    with pytest.raises(RunError, match="version 3 are damaged"):
        store.read(3, "0" * 64)
    content = bytearray((tmp_path / stored.file).read_bytes())
    content[-1] ^= 1
    (tmp_path / stored.file).write_bytes(content)
    with pytest.raises(RunError, match="version 3 are damaged"):
        store.read(3)


def test_a_version_written_again_after_a_crash_replaces_the_unpublished_one(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.write(3, np.zeros(TINY.size, np.float32), TINY, {})
    store.keep(3)
    store.write(3, np.ones(TINY.size, np.float32), TINY, {})
    second = store.keep(3)
    assert store.keep(3) == second, "it may be said twice"
    assert [p.name for p in tmp_path.iterdir()] == [second.file]


def test_weights_that_find_no_room_are_a_one_line_error(tmp_path: Path) -> None:
    done = _python(
        """
        from raypipe.errors import RunError
        from raypipe.tracking.versions import VersionStore
        from raypipe.types import Layout, Role
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        layout = Layout.of([("w", (1000,), "float32", Role.SHARED)])
        try:
            VersionStore(folder).write(3, np.zeros(layout.size, np.float32), layout, {})
        except RunError as error:
            print(error)
        """,
        tmp_path,
    )
    assert done.stdout.startswith("version 3 could not be written: ")
    assert len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_what_the_rule_names_and_what_is_pinned(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    for version in range(1, 13):
        store.write(version, np.zeros(TINY.size, np.float32), TINY, {})
        store.keep(version)
    store.pin(8)
    removed = store.prune(Retention(last=2, every=(5,), best=7, also=frozenset({3})))
    assert store.kept() == [1, 3, 5, 7, 8, 10, 11, 12]
    assert removed == [2, 4, 6, 9]
    with pytest.raises(ConfigError, match="version 4 are not kept; the nearest kept are 1, 3, 5"):
        store.pin(4)


# --- MLflow --------------------------------------------------------------------------------------------------------


def test_every_version_is_one_step_and_few_become_models(run: Run, home: Path) -> None:
    for version in range(8):
        run.publish(version)
    run.finish(best=7, last=7)
    sink = Sink(home=home)
    assert follow(run.folder, until_done=True, home=home, patience_s=20) == sink.where()
    found = _the_run(sink)
    assert (found.info.status, found.info.end_time) == ("FINISHED", 2_000_000)
    assert found.data.params["train.lr"] == "0.05"
    assert _steps(sink, "eval/accuracy") == _steps(sink, "fed/steps") == list(range(8))
    history = sink.client.get_metric_history(found.info.run_id, "fed/bytes_total")
    assert [(m.step, m.timestamp, m.value) for m in history][2] == (2, 1_002_000, 120)
    for name, value in {
        "fed/staleness_mean": 0.5,
        "fed/contributors": 2,
        "store/south/share": 0.25,
        "store/south/accuracy": 0.07,
        "time/elapsed_s": 7,
        "test/accuracy": 0.5,
    }.items():
        assert found.data.metrics[name] == value, name
    assert _models(sink) == ["v00005-shelf-1", "v00007-shelf-1"]
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "stores.json", "type": "table"},
        {"path": "lineage/v00000.json", "type": "table"},
    ]


def test_a_model_in_mlflow_holds_the_weights_their_lineage_and_their_score(
    run: Run, home: Path, tmp_path: Path
) -> None:
    for version in range(6):
        run.publish(version, judged=False)
    follow(run.folder, home=home, patience_s=20)
    run.judge(5, 1010.0)  # it came later
    follow(run.folder, home=home, patience_s=20)
    sink = Sink(home=home)
    found = _the_run(sink)
    (model,) = sink.client.search_logged_models([found.info.experiment_id])
    assert (model.status, model.params["parent"], model.params["stores"]) == ("READY", "4", "north, south")
    assert {m.key: m.value for m in model.metrics}["eval/accuracy"] == 0.05
    place = Path(model.artifact_location.removeprefix("file://"))
    assert (place / "state.safetensors").read_bytes() == run.versions.path(5).read_bytes()
    assert json.loads((place / "lineage.json").read_text())["contributions"][1]["base"] == 3
    assert [output.step for output in found.outputs.model_outputs] == [5]
    assert place.is_relative_to(home)


def test_a_class_list_that_changed_is_a_table_of_its_version(run: Run, home: Path) -> None:
    task = {**TASK, "classes": ["boot", "coat", "hat", "cap"], "gone": {"hat": "cap"}}
    for version in range(6):
        changed = {"change": {}, "task": task, "layout": LAYOUT.to_json()} if version == 3 else None
        run.publish(version, judged=False, classes=changed)
    follow(run.folder, home=home, patience_s=20)
    sink = Sink(home=home)
    found = _the_run(sink).info
    files = {file.path for file in sink.client.list_artifacts(found.run_id, "classes")}
    assert files == {"classes/v00000.json", "classes/v00003.json"}
    place = Path(found.artifact_uri.removeprefix("file://"))
    table = json.loads((place / "classes" / "v00003.json").read_text())
    assert table["data"] == [[0, "boot", ""], [1, "coat", ""], [2, "hat", "counts as cap"], [3, "cap", ""]]
    (model,) = sink.client.search_logged_models([found.experiment_id])
    card = json.loads((Path(model.artifact_location.removeprefix("file://")) / "raypipe.json").read_text())
    assert (card["version"], card["task"]) == (5, task)


def test_told_twice_is_told_once(run: Run, home: Path) -> None:
    for version in range(6):
        run.publish(version)
    run.finish(best=3, last=5)
    for _ in range(2):
        (run.folder / "mlflow.json").unlink(missing_ok=True)
        follow(run.folder, home=home, patience_s=20)
    sink = Sink(home=home)
    found = _the_run(sink)
    assert _steps(sink, "eval/accuracy") == list(range(6))
    assert _steps(sink, "store/north/share") == list(range(1, 6))
    assert _models(sink) == ["v00003-shelf-1", "v00005-shelf-1"]
    assert sorted(output.step for output in found.outputs.model_outputs) == [3, 5]
    table = Path(found.info.artifact_uri.removeprefix("file://")) / "lineage" / "v00000.json"
    assert len(json.loads(table.read_text())["data"]) == 1 + 5 * 2


@pytest.mark.parametrize("broken", ["log_batch", "log_model_artifacts", "log_outputs", "finalize_logged_model"])
def test_a_follower_that_dies_anywhere_goes_on_without_loss(
    run: Run, home: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in range(6):
        run.publish(version)
    follower = Follower(run.folder, home=home)
    _fail_after(follower, broken, monkeypatch)
    with pytest.raises(OSError, match="killed here"):
        follower.step()
    follower.close()
    follow(run.folder, home=home, patience_s=20)
    sink = Sink(home=home)
    assert _steps(sink, "fed/steps") == list(range(6))
    assert _models(sink) == ["v00005-shelf-1"]
    assert len(_the_run(sink).outputs.model_outputs) == 1


def _fail_after(follower: Follower, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is made, then its outcome is lost."""
    client = follower._connected()[0].client
    real: Callable[..., Any] = getattr(client, method)

    def lost(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError("killed here")

    monkeypatch.setattr(client, method, lost)


def test_another_store_or_a_deleted_run_is_told_everything(run: Run, home: Path, tmp_path: Path) -> None:
    run.publish(1)
    follow(run.folder, home=home, patience_s=20)
    run.publish(2)
    sink = Sink(home=home)
    sink.client.delete_run(_the_run(sink).info.run_id)
    follow(run.folder, home=home, patience_s=20)
    assert _steps(sink, "fed/steps") == [1, 2]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(run: Run, home: Path) -> None:
    run.publish(1)
    run.finish(best=1, last=1)
    follow(run.folder, home=home, patience_s=20)
    again: Any = {**run.started, "epoch": 2, "config": {**run.started["config"], "train": {"lr": 0.01}}}
    run.journal.append("run_started", again, 3000.0)
    run.publish(2)
    follow(run.folder, home=home, patience_s=20)
    found = _the_run(Sink(home=home))
    assert found.info.status == "RUNNING"
    assert (found.data.params["train.lr"], found.data.params["epoch-2/train.lr"]) == ("0.05", "0.01")
    assert _steps(Sink(home=home), "fed/steps") == [1, 2]


def test_many_pending_versions_share_few_requests(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(1, 101):
        run.publish(version)
    follower = Follower(run.folder, home=home)
    client = follower._connected()[0].client
    sizes: list[int] = []
    real = client.log_batch

    def counted(run_id: str, metrics: Any = (), **rest: Any) -> None:
        sizes.append(len(metrics))
        real(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(client, "log_batch", counted)
    monkeypatch.setattr(Follower, "_is_kept", lambda *_: False)
    while follower.step():
        pass
    assert max(sizes) == 1000
    assert len([size for size in sizes if size]) <= 5


def test_only_one_process_follows_a_run(run: Run, home: Path) -> None:
    first = Follower(run.folder, home=home)
    first.step()
    with pytest.raises(RunError, match="another process is following this run"):
        follow(run.folder, home=home, patience_s=0.1)
    first.close()
    follow(run.folder, home=home, patience_s=0.1)


def test_no_place_of_a_store_and_no_login_reaches_mlflow(run: Run, home: Path) -> None:
    card = {"store": "north", "counts": {"train": 9}, "cpus": 1.0, "gpu": None, "node": "canary-node"}
    run.journal.append("store_joined", card, 1000.0)
    reject = {"store": "north", "ticket": "t", "reason": "canary-reason"}
    run.journal.append("update_rejected", reject, 1000.0)
    run.publish(1)
    run.finish(best=1, last=1)
    follow(run.folder, home=home, patience_s=20)
    told = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert b"canary" not in told
    assert hide_login("at http://user:secret@host:1/x") == "at http://host:1/x"
    assert flat_params({"warm_start": "/canary/base.safetensors"}) == {"warm_start": "base.safetensors"}


# --- a server that dies --------------------------------------------------------------------------------------------


@pytest.fixture
def server(home: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts `mlflow server` on one port, as often as it is called; what runs at the end is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    place = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "served")]
    command = ["-m", "mlflow", "server", *place, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PORT": str(port)}

    def start() -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, *command], env=env, stdout=quiet, stderr=quiet, start_new_session=True
        )
        started.append(process)
        process.address = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
        return process

    yield start
    for process in started:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The server and its worker: they are a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_first_runs_that_start_at_once_share_a_store_and_one_killed_in_making_it_spoils_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from raypipe.tracking.mlflow_sink import Sink;"
        "sink = Sink(home=Path(sys.argv[1])); print('ready', flush=True); sys.stdin.readline();"
        "print(sink.experiment(sys.argv[2]))"
    )

    def ready(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path), name]
        made = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)
        assert made.stdout is not None
        assert made.stdout.readline() == "ready\n"
        return made

    def begin(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    killed = ready("first")
    begin(killed)
    while not (files := [path for path in tmp_path.glob("mlflow.db*") if path.stat().st_size]):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert files != [tmp_path / "mlflow.db"], "it was whole already"
    together = [ready(name) for name in ("second", "third")]
    for process in together:
        begin(process)
    for process in together:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-2000:]
        assert out.strip().isdigit()


def test_a_server_killed_and_started_again_has_everything_once(
    run: Run, server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "LONGEST_WAIT_S", 0.5)
    first = server()
    _wait(lambda: _answers(first.address))
    for version in range(1, 11):
        run.publish(version)
    follower = Follower(run.folder, first.address)
    thread = threading.Thread(target=follower.run, args=(threading.Event(),), kwargs={"until_done": True}, daemon=True)
    thread.start()
    _wait(lambda: follower.place is not None)
    _kill(first)  # while it is told the first ten
    slowest = 0.0
    for version in range(11, 21):
        began = time.monotonic()
        run.publish(version)
        slowest = max(slowest, time.monotonic() - began)
    run.finish(best=13, last=20)
    _wait(lambda: bool(follower.trouble))
    assert follower.behind() > 0
    assert slowest < 1.0  # the run did not wait for it
    second = server()
    thread.join(timeout=90)
    assert not thread.is_alive()
    sink = Sink(second.address)
    assert follower.where().startswith(f"{second.address}/#/experiments/")
    assert _the_run(sink).info.status == "FINISHED"
    assert _steps(sink, "fed/steps") == _steps(sink, "eval/loss") == list(range(1, 21))
    assert _models(sink) == [f"v{v:05d}-shelf-1" for v in (5, 10, 13, 15, 20)]
    assert len(_the_run(sink).outputs.model_outputs) == 5


# --- the registry --------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(run: Run, home: Path) -> Run:
    for version in range(1, 5):
        run.publish(version)
    follow(run.folder, home=home, patience_s=20)
    return run


def test_versions_are_listed_from_the_journal_alone(run: Run) -> None:
    for version in range(1, 5):
        run.publish(version, judged=version != 3)
    run.versions.prune(Retention(last=1))
    rows = list_versions(run.folder)
    assert [(r.version, r.parent, r.contributors, r.score, r.kept, r.best) for r in rows] == [
        (1, 0, 2, 0.01, True, False),
        (2, 1, 2, 0.02, False, False),
        (3, 2, 2, None, False, False),
        (4, 3, 2, 0.04, True, True),
    ]
    listed = _python(
        """
        from raypipe.tracking.lineage import list_versions
        print(len(list_versions(folder)), {"mlflow", "torch", "ray"} & set(sys.modules))
        """,
        run.folder,
    )
    assert listed.stdout == "4 set()\n"


def test_a_champion_is_a_module_that_evaluates_and_goes_on_learning(
    tracked: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    promotion = promote(tracked.folder, 3, home=home)
    assert (promotion.uri, promotion.previous) == ("models:/shelf-model@champion", None)
    uri = Sink(home=home).uri
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", uri, raising=False)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    module = mlflow.pytorch.load_model("models:/shelf-model@champion")
    assert torch.equal(module.state_dict()["0.bias"], torch.from_numpy(tracked.versions.read(3)["0.bias"]))
    module.eval()
    with torch.no_grad():
        module.load_state_dict({k: v - 3 for k, v in module.state_dict().items()})  # back to sane weights
    module.train()
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    outputs = mlflow.pyfunc.load_model("models:/shelf-model@champion").predict(images.numpy())
    assert outputs.shape == (16, 3)


def test_promoted_versions_have_their_own_metrics_and_can_be_rolled_back(tracked: Run, home: Path) -> None:
    promote(tracked.folder, 2, home=home)
    again = promote(tracked.folder, 2, home=home)
    assert (again.number, again.previous) == ("1", "1")
    second = promote(tracked.folder, 4, home=home)
    assert (second.number, second.previous) == ("2", "1")
    client = Sink(home=home).client
    registered = client.search_model_versions("name = 'shelf-model'")
    children = {v.version: client.get_run(v.run_id) for v in registered}
    assert {str(n): child.data.metrics["eval/accuracy"] for n, child in children.items()} == {"1": 0.02, "2": 0.04}
    assert {str(n): child.data.params["version"] for n, child in children.items()} == {"1": "2", "2": "4"}
    parent = _the_run(Sink(home=home)).info.run_id
    assert {child.data.tags["mlflow.parentRunId"] for child in children.values()} == {parent}
    assert rollback("shelf-model", home=home).number == "1"
    assert client.get_model_version_by_alias("shelf-model", "champion").version in (1, "1")
    assert client.get_model_version_by_alias("shelf-model", "previous").version in (2, "2")
    assert rollback("shelf-model", home=home).number == "2"
    assert tracked.versions.pinned() == {2, 4}


def test_what_cannot_be_promoted_says_why_in_one_line(tracked: Run, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no version 9; it has 1 to 4"):
        promote(tracked.folder, 9, home=home)
    for alias in ("v42", "latest", "previous", "a b"):
        with pytest.raises(ConfigError, match=f"'{alias}' cannot be an alias"):
            promote(tracked.folder, 4, alias=alias, home=home)
    tracked.versions.prune(Retention(last=2))
    with pytest.raises(ConfigError, match="version 2 are not kept; the nearest kept are 1, 3, 4"):
        promote(tracked.folder, 2, home=home)
    with pytest.raises(ConfigError, match="nothing to go back to"):
        rollback("shelf-model", home=home)
    with pytest.raises(RunError, match="MLflow did not do it"):
        rollback("shelf-model", uri="http://127.0.0.1:9")


def test_a_warm_start_takes_weights_from_a_file_or_the_registry(tracked: Run, home: Path) -> None:
    promote(tracked.folder, 3, home=home)
    for source in (str(tracked.versions.path(3)), "models:/shelf-model@champion", "models:/shelf-model/1"):
        assert np.array_equal(load_weights(source, LAYOUT, home=home)[LAYOUT.entries[0].slice], (WEIGHTS + 3)[:72])
    other, _ = initial(MODEL, 4, 1, 8, seed=0)
    with pytest.raises(ConfigError, match=r"has shape \(3, 8\), the model needs \(4, 8\) \(and 1 more") as caught:
        load_weights("models:/shelf-model@champion", other, home=home)
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match=r"no \.safetensors file, no run's folder"):
        load_weights("weights.pt", LAYOUT, home=home)
    with pytest.raises(ConfigError, match="no registered model"):
        load_weights("models:/shelf-model", LAYOUT, home=home)
    for nobody in ("models:/nobody@champion", "models:/shelf-model@nobody", "models:/shelf-model/99"):
        with pytest.raises(ConfigError, match=r"^weights from .*: MLflow does not have it: .* not found"):
            load_weights(nobody, LAYOUT, home=home)
    tracked.versions.write(9, np.full(LAYOUT.size, np.nan, np.float32), LAYOUT, {})
    tracked.versions.keep(9)
    with pytest.raises(ConfigError, match="not finite"):
        load_weights(str(tracked.versions.path(9)), LAYOUT)


def test_images_are_labelled_by_the_names_of_the_task(tracked: Run, home: Path, tmp_path: Path) -> None:
    promote(tracked.folder, 4, home=home)
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image in images:
        cv2.imwrite(str(image), np.full((20, 16), 99, np.uint8))
    by_file = predict(str(tracked.versions.path(4)), images)
    assert [p.path for p in by_file] == images
    assert all(p.label in TASK["classes"] and 1 / 3 <= p.probability <= 1 for p in by_file)
    assert predict("models:/shelf-model@champion", images, home=home) == by_file
    assert predict(str(tracked.folder), images) == predict(str(tracked.folder), images, version=4) == by_file
    images[0].write_bytes(images[0].read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.png: no whole PNG or JPEG"):
        predict(str(tracked.folder), images)
    with pytest.raises(ConfigError, match="no such file"):
        predict(str(tracked.folder), [tmp_path / "c.png"])
