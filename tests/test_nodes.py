"""Nodes that are lost and return without a person: a store cut off, a head switched off, each a machine of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import CLASSES, ROOT
from machines import Machine, Room, possible

from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.errors import RaypipeError
from raypipe.tracking.book import run_folder
from raypipe.tracking.journal import Journal

STORES = ["north", "south"]
HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
SYSTEM = json.dumps({"health_check_initial_delay_ms": 0, **HEALTH})
SMALL = ["--num-cpus=1", "--object-store-memory=100000000"]
CONFIG: dict[str, Any] = {
    "name": "nodes",
    "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
    "model": {"name": "small_cnn", "width": 8},
    "stores": [{"id": store, "cpus": 0.2} for store in STORES],
    "train": {"lr": 0.05, "batch_size": 16},
    "pace": "paced",
    "pacing": {"budget_s": 0.5, "heartbeat_s": 1, "hung_s": 5, "backoff_s": 0.2, "join_s": 90},
    "stop": {"max_versions": 100_000},
    "evaluate": {"test": False, "alone": False},
    "track": {"mlflow": False},
}


@dataclass
class Site:
    """A head and two stores, kept by their supervisors, and a run that goes on."""

    folder: Path
    head: Machine
    stores: dict[str, Machine]
    kept: dict[str, subprocess.Popen[str]] = field(default_factory=dict)  # the newest supervisor of each
    opened: tuple[str, ...] = ("--insecure",)
    health: tuple[str, ...] = (f"--system-config={SYSTEM}",)  # a node that is silent is given up sooner than by default

    @property
    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder / "disk"),  # each machine sees its own there
            "RAYPIPE_HOME": str(self.folder / "home"),
            "RAYPIPE_STORES": str(self.folder / "stores"),
        }

    def run(self, machine: Machine, name: str, *command: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{name}.log").open("a")
        return machine.start(*command, cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def keep_head(self) -> None:
        script = [
            str(ROOT / "cluster/head-node"),
            "--address",
            self.address,
            *self.opened,
            "--",
            "--include-dashboard=false",
        ]
        self.kept["head"] = self.run(self.head, "head", *script, *self.health, *SMALL)

    def keep_store(self, store: str) -> None:
        script = [str(ROOT / "cluster/store-node"), store, "--address", self.address, "--labels", "region=test"]
        self.kept[store] = self.run(self.stores[store], store, *script, *self.opened, "--", *SMALL)

    @property
    def address(self) -> str:
        return f"{self.head.ip}:6379"

    def records(self, *kinds: Any) -> list[tuple[float, dict[str, Any]]]:
        """(when, what) of the run; nothing while it is being made."""
        try:
            journal = Journal(run_folder("last", self.folder / "home") / "journal.sqlite")
        except RaypipeError:
            return []
        with closing(journal):
            return [(record.at, record.body) for record in journal.read(kinds=kinds)]

    def by(self, store: str, since: float = 0.0) -> list[int]:
        """Versions after a moment to which a store contributed."""
        published = [body for at, body in self.records("version_published") if at > since]
        return [body["version"] for body in published if store in (c["store"] for c in body["contributions"])]

    def versions(self) -> list[int]:
        return [body["version"] for _, body in self.records("version_published")]

    def declared_dead(self) -> bool:
        """Whether the head has given a node up, by the newest log of its GCS."""
        logs = sorted(self.head.disk.glob("ray/session_2*/logs/gcs_server.out"), key=lambda log: log.stat().st_mtime)
        return "missing too many heartbeats" in logs[-1].read_text()

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def said(self) -> str:
        """The end of each log, for who has to find out why."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def until(self, happened: Callable[[], Any], seconds: float, what: str) -> Any:
        end = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}\n{self.said()}"
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if not possible():
        assert os.getuid() != 0, "root must be able to make namespaces here: these tests may not be skipped"
        pytest.skip("needs root: each machine is made of namespaces of its own")
    folder = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
    room = Room(folder)
    try:
        head, *stores = [room.machine() for _ in range(3)]
        made = Site(folder, head, dict(zip(STORES, stores, strict=True)))
        split = {"name": "dirichlet", "alpha": 1.0}
        make_stores(folder / "stores", STORES, source=load_sample(), split=split, size_ratio=1.0, max_images=400)
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
        for machine in room.machines:
            machine.on()
        made.keep_head()
        for store in STORES:
            made.keep_store(store)
        made.until(lambda: "Ray runtime started" in made.log("head"), 90, "a head")
        made.run(head, "train", "raypipe", "train", str(folder / "run.yaml"), "--insecure", "--address", made.address)
        made.until(lambda: made.by("south") and made.by("north"), 120, "versions with both stores")
        yield made
    finally:
        room.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_store_cut_off_until_it_is_declared_dead_contributes_again(site: Site) -> None:
    joined = site.log("south").count("joins")
    site.stores["south"].cable("down")
    cut = time.time()
    site.until(site.declared_dead, 30, "its node is declared dead")
    site.until(lambda: [body for at, body in site.records("store_left") if at > cut], 30, "the run misses it")
    left = site.records("store_left")[-1]
    assert left[1]["store"] == "south"
    site.until(lambda: set(site.by("north", left[0])) - set(site.by("south", left[0])), 30, "a version without it")
    site.stores["south"].cable("up")
    healed = time.time()
    site.until(lambda: site.by("south", healed), 90, "it contributes again")
    print(f"cut off to contributing again after the cable was back: {time.time() - healed:.1f} s")
    assert site.log("south").count("joins") > joined, "its raylet had to be started again"


def test_a_head_switched_off_goes_on_within_a_minute_of_its_return(site: Site) -> None:
    beside = site.run(site.head, "beside", "raypipe", "resume", "--insecure", "--address", site.address)
    assert beside.wait(60) == 0
    assert site.log("beside").endswith(": is going on\n"), "no second coordinator for a run that has one"
    before = site.versions()
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1) / 2)  # others on this machine: their share of time too
    site.head.off()
    time.sleep(2)  # no machine is back sooner
    died_at = site.versions()
    assert died_at[-1] >= before[-1]
    site.head.on()
    back = time.time()
    site.keep_head()
    site.until(lambda: site.versions()[-1] > died_at[-1], 120, "a version after the head's return")
    took_s = site.records("version_published")[len(died_at)][0] - back
    print(f"head's return to the next version: {took_s:.1f} s (load {os.getloadavg()[0]:.1f})")
    assert took_s <= 60 * crowd
    site.until(lambda: site.by("south", back) and site.by("north", back), 60, "both stores contribute again")
    assert site.versions() == list(range(len(site.versions())))
    counted = [c["ticket"] for _, body in site.records("version_published") for c in body["contributions"]]
    assert len(counted) == len(set(counted)), "each update counts once"
    assert [body["epoch"] for _, body in site.records("run_started")] == [1, 2]


def test_sigterm_ends_a_node_and_nothing_but_the_node(site: Site) -> None:
    for name, machine in [*site.stores.items(), ("head", site.head)]:
        kept = site.kept[name]
        assert len(machine.processes()) > 5
        psutil.Process(kept.pid).children()[0].terminate()  # the go-between's only child
        assert kept.wait(30) == 0, site.said()
        left = [" ".join(process.cmdline()) for process in machine.processes()]
        assert [line for line in left if "raypipe train" not in line] == []
    assert site.records("run_finished") == [], "it is not over: it waits for a head"
