"""A vault's parts, put together from what its owner has said."""

from __future__ import annotations

import logging
import os
import time

from raypipe.store.budget import Budget
from raypipe.store.code import code_hash
from raypipe.store.safety import site_log
from raypipe.store.site import Site
from raypipe.vault.conversation import Vault
from raypipe.vault.place import Place, Settings
from raypipe.vault.server import Gate


def open_gate(place: Place, settings: Settings) -> Gate:
    """Raises ConfigError: the policy, the keys, the budget."""
    code = code_hash(place.code / "raypipe")
    site = Site(place.home, cpus=settings.cpus, gpus=settings.gpus)
    log: logging.Logger = site_log(place.home, place.store)
    log.setLevel(logging.INFO)
    budget = Budget(place.home / "budget.json", settings.limits, time.time, "vault")
    log.info("vault open: process %d, user %d, code %s", os.getpid(), os.geteuid(), code[:16])
    return Gate(Vault(site, settings.limits, budget, code, log), settings.actor_user)
