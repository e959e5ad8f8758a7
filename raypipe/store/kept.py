"""What a store keeps for itself from ticket to ticket: the optimizer's state, and entries of the model (`train.local`).

The same at a store, where it lies in the outbox, and when a run is replayed. What is kept is that of the last ticket
whose update became part of a version.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.optim import Optimizer

from raypipe.errors import StoreError
from raypipe.models.flat import FlatModel
from raypipe.store.messages import Plan

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
# The optimizer's state dict; in a run with local entries {"own": float32 (of the layout's local slice,), "optimizer":
# the state dict or None}.
State: TypeAlias = dict[str, Any]


def keeps(plan: Plan) -> bool:
    """Whether something is."""
    return plan.keep_optimizer or plan.local is not None


def key_of(plan: Plan) -> str:
    """Under which it is: what fits a plan of another layout or optimizer does not fit this one."""
    return json.dumps([plan.run, plan.layout, plan.optimizer], sort_keys=True)


def begin(model: FlatModel, plan: Plan, weights: Array, state: State | None) -> State | None:
    """Load a version with the store's own entries, if it has some; the optimizer's state to go on from, or None."""
    model.load(weights)
    if plan.local is None or state is None:
        return state
    model.own.copy_(state["own"])
    optimizer: State | None = state["optimizer"]
    return optimizer


def left(model: FlatModel, plan: Plan, optimizer: Optimizer) -> State | None:
    """What a ticket leaves to be kept; None: nothing. Raises StoreError for entries that are not finite."""
    state: State | None = optimizer.state_dict() if plan.keep_optimizer else None
    if plan.local is None:
        return state
    if not bool(torch.isfinite(model.own).all()):
        raise StoreError("the store's own part of the model is not finite; lower lr")
    return {"own": model.own.clone(), "optimizer": state}
