"""Where jobs/bench.py measures: one temporary home, ten stores with the same number of images, Ray on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from bench_floor import write_sleepy

from raypipe.config.schema import RunConfig
from raypipe.demo import make_demo_stores
from raypipe.launch import begin, watch
from raypipe.placement.actor import shut_down, start_local
from raypipe.run import load_run, new_run_id
from raypipe.tracking.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
IDS = [f"store-{i}" for i in range(10)]
TASK = {"name": "classification", "classes": 10, "image_size": 32, "channels": 3}


def configuration(name: str, num_stores: int = 10, **changes: Any) -> dict[str, Any]:
    """W1 with changes, as it would be written in YAML. All workloads read the same images: 200 a store, alike."""
    said: dict[str, Any] = {
        "name": name,
        "task": TASK,
        "model": "small_cnn",
        "stores": [{"id": store} for store in IDS[:num_stores]],
        "train": {"lr": 0.05, "batch_size": 32, "local_epochs": 1},
        "pace": "wait_for_all",
        "pacing": {"concurrency": 2},
        "stop": {"max_versions": 10},
        "ledger": {"keep": False},
        "local": {"split": "iid", "size_ratio": 1, "camera_shift": 0, "max_images": 2000},
    }
    return {**said, **changes}


@dataclass
class Bed:
    """One temporary home with stores of one sample, Ray on this machine, and whole commands."""

    folder: Path
    repeats: int
    quick: bool
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        os.environ |= {"RAYPIPE_HOME": str(self.home), "RAY_TMPDIR": str(self.folder), "RAY_AUTH_MODE": "disabled"}
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            os.environ.pop(name, None)
        self.stores = self.home / "demo" / "w1"  # where the whole command looks for them too
        os.environ["RAYPIPE_STORES"] = str(self.stores)
        packages = self.folder / "packages"
        write_sleepy(packages)
        sys.path.insert(0, str(packages))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        self._started = False
        self.config = self.load(configuration("w1"))
        make_demo_stores(self.config, self.stores)

    def load(self, said: Mapping[str, Any]) -> RunConfig:
        return load_run(self.write(said))

    def write(self, said: Mapping[str, Any]) -> Path:
        path = self.folder / f"{said['name']}.yaml"
        path.write_text(yaml.safe_dump(dict(said)))
        return path

    # -- Ray here ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Ray on this machine, once for all figures that need it."""
        if not self._started:
            start_local(IDS, len(IDS), 64 * 2**20)
            self._started = True

    def close(self) -> None:
        if self._started:
            shut_down()
            self._started = False

    def federate(
        self, said: Mapping[str, Any], look: Callable[[Path, RunConfig], None] = lambda run, config: None
    ) -> dict[str, list[dict[str, Any]]]:
        """A federation, watched as raypipe.launch does; its records by kind. The tests at its end are left out.

        `look`: at the run's folder, before it is removed.
        """
        import ray

        self.start()
        config = self.load({**said, "evaluate": {"alone": False, "test": False}})
        run = new_run_id(config.name, time.time())
        actor = begin(config, run, str(self.home), {})
        summary = watch(actor, lambda state: None, lambda: None)
        ray.kill(actor)
        self.wait_for_quiet()
        if summary["status"] != "finished":
            raise RuntimeError(f"{run} ended: {summary['reason']}")
        records: dict[str, list[dict[str, Any]]] = {}
        for record in Journal(self.home / "runs" / run / "journal.sqlite").read():
            records.setdefault(record.kind, []).append(record.body)
        look(self.home / "runs" / run, config)
        shutil.rmtree(self.home / "runs" / run)
        return records

    def wait_for_quiet(self) -> None:
        """Until the stores' processes of the last federation are gone."""
        import ray

        cluster: Any = ray  # typed in part
        until, total = time.monotonic() + 30, cluster.cluster_resources()["CPU"]

        def idle() -> Any:
            return cluster.available_resources().get("CPU")

        while idle() != total and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(1.0)

    def command(self, arguments: list[str], home: Path | None = None) -> tuple[float, str]:
        """Seconds and output of a Python command in a fresh process. Raises RuntimeError when it fails."""
        start = time.monotonic()
        env = {**os.environ, "RAYPIPE_HOME": str(home or self.home)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{arguments[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
        return time.monotonic() - start, done.stdout
