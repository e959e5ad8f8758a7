"""What is learned, by version: a run's plan and layout change with its class list, older versions keep their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from raypipe.errors import ConfigError
from raypipe.models.growth import Form, no_growth
from raypipe.store.messages import Plan, encode
from raypipe.tasks.class_list import Change
from raypipe.types import Layout


@dataclass(frozen=True, slots=True)
class Stage:
    """From version `since` on this is what a ticket is told, and how weights lie; `raw`: the plan as it is sent."""

    since: int
    plan: Plan
    form: Form
    raw: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "raw", encode(self.plan))

    @property
    def layout(self) -> Layout:
        return self.form.layout


Next: TypeAlias = Callable[[Stage, int, Change], Stage]  # what follows a stage at a version with this change


def rehearse(now: Stage, follow: Next, changes: Mapping[int, Change]) -> None:
    """Make all that would follow, so that what cannot be is known before it would end a run. Raises ConfigError."""
    for version, change in sorted(changes.items()):
        then = follow(now, version, change)
        if len(then.form.rows) != len(now.form.rows) or (change.add and not now.form.rows):
            raise ConfigError(no_growth(now.plan.model["name"]))
        now = then


class Stages:
    """Those of a run, the first from version 0 on."""

    def __init__(self, first: Stage) -> None:
        self._all = [first]

    def at(self, version: int) -> Stage:
        """What holds for a version."""
        return next(stage for stage in reversed(self._all) if stage.since <= version)

    def add(self, stage: Stage) -> None:
        """From its version on; one of a version that was withdrawn is replaced."""
        self._all = [one for one in self._all if one.since < stage.since] + [stage]

    def withdraw(self, version: int) -> None:
        """There is no such version: it, and those after it, change nothing."""
        self._all = [one for one in self._all if one.since < version]
