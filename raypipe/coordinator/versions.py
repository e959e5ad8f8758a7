"""Updates are weighed and folded; versions are made, kept, and withdrawn when their weights are lost."""

from __future__ import annotations

import math

from raypipe.coordinator import actions as do
from raypipe.coordinator import ending, tickets
from raypipe.coordinator import events as ev
from raypipe.coordinator.run import STOPPED_S, Run
from raypipe.coordinator.state import Phase, Ticket
from raypipe.errors import ConfigError
from raypipe.tasks.class_list import Change


def fold(run: Run) -> list[do.Action]:
    """Portions for the updates that arrived: at once, or the prefix in store order where bits must repeat."""
    if run.ending is not None:
        return []
    arrived = sorted((t for t in run.tickets.values() if t.phase is Phase.ARRIVED), key=lambda t: t.store)
    if run.due():  # the sum is complete: the rest belongs to the next version
        return []
    if run.policy.in_order:
        first_missing = min(run.expected(with_arrived=False), default="￿")
        arrived = [t for t in arrived if t.store < first_missing]
    actions: list[do.Action] = []
    portions = []
    for ticket in arrived:
        if _weigh(run, ticket):
            ticket.phase = Phase.FOLDING
            steps = ticket.steps if run.policy.weigh == "steps" else None
            known = (ticket.id, ticket.store, ticket.weight, steps, ticket.worth, ticket.base)
            portions.append(do.Portion(*known))
        else:
            del run.tickets[ticket.id]
            reason = f"trained on version {ticket.base}, {ticket.staleness} versions ago"
            body = {"store": ticket.store, "ticket": ticket.id, "reason": reason, "digest": ticket.digest}
            actions += [do.Record("update_rejected", body), do.Settle(ticket.store, ticket.id, None, reason)]
    return [*actions, do.Fold(tuple(portions))] if portions else actions


def _weigh(run: Run, ticket: Ticket) -> bool:
    """Set the ticket's staleness and weight; False when it is too stale and policy drops it."""
    policy = run.policy
    newest = run.version + (run.publishing is not None)
    ticket.staleness = newest - ticket.base
    trust = policy.weigh_staleness(ticket.staleness)
    there = sum(m.present or m.returning > run.now for m in run.members.values())
    in_flight = min(policy.concurrency or there, there)
    limit = policy.stale_limit * max(1.0, in_flight / (policy.buffer_size or max(1, in_flight)))
    if ticket.staleness > limit:
        if policy.stale_action == "drop":
            return False
        trust = policy.floor_weight
    worth = 1.0 if policy.weigh == "equal" else float(max(1, ticket.num_train))
    ticket.worth, ticket.weight = worth, worth * max(trust, policy.floor_weight)
    return ticket.weight > 0


def folded(run: Run, event: ev.Folded) -> list[do.Action]:
    """What was folded is in the open sum; what could not be folded is rejected."""
    actions: list[do.Action] = []
    for ticket_id, reason in event.rejected:
        if (ticket := run.tickets.get(ticket_id)) is not None:
            actions += tickets.reject(run, ticket, reason, event.at)
    for ticket_id in event.tickets:
        ticket = run.tickets.get(ticket_id)
        if ticket is not None and ticket.phase is Phase.FOLDING:
            run.places += 1
            ticket.phase, ticket.place = Phase.FOLDED, run.places
            run.members[ticket.store].failures = 0
    return actions


def publish(run: Run) -> list[do.Action]:
    """Make a version of the open sum when it is due."""
    summed = run.in_sum()
    if not run.due() or any(t.phase is Phase.FOLDING for t in summed):
        return []
    summed.sort(key=lambda t: t.place)
    total = math.fsum(t.weight for t in summed)
    there = max(1, sum(m.counts(run.now) for m in run.members.values()))
    contributions = tuple(_contribution(t, total) for t in summed)
    stores = len({t.store for t in summed})
    full, mix, version = math.fsum(t.worth for t in summed), min(1.0, stores / there), run.version + 1
    run.publishing = do.Publish(version, contributions, full, mix, run.changes.get(version))
    for ticket in summed:
        ticket.phase = Phase.PUBLISHED
    return [run.publishing]


def published(run: Run, event: ev.Published) -> list[do.Action]:
    """It is announced; its weights go to the disk while stores train on it."""
    if run.publishing is None or event.version != run.publishing.version:
        return []
    run.unkept[event.version] = run.publishing.contributions
    if run.publishing.change is not None:
        run.scores.begin_anew(event.version)
    run.publishing, run.version = None, event.version
    return [do.Keep(event.version), *ending.judge_centrally(run), *ending.close_scores(run)]


def withdrawn(run: Run, version: int, reason: str) -> list[do.Action]:
    """The newest version's weights are lost: it is made again, of what still can be had."""
    gone = [t for t in run.tickets.values() if t.base >= version]
    run.version, run.picked, run.cohort, run.finished = version - 1, None, [], False
    if run.closing_s != STOPPED_S:  # why it was to end may hold no more
        run.ending = None
    for ticket in gone:
        del run.tickets[ticket.id]
    for contribution in run.unkept.pop(version, ()):
        ticket = run.tickets[contribution.ticket]
        ticket.phase, ticket.hung_at = Phase.WAITING, math.inf  # `Resumed`, which follows, says for how long
    for member in run.members.values():  # its work on the version before counts again: none is done twice
        made = [t for t in run.tickets.values() if t.store == member.id and t.base == run.version and t.arrived]
        member.handed_over = (run.version, max((t.asked.repeat + 1 for t in made), default=0))
    run.scores.withdraw(version)
    return [do.Settle(t.store, t.id, None, reason) for t in gone]


def kept(run: Run, version: int) -> list[do.Action]:
    """Its weights are on the disk: its updates are settled."""
    contributions = run.unkept.pop(version, ())
    for contribution in contributions:
        run.tickets.pop(contribution.ticket, None)
    return [do.Settle(c.store, c.ticket, version) for c in contributions]


def classes_asked(run: Run, change: Change, wanted: int | None) -> list[do.Action]:
    """Another class list, from a version on. Whoever asked was told what can be: this may be later by a version."""
    try:
        version = run.place(change, wanted)
    except ConfigError as error:
        return [do.Record("classes_refused", {"reason": error.message})]
    run.changes[version] = change
    return [do.Record("classes_planned", {"version": version, "change": change.line})]


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
        worth=ticket.worth,
    )
