"""A federation of the imagination: the real machine, diary, journal and way back, under a virtual clock.

Stores, network and the shell's threads are a few lines each, with the troubles that a seed gives: stores that fail,
hang, die, never come; messages that come twice or not at all; a coordinator that dies at given writes (chaos_disk.py).
Every step is checked against what this world knows by itself: what was folded, from which base, with which weight.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import chaos_checks as checks
from chaos_disk import Crash, Disk, Recording
from chaos_pairs import Seen, Watched
from chaos_stores import Network, Shop

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.policy import Policy
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.state import Phase
from raypipe.tasks.class_list import Change, ClassList

GRACE_S = 10.0  # for stores to return after the coordinator did
CHECKPOINT_EVERY = 40  # lines of the diary
BUSY_S = 2.0  # the most by which a Tick comes late
CENTRAL = "centre"


def remembered(machine: Coordinator) -> str:
    """All that it remembers, as text."""
    return json.dumps(asdict(machine.memory()), default=sorted)


class World:
    """One history. `healthy` stores never fail; a violation is an AssertionError."""

    def __init__(
        self, policy: Policy, stores: int, seed: int, healthy: int, disk: Disk, seen: Seen, stop_at: float = math.inf
    ) -> None:
        """`stop_at`: when somebody asks for the end; the last store is in no configuration, it joins by command."""
        self.chance, self.policy, self.disk, self.seen = random.Random(seed), policy, disk, seen
        self.names, self.stop_at = [f"s{i}" for i in range(stores)], stop_at
        self.at = 0.0
        whim = random.Random(f"classes/{seed}")
        self.changes_at = [whim.uniform(0, 20) for _ in range(3)] if whim.random() < 0.3 else []  # of the class list
        self.queue: list[tuple[float, int, ev.Event | Callable[[], None]]] = []
        self.count = itertools.count()
        speeds = [0.5, 1.0, 5.0]
        self.shops = {
            s: Shop(s, i < healthy, self.chance.choice(speeds), self.chance.randint(1, 500))
            for i, s in enumerate(self.names)
        }
        self.network = Network(self)
        self.asked: dict[str, do.Train] = {}
        self.made: dict[str, int] = {}  # ticket -> version, by the record
        self.told: dict[str, int | None] = {}  # ticket -> what its store was told
        self.forgotten: set[str] = set()  # tickets told of a version that was damaged when it was safe already
        self.arrived: set[str] = set()  # updates in the coordinator's memory
        self.weights: dict[str, do.Portion] = {}
        self.paused: set[str] = set()  # stores that ever did
        self.open_sum: list[str] = []
        self.owed: list[do.Record] = []  # decided, perhaps not written yet
        self.newest = 0  # version that was last named, made or in the making
        self.recorded = 0  # newest version by the record
        self.lane_free = self.disk_free = 0.0
        self.lines = self.downs = 0
        self.epoch, self.begun = 0, False
        self.machine = self.new_machine()

    # -- the coordinator's life ------------------------------------------------------------------------------

    def run(self, limit: int) -> Coordinator:
        """To the end, through every death of the coordinator."""
        events = 0
        while True:
            try:
                self.begun = False
                self._begin()
                self.begun = True
                if self.machine.finished:  # it died with its last line: whom it did not tell is not told
                    return self.machine
                while not self.machine.finished:
                    events += 1
                    assert events < limit, f"not over after {limit} events: {self._where()}"
                    self._step()
                self._drain()
                checks.over(self)
                return self.machine
            except Crash:
                self._down()

    def _drain(self) -> None:
        """The records that the end names are heard; see `loop.drive`."""
        for _, _, what in sorted(self.queue, key=lambda item: item[:2]):
            if isinstance(what, Recording):
                what()

    def _begin(self) -> None:
        """As `raypipe.compose` does, in its order."""
        epoch, told, versions = self.disk.past()
        before, self.machine = self.machine, self.new_machine()
        first, withdrawn = list[do.Action](), list[int]()
        self.epoch = epoch + 1
        if versions:
            self._like_before(before)
            intact, newest = self.disk.intact, max(versions)
            back = bring_back(
                self.machine,
                self.disk.diary,
                newest=newest,
                told=told,
                intact=intact,
                epoch=self.epoch,
                grace_s=GRACE_S,
            )
            first, withdrawn = back.actions, back.withdrawn
            self._set_clock(self.machine.memory().now)
        elif self.policy.max_active_stores is not None:
            first = self.machine.handle(ev.Tick(self.at))
        self.disk.record("run_started", {"epoch": self.epoch})
        for version in withdrawn:
            self.disk.record("version_withdrawn", {"version": version, "reason": "lost"})
        self.owed = [action for action in first if isinstance(action, do.Record)]
        self.disk.checkpoint(self.machine.memory(), self.owed)
        self.lines = 0
        if not versions:
            self.disk.write(0)
            self.disk.keep(0)
            self.disk.record("version_published", {"version": 0, "parent": None, "contributions": []})
            self.disk.record("weights_kept", {"version": 0})
        self._take_stock()
        self.network.gather(first_time=not versions)
        if math.isfinite(self.stop_at):
            self.later(max(self.at, self.stop_at), ev.StopAsked("stopped by hand", 0.0))
        for when in [when for when in self.changes_at if when > self.at]:
            self.later(when, ev.ClassesAsked(Change(add=(f"new at {when}",)), None, 0.0))
        for action in first:
            self.perform(action)

    def _set_clock(self, at: float) -> None:
        """The coordinator's clock goes on from what was noted last."""
        shift, self.at = at - self.at, at
        self.queue = [(when + shift, number, what) for when, number, what in self.queue]
        for shop in self.shops.values():
            shop.busy_until += shift
        self.lane_free = self.disk_free = at

    def _take_stock(self) -> None:
        """What is true now, by the record; nothing is in the coordinator's memory but the machine."""
        _, _, versions = self.disk.past()
        checks.back(self, sorted(versions))
        self.newest = self.recorded = self.machine.version
        before = set(self.made)
        self.made = {c.ticket: v.number for v in versions.values() for c in v.contributions}
        self.forgotten |= {t for t in before - set(self.made) if self.told.get(t) is not None}
        self.arrived, self.open_sum = set(), []

    def _like_before(self, before: Coordinator) -> None:
        """Where nothing was lost, the diary gives the very state that there was."""
        if self.disk.last != "after" or not self.begun:  # a line that was cut was not acted upon
            return
        found = self.disk.diary.read()
        assert found is not None, "the diary is gone"
        again = self.new_machine()
        again.recall(found.memory)
        for event in found.events:
            again.handle(event)
        assert remembered(again) == remembered(before), "another state than the one that was noted"

    def _down(self) -> None:
        """Everything of the coordinator is gone; the stores go on."""
        self.downs += 1
        assert self.downs < 500, "it dies for ever"
        self.disk.reopen()
        newest = self.machine.version
        kept = [v for v, state in self.disk.weights.items() if state == "kept"]
        if len(kept) > 1 and newest in kept and self.disk.intact(newest - 1) and self.chance.random() < 0.1:
            self.disk.damage(newest)
        self.queue = self.network.meanwhile(self.queue, self.at, self.chance.uniform(0, 30))
        heapq.heapify(self.queue)

    def new_machine(self) -> Watched:
        metric, chance, said = "accuracy", random.Random, self.names[:-1] or self.names
        classes = ClassList(("coat", "hat"))
        machine = Watched(self.policy, said, metric=metric, chance=chance, start_at=0.0, classes=classes)
        machine.seen = self.seen
        return machine

    # -- the loop ---------------------------------------------------------------------------------------------

    def later(self, at: float, what: ev.Event | Callable[[], None]) -> None:
        heapq.heappush(self.queue, (at, next(self.count), what))

    def _step(self) -> None:
        """Now and then the loop is busy when a Tick is due, and what came meanwhile is first: see `loop.drive`."""
        wake = self.machine.wake_at()
        if self.queue and (self.queue[0][0] <= wake + (BUSY_S if self.chance.random() < 0.03 else 0.0)):
            self.at, _, what = heapq.heappop(self.queue)
        else:
            assert math.isfinite(wake), f"nothing can happen any more: {self._where()}"
            self.at, what = wake, ev.Tick(wake)
        if callable(what):
            what()
        else:
            self._tell(replace(what, at=self.at))

    def _tell(self, event: ev.Event) -> None:
        """As `loop.drive` does: handle, note, act."""
        m = self.machine
        if isinstance(event, ev.StoreJoined | ev.StoreLeft | ev.StoreHung):
            if (linked := self.network.link(event)) is None:
                return
            event = linked
        elif isinstance(event, ev.StorePaused | ev.StoreWentOn):
            if not self.shops[event.store].linked:
                return
            self.paused.add(event.store)
        elif isinstance(event, ev.UpdateArrived):
            self.arrived.add(event.ticket)
        actions = m.handle(event)
        self.disk.note(event, actions)
        self.lines += 1
        self.owed += [action for action in actions if isinstance(action, do.Record)]
        if self.lines >= CHECKPOINT_EVERY and any(isinstance(a, do.Publish) for a in actions):
            self.lines = 0
            self.disk.checkpoint(m.memory(), self.owed)
        for action in actions:
            self.perform(action)
        if self.at >= self.stop_at / 2 and any(t.phase is Phase.TRAINED for t in m.tickets.values()):
            self.later(self.at, ev.StopAsked("stopped by hand, as work waits for its turn", 0.0))  # seldom by itself
        checks.step(self)

    # -- what is done -----------------------------------------------------------------------------------------

    def perform(self, action: do.Action) -> None:
        match action:
            case do.Train():
                checks.train(self, action)
                self.network.train(action)
            case do.Collect():
                self.network.collect(action)
            case do.Fold():
                for portion in action.portions:
                    checks.portion(self, portion)
                self._in_lane(lambda: self._fold(action))
            case do.Publish():
                self.newest = action.version
                self._in_lane(lambda: self._publish(action))
            case do.Record():
                self._in_lane(Recording(self.disk, action, self.owed))
            case do.Keep():
                self.disk_free = max(self.disk_free, self.at) + self.chance.uniform(0, 2)
                self.later(self.disk_free, lambda: self._keep(action.version))
            case do.Settle():
                self.arrived.discard(action.ticket)
                self._settle(action)
            case do.Restart(store=store):
                self.network.restart(store)
            case do.Ask(store=store):
                self.network.asked(store)
            case do.Release(store=store):
                self.network.release(store)
            case do.Evaluate():
                self.network.evaluate(action)
            case do.Cancel() | do.Finish():
                pass

    def _in_lane(self, work: Callable[[], None]) -> None:
        self.lane_free = max(self.lane_free, self.at) + self.chance.choice([0.0, 0.01, 0.01, 0.3, 2.0])
        self.later(self.lane_free, work)

    def _fold(self, action: do.Fold) -> None:
        here = [p for p in action.portions if p.ticket in self.arrived]
        for portion in action.portions:
            dropped = portion.ticket not in self.machine.tickets or self.machine.ending is not None
            assert portion in here or dropped, f"{portion.ticket} is folded without its update"
        bad = tuple((p.ticket, "not finite") for p in here if self.network.trouble(p.store, 0.1))
        for portion in here:
            self.arrived.discard(portion.ticket)
            if portion.ticket not in dict(bad):
                assert portion.ticket not in self.open_sum, f"{portion.ticket} is folded twice"
                self.open_sum.append(portion.ticket)
                self.weights[portion.ticket] = portion
        good = tuple(p.ticket for p in action.portions if p.ticket not in dict(bad))
        self.later(self.at, ev.Folded(good, bad, self.at))

    def _publish(self, action: do.Publish) -> None:
        checks.publish(self, action)
        self.open_sum = []
        self.disk.write(action.version)
        self.disk.sync()
        self.made |= {c.ticket: action.version for c in action.contributions}
        contributions = [asdict(c) for c in action.contributions]
        body = {"version": action.version, "parent": action.version - 1, "contributions": contributions}
        self.disk.record("version_published", body)
        self.recorded = action.version
        self.later(self.at + 0.05, ev.Published(action.version, self.at))

    def _keep(self, version: int) -> None:
        self.disk.keep(version)
        self.disk.record("weights_kept", {"version": version})
        self.later(self.at, ev.Kept(version, self.at))

    def _settle(self, action: do.Settle) -> None:
        said = action.version if action.version is not None else self.made.get(action.ticket)
        checks.settled(self, action, said)
        self.told[action.ticket] = said
        self.network.settle(action, said)

    def _where(self) -> Any:
        return {t.id: t.phase.name for t in self.machine.tickets.values()}
