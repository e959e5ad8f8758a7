"""What must hold in a random history, by what its world knows by itself; see chaos_world.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chaos_reader import journal

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.state import Phase

if TYPE_CHECKING:
    from chaos_world import World


def back(world: World, versions: list[int]) -> None:
    """When it begins or is back; the versions by the record."""
    newest = world.machine.version
    assert versions == list(range(newest + 1)), "the machine and the record differ"
    assert world.disk.intact(newest), f"it goes on from version {newest}, whose weights are lost"


def patient(event: ev.Event, actions: list[do.Action]) -> None:
    """As it comes back, nobody can be too late yet: what fell out of a lost version waits for its store again."""
    late = [a.body["ticket"] for a in actions if isinstance(a, do.Record) and a.kind == "ticket_failed"]
    assert not late or not isinstance(event, ev.Withdrawn | ev.Resumed), f"given up as it came back: {late}"


def train(world: World, action: do.Train) -> None:
    """Of a ticket that is given out, or asked for again."""
    m = world.machine
    assert m.members[action.store].present, f"{action.store} is asked and is not there"
    assert not m.members[action.store].aside, f"{action.store} is asked and is set aside"
    assert action.ticket in m.tickets, f"{action.ticket}: asked for in the step that settles it"
    again = world.asked.setdefault(action.ticket, action)
    assert again == action, f"two tickets are named {action.ticket}"
    assert action.ticket not in world.made, f"{action.ticket}: asked for what is in a version already"
    if m.tickets[action.ticket].again:
        return
    assert action.version == m.version, f"{action.ticket}: trains on a version that is not the newest"
    assert m.publishing is None, f"{action.ticket}: given out while a version is made"
    before = [t for t in (*world.made, *world.open_sum) if _work(world, t) == _work(world, action.ticket)]
    assert not before or world.disk.power_cuts, f"{action.ticket}: the same work as {before}"


def _work(world: World, ticket: str) -> tuple[str, int, int]:
    asked = world.asked[ticket]
    return asked.store, asked.version, asked.repeat


def portion(world: World, portion: do.Portion) -> None:
    """Its weight, computed again from the versions that this world has seen."""
    policy, report = world.policy, world.network.reports[portion.ticket]
    late = world.newest - world.asked[portion.ticket].version
    worth = 1.0 if policy.weigh == "equal" else float(report.num_train)
    full = worth * max(policy.weigh_staleness(late), policy.floor_weight)
    floor = worth * policy.floor_weight
    if late <= policy.stale_limit:
        right = [full]
    elif late > policy.stale_limit * max(1, len(world.names)):
        right = [floor] if policy.stale_action == "floor" else []
    else:
        right = [full, floor] if policy.stale_action == "floor" else [full]
    found = [value for value in right if math.isclose(portion.weight, value)]
    assert found, f"{portion.ticket}: weight {portion.weight}, {late} versions late; right would be {right}"
    assert portion.steps == (report.steps if policy.weigh == "steps" else None)


def publish(world: World, action: do.Publish) -> None:
    """The version says what its sum holds, no more and no less, each update once and as it was."""
    assert action.version == world.recorded + 1, f"version {action.version} after {world.recorded}"
    names = [c.ticket for c in action.contributions]
    assert names == world.open_sum, f"version {action.version} says {names}, its sum holds {world.open_sum}"
    twice = [name for name in names if name in world.made]
    assert not twice, f"in two versions: {twice}"
    total = sum(world.weights[name].weight for name in names)
    for c in action.contributions:
        report, asked = world.network.reports[c.ticket], world.asked[c.ticket]
        assert math.isclose(c.weight, world.weights[c.ticket].weight)
        assert math.isclose(c.share, c.weight / total), f"{c.ticket}: share {c.share} of weight {c.weight}/{total}"
        late = world.newest - 1 - asked.version
        assert c.staleness == late, f"{c.ticket}: staleness {c.staleness}, it is {late}"
        assert (c.store, c.base) == (asked.store, asked.version)
        assert (c.steps, c.examples, c.loss) == (report.steps, report.examples, report.loss)
    policy = world.policy
    timeless = policy.deadline_s is None and not policy.tick  # nobody is late
    if policy.in_order and policy.buffer_size is None and timeless and not world.downs:
        assert _sorted(world, names), f"version {action.version} is not in store order: {names}"


def _sorted(world: World, names: list[str]) -> bool:
    mine = [world.asked[n].store for n in names if world.asked[n].version == world.newest - 1]
    healthy = [s for s in mine if world.shops[s].healthy and s not in world.paused]  # who pauses long is late
    return healthy == sorted(healthy)


def settled(world: World, action: do.Settle, said: int | None) -> None:
    """A store is told the truth, and the same each time; then the ticket is over."""
    ticket = action.ticket
    assert ticket not in world.machine.tickets, f"{ticket}: settled, and the coordinator goes on with it"
    if said is not None:
        assert said == world.made.get(ticket), f"{ticket}: told of version {said}, which lacks it"
        assert said in world.disk.kept, f"{ticket}: settled before its version was kept"
    before = world.told.setdefault(ticket, said)
    changed = (before is None and world.disk.power_cuts > 0) or ticket in world.forgotten
    assert before == said or changed, f"{ticket}: its store is told {before}, then {said}"


def step(world: World) -> None:
    """After each event."""
    m = world.machine
    training = [t for t in m.tickets.values() if t.phase is Phase.TRAINING]
    assert all(m.members[t.store].present for t in training), "in training at a store that is not there"
    most = m.policy.max_active_stores
    there = [shop.name for shop in world.shops.values() if shop.here or shop.linked]
    assert most is None or len(there) <= most, f"{there} are there, {most} may be"
    assert most is None or sum(member.asked for member in m.members.values()) <= most, "more are asked for than may be"
    if world.downs:
        return
    assert len({t.store for t in training}) == len(training), "two tickets in training at one store"
    in_time = [t for t in training if t.due_at > world.at]
    assert m.policy.concurrency is None or len(in_time) <= m.policy.concurrency, "more than its slots"


def over(world: World) -> None:
    """At the end: all is kept, and whoever is there was told of each version that holds its update."""
    m = world.machine
    assert m.ending is not None
    assert m.publishing is None
    assert not m.tickets, f"left over at the end: {sorted(m.tickets)}"
    assert not m.unkept, "the end came before the last weights were kept"
    _, _, versions = world.disk.past()
    assert m.version == max(versions)
    for ticket, version in world.made.items():
        there = m.members[world.asked[ticket].store].present
        assert not there or world.told.get(ticket) == version, f"{ticket}: its store never heard of {version}"
    _judged_well(world)
    record = journal(world.disk.folder)
    unheard = set(m.scores.scored) - set(record.evaluated)
    assert not unheard, f"versions {sorted(unheard)} were judged, and no record says so"
    for ticket in world.made:
        store, skipped = world.asked[ticket].store, world.network.reports[ticket].skipped
        said = record.skipped.get(store, 0)
        assert skipped <= said, f"{store} left {skipped} images out of {ticket}; by the record: {said}"


def _judged_well(world: World) -> None:
    """Which version is the best, and whether that was good enough to end: by the policy's own sense of better."""
    scores, policy = world.machine.scores, world.policy
    if scores.scored:
        newest = [score for v, score in scores.scored.items() if v >= scores.since]  # of the newest class list
        right = (min if policy.lower_is_better else max)(newest or list(scores.scored.values()))
        assert scores.best is not None
        assert scores.best[1] == right, f"the best score is said to be {scores.best}, it is {right}"
    reason = "" if world.machine.ending is None else world.machine.ending[0]
    if " reached " in reason:
        assert scores.best is not None
        assert policy.target is not None
        far = scores.best[1] - policy.target
        assert far == 0 or (far < 0) == policy.lower_is_better, f"it ended as {reason}, with {scores.best}"
