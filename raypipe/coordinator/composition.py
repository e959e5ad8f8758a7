"""The parts of one run, put together; `raypipe.compose` makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.config.schema import RunConfig
from raypipe.coordinator.actions import Action
from raypipe.coordinator.board import Board
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.shell import Shell
from raypipe.coordinator.stages import Stages
from raypipe.store.messages import Plan


@dataclass(frozen=True, slots=True)
class Composition:
    """What the coordinator's actor runs."""

    config: RunConfig
    machine: Coordinator
    shell: Shell
    board: Board
    stages: Stages
    home: Path
    folder: Path
    epoch: int
    code: str
    kept: Callable[[], list[int]]  # versions whose weights are kept
    read: Callable[[int], np.ndarray]  # a kept version's flat vector
    begin: Callable[[], None]  # the newest version durable and fetchable
    first: list[Action]  # what is to be done before anything happens
    notary: Notary | None  # where the run keeps a ledger
    norms: Callable[[int], list[str]]  # layers whose statistics a version carries, as a batch meets them

    @property
    def plan(self) -> Plan:
        """What the run's tickets were told at first."""
        return self.stages.at(0).plan

    def ending(self, stop_reason: str) -> str:
        """Why the run ended, in a few words."""
        ending = self.machine.ending
        return stop_reason or (ending[0] if ending else "")
