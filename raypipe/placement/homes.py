"""Where things lie on a machine: a node's stores, a coordinator's runs."""

from __future__ import annotations

import os
from pathlib import Path


def stores_home() -> Path:
    """Where this node keeps its stores' folders, a policy file in each: $RAYPIPE_STORES, else ~/.raypipe/stores."""
    return Path(os.environ.get("RAYPIPE_STORES", "~/.raypipe/stores")).expanduser()


def raypipe_home() -> Path:
    """Where runs live on this machine: $RAYPIPE_HOME, else ~/.raypipe; always absolute."""
    return Path(os.environ.get("RAYPIPE_HOME") or Path.home() / ".raypipe").expanduser().absolute()


def vaults_home() -> Path:
    """Where this node keeps its stores' vaults: $RAYPIPE_VAULTS, else /var/lib/raypipe/vaults."""
    return Path(os.environ.get("RAYPIPE_VAULTS", "/var/lib/raypipe/vaults"))
