"""A Ray cluster to run on: the one that is there, or one on this machine alone."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Ray's hook would start each worker through uv again, three times slower; the workers' Python has all they need.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from raypipe.errors import RunError
from raypipe.placement.plan import local_resources

NAMESPACE = "raypipe"
LOOPBACK = "127.0.0.2"  # 127.0.0.1 is rewritten by Ray to the machine's own address, which others could reach


def start_local(stores: Sequence[str], cpus: float, model_bytes: int) -> None:
    """Ray on this machine alone, playing every store's node; ends with this process.

    Nothing listens beyond loopback, so there is no token (RAY_AUTH_MODE is set so that newer Rays agree). CPU shares
    are granted as asked: this machine's cores are shared out by its operating system.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    room = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 1 << 30
    wanted = 256 * 2**20 + model_bytes * (len(stores) + 8)
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(cpus) + 1),
            resources=local_resources(stores),
            object_store_memory=max(80 * 2**20, min(wanted, int(room * 0.6))),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace=NAMESPACE,
            # Updates leave the object store when they are folded, not up to a second later: their memory is used
            # again while it is still mapped (a fresh 45 MB costs each store 20 ms of page faults).
            _system_config={"free_objects_period_milliseconds": 10},
            _node_ip_address=LOOPBACK if sys.platform == "linux" else "127.0.0.1",
        )
    except Exception as error:  # noqa: BLE001  Ray raises many kinds, bare ones among them
        raise RunError(f"Ray did not start on this machine: {_line(error)}") from None


def connect(address: str) -> None:
    """Join a running cluster. Raises RunError in one line."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (OSError, RuntimeError, ValueError, ConnectionError) as error:
        hint = "is it running, and are RAY_AUTH_MODE and its token set as on the head?"
        raise RunError(f"no Ray cluster at {address}: {_line(error)} ({hint})") from None


def wait_for_head(seconds: float) -> None:
    """Until the cluster knows its head, to which coordinators are pinned. Raises RunError."""
    until = time.monotonic() + seconds
    while not ray.cluster_resources().get("node:__internal_head__"):
        if time.monotonic() > until:
            raise RunError(f"the cluster has no head node after {seconds:.0f} s")
        time.sleep(0.2)


def shut_down() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
