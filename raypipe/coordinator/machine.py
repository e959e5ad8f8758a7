"""The coordinator's decisions: who trains, what is folded with which weight, when a version is made.

`handle(event) -> actions` is the only way in and the only method that changes state. No clock, network, Ray or
tensor is in here: time comes with events, chance as an argument. Rules:

* A store holds at most one ticket in training. A ticket past its due time holds no slot and nobody waits for it,
  but its work is folded when it comes, with its staleness weight.
* *Expected* are the stores that can still bring something to the open version in time: those with a ticket not
  past due, and those that will be given one. A version is due when the stores in its sum are as many as K, or as
  many as can still come (`buffer_size` None: as can still come).
* Staleness is measured at the fold: newest version minus base version. Its limit is relative,
  `stale_limit * concurrency / K`, since a store s times slower sees s times the mean staleness.
* A store that is closed by its own policy is in no cohort until it opens. One that pauses, since who owns its machine
  needs it, is not hung; after `hung_s` nobody waits for it either.
* A version being written down blocks new tickets (they would be a version behind), never folds.
* An update is settled when the weights that hold it are on the disk: until then its store could be asked again.
* The end: cancel what is in flight, judge the newest version where it can be judged, finish.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator import rotation
from raypipe.coordinator.policy import Policy
from raypipe.coordinator.state import Member, Memory, Phase, Scores, Ticket
from raypipe.tasks.metrics import derived

CLOSING_S = 30.0  # for the last judgement, before the run finishes without it
STOPPED_S = 5.0  # the same when somebody wants the run to end now
FIRST_S = 3600.0  # for a first ticket without a deadline: nothing is known of the store's speed
WARM_UP_S = 60.0  # more patience until a store that joined has handed over once: it imports, builds and decodes
AHEAD = 3  # updates at the head before their turn in store order
AWAITED = (Phase.WAITING, Phase.TRAINING, Phase.COLLECTING)  # somebody else has to do something
MAX_IN_ONE_SUM = 2  # a fast store's share of one buffer when slots are refilled on arrival


class Coordinator:
    """The machine of one run. Version 0 exists when it is made."""

    def __init__(
        self,
        policy: Policy,
        stores: list[str],
        *,
        metric: str,
        chance: Callable[[int], random.Random],
        start_at: float,
    ) -> None:
        """`chance`: a version's own random numbers, so that there is no random state to be saved."""
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
        self._chance = chance
        self.issued = self.places = self.told = 0
        self.central_busy = False
        self.closing_s = CLOSING_S
        self.empty_since: float | None = None
        self.now = start_at

    # -- the only way in ------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> list[do.Action]:
        """Take an event, change state, say what is to be done."""
        if self.finished and not isinstance(event, ev.Withdrawn):
            return []
        self.now = at = max(self.now, event.at)
        actions: list[do.Action] = []
        match event:
            case ev.StoreJoined():
                actions += self._joined(event, at)
            case ev.Resumed():
                actions += self._resumed(event, at)
            case ev.StoreAdded(store=store):
                self._added(store)
            case ev.StoreLeft(store=store, reason=reason):
                actions += self._left(store, reason, for_good=event.for_good)
            case ev.StoreHung(store=store, reason=reason):
                actions += self._restart(store, reason, at)
            case ev.Trained():
                actions += self._trained(event)
            case ev.TrainingFailed():
                actions += self._failed(event, at)
            case ev.Deferred():
                actions += self._deferred(event)
            case ev.StorePaused(store=store, reason=reason):
                actions += self._paused(store, reason, at)
            case ev.StoreWentOn(store=store):
                actions += self._went_on(store, at)
            case ev.UpdateArrived():
                self._arrived(event)
            case ev.UpdateRefused():
                actions += self._refused(event)
            case ev.Folded():
                actions += self._folded(event)
            case ev.Published():
                actions += self._published(event)
            case ev.Kept(version=version):
                kept = self.unkept.pop(version, ())
                self._forget(kept)
                actions += [do.Settle(c.store, c.ticket, version) for c in kept]
            case ev.Withdrawn(version=version, reason=reason):
                actions += self._withdrawn(version, reason)
            case ev.Evaluated():
                self.scores.add(event.version, event.store, event.metrics, event.num_examples)
                self._heard(event.version, event.store)
                actions += self._close_scores()
            case ev.EvaluationFailed():
                self._heard(event.version, event.store)
            case ev.StopAsked(reason=reason):
                self.closing_s = STOPPED_S
                actions += self._end(reason, at)
            case ev.Tick():
                pass
        actions += self._expire(at)
        if self.ending is None and (reason := self._reason_to_end(at)):
            actions += self._end(reason, at)
        actions += self._collect(at)
        actions += self._fold()
        actions += self._publish()
        actions += self._rotate(at)
        actions += self._train(at)
        self._note_emptiness(at)
        return self._numbered(actions + self._finish(at))

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
            times += [limit, limit + 0.5 * (self.policy.budget_s or 0.0)]
        if self.empty_since is not None:
            times.append(self.empty_since + self.patience_s)
        if self.ending is not None:
            times.append(self.ending[1] + self.closing_s)
        return min((t for t in times if t > self.now), default=math.inf)

    def memory(self) -> Memory:
        """All that it remembers; see `recall`."""
        return Memory(**{f.name: getattr(self, f.name) for f in fields(Memory)})

    def recall(self, memory: Memory) -> None:
        """Be as that machine was, under the same policy."""
        for f in fields(Memory):
            setattr(self, f.name, getattr(memory, f.name))

    def _numbered(self, actions: list[do.Action]) -> list[do.Action]:
        for place, action in enumerate(actions):
            if isinstance(action, do.Record):
                self.told += 1
                actions[place] = replace(action, number=self.told)
        return actions

    # -- stores ---------------------------------------------------------------------------------------------

    def _joined(self, event: ev.StoreJoined, at: float) -> list[do.Action]:
        member = self.members.setdefault(event.store, Member(event.store))
        if not member.asked:  # it came as it was released
            return []
        if not member.restarting and member.returning <= at:  # it came back from outside: a new chance
            member.aside, member.failures, member.retry_at, member.closed_until = "", 0, at, at
        member.present, member.restarting, member.warm, member.missed = True, False, False, False
        member.returning = member.coming_until = -math.inf
        member.num_train, member.max_upload_bytes_s = event.num_train, event.max_upload_bytes_s
        member.stuck = False
        mine = [t for t in self.tickets.values() if t.store == event.store]
        forgotten = [ticket for ticket in event.outbox if ticket not in self.tickets]
        actions: list[do.Action] = [do.Settle(event.store, ticket, None, "it was settled") for ticket in forgotten]
        over = self.ending is not None or self._reason_to_end(at)  # it may end in this very step
        for ticket in [t for t in mine if t.phase is Phase.WAITING]:
            if not over and not member.aside:
                self._await(ticket, at)  # of a finished one the store has the update still: it gives the same report
                actions.append(ticket.asked)
            else:
                del self.tickets[ticket.id]
                actions.append(do.Settle(event.store, ticket.id, None, member.aside or "the run ended"))
        return actions

    def _added(self, store: str) -> None:
        """Where not all may be there; else it is simply there when it joins."""
        member = self.members.setdefault(store, Member(store, asked=self.policy.max_active_stores is None))
        member.aside = ""

    def _rotate(self, at: float) -> list[do.Action]:
        """Release who is not needed, ask for who is next; see rotation.py."""
        if self.ending is not None:
            return []
        actions: list[do.Action] = []
        busy = {t.store for t in self.tickets.values()}
        busy |= {s for s in self.cohort if (m := self.members[s]).present and not rotation.turn_over(m, self.policy)}
        lacking = len(self._waiting()) - rotation.room(self.members.values(), self.policy)
        for member in [m for m in self.members.values() if m.asked and m.id not in busy]:
            if reason := rotation.why_release(member, self.policy, at, crowded=lacking > 0):
                lacking -= 1
                actions += self._let_go(member, reason, at)
        room = rotation.room(self.members.values(), self.policy)
        if room < 1 or not (able := self._waiting()):
            return actions
        awaited = self.policy.max_active_stores is not None and not self.policy.tick
        for member in rotation.in_turn(able, self._chance(self.version))[: int(min(room, len(able)))]:
            member.asked, member.asked_at, member.turns = True, at, 0
            member.coming_until = at + self.policy.join_s if awaited else -math.inf
            actions += [do.Ask(member.id), do.Record("store_asked", {"store": member.id})]
        return actions

    def _let_go(self, member: Member, reason: str, at: float) -> list[do.Action]:
        member.missed = not member.present and not member.aside and member.closed_until <= at
        member.asked = member.present = member.restarting = False
        member.released_at, member.paused_at = at, None
        member.returning = member.coming_until = -math.inf
        self.cohort = [s for s in self.cohort if s != member.id]
        self._heard(self.version, member.id)
        return [do.Release(member.id), do.Record("store_released", {"store": member.id, "reason": reason})]

    def _waiting(self) -> list[Member]:
        return rotation.waiting(self.members.values(), self.policy, self.now)

    def _resumed(self, event: ev.Resumed, at: float) -> list[do.Action]:
        """Everything in flight is asked for again when its store is back; the open sum begins anew."""
        self.epoch, until = event.epoch, at + event.grace_s
        for member in self.members.values():
            member.returning = until if member.present else -math.inf
            member.present = member.restarting = False
            member.paused_at = None
        done = {c.ticket for made in self.unkept.values() for c in made}
        for ticket in self.tickets.values():
            if ticket.id not in done:
                ticket.phase, ticket.hung_at = Phase.WAITING, until
        self.created_at = self.created_at if self.started_at is not None else at
        self.publishing, self.awaited = None, None
        self.central_busy, self.empty_since = False, None
        if self.policy.max_active_stores is None:  # all are
            for member in self.members.values():
                member.asked = True
            return []
        asked = [member for member in self.members.values() if member.asked]
        for member in asked:
            member.asked_at = at
        return [do.Ask(member.id) for member in asked]

    def _withdrawn(self, version: int, reason: str) -> list[do.Action]:
        """The newest version's weights are lost: it is made again, of what still can be had."""
        gone = [t for t in self.tickets.values() if t.base >= version]
        self.version, self.picked, self.cohort, self.finished = version - 1, None, [], False
        if self.closing_s != STOPPED_S:  # why it was to end may hold no more
            self.ending = None
        for ticket in gone:
            del self.tickets[ticket.id]
        for contribution in self.unkept.pop(version, ()):
            ticket = self.tickets[contribution.ticket]
            ticket.phase, ticket.hung_at = Phase.WAITING, math.inf  # `Resumed`, which follows, says for how long
        for member in self.members.values():  # its work on the version before counts again: none is done twice
            made = [t for t in self.tickets.values() if t.store == member.id and t.base == self.version and t.arrived]
            member.handed_over = (self.version, max((t.asked.repeat + 1 for t in made), default=0))
        self.scores.withdraw(version)
        return [do.Settle(t.store, t.id, None, reason) for t in gone]

    def _left(self, store: str, reason: str, *, for_good: bool = False) -> list[do.Action]:
        member = self.members.get(store)
        if member is None:
            return []
        member.returning = member.coming_until = -math.inf
        member.asked_at = self.now
        if for_good and self.policy.max_active_stores is not None:
            member.aside = reason
        if not member.present:
            return []
        member.present, member.paused_at = False, None
        self.cohort = [s for s in self.cohort if s != store]
        self._heard(self.version, store)
        actions: list[do.Action] = [do.Record("store_left", {"store": store, "reason": reason})]
        for ticket in [t for t in self.tickets.values() if t.store == store and t.phase <= Phase.COLLECTING]:
            del self.tickets[ticket.id]
            actions.append(do.Settle(store, ticket.id, None, reason))
        return actions

    def _restart(self, store: str, reason: str, at: float) -> list[do.Action]:
        if not self.members[store].present:
            return []
        self.members[store].restarting = True
        blame = self._blame(store, reason, at)
        return [*self._left(store, reason), do.Restart(store, reason), *blame]

    def _blame(self, store: str, reason: str, at: float) -> list[do.Action]:
        """Count a failure; back off, or set the store aside."""
        member = self.members[store]
        member.failures += 1
        member.retry_at = at + self.policy.backoff_s * 2 ** min(member.failures - 1, 16)
        if member.failures < self.policy.max_failures:
            return []
        member.aside = reason
        self.cohort = [s for s in self.cohort if s != store]
        return [do.Record("store_set_aside", {"store": store, "reason": reason, "failures": member.failures})]

    def _paused(self, store: str, reason: str, at: float) -> list[do.Action]:
        member = self.members.get(store)
        if member is None or not member.present or member.paused_at is not None:
            return []
        member.paused_at = at
        for ticket in self.tickets.values():
            if ticket.store == store and ticket.phase is Phase.TRAINING:
                ticket.again = True  # how long it took tells nothing
        return [do.Record("store_paused", {"store": store, "reason": reason})]

    def _went_on(self, store: str, at: float) -> list[do.Action]:
        member = self.members.get(store)
        if member is None or member.paused_at is None:
            return []
        seconds, member.paused_at = at - member.paused_at, None
        for ticket in self.tickets.values():
            if ticket.store == store and ticket.phase is Phase.TRAINING:
                ticket.hung_at += seconds
        return [do.Record("store_went_on", {"store": store, "seconds": seconds})]

    # -- tickets --------------------------------------------------------------------------------------------

    def _trained(self, event: ev.Trained) -> list[do.Action]:
        ticket = self.tickets.get(event.ticket)
        if ticket is None or ticket.phase is not Phase.TRAINING:
            return []
        ticket.phase = Phase.TRAINED
        ticket.steps, ticket.examples, ticket.num_train = event.steps, event.examples, event.num_train
        ticket.seconds, ticket.loss, ticket.after = event.seconds, event.loss, event.after
        ticket.data_hash = event.data_hash
        ticket.num_bytes = event.update_bytes
        if event.seconds > 0:
            self.members[ticket.store].speed = event.steps / event.seconds
        return []

    def _collect(self, at: float) -> list[do.Action]:
        """Have updates handed over: at once; where they are folded in store order, a few ahead of their turn, so that
        the head never holds more than a few, however many stores there are."""
        waiting = sorted((t for t in self.tickets.values() if t.phase is Phase.TRAINED), key=lambda t: t.store)
        if self.policy.in_order:
            held = sum(t.phase in (Phase.COLLECTING, Phase.ARRIVED) for t in self.tickets.values())
            first = min(self._expected(), default="")
            waiting = [t for t in waiting if t.store == first or t in waiting[: max(0, AHEAD - held)]]
        for ticket in waiting:
            ticket.phase, rate = Phase.COLLECTING, self.members[ticket.store].max_upload_bytes_s
            slowly_s = 2 * ticket.num_bytes / rate if rate else 0.0  # twice: the update before may be on its way
            ticket.hung_at = max(ticket.hung_at, at + self.policy.hung_s + slowly_s)
        return [do.Collect(t.id, t.store) for t in waiting]

    def _arrived(self, event: ev.UpdateArrived) -> None:
        ticket = self.tickets.get(event.ticket)
        if ticket is None or ticket.phase is not Phase.COLLECTING:
            return
        ticket.phase, ticket.num_bytes = Phase.ARRIVED, event.num_bytes
        ticket.digest, ticket.signature = event.digest, event.signature
        member = self.members[ticket.store]
        member.warm = True
        member.turns += 1
        if not ticket.again:
            member.last_s = event.at - ticket.issued_at
            member.overhead_s = max(0.0, member.last_s - ticket.seconds)
        base, times = member.handed_over
        if not ticket.arrived:  # a second time after the coordinator died
            member.handed_over = (ticket.base, times + 1 if base == ticket.base else 1)
        ticket.arrived = True

    def _failed(self, event: ev.TrainingFailed, at: float) -> list[do.Action]:
        ticket = self.tickets.get(event.ticket)
        if ticket is None or ticket.phase > Phase.COLLECTING:
            return []
        del self.tickets[event.ticket]
        note = do.Record("ticket_failed", {"store": ticket.store, "ticket": ticket.id, "reason": event.reason})
        if event.final:
            self.members[ticket.store].failures = self.policy.max_failures - 1
        return [note, *self._try_again(ticket, event.reason, at)]

    def _deferred(self, event: ev.Deferred) -> list[do.Action]:
        """Nobody's fault: no failure is counted, and the store is in no cohort until it opens."""
        ticket = self.tickets.get(event.ticket)
        if ticket is None or ticket.phase > Phase.COLLECTING:
            return []
        del self.tickets[event.ticket]
        self.members[ticket.store].closed_until = event.at + event.wait_s
        self.cohort = [s for s in self.cohort if s != ticket.store]
        body = {"store": ticket.store, "ticket": ticket.id, "reason": event.reason, "wait_s": event.wait_s}
        return [do.Record("store_closed", body), do.Settle(ticket.store, ticket.id, None, event.reason)]

    def _try_again(self, ticket: Ticket, reason: str, at: float) -> list[do.Action]:
        """Blame the store; where a version waits for its cohort, it stays in it until it is set aside."""
        actions = self._blame(ticket.store, reason, at)
        cohort_waits = self.policy.refill == "on_publish" and not self.policy.tick
        aside = self.members[ticket.store].aside
        if cohort_waits and ticket.base == self.version and not aside and ticket.store not in self.cohort:
            self.cohort.append(ticket.store)
        return actions

    def _refused(self, event: ev.UpdateRefused) -> list[do.Action]:
        ticket = self.tickets.get(event.ticket)
        if ticket is None or ticket.phase is not Phase.COLLECTING:
            return []
        ticket.digest = event.digest
        return self._reject(ticket, event.reason, event.at)

    def _reject(self, ticket: Ticket, reason: str, at: float) -> list[do.Action]:
        """Its update is not folded, and its store is told."""
        del self.tickets[ticket.id]
        body = {"store": ticket.store, "ticket": ticket.id, "reason": reason, "digest": ticket.digest}
        told: list[do.Action] = [
            do.Record("update_rejected", body),
            do.Settle(ticket.store, ticket.id, None, reason),
        ]
        return told + self._try_again(ticket, reason, at)

    def _folded(self, event: ev.Folded) -> list[do.Action]:
        actions: list[do.Action] = []
        for ticket_id, reason in event.rejected:
            if (ticket := self.tickets.get(ticket_id)) is not None:
                actions += self._reject(ticket, reason, event.at)
        for ticket_id in event.tickets:
            ticket = self.tickets.get(ticket_id)
            if ticket is not None and ticket.phase is Phase.FOLDING:
                self.places += 1
                ticket.phase, ticket.place = Phase.FOLDED, self.places
                self.members[ticket.store].failures = 0
        return actions

    def _expire(self, at: float) -> list[do.Action]:
        """Restart stores that are long past their due time."""
        actions: list[do.Action] = []
        for ticket in [t for t in self.tickets.values() if t.phase in AWAITED]:
            paused_at = self.members[ticket.store].paused_at if ticket.phase is Phase.TRAINING else None
            if paused_at is not None and paused_at + self.policy.hung_s <= at:
                ticket.due_at = min(ticket.due_at, at)  # nobody waits for it any more
            if paused_at is not None or ticket.hung_at > at:
                continue
            if ticket.phase is Phase.WAITING:
                del self.tickets[ticket.id]
                body = {"store": ticket.store, "ticket": ticket.id, "reason": "its store did not come back"}
                actions.append(do.Record("ticket_failed", body))
                continue
            waited = at - ticket.issued_at
            actions += self._restart(ticket.store, f"no result after {waited:.0f} s; restarted", at)
        return actions

    # -- folding and publishing -----------------------------------------------------------------------------

    def _fold(self) -> list[do.Action]:
        """Portions for the updates that arrived: at once, or the prefix in store order where bits must repeat."""
        if self.ending is not None:
            return []
        arrived = sorted((t for t in self.tickets.values() if t.phase is Phase.ARRIVED), key=lambda t: t.store)
        if self._due():  # the sum is complete: the rest belongs to the next version
            return []
        if self.policy.in_order:
            first_missing = min(self._expected(with_arrived=False), default="￿")
            arrived = [t for t in arrived if t.store < first_missing]
        actions: list[do.Action] = []
        portions = []
        for ticket in arrived:
            if self._weigh(ticket):
                ticket.phase = Phase.FOLDING
                steps = ticket.steps if self.policy.weigh == "steps" else None
                portions.append(do.Portion(ticket.id, ticket.store, ticket.weight, steps))
            else:
                del self.tickets[ticket.id]
                reason = f"trained on version {ticket.base}, {ticket.staleness} versions ago"
                actions.append(do.Settle(ticket.store, ticket.id, None, reason))
        return [*actions, do.Fold(tuple(portions))] if portions else actions

    def _weigh(self, ticket: Ticket) -> bool:
        """Set the ticket's staleness and weight; False when it is too stale and policy drops it."""
        policy = self.policy
        newest = self.version + (self.publishing is not None)
        ticket.staleness = newest - ticket.base
        trust = policy.weigh_staleness(ticket.staleness)
        there = sum(m.present or m.returning > self.now for m in self.members.values())
        in_flight = min(policy.concurrency or there, there)
        limit = policy.stale_limit * max(1.0, in_flight / (policy.buffer_size or max(1, in_flight)))
        if ticket.staleness > limit:
            if policy.stale_action == "drop":
                return False
            trust = policy.floor_weight
        worth = 1.0 if policy.weigh == "equal" else float(max(1, ticket.num_train))
        ticket.worth, ticket.weight = worth, worth * max(trust, policy.floor_weight)
        return ticket.weight > 0

    def _publish(self) -> list[do.Action]:
        summed = self._in_sum()
        if not self._due() or any(t.phase is Phase.FOLDING for t in summed):
            return []
        summed.sort(key=lambda t: t.place)
        total = math.fsum(t.weight for t in summed)
        there = max(1, sum(m.counts(self.now) for m in self.members.values()))
        contributions = tuple(_contribution(t, total) for t in summed)
        stores = len({t.store for t in summed})
        self.publishing = do.Publish(
            self.version + 1, contributions, math.fsum(t.worth for t in summed), min(1.0, stores / there)
        )
        for ticket in summed:
            ticket.phase = Phase.PUBLISHED
        return [self.publishing]

    def _published(self, event: ev.Published) -> list[do.Action]:
        if self.publishing is None or event.version != self.publishing.version:
            return []
        self.unkept[event.version] = self.publishing.contributions
        self.publishing, self.version = None, event.version
        return [do.Keep(event.version), *self._judge_centrally(), *self._close_scores()]

    def _due(self) -> bool:
        """The open sum is complete. Derived, never stored."""
        stores = {t.store for t in self._in_sum()}
        if not stores or self.publishing is not None or self.ending is not None:
            return False
        can_come = stores | self._expected()
        return len(stores) >= min(self.policy.buffer_size or len(can_come), len(can_come))

    def _expected(self, *, with_arrived: bool = True) -> set[str]:
        """Stores that can still bring something to the open sum in time."""
        coming = {t.store for t in self.tickets.values() if t.phase <= Phase.COLLECTING and not self._late(t)}
        if with_arrived:
            coming |= {t.store for t in self.tickets.values() if t.phase is Phase.ARRIVED}
        if self.policy.refill == "on_publish" and self.picked == self.version:
            return coming | set(self._startable())
        return coming | set(self._free()) | self._returning()

    # -- giving out work ------------------------------------------------------------------------------------

    def _train(self, at: float) -> list[do.Action]:
        if self.ending is not None or self.publishing is not None or not self._started(at):
            return []
        if self._due():  # a version is about to be made: a ticket now would be one behind
            return []
        if self.policy.settle_first and self.unkept:
            return []
        actions: list[do.Action] = []
        for store in self._candidates():
            if self.policy.concurrency is not None and self._slots_taken() >= self.policy.concurrency:
                break
            actions.append(self._issue(self.members[store], at))
        return actions

    def _started(self, at: float) -> bool:
        if self.started_at is None and sum(m.present for m in self.members.values()) >= self.policy.quorum:
            self.started_at = at
        return self.started_at is not None

    def _candidates(self) -> list[str]:
        """Stores to be given a ticket now: the longest work first; on arrival, the longest idle first."""
        free = self._free()
        if self.policy.refill == "on_arrival":
            return sorted((s for s in free if not self._sated(s)), key=lambda s: self.members[s].last_issued_at)
        nothing_open = not self._in_sum() and not self._expected()
        if self.picked != self.version or nothing_open:
            self.picked, size = self.version, self.policy.cohort
            able = sorted({*free, *self._returning()})
            chance = self._chance(self.version)
            self.cohort = able if size is None or size >= len(able) else sorted(chance.sample(able, size))
        ready = sorted(s for s in self.cohort if s in free)
        if self.policy.in_order:  # so that each is folded while the next ones train
            return ready
        return sorted(ready, key=lambda s: -(self.members[s].last_s or 0.0))

    def _issue(self, member: Member, at: float) -> do.Train:
        policy = self.policy
        self.issued += 1
        budget, steps = policy.budget_s, None
        if budget is None and policy.deadline_s is not None:  # what the store can do in time, by its own measure
            budget = max(0.2 * policy.deadline_s, policy.deadline_s - 1.5 * member.overhead_s)
            steps = None if member.speed is None else max(1, int(member.speed * budget))
        if policy.max_seconds is not None and self.started_at is not None and budget is not None:
            budget = max(0.1 * budget, min(budget, self.started_at + policy.max_seconds - at))
        due = policy.deadline_s if policy.deadline_s is not None else (1.25 * budget + 0.5 if budget else math.inf)
        warm_up = 0.0 if member.warm else WARM_UP_S
        patience = due if math.isfinite(due) else 10 * (member.last_s or self._slowest() or FIRST_S / 10)
        progress = self.progress(at)
        judged = self.scores.judged.get(self.version, {})
        evaluate = self.version % policy.evaluate_every == 0 and member.id not in judged
        base, times = member.handed_over
        repeat = times if base == self.version else 0
        name = f"{self.version}.{self.epoch}-{self.issued}.{member.id}"
        train = do.Train(name, member.id, self.version, (progress, progress), budget, steps, evaluate, repeat)
        hung_at = at + patience + policy.hung_s + warm_up
        self.tickets[name] = Ticket(name, member.id, self.version, train, at, at + due, hung_at)
        self.cohort = [s for s in self.cohort if s != member.id]
        member.issued, member.last_issued_at = member.issued + 1, at
        return train

    def _await(self, ticket: Ticket, at: float) -> None:
        """It is asked for again: it has as long as it had at first, and the store's start."""
        due, hung = ticket.due_at - ticket.issued_at, FIRST_S if math.isinf(ticket.due_at) else 0.0
        ticket.phase, ticket.issued_at, ticket.again = Phase.TRAINING, at, True
        ticket.due_at, ticket.hung_at = at + due, at + (hung or due) + self.policy.hung_s + WARM_UP_S

    def _slowest(self) -> float:
        """The longest newest ticket of any store, in seconds; 0 before the first."""
        return max((m.last_s or 0.0 for m in self.members.values()), default=0.0)

    def progress(self, at: float) -> float:
        """How much of the run is over, in [0, 1], by versions or by time, whichever is further."""
        by_version = self.version / self.policy.max_versions if self.policy.max_versions else 0.0
        since = at - self.started_at if self.started_at is not None else 0.0
        by_time = since / self.policy.max_seconds if self.policy.max_seconds else 0.0
        return min(1.0, max(by_version, by_time))

    # -- the end --------------------------------------------------------------------------------------------

    def _judge_centrally(self) -> list[do.Action]:
        central = self.scores.central
        if central is None or self.central_busy or self.version % self.policy.evaluate_every:
            return []
        self.central_busy = True
        return [do.Evaluate(self.version, central)]

    def _heard(self, version: int, store: str) -> None:
        if store == self.scores.central:
            self.central_busy = False
        if self.awaited is not None and version == self.version:
            self.awaited.discard(store)

    def _close_scores(self) -> list[do.Action]:
        """Score versions that all who judge have judged, and those two behind the newest."""
        there = {s for s, m in self.members.items() if m.counts(self.now)}
        judges = there if self.scores.central is None else {self.scores.central}
        actions: list[do.Action] = []
        for version in sorted(v for v in self.scores.judged if v not in self.scores.closed):
            if version <= self.version - 2 or judges <= set(self.scores.judged[version]):
                actions += self._score(version)
        return actions

    def _score(self, version: int) -> list[do.Action]:
        mean = self.scores.close(version)
        if mean is None:
            return []
        rows = self.scores.judged.get(version, {})
        best = self.scores.best is not None and self.scores.best[0] == version
        stores = {s: {**derived(mean), "num_examples": n} for s, (mean, n) in sorted(rows.items())}
        total = sum(n for _, n in rows.values())
        body = {"version": version, "split": "validation", "metrics": mean, "stores": stores, "best": best}
        return [do.Record("evaluated", {**body, "num_examples": total})]

    def _finish(self, at: float) -> list[do.Action]:
        """Once the end has begun: have the newest version judged, then finish."""
        actions: list[do.Action] = []
        if self.ending is None or self.publishing is not None:
            return actions
        reason, since = self.ending
        if self.awaited is None and any(m.returning > at for m in self.members.values()):
            return actions
        if self.awaited is None:
            actions += self._judge_last()
        if self.unkept:
            return actions
        if not self.awaited or at >= since + self.closing_s:
            for version in sorted(set(self.scores.judged) - self.scores.closed):
                actions += self._score(version)
            self.finished = True
            best = self.scores.best[0] if self.scores.best else self.version
            actions.append(do.Finish(reason, best, failed=self.started_at is None))
        return actions

    def _judge_last(self) -> list[do.Action]:
        """Ask all who can answer for their word on the newest version."""
        there = [s for s, m in self.members.items() if m.present and not m.aside and not m.stuck]
        if self.scores.central is not None:
            there = [self.scores.central]
        done = self.scores.judged.get(self.version, {})
        self.central_busy = False
        self.awaited = {s for s in there if s not in done} if self.started_at is not None else set()
        self.tickets = {t.id: t for t in self.tickets.values() if t.phase is Phase.PUBLISHED}
        return [do.Evaluate(self.version, s) for s in sorted(self.awaited)]

    def _reason_to_end(self, at: float) -> str:
        policy = self.policy
        if self.started_at is None:
            late = at >= self.created_at + self.patience_s
            return f"no quorum after {self.patience_s:.0f} s" if late else ""
        if policy.max_versions is not None and self.version >= policy.max_versions:
            return f"{self.version} versions"
        limit = math.inf if policy.max_seconds is None else self.started_at + policy.max_seconds
        # Sums as in `wake_at`: a difference may be a bit short at the Tick, and there is no other one.
        if at >= limit and (not self._expected() or at >= limit + 0.5 * (policy.budget_s or 0.0)):
            return f"{policy.max_seconds:.0f} s"
        if policy.target is not None and self.scores.reached(policy.target):
            return f"{self.scores.metric} reached {policy.target}"
        if policy.patience is not None and self.scores.stale_for(policy.patience):
            return f"no better version in {policy.patience}"
        if self.members and all(m.aside for m in self.members.values()):
            return "every store is set aside"
        if self.empty_since is not None and at >= self.empty_since + self.patience_s:
            return f"no store was left for {self.patience_s:.0f} s"
        return ""

    def _note_emptiness(self, at: float) -> None:
        """Since when no store can be given work, none even later today; whoever comes back in time ends it."""
        there = [m for m in self.members.values() if not m.aside]
        usable = any(m.present or max(m.returning, m.closed_until) > at for m in there)
        usable = usable or any(not m.asked and rotation.rests_until(m, self.policy) > at for m in there)
        self.empty_since = None if usable or self.started_at is None else (self.empty_since or at)

    def _end(self, reason: str, at: float) -> list[do.Action]:
        if self.ending is not None:
            return []
        self.ending = (reason, at)
        cancels: list[do.Action] = [do.Cancel(t.store, t.id) for t in self._training()]
        open_ones = [t for t in self.tickets.values() if t.phase is not Phase.PUBLISHED]
        for ticket in open_ones:  # it is over for good, though its answer is on its way, or the run goes on after all
            if ticket.phase is Phase.TRAINING and self._late(ticket):
                self.members[ticket.store].stuck = True
            del self.tickets[ticket.id]
        return cancels + [do.Settle(t.store, t.id, None, "the run ended") for t in open_ones]

    # -- derived --------------------------------------------------------------------------------------------

    def _training(self) -> list[Ticket]:
        return [t for t in self.tickets.values() if t.phase is Phase.TRAINING]

    @property
    def patience_s(self) -> float:
        """How long the run goes on without enough stores."""
        return rotation.patience_s(self.members, self.policy)

    def _late(self, ticket: Ticket) -> bool:
        return ticket.due_at <= self.now and ticket.phase is not Phase.WAITING

    def _forget(self, contributions: tuple[do.Contribution, ...]) -> None:
        for contribution in contributions:
            self.tickets.pop(contribution.ticket, None)

    def _free(self) -> list[str]:
        """Stores that may be given work now."""
        handing_over = Phase.COLLECTING if self.policy.refill == "on_arrival" else Phase.TRAINING
        busy = {t.store for t in self.tickets.values() if t.phase <= handing_over}
        busy |= self._had_turn()
        return [s for s, m in self.members.items() if m.available(self.now) and s not in busy]

    def _had_turn(self) -> set[str]:
        """Stores that are given nothing more, since others wait for their places."""
        if self.policy.max_active_stores is None or not self._waiting():
            return set()
        return {s for s, m in self.members.items() if rotation.turn_over(m, self.policy)}

    def _slots_taken(self) -> int:
        return sum(not self._late(t) for t in self._training())

    def _in_sum(self) -> list[Ticket]:
        return [t for t in self.tickets.values() if t.phase in (Phase.FOLDING, Phase.FOLDED)]

    def _returning(self) -> set[str]:
        """Stores that hold no ticket and may come in time: asked for, or there when the coordinator died."""
        held = {t.store for t in self.tickets.values() if t.phase <= Phase.TRAINING}
        coming = {s for s, m in self.members.items() if max(m.returning, m.coming_until) > self.now and not m.aside}
        return coming - held

    def _startable(self) -> list[str]:
        """Members of the open cohort that wait for a slot or for the end of their back-off."""
        over = self._had_turn()
        return [s for s in self.cohort if self.members[s].counts(self.now) and s not in over]

    def _sated(self, store: str) -> bool:
        """With slots refilled on arrival, a store that is in the open sum twice waits for the version."""
        held = [t for t in self.tickets.values() if Phase.TRAINING < t.phase < Phase.PUBLISHED]
        return sum(t.store == store for t in held) >= MAX_IN_ONE_SUM


def _contribution(ticket: Ticket, total: float) -> do.Contribution:
    return do.Contribution(
        ticket=ticket.id,
        store=ticket.store,
        base=ticket.base,
        staleness=ticket.staleness,
        steps=ticket.steps,
        examples=ticket.examples,
        weight=ticket.weight,
        share=ticket.weight / total,
        seconds=ticket.seconds,
        loss=ticket.loss,
        bytes_up=ticket.num_bytes,
        digest=ticket.digest,
        signature=ticket.signature,
        progress=ticket.asked.progress[0],
        repeat=ticket.asked.repeat,
        after=ticket.after,
        data_hash=ticket.data_hash or None,
    )
