"""Stores onto nodes, as plain data: resources pin, labels describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHARE = 0.001  # of the store's resource: it pins, and leaves room for other federations on the same store

# glibc gives freed memory back to the system; Ray's methods run in threads whose arenas even do so at every batch. A
# training step then faults all its activations in again: 1.4 times the time (measured, small CNN, batch 32).
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 24),
}

# A job's environment reaches every actor of it; MLflow's login is for the coordinator's follower alone (a server's
# address may hold one).
NO_LOGIN = dict.fromkeys((f"MLFLOW_TRACKING_{what}" for what in ("URI", "USERNAME", "PASSWORD", "TOKEN")), "")


def resource(store: str) -> str:
    """The custom resource that only this store's node offers."""
    return f"store:{store}"


def store_options(store: str, cpus: float, gpus: float) -> dict[str, Any]:
    """Ray actor options that put a store on its own node and nowhere else; without that node it pends."""
    pin, environment = {resource(store): SHARE}, {**KEEP_FREED_MEMORY, **NO_LOGIN}
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": pin, "runtime_env": {"env_vars": environment}}


def local_resources(stores: Sequence[str]) -> dict[str, float]:
    """Custom resources of one machine that plays every store's node."""
    return {resource(store): 1.0 for store in stores}


def missing(stores: Sequence[str], offered: Mapping[str, float]) -> list[str]:
    """Stores whose resource no live node offers."""
    return [store for store in stores if not offered.get(resource(store))]


def missing_advice(store: str, waited_s: float, trouble: str = "") -> str:
    """Which node is missing, for how long, what to do: one line. `trouble`: why the autoscaler cannot start it."""
    what = f"store {store}: no node offers {resource(store)} (for {waited_s:.0f} s)"
    if trouble:
        return f"{what}: {trouble}"
    return f"{what}; on its node run: ray start --address=<head>:6379 --resources='{{\"{resource(store)}\": 1}}'"
