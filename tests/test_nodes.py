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
from dataclasses import dataclass
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
SMALL = ["--num-cpus=2", "--object-store-memory=100000000"]
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

    def keep_head(self) -> subprocess.Popen[str]:
        """Its own supervisor."""
        options = ["--include-dashboard=false", f"--system-config={SYSTEM}", *SMALL]
        return self.run(self.head, "head", str(ROOT / "cluster/head-node"), "--address", self.address, "--", *options)

    def keep_store(self, store: str) -> subprocess.Popen[str]:
        address = ["--address", self.address, "--labels", "region=test"]
        return self.run(self.stores[store], store, str(ROOT / "cluster/store-node"), store, *address, "--", *SMALL)

    @property
    def address(self) -> str:
        return f"{self.head.ip}:6379"

    def records(self, *kinds: Any) -> list[tuple[float, dict[str, Any]]]:
        """(when, what) of the run; nothing while it is being made."""
        try:
            journal = Journal(run_folder("last", self.folder / "home") / "journal.sqlite")
            return [(record.at, record.body) for record in journal.read(kinds=kinds)]
        except RaypipeError:
            return []

    def by(self, store: str, since: float = 0.0) -> list[int]:
        """Versions after a moment to which a store contributed."""
        published = [body for at, body in self.records("version_published") if at > since]
        return [body["version"] for body in published if store in (c["store"] for c in body["contributions"])]

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
        pytest.skip("machines of its own need root")
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
        made.until(lambda: "Ray runtime started" in made.said(), 60, "a head")
        made.run(head, "train", "raypipe", "train", str(folder / "run.yaml"), "--address", made.address)
        yield made
    finally:
        room.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_store_cut_off_is_declared_dead_and_comes_back(site: Site) -> None:
    t0 = time.time()
    def say(*x): print(f"{time.time()-t0:6.1f}", *x, file=sys.stderr, flush=True)
    site.until(lambda: site.by("south") and site.by("north"), 120, "a version with both stores")
    say("both")
    site.stores["south"].cable("down")
    cut = time.time()
    site.until(lambda: [b for at, b in site.records("store_left") if at > cut and b["store"] == "south"], 30, "left")
    say("left", site.records("store_left"))
    site.until(lambda: len(site.by("north", cut)) > 6, 30, "versions without south")
    time.sleep(5)
    say("alone")
    site.stores["south"].cable("up")
    up = time.time()
    site.until(lambda: site.by("south", up), 90, "south contributes again")
    say("again", time.time() - up)


def test_a_head_switched_off_goes_on_within_a_minute_of_its_return(site: Site) -> None:
    t0 = time.time()
    def say(*x): print(f"{time.time()-t0:6.1f}", *x, file=sys.stderr, flush=True)
    site.until(lambda: site.by("south") and site.by("north"), 120, "a version with both stores")
    site.head.off()
    time.sleep(3)
    before = site.records("version_published")[-1][1]["version"]
    site.head.on()
    back = time.time()
    site.keep_head()
    site.until(lambda: site.records("version_published")[-1][1]["version"] > before, 120, "next")
    say("next version after", time.time() - back)
    site.until(lambda: site.by("south", back) and site.by("north", back), 60, "both")
    say("both after", time.time() - back)
