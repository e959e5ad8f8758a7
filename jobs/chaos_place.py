"""Where a real chaos run takes place: a head and a raylet a store on this machine, an MLflow server, a small disk.

It also plays what a site has beside raypipe: a supervisor that starts again what has died. A raylet, the MLflow server
and the command are started anew; when the head dies everything is, as after a power cut, and the run resumed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
QUOTA_MIB = 64  # the run's disk
START_TRIES = 4
AGAIN_S = 1.5  # after which the supervisor starts again what died
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4}


class Place:
    """The cluster, its files and its supervisor. Everything that it starts ends with `close`."""

    def __init__(self, stores: int, seed: int) -> None:
        self.seed = seed
        self.folder = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
        self.names = [f"shop-{i}" for i in range(1, stores + 1)]
        self.home, self.stores = self.folder / "home", self.folder / "stores"
        self.tracked = self.folder / "mlflow.db"
        self.quota = self._mount()
        self.nodes: dict[str, Any] = {}
        self.cluster: Any = None
        self.server: subprocess.Popen[bytes] | None = None
        self.command: subprocess.Popen[bytes] | None = None
        self.run = ""
        self.started = 0  # commands
        self.dead_since: dict[str, float] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._environment()

    def _mount(self) -> bool:
        """A file system of its own for the run, so small that it can be filled; False where that is not allowed."""
        self.home.mkdir()
        (self.folder / "ray").mkdir()
        if os.geteuid() != 0:
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={QUOTA_MIB}m", "raypipe-chaos", str(self.home)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _environment(self) -> None:
        """For all that is started from here; before Ray is imported."""
        os.environ |= {
            "RAY_TMPDIR": str(self.folder),
            "RAYPIPE_HOME": str(self.home),
            "RAYPIPE_STORES": str(self.stores),
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_SEED": str(self.seed),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}",
        }
        os.environ.pop("RAY_ADDRESS", None)

    def make_data(self) -> None:
        from raypipe.data.sample import load_sample
        from raypipe.data.stores import make_stores

        split, images = {"name": "dirichlet", "alpha": 1.0}, 300 * len(self.names)
        make_stores(self.stores, self.names, source=load_sample(), split=split, size_ratio=3.0, max_images=images)

    def write_config(self, name: str, *, pace: str, versions: int) -> Path:
        said: dict[str, Any] = {
            "name": name,
            "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
            "model": {"name": "small_cnn", "width": 8},
            "stores": [{"id": store, "cpus": 0.2, "slowdown": 1 if pace == "paced" else 8} for store in self.names],
            "train": {"lr": 0.05, "local_steps": None if pace == "paced" else 10, "batch_size": 16},
            "pace": pace,
            "pacing": {"heartbeat_s": 2, "hung_s": 8, "backoff_s": 0.2, "max_failures": 20, "quorum": 1, "join_s": 900},
            "stop": {"max_versions": versions},
            "evaluate": {"test": False, "alone": False},
            "track": {"keep_last": 10, "keep_every": 50, "log_model_every": 100000},
        }
        extra: dict[str, Any] = {"budget_s": 1.0} if pace == "paced" else {"buffer_size": 2}
        said["pacing"] |= extra
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(said))
        return file

    # -- the cluster ----------------------------------------------------------------------------------------------

    def start_cluster(self) -> None:
        """On a busy machine a head may not be up in the half minute that Ray gives it: then once more."""
        for left in range(START_TRIES, 0, -1):
            try:
                return self._start_cluster()
            except Exception as error:
                print(f"  the cluster did not start: {str(error).splitlines()[0]}", flush=True)
                self.stop_cluster()
                if left == 1:
                    raise
        raise AssertionError

    def _start_cluster(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=2, include_dashboard=False, node_ip_address="127.0.0.2", **self._common(HEALTH))
        for store in self.names:
            self.start_node(store)

    def _common(self, system: dict[str, Any] | None = None) -> dict[str, Any]:
        common: dict[str, Any] = {"temp_dir": str(self.folder / "c"), "object_store_memory": 100 * 2**20}
        if system is not None:
            common["_system_config"] = {"health_check_initial_delay_ms": 0, **system}
        return common

    def start_node(self, store: str) -> None:
        address = f"127.0.0.{self.names.index(store) + 3}"
        resources = {f"store:{store}": 1}
        options = {"num_cpus": 2, "resources": resources, "node_ip_address": address, **self._common()}
        self.nodes[store] = self.cluster.add_node(wait=False, **options)

    def raylet(self, store: str | None = None) -> psutil.Process | None:
        """Of a store's node, or of the head."""
        node = self.cluster.head_node if store is None else self.nodes.get(store)
        return _alive(node, "raylet") if node is not None else None

    def workers(self, what: str, raylet: psutil.Process | None) -> list[psutil.Process]:
        """Actors of a class below a raylet."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in raylet.children(recursive=True) if raylet is not None else []:
                with contextlib.suppress(psutil.Error):
                    if f"ray::{what}" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def stop_cluster(self) -> None:
        """All of it at once; what is frozen too, and what was left by a start that failed."""
        others = {process.pid for process in (self.command, self.server) if process is not None}
        for process in psutil.Process().children():
            if process.pid not in others:
                end([*_below(process), process])
        if self.cluster is not None:
            with contextlib.suppress(Exception):  # what is dead already cannot be stopped again
                self.cluster.shutdown()
        self.nodes, self.cluster = {}, None

    # -- the supervisor -------------------------------------------------------------------------------------------

    def mend(self, config: Path | None) -> bool:
        """Start again what has been dead for a while: raylets, the MLflow server, and where its configuration is given
        the command. Whether all of it lives."""
        for store in self.names:
            if self._dead(f"raylet {store}", self.raylet(store) is None):
                if (dead := self.nodes.pop(store, None)) is not None:
                    end(_below_all(dead))
                    self.cluster.worker_nodes.discard(dead)
                try:
                    self.start_node(store)
                except Exception as error:  # noqa: BLE001  whatever Ray's reason: again, later
                    print(f"  {store}'s node did not start: {str(error).splitlines()[0]}")
        if self._dead("mlflow", self.server is None or self.server.poll() is not None):
            self.start_server()
        if config is not None and self._dead("command", self.command is None or self.command.poll() is not None):
            self.start_command(config)
        return not self.dead_since

    def _dead(self, what: str, dead: bool) -> bool:
        if not dead:
            self.dead_since.pop(what, None)
            return False
        since = self.dead_since.setdefault(what, time.monotonic())
        if time.monotonic() - since < AGAIN_S:
            return False
        del self.dead_since[what]
        return True

    def start_server(self) -> None:
        files = ["--backend-store-uri", f"sqlite:///{self.tracked}", "--artifacts-destination"]
        command = [sys.executable, "-m", "mlflow", "server", *files, str(self.folder / "served"), "--workers", "1"]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        env.pop("MLFLOW_TRACKING_URI")
        self.server = self._start([*command, "--host", "127.0.0.1", "--port", str(self.port)], "mlflow.log", env)

    def start_command(self, config: Path) -> None:
        """`raypipe train`, with a noisy coordinator; a run that has begun is resumed."""
        begun = sorted((self.home / "runs").glob(f"{config.stem}-*/journal.sqlite"))
        self.run = begun[-1].parent.name if begun else ""
        what = ["--resume", self.run] if self.run else [str(config)]
        command = [sys.executable, str(ROOT / "jobs" / "chaos_port.py"), "train", *what]
        self.command = self._start([*command, "--insecure", "--address", self.cluster.address], "command.log")
        self.started += 1

    def _start(self, command: list[str], log: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def raypipe(self, *arguments: str, timeout_s: float = 240) -> tuple[int, str]:
        """Another command of it."""
        command = [sys.executable, "-m", "raypipe", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
        return done.returncode, done.stdout + done.stderr

    def close(self, *, keep: bool) -> None:
        """End all of it. `keep`: its files are wanted."""
        for process in (self.command, self.server):
            if process is not None and process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    own = psutil.Process(process.pid)
                    end([*_below(own), own])
                process.wait()
        try:
            self.stop_cluster()
        finally:
            if self.quota and not keep:
                subprocess.run(["umount", "--lazy", str(self.home)], check=False)
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL, all of them."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _alive(node: Any, name: str) -> psutil.Process | None:
    """A node's own process of this name, unless it is dead."""
    for info in node.all_processes.get(name, []):
        if info.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                return psutil.Process(info.process.pid)
    return None


def _below_all(node: Any) -> list[psutil.Process]:
    """What is left of a node whose raylet died."""
    left = [process for name in node.all_processes if (process := _alive(node, name)) is not None]
    return [*(child for process in left for child in _below(process)), *left]
