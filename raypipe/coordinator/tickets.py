"""A ticket's way from its issue to the update's arrival, or to its failure."""

from __future__ import annotations

import math

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator import stores
from raypipe.coordinator.policy import TRAINS
from raypipe.coordinator.run import AWAITED, Run
from raypipe.coordinator.state import Member, Phase, Ticket
from raypipe.coordinator.stores import WARM_UP_S

AHEAD = 3  # updates at the head before their turn in store order


def train(run: Run, at: float) -> list[do.Action]:
    """Give out work to all who may have it."""
    if run.ending is not None or run.publishing is not None or not _started(run, at):
        return []
    if run.due():  # a version is about to be made: a ticket now would be one behind
        return []
    if run.policy.settle_first and run.unkept:
        return []
    actions: list[do.Action] = []
    for store in _candidates(run):
        if run.policy.concurrency is not None and run.slots_taken() >= run.policy.concurrency:
            break
        actions.append(_issue(run, run.members[store], at))
    return actions


def _started(run: Run, at: float) -> bool:
    if run.started_at is None and sum(m.present for m in run.members.values()) >= run.policy.quorum:
        run.started_at = at
    return run.started_at is not None


def _candidates(run: Run) -> list[str]:
    """Stores to be given a ticket now: the longest work first; on arrival, the longest idle first."""
    free = run.free()
    if run.policy.refill == "on_arrival":
        return sorted((s for s in free if not run.sated(s)), key=lambda s: run.members[s].last_issued_at)
    nothing_open = not run.in_sum() and not run.expected()
    if run.picked != run.version or nothing_open:
        run.picked, size = run.version, run.policy.cohort
        able = sorted({*free, *run.returning()})
        chance = run.chance(run.version)
        run.cohort = able if size is None or size >= len(able) else sorted(chance.sample(able, size))
    ready = sorted(s for s in run.cohort if s in free)
    if run.policy.in_order:  # so that each is folded while the next ones train
        return ready
    return sorted(ready, key=lambda s: -(run.members[s].last_s or 0.0))


def _issue(run: Run, member: Member, at: float) -> do.Train:
    policy = run.policy
    run.issued += 1
    budget, steps = run.budget_s, None
    if budget is None and policy.deadline_s is not None:  # what the store can do in time, by its own measure
        budget = max(0.2 * policy.deadline_s, policy.deadline_s - 1.5 * member.overhead_s)
        steps = None if member.speed is None else max(1, int(member.speed * budget))
    if policy.max_seconds is not None and run.started_at is not None and budget is not None:
        budget = max(0.1 * budget, min(budget, run.started_at + policy.max_seconds - at))
    due = policy.deadline_s if policy.deadline_s is not None else math.inf
    if policy.deadline_s is None and policy.tick and budget is not None:  # elsewhere a version waits for its cohort
        moves = budget / TRAINS if policy.budget_s is None else 0.0  # where it is set by them
        due = 1.25 * budget + moves + 0.5
    warm_up = 0.0 if member.warm else WARM_UP_S
    patience = due if math.isfinite(due) else stores.patience_s(member, stores.known_s(run))
    progress = run.progress(at)
    judged = run.scores.judged.get(run.version, {})
    evaluate = run.version % policy.evaluate_every == 0 and member.id not in judged
    base, times = member.handed_over
    repeat = times if base == run.version else 0
    name = f"{run.version}.{run.epoch}-{run.issued}.{member.id}"
    train = do.Train(name, member.id, run.version, (progress, progress), budget, steps, evaluate, repeat)
    hung_at = at + patience + policy.hung_s + warm_up
    run.tickets[name] = Ticket(name, member.id, run.version, train, at, at + due, hung_at)
    run.cohort = [s for s in run.cohort if s != member.id]
    member.issued, member.last_issued_at = member.issued + 1, at
    return train


def trained(run: Run, event: ev.Trained) -> list[do.Action]:
    """Its report; the update waits at the store."""
    ticket = run.tickets.get(event.ticket)
    if ticket is None or ticket.phase is not Phase.TRAINING:
        return []
    ticket.phase, ticket.trained_at = Phase.TRAINED, event.at
    ticket.steps, ticket.examples, ticket.num_train = event.steps, event.examples, event.num_train
    ticket.seconds, ticket.loss, ticket.after = event.seconds, event.loss, event.after
    ticket.data_hash = event.data_hash
    ticket.num_bytes = event.update_bytes
    member = run.members[ticket.store]
    if event.seconds > 0:
        member.speed = event.steps / event.seconds
    if event.skipped <= member.skipped:
        return []
    member.skipped = event.skipped  # it may find more of them with each ticket: said as they become more
    body = {"store": ticket.store, "skipped": event.skipped, "of": event.num_train}
    return [do.Record("images_skipped", body)]


def collect(run: Run, at: float) -> list[do.Action]:
    """Have updates handed over: at once; where they are folded in store order, a few ahead of their turn, so that
    the head never holds more than a few, however many stores there are."""
    here = [t for t in run.tickets.values() if t.phase is Phase.TRAINED and not run.away(t)]
    waiting = sorted(here, key=lambda t: t.store)
    if run.policy.in_order:
        held = sum(Phase.COLLECTING <= t.phase <= Phase.FOLDING for t in run.tickets.values())
        first = min(run.expected(), default="")
        waiting = [t for t in waiting if t.store == first or t in waiting[: max(0, AHEAD - held)]]
    for ticket in waiting:
        ticket.phase, rate = Phase.COLLECTING, run.members[ticket.store].max_upload_bytes_s
        ticket.idle_s += max(0.0, at - ticket.trained_at)
        slowly_s = 2 * ticket.num_bytes / rate if rate else 0.0  # twice: the update before may be on its way
        ticket.hung_at = max(ticket.hung_at, at + run.policy.hung_s + slowly_s)
    return [do.Collect(t.id, t.store) for t in waiting]


def arrived(run: Run, event: ev.UpdateArrived) -> None:
    """Its update is in the coordinator's memory."""
    ticket = run.tickets.get(event.ticket)
    if ticket is None or ticket.phase not in (Phase.TRAINED, Phase.COLLECTING):  # `TRAINED`: just before it was cut off
        return
    ticket.phase, ticket.num_bytes = Phase.ARRIVED, event.num_bytes
    ticket.digest, ticket.signature = event.digest, event.signature
    member = run.members[ticket.store]
    member.warm = True
    member.turns += 1
    if not ticket.again:
        member.last_s = event.at - ticket.issued_at - ticket.idle_s
        member.overhead_s = max(0.0, member.last_s - ticket.seconds)
    base, times = member.handed_over
    if not ticket.arrived and ticket.base >= base:  # else a second time, or what its store held back while it was away
        done = max(times if base == ticket.base else 0, ticket.asked.repeat)  # what was before may have been lost
        member.handed_over = (ticket.base, done + 1)
    ticket.arrived = True


def failed(run: Run, event: ev.TrainingFailed, at: float) -> list[do.Action]:
    """It came to nothing."""
    ticket = run.tickets.get(event.ticket)
    if ticket is None or ticket.phase not in AWAITED:  # cut off as it handed over: its store has the update still
        return []
    del run.tickets[event.ticket]
    note = do.Record("ticket_failed", {"store": ticket.store, "ticket": ticket.id, "reason": event.reason})
    if event.final:
        run.members[ticket.store].failures = run.policy.max_failures - 1
    return [note, *_try_again(run, ticket, event.reason, at)]


def deferred(run: Run, event: ev.Deferred) -> list[do.Action]:
    """Nobody's fault: no failure is counted, and the store is in no cohort until it opens."""
    ticket = run.tickets.get(event.ticket)
    if ticket is None or ticket.phase > Phase.COLLECTING:
        return []
    del run.tickets[event.ticket]
    run.members[ticket.store].closed_until = event.at + event.wait_s
    run.cohort = [s for s in run.cohort if s != ticket.store]
    body = {"store": ticket.store, "ticket": ticket.id, "reason": event.reason, "wait_s": event.wait_s}
    return [do.Record("store_closed", body), do.Settle(ticket.store, ticket.id, None, event.reason)]


def _try_again(run: Run, ticket: Ticket, reason: str, at: float) -> list[do.Action]:
    """Blame the store; where a version waits for its cohort, it stays in it until it is set aside."""
    actions = stores.blame(run, ticket.store, reason, at)
    cohort_waits = run.policy.refill == "on_publish" and not run.policy.tick
    aside = run.members[ticket.store].aside
    if cohort_waits and ticket.base == run.version and not aside and ticket.store not in run.cohort:
        run.cohort.append(ticket.store)
    return actions


def refused(run: Run, event: ev.UpdateRefused) -> list[do.Action]:
    """What was handed over is not what its store signed, or not an update."""
    ticket = run.tickets.get(event.ticket)
    if ticket is None or ticket.phase is not Phase.COLLECTING:
        return []
    ticket.digest = event.digest
    return reject(run, ticket, event.reason, event.at)


def reject(run: Run, ticket: Ticket, reason: str, at: float) -> list[do.Action]:
    """Its update is not folded, and its store is told."""
    del run.tickets[ticket.id]
    body = {"store": ticket.store, "ticket": ticket.id, "reason": reason, "digest": ticket.digest}
    told: list[do.Action] = [
        do.Record("update_rejected", body),
        do.Settle(ticket.store, ticket.id, None, reason),
    ]
    return told + _try_again(run, ticket, reason, at)


def expire(run: Run, at: float) -> list[do.Action]:
    """Restart stores that are long past their due time."""
    actions: list[do.Action] = []
    stores.see_who_hangs(run)
    for ticket in [t for t in run.tickets.values() if t.phase in AWAITED]:
        paused_at = run.members[ticket.store].paused_at if ticket.phase is Phase.TRAINING else None
        if paused_at is not None and paused_at + run.policy.hung_s <= at:
            ticket.due_at = min(ticket.due_at, at)  # nobody waits for it any more
        if paused_at is not None or ticket.hung_at > at:
            continue
        if ticket.phase is Phase.WAITING:
            del run.tickets[ticket.id]
            body = {"store": ticket.store, "ticket": ticket.id, "reason": "its store did not come back"}
            actions.append(do.Record("ticket_failed", body))
            continue
        waited = at - ticket.issued_at
        actions += stores.restart(run, ticket.store, f"no result after {waited:.0f} s; restarted", at)
    return actions
