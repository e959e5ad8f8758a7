"""A ticket of a run trained again, from the store's data alone: no outbox, no state, nothing is written.

What a store does with a ticket is a function of the base weights, the ticket's seed, progress and number of steps,
and of what the ticket that it went on from left there (kept.py): all in the record. The rest, data and limits, is the
store's own.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from raypipe.errors import StoreRefused
from raypipe.store.control import Control
from raypipe.store.kept import State, begin, left
from raypipe.store.lesson import Admitted, learn
from raypipe.store.measure import measured_statistics
from raypipe.store.messages import Plan, Ticket
from raypipe.store.policy import read_policy
from raypipe.store.shelf import Shelf
from raypipe.store.site import CACHE_BYTES  # the same: what is cached decides from which images batches draw
from raypipe.store.trainer import Outcome

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Again:
    """What came of it: `update` is float32 (update_size,), `state` what is kept after it."""

    update: Array
    outcome: Outcome
    state: State | None


class Retrainer:
    """One store on this machine. `threads`: as many as it had, since sums depend on them."""

    def __init__(self, home: Path, threads: int) -> None:
        """Raises ConfigError for a policy that cannot be read."""
        self.policy = read_policy(home)
        self._threads = threads
        self._shelf = Shelf(self.policy, torch.device("cpu"), threads=threads, cache_bytes=CACHE_BYTES)

    def content_hash(self, name: str) -> str:
        """Of a data set. Raises StoreRefused where the policy offers none of this name; ConfigError."""
        if name not in self.policy.data:
            raise StoreRefused(f"no data set named {name!r} is offered")
        return self._shelf.data(name).content_hash

    def statistics(self, plan: Plan, weights: Array, num_images: int, layer: str) -> Array:
        """What comes to a norm layer, see measure.py. Raises StoreError."""
        torch.set_num_threads(self._threads)
        learner = self._shelf.learner(plan, weights)
        learner.model.load(weights)
        images, share = self._shelf.images(plan, learner.task, "train"), self._shelf.max_bad_share(plan)
        sums = measured_statistics(learner.model, learner.task, images, num_images, layer, share, lambda: False)
        assert sums is not None
        return sums

    def train(
        self, ticket: Ticket, plan: Plan, weights: Array, kept: State | None, correction: Array | None = None
    ) -> Again:
        """`max_steps` of the ticket says how many, whatever it took then. Raises StoreError."""
        torch.set_num_threads(self._threads)
        limits = replace(self.policy.admit(ticket, plan), max_steps=ticket.max_steps, budget_s=None)
        learner = self._shelf.learner(plan, weights)
        images = self._shelf.images(plan, learner.task, "train")
        kept = begin(learner.model, plan, weights, deepcopy(kept))
        asked = Admitted(ticket, plan, weights, learner, images, limits, Control(), correction=correction)
        outcome, optimizer = learn(asked, kept, clock=time.monotonic)
        return Again(learner.model.update(weights)[0], outcome, deepcopy(left(learner.model, plan, optimizer)))
