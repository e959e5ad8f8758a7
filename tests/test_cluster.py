"""A real federation on five raylets: exact arithmetic, faults, privacy, two runs side by side, a submitted job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, STORES, Place

from raypipe.compose import compose
from raypipe.config.schema import RunConfig
from raypipe.models.flat import initial
from raypipe.models.tensors import vector_from
from raypipe.run import new_run_id
from raypipe.tracking.book import run_folder
from raypipe.tracking.journal import Journal
from raypipe.tracking.versions import VersionStore

pytestmark = pytest.mark.cluster


class Federation:
    """A run seen from a test: its coordinator, its record, its stores' processes."""

    def __init__(self, cluster: Place, config: dict[str, Any]) -> None:
        import ray

        from raypipe.coordinator.actor import CoordinatorActor
        from raypipe.placement.actor import NAMESPACE
        from raypipe.prelude import prepare

        self._ray, self.address = ray, cluster.address
        self.run = new_run_id(config["name"], time.time())
        said = RunConfig.model_validate(config).model_dump(mode="json")
        named: Any = CoordinatorActor.options(
            name=f"coordinator/{self.run}", namespace=NAMESPACE
        )  # as launch.begin does
        ask = prepare if config.get("closed_form") else None
        self.actor = named.remote(compose, said, self.run, str(cluster.home), {}, ask)
        self.work = self.actor.work.remote()
        self.folder = cluster.home / "runs" / self.run

    def result(self, timeout_s: float = 120.0) -> dict[str, Any]:
        return dict(self._ray.get(self.work, timeout=timeout_s))

    def board(self) -> dict[str, Any]:
        return dict(
            self._ray.get(self.actor.progress.remote(0, 0.2), timeout=20)["board"]
            or {"rows": [], "version": 0, "lines": []}
        )

    def until(self, what: Any, timeout_s: float = 60.0) -> Any:
        """The first truthy `what(board)`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := what(self.board()):
                return found
        raise AssertionError(f"not in {timeout_s:.0f} s; the board: {self.board()}")

    def records(self, *kinds: Any) -> list[dict[str, Any]]:
        return [r.body for r in Journal(self.folder / "journal.sqlite").read(kinds=kinds)]

    def contributors(self, since: int) -> set[str]:
        """Whose updates are in versions after this one."""
        made = self.records("version_published")
        return {c["store"] for v in made if v["version"] > since for c in v["contributions"]}

    def processes(self) -> dict[str, int]:
        """Store -> process id of its newest actor in this run."""
        from ray.util.state import list_actors

        found = {}
        for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000):
            if actor.name and actor.name.startswith(f"store/{self.run}/"):
                found[actor.name.split("/")[2]] = actor.pid
        return found


@contextmanager
def connected(cluster: Place) -> Iterator[None]:
    from raypipe.placement.actor import connect, shut_down

    connect(cluster.address)
    try:
        yield
    finally:
        shut_down()


def state(board: dict[str, Any], store: str) -> str:
    return next((row["state"] for row in board["rows"] if row["store"] == store), "")


def test_wait_for_all_equals_ten_lines_of_fedavg_and_equal_seeds_give_equal_versions(cluster: Place) -> None:
    config = cluster.config(stop={"max_versions": 2}, seed=11)
    config["train"]["optimizer"] = {"name": "sgd", "momentum": 0.9}
    with connected(cluster):
        both = [Federation(cluster, config) for _ in range(2)]
        for federation in both:
            federation.result()
    hashes = [[v["hash"] for v in f.records("version_published")] for f in both]
    assert len(hashes[0]) == 3
    assert hashes[0] == hashes[1]
    said = RunConfig.model_validate(config)
    layout, weights = initial(said.model, 10, 1, 28, said.seed)
    for version in (1, 2):
        weights = fedavg_by_hand(cluster, said, weights, version - 1)
        stored = vector_from(layout, VersionStore(both[0].folder / "versions").read(version))
        assert stored.tobytes() == weights.tobytes(), f"version {version} differs"


def fedavg_by_hand(cluster: Place, config: RunConfig, base: np.ndarray, version: int) -> np.ndarray:
    """Ten lines of FedAvg, with each store's training done by a plain site in this process."""
    import torch

    from raypipe.store.messages import Plan, Ticket
    from raypipe.store.seeds import ticket_seed
    from raypipe.store.site import Site

    layout, _ = initial(config.model, 10, 1, 28, config.seed)
    train = config.train
    plan = Plan(
        "by-hand", config.task, config.model, config.data, train.optimizer, train.lr, train.schedule,
        train.batch_size, layout.fingerprint,
    )  # fmt: skip
    total, weight_sum = torch.zeros(layout.update_size), 0.0
    for store in sorted(STORES):
        site = Site(cluster.stores / store, cpus=0.2)
        seed = ticket_seed(config.seed, store, version)
        progress = (version / 2, version / 2)
        ticket = Ticket(f"t{version}", store, 1, version, seed, progress, max_steps=train.local_steps)
        report = site.train(ticket, plan, base)
        total.add_(torch.from_numpy(site.collect(ticket.id, []).copy()), alpha=float(report.num_train))
        weight_sum += report.num_train
    new = torch.from_numpy(base.copy())
    new[layout.shared] += total.div_(weight_sum)[layout.shared]
    return new.numpy()


def test_a_frozen_and_a_killed_store_end_no_run_and_are_taken_in_again(cluster: Place) -> None:
    config = cluster.config(
        pace="paced",
        pacing={"budget_s": 0.5, "hung_s": 3, "heartbeat_s": 1, "max_failures": 2, "backoff_s": 0.2},
        stop={"max_versions": None, "max_seconds": 400},
        train={"local_steps": None},
    )
    import ray

    with connected(cluster):
        federation = Federation(cluster, config)
        federation.until(lambda board: board["version"] >= 2)
        processes = federation.processes()
        assert sorted(processes) == STORES
        os.kill(processes["shop-1"], signal.SIGSTOP)
        os.kill(processes["shop-2"], signal.SIGKILL)
        frozen_at = federation.board()["version"]
        federation.until(lambda board: board["version"] >= frozen_at + 3)
        federation.until(lambda board: state(board, "shop-2") in ("ready", "training"))
        federation.until(lambda board: state(board, "shop-1") in ("ready", "training"))
        back_at = federation.board()["version"]
        federation.until(lambda board: {"shop-1", "shop-2"} <= federation.contributors(back_at))  # taken in again
        ray.get(federation.actor.stop.remote("seen enough"))
        summary = federation.result()
    assert not Path(f"/proc/{processes['shop-1']}").exists(), "the frozen process was ended"
    left = [body["store"] for body in federation.records("store_left")]
    assert {"shop-1", "shop-2"} <= set(left)
    versions = federation.records("version_published")
    assert [v["version"] for v in versions] == list(range(summary["versions"] + 1))


def told(verb: str, federation: Federation, *more: str) -> subprocess.Popen[str]:
    """`raypipe VERB RUN ...`, as an operator says it."""
    command = [sys.executable, "-m", "raypipe", verb, federation.run, *more, "--address", federation.address]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_stores_join_and_leave_and_classes_change_while_it_runs(cluster: Place) -> None:
    config = cluster.config(
        pace="fedbuff", pacing={"buffer_size": 2, "quorum": 2}, stop={"max_versions": 4000}, train={"local_steps": 2}
    )
    config["stores"] = [s for s in config["stores"] if s["id"] != "shop-5"]
    import ray

    with connected(cluster):
        federation = Federation(cluster, config)
        federation.until(lambda board: board["version"] >= 1 and state(board, "shop-4"))
        joining = told("join", federation, "shop-5", "--cpus", "0.2")
        leaving = told("leave", federation, "shop-4")
        assert (joining.wait(60), leaving.wait(60)) == (0, 0)
        federation.until(lambda board: next((r["updates"] for r in board["rows"] if r["store"] == "shop-5"), 0) >= 2)
        federation.until(lambda board: state(board, "shop-4") == "gone")
        changed = ray.get(federation.actor.classes.remote({"add": ["Cap"], "retire": ["Bag"]}, None))
        federation.until(lambda board: board["version"] >= changed + 5)
        refused = told("classes", federation, "--retire", "Bag")
        errors = refused.communicate(timeout=60)[1]
        assert told("stop", federation).wait(60) == 0
        summary = federation.result()
    assert refused.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith("raypipe: classes from version ")
    assert "retire: no class named 'Bag'" in line
    versions = federation.records("version_published")
    assert [v["version"] for v in versions if v.get("classes")] == [changed]
    assert versions[changed]["classes"]["task"]["gone"] == {"Bag": None}
    assert {c["base"] for v in versions[changed:] for c in v["contributions"]} & {changed, changed + 1}
    assert not federation.records("store_set_aside")
    assert summary["reason"] == "stopped by hand"
    assert federation.records("run_finished")[0]["status"] == "killed"


CANARY = "CANARY-7f3a91"


def test_what_a_store_holds_appears_nowhere_else_whether_it_trains_or_fails(cluster: Place) -> None:
    config = cluster.config(name="canary", stop={"max_versions": 2}, pacing={"max_failures": 1, "quorum": 5})
    planted = {"shop-3": _unreadable, "shop-4": _with_text, "shop-5": _whole}
    with ExitStack() as plants, connected(cluster):
        for store, spoil in planted.items():
            plants.enter_context(_planted(cluster.stores / store, spoil, of_its_class=store == "shop-5"))
            assert any(CANARY.encode() in _content(p) for p in (cluster.stores / store).rglob("*.parquet"))
        federation = Federation(cluster, config)
        printed = [str(federation.until(lambda board: board["version"] >= 1))]
        printed += [str(federation.board()), str(federation.result())]
    aside = {r["store"]: r["reason"] for r in federation.records("store_set_aside")}
    assert set(aside) == {"shop-3", "shop-5"}, "images that cannot be read, and a class that nobody knows"
    assert "read" in aside["shop-3"]
    assert "class" in aside["shop-5"]
    trained = {c["store"] for v in federation.records("version_published") for c in v["contributions"]}
    assert "shop-4" in trained
    places = [p for p in [*cluster.home.rglob("*"), *(cluster.folder / "c").rglob("*")] if p.is_file()]
    found = [p for p in places if CANARY.encode() in _content(p)]
    assert len(places) > 20
    assert found == []
    assert all(CANARY not in text for text in printed)


def _unreadable(image: bytes) -> bytes:
    return CANARY.encode() + image[:20]


def _whole(image: bytes) -> bytes:
    return image


def _with_text(image: bytes) -> bytes:
    """The same PNG with the canary in a tEXt chunk after its header."""
    body = b"tEXtComment\0" + CANARY.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return image[:33] + chunk + image[33:]


@contextmanager
def _planted(store: Path, spoil: Callable[[bytes], bytes], *, of_its_class: bool) -> Iterator[None]:
    """The canary in the data set's folder, each image's id, a class's name, and in the images as `spoil` does it.

    `of_its_class`: there are images of that class; else none are.
    """
    policy, data = store / "policy.yaml", store / "data"
    kept = policy.read_text()
    shutil.copytree(data / "products", data / CANARY)
    file = data / CANARY / "train.parquet"
    table = pq.read_table(file)
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    classes = json.loads(metadata["raypipe.classes"])
    numbers = table.column("label").to_pylist()
    if of_its_class:
        classes[numbers[0]] = CANARY
        for split in ("validation", "test"):  # one list holds for all
            (data / CANARY / f"{split}.parquet").unlink()
    else:
        classes.append(CANARY)
    columns = {
        "image": [spoil(image) for image in table.column("image").to_pylist()],
        "image_id": [f"{CANARY}-{number}" for number in range(len(table))],
    }
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table.replace_schema_metadata({**metadata, "raypipe.classes": json.dumps(classes)}), file)
    policy.write_text(kept.replace("data/products", f"data/{CANARY}"))
    try:
        yield
    finally:
        policy.write_text(kept)
        shutil.rmtree(data / CANARY)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_store_whose_node_is_missing_pends_and_is_named(cluster: Place) -> None:
    config = cluster.config(pacing={"quorum": 6, "join_s": 26})
    config["stores"] += [{"id": "shop-9", "cpus": 0.2}]
    with connected(cluster):
        from ray.util.state import list_actors

        federation = Federation(cluster, config)
        federation.until(lambda board: any("shop-9" in line for line in board["lines"]))
        actors = [a for a in list_actors(limit=1000) if a.name.startswith(f"store/{federation.run}/")]
        states = {a.name.split("/")[2]: a.state for a in actors}
        summary = federation.result()
    assert states.pop("shop-9") == "PENDING_CREATION", "it runs nowhere else"
    assert set(states.values()) == {"ALIVE"}
    assert summary["status"] == "failed"
    (missing,) = [r["reason"] for r in federation.records("store_missing") if r["store"] == "shop-9"]
    assert "no node offers store:shop-9" in missing
    assert "ray start" in missing


def test_the_main_job_through_ray_job_submit_while_another_federation_shares_the_stores(
    cluster: Place, tmp_path: Path
) -> None:
    config = cluster.config(name="submitted", stop={"max_versions": 3}, evaluate={"test": True, "alone": True})
    file = ROOT / "configs" / ".submitted.yaml"
    other = cluster.config(name="beside", stop={"max_versions": 3})
    beside: dict[str, Any] = {}

    def run_beside() -> None:
        written = tmp_path / "beside.yaml"
        written.write_text(yaml.safe_dump(other))
        command = [sys.executable, "jobs/federate.py", str(written), "--insecure", "--address", cluster.address]
        beside["done"] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)

    thread = threading.Thread(target=run_beside)
    try:
        file.write_text(yaml.safe_dump(config))
        thread.start()
        command = [str(ROOT / ".venv/bin/ray"), "job", "submit", "--address", cluster.jobs, "--working-dir", "."]
        command += ["--", "python", "jobs/federate.py", "configs/.submitted.yaml", "--insecure"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    finally:
        file.unlink()
        thread.join()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1500:]
    assert "shared model on the test set" in done.stdout
    assert beside["done"].returncode == 0, beside["done"].stderr
    for name in ("submitted", "beside"):
        folders = sorted((cluster.home / "runs").glob(f"{name}-*"))
        finished = [r.body for r in Journal(folders[-1] / "journal.sqlite").read(kinds=["run_finished"])]
        assert finished[0]["versions"] == 3
    points = sqlite3.connect(cluster.home / "mlflow.db").execute(
        "select count(distinct m.step) from metrics m join runs r on r.run_uuid = m.run_uuid"
        " where m.key = 'fed/contributors' and r.name like 'submitted%'"
    )
    assert points.fetchone()[0] == 4, "every version is a step in MLflow"
    assert run_folder("last", cluster.home).name.split("-")[0] in ("submitted", "beside")
