"""Stores come, go, fail, pause and take turns; what that means for their tickets."""

from __future__ import annotations

import math

from raypipe.coordinator import actions as do
from raypipe.coordinator import ending, rotation
from raypipe.coordinator import events as ev
from raypipe.coordinator.run import Run
from raypipe.coordinator.state import Member, Phase, Ticket

FIRST_S = 3600.0  # for a first ticket without a deadline, while nothing is known of any store's speed
SLOWER = 20.0  # times that a store may be slower than the slowest that is known, for equally many images
SHORTEST_S = 300.0  # the same of a first ticket, however fast the others: its link may be slow
WARM_UP_S = 60.0  # more patience until a store that joined has handed over once: it imports, builds and decodes


def joined(run: Run, event: ev.StoreJoined, at: float) -> list[do.Action]:
    """A store is there: tell it what is over, and ask again for what it held when the coordinator died."""
    member = run.members.setdefault(event.store, Member(event.store))
    if not member.asked:  # it came as it was released
        return []
    if not member.restarting and member.returning <= at:  # it came back from outside: a new chance
        member.aside, member.failures, member.retry_at, member.closed_until = "", 0, at, at
    member.present, member.restarting, member.warm, member.missed = True, False, False, False
    member.returning = member.coming_until = -math.inf
    member.num_train, member.max_upload_bytes_s = event.num_train, event.max_upload_bytes_s
    member.stuck = False
    mine = [t for t in run.tickets.values() if t.store == event.store]
    forgotten = [ticket for ticket in event.outbox if ticket not in run.tickets]
    actions: list[do.Action] = [do.Settle(event.store, ticket, None, "it was settled") for ticket in forgotten]
    for ticket in [t for t in mine if t.phase is Phase.TRAINED]:  # it was cut off with its finished update
        if member.aside or ticket.id not in event.outbox:
            actions += lost(run, ticket, member.aside or "its update was gone when it came back")
    over = run.ending is not None or ending.reason_to_end(run, at)  # it may end in this very step
    for ticket in [t for t in mine if t.phase is Phase.WAITING]:
        if not over and not member.aside:
            _ask_again(run, ticket, at)  # of a finished one the store has the update still: it gives the same report
            actions.append(ticket.asked)
        else:
            del run.tickets[ticket.id]
            actions.append(do.Settle(event.store, ticket.id, None, member.aside or "the run ended"))
    return actions


def added(run: Run, store: str) -> None:
    """Where not all may be there; else it is simply there when it joins."""
    member = run.members.setdefault(store, Member(store, asked=run.policy.max_active_stores is None))
    member.aside = ""


def left(run: Run, store: str, reason: str, *, for_good: bool = False) -> list[do.Action]:
    """A store is gone, `for_good` by its operator: its work that is not at the head yet is over.

    But what it has finished it keeps on its disk: handed over when it is back, late; meanwhile nobody waits for it.
    """
    member = run.members.get(store)
    if member is None:
        return []
    member.returning = member.coming_until = -math.inf
    member.asked_at = run.now
    if for_good and run.policy.max_active_stores is not None:
        member.aside = reason
    finished = [t for t in run.tickets.values() if t.store == store and t.phase in (Phase.TRAINED, Phase.COLLECTING)]
    over = [action for ticket in finished if for_good for action in lost(run, ticket, reason)]
    if not member.present:
        return over
    member.present, member.paused_at = False, None
    run.cohort = [s for s in run.cohort if s != store]
    ending.heard(run, run.version, store)
    actions: list[do.Action] = [do.Record("store_left", {"store": store, "reason": reason}), *over]
    for ticket in [] if for_good else finished:
        ticket.phase, ticket.due_at, ticket.again = Phase.TRAINED, min(ticket.due_at, run.now), True
    for ticket in [t for t in run.tickets.values() if t.store == store and t.phase < Phase.TRAINED]:
        del run.tickets[ticket.id]
        actions.append(do.Settle(store, ticket.id, None, reason))
    return actions


def lost(run: Run, ticket: Ticket, reason: str) -> list[do.Action]:
    """Finished work that will not come, not without a word."""
    del run.tickets[ticket.id]
    why = f"{reason}, before its update was handed over"
    body = {"store": ticket.store, "ticket": ticket.id, "reason": why}
    return [do.Record("update_rejected", body), do.Settle(ticket.store, ticket.id, None, reason)]


def restart(run: Run, store: str, reason: str, at: float) -> list[do.Action]:
    """End its process and start it anew; a failure of its own."""
    if not run.members[store].present:
        return []
    run.members[store].restarting = True
    blamed = blame(run, store, reason, at)
    return [*left(run, store, reason), do.Restart(store, reason), *blamed]


def blame(run: Run, store: str, reason: str, at: float) -> list[do.Action]:
    """Count a failure; back off, or set the store aside."""
    member = run.members[store]
    member.failures += 1
    member.retry_at = at + run.policy.backoff_s * 2 ** min(member.failures - 1, 16)
    if member.failures < run.policy.max_failures:
        return []
    member.aside = reason
    run.cohort = [s for s in run.cohort if s != store]
    return [do.Record("store_set_aside", {"store": store, "reason": reason, "failures": member.failures})]


def paused(run: Run, store: str, reason: str, at: float) -> list[do.Action]:
    """Its training stands still, for who owns its machine."""
    member = run.members.get(store)
    if member is None or not member.present or member.paused_at is not None:
        return []
    member.paused_at = at
    for ticket in run.tickets.values():
        if ticket.store == store and ticket.phase is Phase.TRAINING:
            ticket.again = True  # how long it took tells nothing
    return [do.Record("store_paused", {"store": store, "reason": reason})]


def went_on(run: Run, store: str, at: float) -> list[do.Action]:
    """It trains again; the pause was not its fault."""
    member = run.members.get(store)
    if member is None or member.paused_at is None:
        return []
    seconds, member.paused_at = at - member.paused_at, None
    for ticket in run.tickets.values():
        if ticket.store == store and ticket.phase is Phase.TRAINING:
            ticket.hung_at += seconds
            ticket.idle_s += seconds
    return [do.Record("store_went_on", {"store": store, "seconds": seconds})]


def resumed(run: Run, event: ev.Resumed, at: float) -> list[do.Action]:
    """Everything in flight is asked for again when its store is back; the open sum begins anew."""
    run.epoch, until = event.epoch, at + event.grace_s
    for member in run.members.values():
        member.returning = until if member.present else -math.inf
        member.present = member.restarting = False
        member.paused_at = None
    done = {c.ticket for made in run.unkept.values() for c in made}
    for ticket in run.tickets.values():
        if ticket.id not in done:
            ticket.phase, ticket.hung_at = Phase.WAITING, until
    run.created_at = run.created_at if run.started_at is not None else at
    run.publishing, run.awaited = None, None
    run.central_busy, run.empty_since = False, None
    if run.policy.max_active_stores is None:  # all are
        for member in run.members.values():
            member.asked = True
        return []
    asked = [member for member in run.members.values() if member.asked]
    for member in asked:
        member.asked_at = at
    return [do.Ask(member.id) for member in asked]


def rotate(run: Run, at: float) -> list[do.Action]:
    """Release who is not needed, ask for who is next; see rotation.py."""
    if run.ending is not None:
        return []
    actions: list[do.Action] = []
    busy = {t.store for t in run.tickets.values() if not run.away(t)}
    busy |= {s for s in run.cohort if (m := run.members[s]).present and not rotation.turn_over(m, run.policy)}
    lacking = len(run.waiting()) - rotation.room(run.members.values(), run.policy)
    for member in [m for m in run.members.values() if m.asked and m.id not in busy]:
        if reason := rotation.why_release(member, run.policy, at, crowded=lacking > 0):
            lacking -= 1
            actions += _let_go(run, member, reason, at)
    room = rotation.room(run.members.values(), run.policy)
    if room < 1 or not (able := run.waiting()):
        return actions
    awaited = run.policy.max_active_stores is not None and not run.policy.tick
    for member in rotation.in_turn(able, run.chance(run.version))[: int(min(room, len(able)))]:
        member.asked, member.asked_at, member.turns = True, at, 0
        member.coming_until = at + run.policy.join_s if awaited else -math.inf
        actions += [do.Ask(member.id), do.Record("store_asked", {"store": member.id})]
    return actions


def _let_go(run: Run, member: Member, reason: str, at: float) -> list[do.Action]:
    member.missed = not member.present and not member.aside and member.closed_until <= at
    member.asked = member.present = member.restarting = False
    member.released_at, member.paused_at = at, None
    member.returning = member.coming_until = -math.inf
    run.cohort = [s for s in run.cohort if s != member.id]
    ending.heard(run, run.version, member.id)
    return [do.Release(member.id), do.Record("store_released", {"store": member.id, "reason": reason})]


def _ask_again(run: Run, ticket: Ticket, at: float) -> None:
    """It is asked for again: it has as long as it had at first, and the store's start."""
    due = ticket.due_at - ticket.issued_at
    patience = due if math.isfinite(due) else patience_s(run.members[ticket.store], known_s(run))
    ticket.phase, ticket.issued_at, ticket.idle_s, ticket.again = Phase.TRAINING, at, 0.0, True
    ticket.due_at, ticket.hung_at = at + due, at + patience + run.policy.hung_s + WARM_UP_S


def known_s(run: Run) -> tuple[float, float] | None:
    """Of the stores' newest tickets, from issue to arrival: the longest, and the longest for an image of the store."""
    known = [(m.last_s, m.last_s / max(1, m.num_train)) for m in run.members.values() if m.last_s is not None]
    return (max(seconds for seconds, _ in known), max(each for _, each in known)) if known else None


def patience_s(member: Member, known: tuple[float, float] | None) -> float:
    """How long a ticket without a due time may take: by the store's newest one, else by what the others' took.

    Without either, FIRST_S. Each failure doubles a first ticket's, so that a store that is only slow comes through.
    """
    if member.last_s is not None:
        return 10 * member.last_s
    if known is None:
        return FIRST_S
    longest, for_an_image = known
    likely = SLOWER * max(longest, for_an_image * member.num_train)  # its work may grow with its images, or not
    patience = max(SHORTEST_S, min(likely, max(FIRST_S, SLOWER * longest)))
    return patience * 2.0 ** min(member.failures, 16)


def see_who_hangs(run: Run) -> None:
    """Of first tickets that were given out before any store's speed was known: by now it may be."""
    training = [t for t in run.training() if math.isinf(t.due_at)]
    first = [(t, member) for t in training if (member := run.members[t.store]).last_s is None]
    known = known_s(run) if first else None
    for ticket, member in first:
        since = ticket.issued_at + ticket.idle_s + run.policy.hung_s + WARM_UP_S
        ticket.hung_at = since + patience_s(member, known)
