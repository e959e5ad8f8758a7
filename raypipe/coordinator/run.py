"""What the coordinator knows of its run, and what follows from that; see machine.py for the rules.

Only the functions that the machine calls for an event change it: those of stores.py, tickets.py, versions.py and
ending.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from statistics import median

from raypipe.coordinator import actions as do
from raypipe.coordinator import rotation
from raypipe.coordinator.policy import FIRST_BUDGET_S, LEAST_BUDGET_S, TRAINS, Policy
from raypipe.coordinator.state import Member, Memory, Phase, Scores, Ticket
from raypipe.tasks.class_list import Change, ClassList, placed

CLOSING_S = 30.0  # for the last judgement, before the run finishes without it
STOPPED_S = 5.0  # the same when somebody wants the run to end now
AWAITED = (Phase.WAITING, Phase.TRAINING, Phase.COLLECTING)  # somebody else has to do something
MAX_IN_ONE_SUM = 2  # a fast store's share of one buffer when slots are refilled on arrival


class Run:
    """State as attributes, and questions about it as methods, which change nothing."""

    def __init__(
        self,
        policy: Policy,
        stores: list[str],
        *,
        metric: str,
        chance: Callable[[int], random.Random],
        start_at: float,
        classes: ClassList | None = None,
        changes: Mapping[int, Change] | None = None,
    ) -> None:
        """`chance`: a version's own random numbers, so that there is no random state to be saved.

        `classes`: as the run begins, where they may change; `changes`: those that are planned.
        """
        self.policy = policy
        self.epoch = 1
        self.members = {store: Member(store, asked=policy.max_active_stores is None) for store in sorted(stores)}
        self.tickets: dict[str, Ticket] = {}
        self.version = 0
        self.publishing: do.Publish | None = None
        self.unkept: dict[int, tuple[do.Contribution, ...]] = {}  # versions whose weights are not on the disk yet
        self.picked: int | None = None  # the version for which a cohort was picked
        self.cohort: list[str] = []  # picked and not yet given a ticket
        self.scores = Scores(metric, policy.lower_is_better, policy.central)
        self.created_at = start_at
        self.started_at: float | None = None
        self.ending: tuple[str, float] | None = None  # why, since when
        self.awaited: set[str] | None = None  # stores whose last judgement is awaited, once it was asked for
        self.finished = False
        self.changes = dict(changes or {})
        self.chance, self._classes = chance, classes
        self.issued = self.places = self.told = 0
        self.central_busy = False
        self.closing_s = CLOSING_S
        self.empty_since: float | None = None
        self.now = start_at

    def memory(self) -> Memory:
        """All that it remembers; see `recall`."""
        return Memory(**{f.name: getattr(self, f.name) for f in fields(Memory)})

    def recall(self, memory: Memory) -> None:
        """Be as that machine was, under the same policy."""
        for f in fields(Memory):
            setattr(self, f.name, getattr(memory, f.name))

    def wake_at(self) -> float:
        """When the next Tick is needed, in seconds of the shell's clock; inf when only an event can help."""
        pending = [t for t in self.tickets.values() if t.phase in AWAITED]
        times = [t.due_at for t in pending] + [t.hung_at for t in pending]
        times += [when for m in self.members.values() for when in (m.returning, m.coming_until)]
        times += [rotation.rests_until(m, self.policy) for m in self.members.values() if not m.asked and not m.aside]
        if self.policy.max_active_stores is not None:
            times += [m.asked_at + self.policy.join_s for m in self.members.values() if m.asked and not m.present]
        times += [max(m.retry_at, m.closed_until) for m in self.members.values() if m.present and not m.aside]
        times += [m.paused_at + self.policy.hung_s for m in self.members.values() if m.paused_at is not None]
        if self.started_at is None:
            times.append(self.created_at + self.patience_s)
        elif self.policy.max_seconds is not None and self.ending is None:
            limit = self.started_at + self.policy.max_seconds
            times += [limit, limit + 0.5 * (self.budget_s or 0.0)]
        if self.empty_since is not None:
            times.append(self.empty_since + self.patience_s)
        if self.ending is not None:
            times.append(self.ending[1] + self.closing_s)
        return min((t for t in times if t > self.now), default=math.inf)

    @property
    def patience_s(self) -> float:
        """How long the run goes on without enough stores."""
        return rotation.patience_s(self.members, self.policy)

    def progress(self, at: float) -> float:
        """How much of the run is over, in [0, 1], by versions or by time, whichever is further."""
        by_version = self.version / self.policy.max_versions if self.policy.max_versions else 0.0
        since = at - self.started_at if self.started_at is not None else 0.0
        by_time = since / self.policy.max_seconds if self.policy.max_seconds else 0.0
        return min(1.0, max(by_version, by_time))

    @property
    def budget_s(self) -> float | None:
        """Of a ticket given now; see policy.py. None: its work is given, not its time."""
        policy = self.policy
        if policy.budget_s is not None or not policy.tick:
            return policy.budget_s
        begins = policy.max_active_stores is not None  # each ticket may have to wait for an actor
        known = [m.overhead_s for m in self.members.values() if m.last_s is not None and (m.turns > 1 or begins)]
        budget = max(LEAST_BUDGET_S, TRAINS * median(known)) if known else FIRST_BUDGET_S
        return budget if policy.deadline_s is None else min(budget, policy.deadline_s)

    def place(self, change: Change, wanted: int | None) -> int:
        """The version from which on a change of the class list would hold. Raises ConfigError where it cannot be."""
        soonest = self.version + 1 + (self.publishing is not None)
        return placed(self._classes, self.changes, change, soonest=soonest, wanted=wanted)

    def waiting(self) -> list[Member]:
        """Stores without an actor that could have one."""
        return rotation.waiting(self.members.values(), self.policy, self.now)

    def training(self) -> list[Ticket]:
        """Tickets in training."""
        return [t for t in self.tickets.values() if t.phase is Phase.TRAINING]

    def late(self, ticket: Ticket) -> bool:
        """Past its due time: nobody waits for it."""
        return ticket.due_at <= self.now and ticket.phase is not Phase.WAITING

    def away(self, ticket: Ticket) -> bool:
        """Its update waits at a store that is cut off."""
        return ticket.phase is Phase.TRAINED and not self.members[ticket.store].present

    def free(self) -> list[str]:
        """Stores that may be given work now."""
        handing_over = Phase.COLLECTING if self.policy.refill == "on_arrival" else Phase.TRAINING
        busy = {t.store for t in self.tickets.values() if t.phase <= handing_over}
        busy |= self.had_turn()
        return [s for s, m in self.members.items() if m.available(self.now) and s not in busy]

    def had_turn(self) -> set[str]:
        """Stores that are given nothing more, since others wait for their places."""
        if self.policy.max_active_stores is None or not self.waiting():
            return set()
        return {s for s, m in self.members.items() if rotation.turn_over(m, self.policy)}

    def slots_taken(self) -> int:
        """Tickets in training that are not late."""
        return sum(not self.late(t) for t in self.training())

    def in_sum(self) -> list[Ticket]:
        """Tickets of the open sum."""
        return [t for t in self.tickets.values() if t.phase in (Phase.FOLDING, Phase.FOLDED)]

    def returning(self) -> set[str]:
        """Stores that hold no ticket and may come in time: asked for, or there when the coordinator died."""
        held = {t.store for t in self.tickets.values() if t.phase <= Phase.TRAINING}
        coming = {s for s, m in self.members.items() if max(m.returning, m.coming_until) > self.now and not m.aside}
        return coming - held

    def startable(self) -> list[str]:
        """Members of the open cohort that wait for a slot or for the end of their back-off."""
        over = self.had_turn()
        return [s for s in self.cohort if self.members[s].counts(self.now) and s not in over]

    def sated(self, store: str) -> bool:
        """With slots refilled on arrival, a store that is in the open sum twice waits for the version."""
        held = [t for t in self.tickets.values() if Phase.TRAINING < t.phase < Phase.PUBLISHED]
        return sum(t.store == store for t in held) >= MAX_IN_ONE_SUM

    def due(self) -> bool:
        """The open sum is complete. Derived, never stored."""
        stores = {t.store for t in self.in_sum()}
        if not stores or self.publishing is not None or self.ending is not None:
            return False
        can_come = stores | self.expected()
        return len(stores) >= min(self.policy.buffer_size or len(can_come), len(can_come))

    def expected(self, *, with_arrived: bool = True) -> set[str]:
        """Stores that can still bring something to the open sum in time."""
        coming = {t.store for t in self.tickets.values() if t.phase <= Phase.COLLECTING and not self.late(t)}
        if with_arrived:
            coming |= {t.store for t in self.tickets.values() if t.phase is Phase.ARRIVED}
        if self.policy.refill == "on_publish" and self.picked == self.version:
            return coming | set(self.startable())
        return coming | set(self.free()) | self.returning()
