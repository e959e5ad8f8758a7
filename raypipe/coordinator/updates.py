"""Updates on their way to a fold: asked for, arrived, and what goes with each; gone once folded or settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from raypipe.aggregation.variates import Learned
from raypipe.coordinator import actions as do


class Updates:
    """By ticket. The loop's thread puts in, the lane's takes out."""

    def __init__(self) -> None:
        self.arrived: dict[str, np.ndarray] = {}
        self.learned: dict[str, Learned] = {}  # in a run with control variates
        self._asked: set[str] = set()

    def ask(self, ticket: str) -> None:
        """It is being collected."""
        self._asked.add(ticket)

    def give_up(self, ticket: str) -> None:
        """It did not come, or was refused."""
        self._asked.discard(ticket)

    def arrive(self, ticket: str, update: np.ndarray) -> bool:
        """Whether anybody waits for it still: it may have been settled while it was on its way."""
        if ticket not in self._asked:
            return False
        self._asked.discard(ticket)
        self.arrived[ticket] = update
        return True

    def settle(self, ticket: str) -> None:
        """Nothing of it is needed any more."""
        self.arrived.pop(ticket, None)
        self.learned.pop(ticket, None)
        self._asked.discard(ticket)

    def take(self, asked: Iterable[do.Portion]) -> tuple[list[do.Portion], list[np.ndarray], list[Learned | None]]:
        """Those of the asked that are there, their vectors, and what was learned with each by its worth."""
        portions = [p for p in asked if p.ticket in self.arrived]  # those settled since, at the end, are gone
        arrays = [self.arrived.pop(p.ticket) for p in portions]
        told = [(self.learned.pop(p.ticket, None), p.worth) for p in portions]
        return portions, arrays, [None if what is None else replace(what, worth=worth) for what, worth in told]
