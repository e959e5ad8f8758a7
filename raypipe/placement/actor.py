"""A Ray cluster to run on: the one that is there, or one on this machine alone."""

from __future__ import annotations

import datetime
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

# Ray's hook would start each worker through uv again, three times slower; the workers' Python has all they need.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from raypipe.errors import ConfigError, RunError
from raypipe.placement.plan import local_resources
from raypipe.security.actor import refuse_misfit
from raypipe.security.own import check_own

NAMESPACE = "raypipe"
KNOCK_S = 5.0
INLINE = 1 << 20  # bytes up to which what a call answers does not go through the object store
PORTS = 20  # of Ray's own processes on one machine, and some to spare
STOP_S = 10.0  # for a coordinator to end by itself
VERSIONS = re.compile(r"^\s+(Ray|Python): (\S+)$", re.MULTILINE)  # in Ray's lines: the cluster's, then this process's
LOOPBACK = "127.0.0.2"  # 127.0.0.1 is rewritten by Ray to the machine's own address, which others could reach


def start_local(stores: Sequence[str], cpus: float, model_bytes: int) -> None:
    """Ray on this machine alone, playing every store's node; ends with this process.

    Ray listens on every address of a machine whatever its own is: see `security.own.show_local_token`. CPU shares are
    granted as asked: this machine's cores are shared out by its operating system.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # newer Rays have it on
    _need_ports(PORTS + len(stores))
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
            # again while it is still mapped (a fresh 45 MB costs each store 20 ms of page faults). Small ones go
            # beside it, with the answer itself: half of the raylet's work a version, a sixth of the coordinator's.
            _system_config={
                "free_objects_period_milliseconds": 10,
                "max_direct_call_object_size": INLINE,
                "task_events_report_interval_ms": 0,  # these two are for Ray's dashboard, which does not run here
                "enable_metrics_collection": False,
            },
            _node_ip_address=LOOPBACK if sys.platform == "linux" else "127.0.0.1",
        )
    except Exception as error:  # noqa: BLE001  Ray raises many kinds, bare ones among them
        busy = "; it allows itself 30 s, a busy machine takes longer: try again" if "timed out" in str(error) else ""
        raise RunError(f"Ray did not start on this machine: {_line(error)}{busy}") from None


def _need_ports(wanted: int) -> None:
    """Raises RunError where so many ports are not to be had: Ray would try for two minutes, and not say for what."""
    with ExitStack() as held:
        for found in range(wanted):
            try:
                held.enter_context(socket.socket()).bind(("", 0))
            except OSError as error:
                raise RunError(
                    f"no free port: Ray needs about {wanted} on this machine, {found} are to be had "
                    f"({error.strerror}); end what holds them (ss -tan), or widen net.ipv4.ip_local_port_range"
                ) from None


def connect(address: str) -> None:
    """Join a running cluster. Raises RunError in one line, ConfigError for what this process would show at its door."""
    check_own(os.environ, datetime.datetime.now(datetime.UTC))
    address = _found() if address == "auto" else address
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (OSError, RuntimeError, ValueError, ConnectionError) as error:
        raise RunError(why_not(address, error)) from None


def why_not(address: str, error: Exception) -> str:
    """A line for what Ray says in several when it does not join a cluster."""
    if versions := VERSIONS.findall(str(error)):
        there, here = (" and ".join(map(" ".join, side)) for side in (versions[:2], versions[2:]))
        return f"the cluster at {address} has {there}, here is {here}: they have to be alike"
    hint = "is it running, and are RAY_AUTH_MODE and its token set as on the head?"
    return f"no Ray cluster at {address}: {_line(error)} ({hint})"


def wait_for_head(seconds: float) -> None:
    """Until the cluster knows its head, to which coordinators are pinned. Raises RunError."""
    until = time.monotonic() + seconds
    while not ray.cluster_resources().get("node:__internal_head__"):
        if time.monotonic() > until:
            raise RunError(f"the cluster has no head node after {seconds:.0f} s")
        time.sleep(0.2)


def _found() -> str:
    """The cluster that Ray would take on this machine; the last one is remembered when it is long gone, too."""
    from ray._private.services import canonicalize_bootstrap_address  # Ray has no public name for it

    try:
        found = canonicalize_bootstrap_address("auto")
    except (ConnectionError, ValueError):
        found = None
    if not found:
        raise RunError("no Ray cluster on this machine: start one (ray start --head), or name one with --address")
    return str(found)


def _knock(address: str) -> None:
    """Ray would try for two minutes. What is no HOST:PORT (`ray://...`) Ray looks up itself."""
    host, _, port = address.rpartition(":")
    if "/" in address or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except (OSError, OverflowError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise RunError(f"no Ray cluster at {address}: {reason}") from None
    refuse_misfit(address)


def address() -> str:
    """HOST:PORT of the cluster that this process is in."""
    found: str = ray.get_runtime_context().gcs_address
    return found


def shut_down() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()


def end_left(run: str | None) -> list[str]:
    """End a run's actors; None: the store actors of all runs that have no coordinator. Their names.

    Actors are found by name, so whichever job or code made them. A coordinator is asked to stop before it is ended.
    """
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]
    alive = {name.split("/")[1] for name in names if name.startswith("coordinator/")}
    if run is None:
        ended = [name for name in names if name.startswith("store/") and name.split("/")[1] not in alive]
    else:
        ended = [name for name in names if name.split("/")[1:2] == [run]]
        if not ended:
            raise ConfigError(f"no actor of a run named {run!r} is on this cluster")
    for name in sorted(ended):  # the coordinator first
        with suppress(ValueError, ray.exceptions.RayError, TimeoutError):
            actor: Any = ray.get_actor(name, namespace=NAMESPACE)
            if name.startswith("coordinator/"):
                ray.get(actor.stop.remote("taken down"), timeout=STOP_S)
                _await_end(actor)
            ray.kill(actor)
    return sorted(ended)


def _await_end(coordinator: Any) -> None:
    """It ends by itself once what was published is kept."""
    until = time.monotonic() + STOP_S
    while time.monotonic() < until:
        if ray.get(coordinator.progress.remote(0, 0.1), timeout=STOP_S)["phase"] == "over":
            return


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
