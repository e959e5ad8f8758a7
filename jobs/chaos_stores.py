"""The stores of a random history and what lies between them and the coordinator; see chaos_world.py.

A store trains one ticket at a time, keeps what it finished in an outbox that outlives its process, refuses a
coordinator of an older epoch. What was sent to it arrives although the coordinator died meanwhile; what it sends back
does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev

if TYPE_CHECKING:
    from chaos_world import World

Item: TypeAlias = "tuple[float, int, ev.Event | Callable[[], None]]"
OUTBOX = 8
ANSWERS = (ev.Trained, ev.TrainingFailed, ev.Deferred, ev.UpdateArrived, ev.UpdateRefused)


@dataclass
class Shop:
    """One store."""

    name: str
    healthy: bool
    speed: float  # seconds of a ticket, about
    images: int
    unreadable: int = 0  # of them, as it has found so far
    outbox: dict[str, ev.Trained] = field(default_factory=dict)  # on its disk, oldest first
    epoch: int = 0  # the newest that it has heard of; on its disk
    process: int = 0  # counts its processes
    busy_until: float = 0.0
    here: bool = False  # a process is there to be spoken to
    linked: bool = False  # joined, and the coordinator was not told that it left
    asked: bool = True  # it may join


class AtStore:
    """Work that goes on at a store whether or not the coordinator lives."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def __call__(self) -> None:
        self.work()


class Network:
    """Carries messages to shops and events back, well or badly."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reports: dict[str, ev.Trained] = {}  # what each ticket's training came to, the newest

    def trouble(self, store: str, share: float) -> bool:
        return not self.world.shops[store].healthy and self.world.chance.random() < share

    def _event(self, at: float, event: ev.Event) -> None:
        """To the coordinator; now and then a second time, later."""
        self.world.later(at, event)
        if self.world.chance.random() < 0.05 and isinstance(event, ANSWERS):
            self.world.later(at + self.world.chance.uniform(0, 3), event)

    # -- coming and going -------------------------------------------------------------------------------------

    def gather(self, *, first_time: bool) -> None:
        """The coordinator is here: stores join it; some never do."""
        world = self.world
        for shop in world.shops.values():
            shop.here = shop.linked = False
            shop.asked = world.policy.max_active_stores is None
            if shop.asked and (shop.healthy or world.chance.random() < (0.8 if first_time else 0.7)):
                at = max(world.at + world.chance.uniform(0, 3 if first_time else 8), shop.busy_until)
                world.later(at, ev.StoreJoined(shop.name, shop.images, at))
            if self.trouble(shop.name, 0.1):
                world.later(world.at + world.chance.uniform(0, 20), lambda name=shop.name: self.leaves(name))  # type: ignore[misc]

    def link(self, event: ev.StoreJoined | ev.StoreLeft | ev.StoreHung) -> ev.Event | None:
        """What the coordinator is told: a store joins once, with what waits in its outbox, until it left."""
        shop = self.world.shops[event.store]
        if not isinstance(event, ev.StoreJoined):
            shop.linked = False
            return event
        if shop.linked or not shop.asked:
            return None
        shop.here = shop.linked = True
        shop.epoch = max(shop.epoch, self.world.epoch)
        return replace(event, outbox=tuple(shop.outbox))

    def restart(self, store: str) -> None:
        self._ends(store)
        self.world.later(self.world.at + 0.5, ev.StoreLeft(store, "its process ended", 0.0))
        self.world.later(self.world.at + 2, ev.StoreJoined(store, self.world.shops[store].images, 0.0))

    def asked(self, store: str) -> None:
        world, shop = self.world, self.world.shops[store]
        shop.asked = True
        if shop.healthy or world.chance.random() < 0.8:
            at = max(world.at + world.chance.uniform(0, 8), shop.busy_until)
            world.later(at, ev.StoreJoined(store, shop.images, at))
            if self.trouble(store, 0.2):  # it was joining as it was released
                world.later(at, ev.StoreJoined(store, shop.images, at))

    def release(self, store: str) -> None:
        self._ends(store)
        shop = self.world.shops[store]
        shop.asked = shop.linked = False

    def _ends(self, store: str) -> None:
        shop = self.world.shops[store]
        shop.process, shop.busy_until, shop.here = shop.process + 1, self.world.at, False

    def _dies(self, store: str) -> None:
        """Its process or node is gone: known by the link, and by the ticket that comes to nothing, in either order."""
        world, at = self.world, self.world.at
        if not world.shops[store].here:
            return
        self._ends(store)
        known = at + world.chance.uniform(0, 0.2)
        world.later(known, ev.StoreLeft(store, "gone", at))
        for ticket in [t for t in world.machine.tickets.values() if t.store == store]:
            if world.chance.random() < 0.5:
                self._event(at + world.chance.uniform(0, 0.2), ev.TrainingFailed(ticket.id, "its process ended", at))
        back = known + (world.chance.uniform(0.2, 3) if world.chance.random() < 0.3 else world.chance.uniform(3, 30))
        world.later(back, ev.StoreJoined(store, world.shops[store].images, at))

    def leaves(self, store: str) -> None:
        """By command, whether it is there or not; and comes back by command."""
        world, at = self.world, self.world.at
        self._ends(store)
        world.later(at, ev.StoreLeft(store, "its operator took it out", at, True))
        back = at + world.chance.uniform(0.1, 20)
        world.later(back, ev.StoreAdded(store, at))
        world.later(back, ev.StoreJoined(store, world.shops[store].images, at))

    def meanwhile(self, queue: list[Item], at: float, away_s: float) -> list[Item]:
        """What goes on while the coordinator is away; its own clock stands still."""
        going: list[Item] = [
            (max(at, when - away_s), number, work) for when, number, work in queue if isinstance(work, AtStore)
        ]
        for shop in self.world.shops.values():
            shop.busy_until = max(at, shop.busy_until - away_s)
            if self.trouble(shop.name, 0.1):
                self._ends(shop.name)
        return going

    # -- the store protocol -----------------------------------------------------------------------------------

    def train(self, action: do.Train) -> None:
        world, shop, chance = self.world, self.world.shops[action.store], self.world.chance
        if shop.epoch > world.epoch:
            return
        if (ready := shop.outbox.get(action.ticket)) is not None:
            self._event(world.at + 0.01, ready)
            return
        done = world.at + (action.budget_s or chance.uniform(0.5, 2) * shop.speed)
        if self.trouble(shop.name, 0.1):
            self._event(done, ev.TrainingFailed(action.ticket, "crashed", done, final=chance.random() < 0.2))
        elif chance.random() < 0.02:
            self._event(world.at + 0.01, ev.Deferred(action.ticket, "closed", chance.uniform(0.1, 40), done))
        elif not self.trouble(shop.name, 0.1):  # else it hangs
            shop.busy_until, process, epoch = done, shop.process, world.epoch
            steps = chance.randint(1, 50)
            if chance.random() < 0.05:
                shop.unreadable = min(shop.images, shop.unreadable + chance.randint(1, 3))
            report = ev.Trained(action.ticket, steps, steps * 32, shop.images, done - world.at, chance.random(), done)
            report = replace(report, skipped=shop.unreadable)
            judged = action.evaluate and not self.trouble(shop.name, 0.1)

            def finish() -> None:
                if shop.process != process:
                    return
                shop.outbox[action.ticket] = self.reports[action.ticket] = report
                for old in list(shop.outbox)[:-OUTBOX]:
                    del shop.outbox[old]
                if epoch == world.epoch:
                    if judged:
                        self._judges(action.version, shop, world.at)
                    elif action.evaluate:
                        world.later(world.at, ev.EvaluationFailed(action.version, shop.name, world.at))
                    self._event(world.at, report)

            world.later(done, AtStore(finish))
        if self.trouble(shop.name, 0.05):
            world.later(world.at + chance.uniform(0, 3), lambda: self._dies(shop.name))
        if chance.random() < 0.03:
            begins = world.at + chance.uniform(0, 3)
            world.later(begins, ev.StorePaused(shop.name, "its owner needs it", 0.0))
            world.later(begins + chance.uniform(0, 60), ev.StoreWentOn(shop.name, 0.0))
        if self.trouble(shop.name, 0.05):
            world.later(world.at + chance.uniform(0, 3), ev.StoreHung(shop.name, "no heartbeat", 0.0))

    def collect(self, action: do.Collect) -> None:
        world, shop, at = self.world, self.world.shops[action.store], self.world.at
        assert action.ticket in world.machine.tickets, f"{action.ticket} is collected in the step that settles it"
        assert not shop.healthy or action.ticket in shop.outbox, f"{action.ticket} is collected and not there"
        if action.ticket not in shop.outbox:
            self._event(at + 0.1, ev.TrainingFailed(action.ticket, "no update waits for this ticket", at))
        elif self.trouble(shop.name, 0.05):
            self._event(at + 1, ev.TrainingFailed(action.ticket, "link", at))
        elif world.chance.random() < 0.01:
            late = world.chance.uniform(0, 2)
            if self.trouble(shop.name, 0.3):  # it is gone when that is heard
                world.later(at + late / 2, ev.StoreHung(shop.name, "no heartbeat", 0.0))
            self._event(at + late, ev.Deferred(action.ticket, "today's bytes are spent", 20.0, at))
        elif self.trouble(shop.name, 0.05):
            self._event(at + world.chance.uniform(0, 0.5), ev.UpdateRefused(action.ticket, "not what it signed", at))
        elif not self.trouble(shop.name, 0.05):  # else the transfer never ends
            self._event(at + world.chance.uniform(0, 0.5), ev.UpdateArrived(action.ticket, 10, at))

    def settle(self, action: do.Settle, said: int | None) -> None:
        """On its way; a store that has heard of a newer coordinator refuses it."""
        shop, epoch = self.world.shops[action.store], self.world.epoch
        if not shop.here:
            return  # it hears of it when it is back

        def arrives() -> None:
            if epoch >= shop.epoch:
                shop.outbox.pop(action.ticket, None)

        self.world.later(self.world.at + self.world.chance.uniform(0, 0.1), AtStore(arrives))

    def evaluate(self, action: do.Evaluate) -> None:
        at, shop = self.world.at, self.world.shops.get(action.store)
        if shop is None or not self.trouble(shop.name, 0.2):
            self._judges(action.version, shop, at + 0.2)
        elif self.trouble(shop.name, 0.5):
            self.world.later(at + 0.2, ev.EvaluationFailed(action.version, shop.name, at))

    def _judges(self, version: int, shop: Shop | None, at: float) -> None:
        name, images = (shop.name, shop.images) if shop is not None else ("centre", 100)
        self.world.later(at, ev.Evaluated(version, name, {"accuracy": self.world.chance.random()}, images, at))
