"""What each store's node offers, and what every Ray process of a locked cluster has in its environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypipe.placement.inventory import Machine
from raypipe.placement.plan import resource
from raypipe.placement.settings import Settings

RAY = "2.58.0"
TLS = "~/.raypipe/tls"
# What has not come after so long Ray asks for again, and all of it is sent again, also where it is on its way. Its own
# 10 s are less than a model takes over a thin line.
PULL_S = 600


def node_types(machines: Sequence[Machine]) -> dict[str, dict[str, Any]]:
    """Ray's `available_node_types`: what each store's node offers, and how many of it there may be."""
    return {
        machine.store: {
            "min_workers": 0,
            "max_workers": 1,
            "resources": offered(machine),
            "labels": labels(machine),
        }
        for machine in machines
    }


def offered(machine: Machine) -> dict[str, int]:
    """Resources of a store's node."""
    return {"CPU": machine.cpus, "GPU": machine.gpus, resource(machine.store): 1}


def labels(machine: Machine) -> dict[str, str]:
    """What describes a store's node; a label holds no ':', so hours are `2200-0600`."""
    said = {"store": machine.store, "region": machine.region, "hours": machine.hours.split(" ")[0].replace(":", "")}
    return {key: value for key, value in said.items() if value}


def environment(settings: Settings, tls: str = TLS) -> dict[str, str]:
    """What every Ray process of a locked cluster has in its environment. Shell: `~` is expanded."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{tls}/token",
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{tls}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{tls}/node.key",
        "RAY_TLS_CA_CERT": f"{tls}/ca.crt",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_object_manager_pull_timeout_ms": str(PULL_S * 1000),
        "PATH": f"{settings.venv}/bin:$PATH",
    }
