"""How a coordinator that died comes back: the machine from its diary, the newest version from the run's folder.

checkpoint + events  ->  the machine as it was when it died
the record           ->  was the version that it was making a fact already?
the weights          ->  a version whose weights are lost or damaged is withdrawn; the one before it is the newest
its records          ->  those that were decided and not written before it died are written now, each once
Resumed              ->  what was in flight is asked for again, each update counted once
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.machine import Coordinator
from raypipe.errors import RunError


@dataclass(frozen=True, slots=True)
class Return:
    """What is to be done first, and the versions that could not be had again, newest first.

    `damage`: what of the diary is left out, in words.
    """

    actions: list[do.Action]
    withdrawn: list[int]
    damage: str


def bring_back(
    machine: Coordinator,
    diary: Diary,
    *,
    newest: int,
    told: int,
    intact: Callable[[int], bool],
    epoch: int,
    grace_s: float,
) -> Return:
    """Make a new machine what the old one was, then tell it that it was away.

    By the record: `newest` is the newest version, `told` the number of the machine's last record. `intact` tells
    whether a version's weights can be had. Raises RunError where nothing can be had.
    """
    remembered = diary.read()
    if remembered is None:
        raise RunError("this run cannot be resumed: it died before its first version, or its diary is gone")
    machine.recall(remembered.memory)
    decided: list[do.Action] = [*(remembered.owed or ())]
    for event in remembered.events:
        decided += machine.handle(event)
    # What it decides from here on is this coordinator's; where lines were lost with the power, the record knows better.
    at, machine.epoch, machine.told = machine.memory().now, epoch, max(machine.told, told)
    if machine.publishing is not None and machine.publishing.version == newest:
        decided += machine.handle(ev.Published(newest, at))
    if machine.version < newest and not machine.finished:
        raise RunError(f"the diary ends at version {machine.version}, the record at {newest}: they are of two runs")
    withdrawn: list[int] = []
    # Above the record: it was withdrawn there, and the coordinator died again before its diary said so.
    while machine.version > newest or not intact(machine.version):
        if machine.version == 0:
            raise RunError("no version of this run has its weights any more")
        if machine.version <= newest:
            withdrawn.append(machine.version)
        decided += machine.handle(ev.Withdrawn(machine.version, "its weights were lost", at))
    keeps: list[do.Action] = [do.Keep(version) for version in sorted(machine.unkept)]
    counted = remembered.owed is not None
    lost = [a for a in decided if isinstance(a, do.Record) and counted and a.number > told]
    lost = [a for a in lost if a.kind != "evaluated" or a.body["version"] <= machine.version]  # not of those withdrawn
    actions = [*lost, *keeps, *machine.handle(ev.Resumed(epoch, grace_s, at))]
    return Return(actions, withdrawn, remembered.damage)
