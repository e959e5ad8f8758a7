"""What is said once for a whole cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What no row says."""

    name: str = "raypipe"
    head: str = "10.1.0.1"
    user: str = "raypipe"
    key: str = "~/.ssh/id_ed25519"
    venv: str = "/opt/raypipe/.venv"  # on every machine: each store installs its own code
    idle_minutes: float = 5
    image: str = "raypipe:0.1.0"
    aws_region: str = "eu-central-1"
    operator_namespace: str = "kuberay-system"  # whose pods alone reach a RayJob's dashboard
