"""One Ray cluster for all tests that need it: a head and five store nodes, each a raylet with an address of its own.

All of it stays in loopback, in one short-named folder, and ends with the session by its own process ids. No test
connects this process for good: each starts and leaves by itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import raypipe  # noqa: F401  # before any test imports OpenCV, which reads its limits once

ROOT = Path(__file__).resolve().parent.parent
STORES = [f"shop-{i}" for i in range(1, 6)]
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

ON_CLUSTER = (
    *("test_cluster", "test_doors", "test_outbox", "test_rest", "test_rotation"),
    *("test_terms", "test_thin", "test_vault"),
)
# These start clusters of their own, with bounds in time. test_up first: after test_nodes in one process `ray up` hung.
MACHINES = ("test_up", "test_nodes", "test_chaos", "test_comeback", "test_readme")

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback only
os.environ["RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"] = "120"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def group(nodeid: str) -> str:
    """Tests that one of several workers runs: those of a file, or of all files that wait for a cluster's processes.

    Two clusters that start at once on two cores keep no bound in time.
    """
    name = Path(nodeid.split("::")[0]).stem
    return "cluster" if name in (*MACHINES, *ON_CLUSTER) else name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The group that takes longest comes first; in it the shared cluster starts when the others have ended."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and item.path.stem not in ON_CLUSTER:
            raise pytest.UsageError(f"{item.path.stem} needs the shared cluster: name it in ON_CLUSTER")
    first = [*MACHINES, *ON_CLUSTER]
    items.sort(key=lambda item: first.index(name) if (name := item.path.stem) in first else len(first))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """See `group`."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # the order is ours
    return Groups(config, log)


@pytest.fixture(autouse=True)
def own_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own `set_tracking_uri` writes into the environment: what one test said there is gone with it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@dataclass(frozen=True)
class Place:
    """Where it is, and where it keeps what."""

    address: str
    jobs: str  # the job server's address
    folder: Path
    stores: Path
    home: Path
    nodes: Any

    def config(self, **changes: Any) -> dict[str, Any]:
        """A small run over the five stores, as it would be written in YAML."""
        said: dict[str, Any] = {
            "name": "test",
            "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
            "model": {"name": "small_cnn", "width": 8},
            "stores": [{"id": store, "cpus": 0.2} for store in STORES],
            "train": {"lr": 0.05, "local_steps": 4, "batch_size": 16},
            "pace": "wait_for_all",
            "pacing": {"heartbeat_s": 2},
            "stop": {"max_versions": 2},
            "evaluate": {"test": False, "alone": False},
        }
        for key, value in changes.items():
            said[key] = {**said[key], **value} if isinstance(said.get(key), dict) and isinstance(value, dict) else value
        return said


@pytest.fixture(scope="session")
def cluster() -> Iterator[Place]:
    """Head with job server, and a raylet a store; private data lies in each store's folder."""
    from raypipe.data.sample import load_sample
    from raypipe.data.stores import make_stores

    folder = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ["RAYPIPE_HOME"], os.environ["RAYPIPE_STORES"] = str(folder / "home"), str(folder / "stores")
    os.environ["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"  # a job's `python` comes from the head's PATH
    os.environ["RAYPIPE_VAULTS"] = str(folder / "v")
    (folder / "ray").mkdir()
    split = {"name": "dirichlet", "alpha": 1.0}
    make_stores(folder / "stores", STORES, source=load_sample(), split=split, size_ratio=4.0, max_images=1500)
    from ray.cluster_utils import Cluster

    health = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    nodes = Cluster()
    common = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    jobs = 28265
    nodes.add_node(
        temp_dir=str(folder / "c"),
        include_dashboard=True,
        dashboard_port=jobs,
        node_ip_address="127.0.0.2",
        _system_config={"health_check_initial_delay_ms": 0, **health},
        **common,
    )
    for number, store in enumerate(STORES):
        own = {"resources": {f"store:{store}": 1}, "node_ip_address": f"127.0.0.{number + 3}"}
        # As on machines of their own: several raylets would unpack a job's files into one folder at the same time.
        nodes.add_node(temp_dir=str(folder / f"c{number}"), **own, **common)
    # As `ray start` does; else a job's own process takes any cluster that it finds on this machine.
    (folder / "c" / "ray_current_cluster").write_text(nodes.address)
    try:
        yield Place(nodes.address, f"http://127.0.0.1:{jobs}", folder, folder / "stores", folder / "home", nodes)
    finally:
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
