"""Before the first version: each store is asked once for its sums; who is slow is waited for within reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raypipe.errors import RunError, StoreError, StoreSuperseded
from raypipe.store import messages as msg

LATE_S = 10.0  # once the quorum has answered, the others get as long again, and this


class Asked(Protocol):
    """A store's port, as far as asking goes; see shell.Port."""

    async def join(self) -> msg.Card: ...
    async def measure(self, plan: bytes, weights: Any, what: str) -> np.ndarray: ...
    async def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """Each store's sums; of those that gave none, why."""

    sums: Mapping[str, np.ndarray]
    missing: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every store, of a plan and, if need be, of a model with these weights. `code`: its own hash."""

    plan: bytes
    weights: np.ndarray | None
    what: str
    code: str
    quorum: int


async def ask(
    ports: Mapping[str, Asked], question: Question, weights: Any, *, join_s: float, at_once: int | None = None
) -> Answers:
    """Raises RunError with each store's reason when fewer than the quorum answer within `join_s`.

    `weights`: the question's, as stores can fetch them. `at_once`: so many stores have an actor at a time, and each
    that answered is released; `join_s` is then for each such group.
    """
    plan, what, quorum = question.plan, question.what, question.quorum
    began = time.monotonic()
    places = None if at_once is None else asyncio.Semaphore(at_once)
    asking = {store: asyncio.ensure_future(_asked(port, plan, weights, what, places)) for store, port in ports.items()}
    until = began + join_s * (1 if at_once is None else -(-len(ports) // at_once))
    try:
        while not all(task.done() for task in asking.values()) and (left := until - time.monotonic()) > 0:
            running = [task for task in asking.values() if not task.done()]
            await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if sum(task.done() and task.exception() is None for task in asking.values()) >= quorum:
                until = min(until, time.monotonic() + (time.monotonic() - began) + LATE_S)
        sums, missing = {}, {}
        for store, task in sorted(asking.items()):
            if not task.done():
                missing[store] = f"no answer within {time.monotonic() - began:.0f} s"
            elif (error := task.exception()) is None:
                sums[store] = task.result()
            elif isinstance(error, StoreError) and not isinstance(error, StoreSuperseded):
                missing[store] = error.message.removeprefix(f"store {store}: ")
            else:
                raise error
    finally:
        for task in asking.values():
            task.cancel()
    if len(sums) < quorum:
        reasons = "; ".join(f"store {store}: {reason}" for store, reason in missing.items())
        raise RunError(f"{len(sums)} stores told their {what} before the start, {quorum} must. {reasons}")
    return Answers(sums, missing)


async def _asked(port: Asked, plan: bytes, weights: Any, what: str, places: asyncio.Semaphore | None) -> np.ndarray:
    if places is None:
        await port.join()
        return np.array(await port.measure(plan, weights, what), np.float64)  # what came is valid until the next
    async with places:
        try:
            return await _asked(port, plan, weights, what, None)
        finally:
            await port.release()
