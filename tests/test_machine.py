"""The machine: scripted histories as sentences. Random ones under every policy: see test_chaos.py."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.board import Board
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.explain import expected_versions, pace_in_words
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.policy import FIRST_BUDGET_S, Policy, pace
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.state import KEPT, Phase, Scores
from raypipe.coordinator.stores import FIRST_S, SHORTEST_S, WARM_UP_S


def machine(policy: Policy, stores: int = 3) -> Coordinator:
    names = [f"s{i}" for i in range(stores)]
    return Coordinator(policy, names, metric="accuracy", chance=random.Random, start_at=0.0)


def join_all(m: Coordinator, at: float = 0.0) -> list[do.Action]:
    return [a for store in list(m.members) for a in m.handle(ev.StoreJoined(store, 100, at))]


def trained(ticket: str, at: float, *, steps: int = 10, num_train: int = 100) -> ev.Trained:
    return ev.Trained(ticket, steps, steps * 32, num_train, seconds=1.0, loss=1.0, at=at)


def of(kind: type[Any], actions: list[do.Action]) -> list[Any]:
    return [a for a in actions if isinstance(a, kind)]


def told(m: Coordinator, diary: Diary, event: ev.Event) -> list[do.Action]:
    """What it decides, noted before anything is done."""
    actions = m.handle(event)
    diary.note(event, actions)
    return actions


def deliver(m: Coordinator, ticket: str, at: float, **report: int) -> list[do.Action]:
    """Training, handing over and folding of one ticket, with nothing going wrong."""
    actions = m.handle(trained(ticket, at, **report))
    actions += m.handle(ev.UpdateArrived(ticket, 400, at))
    portions = [p.ticket for fold in of(do.Fold, actions) for p in fold.portions]
    return actions + (m.handle(ev.Folded(tuple(portions), (), at)) if portions else [])


def test_nobody_trains_before_the_quorum_is_there() -> None:
    m = machine(Policy(refill="on_publish", quorum=2, max_versions=1))
    assert m.handle(ev.StoreJoined("s0", 100, 0.0)) == []
    assert [a.store for a in of(do.Train, m.handle(ev.StoreJoined("s1", 100, 1.0)))] == ["s0", "s1"]


def test_a_run_without_quorum_ends_and_says_so() -> None:
    m = machine(Policy(refill="on_publish", quorum=2, join_s=5.0, max_versions=1))
    m.handle(ev.StoreJoined("s0", 100, 0.0))
    assert m.wake_at() == 5.0
    reason = "no quorum after 5 s: 1 of 3 stores are there, 2 have to be; missing: s1, s2"
    assert m.handle(ev.Tick(5.0))[-1] == do.Finish(reason, 0, failed=True)
    m = machine(Policy(refill="on_publish", quorum=9, join_s=5.0, max_versions=1), 9)
    m.handle(ev.StoreJoined("s3", 100, 0.0))
    (finish,) = of(do.Finish, m.handle(ev.Tick(5.0)))
    assert finish.reason.endswith("missing: s0, s1, s2, s4, s5 and 3 more")


def lost(actions: list[do.Action]) -> list[str]:
    """Finished work that is over by the record."""
    return [a.body["ticket"] for a in of(do.Record, actions) if a.kind == "update_rejected"]


@pytest.mark.parametrize("gone", [ev.StoreLeft, ev.StoreHung])
@pytest.mark.parametrize("name", ["fedbuff", "wait_for_all", "paced"])
def test_a_store_cut_off_as_it_hands_over_does_so_when_it_is_back_and_nobody_waits_for_it(gone: Any, name: Any) -> None:
    m = machine(pace(name, 2, {"max_versions": 5}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    assert of(do.Collect, m.handle(trained(tickets["s1"], 1.0))) == [do.Collect(tickets["s1"], "s1")]
    away = m.handle(gone("s1", "no heartbeat", 2.0))
    assert lost(away) == []
    assert of(do.Settle, away) == []
    m.handle(ev.TrainingFailed(tickets["s1"], "its node is gone", 2.1))  # what the transfer came to
    others = [*deliver(m, tickets["s0"], 3.0), *m.handle(ev.Tick(9.0))]
    assert of(do.Publish, others), "the others go on"
    *_, next_one = of(do.Train, [*others, *m.handle(ev.Published(1, 9.1))])
    back = m.handle(ev.StoreJoined("s1", 100, 10.0, (tickets["s1"],)))
    assert of(do.Collect, back) == [do.Collect(tickets["s1"], "s1")]
    assert of(do.Settle, back) == []
    came = [*m.handle(ev.UpdateArrived(tickets["s1"], 400, 11.0)), *deliver(m, next_one.ticket, 12.0)]
    portions = [portion for fold in of(do.Fold, came) for portion in fold.portions]
    assert tickets["s1"] in [portion.ticket for portion in portions]
    came += [*m.handle(ev.Folded(tuple(p.ticket for p in portions), (), 12.0)), *m.handle(ev.Tick(30.0))]
    (publish,) = of(do.Publish, came)
    assert {c.ticket: c.staleness for c in publish.contributions}[tickets["s1"]] == 1


@pytest.mark.parametrize("gone", [ev.StoreLeft, ev.StoreHung])
@pytest.mark.parametrize("how", ["it is back without", "for good", "the end"])
def test_finished_work_of_a_store_that_is_gone_is_not_lost_without_a_word(gone: Any, how: str) -> None:
    m = machine(pace("fedbuff", 3, {"buffer_size": 2, "max_versions": 5}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(trained(tickets["s0"], 1.0))
    assert [lost(m.handle(gone(store, "its node is gone", 2.0))) for store in ("s0", "s1")] == [[], []]
    last: dict[str, ev.Event] = {
        "it is back without": ev.StoreJoined("s0", 100, 3.0),
        "for good": ev.StoreLeft("s0", "its operator took it out", 3.0, for_good=True),
        "the end": ev.StopAsked("by hand", 3.0),
    }
    over = m.handle(last[how])
    assert lost(over) == [tickets["s0"]], "work that was not finished has no update"
    assert [a.ticket for a in of(do.Settle, over) if a.store == "s0"] == [tickets["s0"]]


def test_an_update_that_comes_as_its_store_is_cut_off_is_taken() -> None:
    m = machine(pace("fedbuff", 3, {"buffer_size": 2, "max_versions": 5}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(trained(tickets["s0"], 1.0))
    m.handle(ev.StoreHung("s0", "no heartbeat", 2.0))
    (fold,) = of(do.Fold, m.handle(ev.UpdateArrived(tickets["s0"], 400, 2.1)))
    assert [portion.ticket for portion in fold.portions] == [tickets["s0"]]


def test_what_comes_late_does_not_have_a_store_do_the_same_work_twice() -> None:
    m = machine(pace("wait_for_all", 2, {"max_versions": 5, "backoff_s": 1.0}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(trained(tickets["s1"], 1.0))
    m.handle(ev.StoreLeft("s1", "its node is gone", 2.0))
    assert of(do.Publish, deliver(m, tickets["s0"], 3.0))
    m.handle(ev.StoreJoined("s1", 100, 4.0, (tickets["s1"],)))
    (new,) = [train for train in of(do.Train, m.handle(ev.Published(1, 5.0))) if train.store == "s1"]
    m.handle(trained(new.ticket, 6.0))
    m.handle(ev.UpdateArrived(new.ticket, 400, 6.0))
    m.handle(ev.UpdateArrived(tickets["s1"], 400, 6.1))
    m.tickets[new.ticket].phase = Phase.FOLDING
    m.handle(ev.Folded((), ((new.ticket, "not finite"),), 6.2))
    (again,) = of(do.Train, m.handle(ev.Tick(8.0)))
    assert (again.store, again.version, again.repeat) == ("s1", 1, 1), "and not the very work that was refused"


def test_an_update_that_cannot_be_handed_over_is_tried_as_often_as_a_store_may_fail() -> None:
    m = machine(pace("fedbuff", 2, {"buffer_size": 2, "max_versions": 5, "max_failures": 3}), 2)
    ticket = {a.store: a.ticket for a in of(do.Train, join_all(m))}["s0"]
    m.handle(trained(ticket, 1.0))
    for at in (2.0, 12.0):
        m.handle(ev.StoreHung("s0", "no heartbeat", at))
        again = m.handle(ev.StoreJoined("s0", 100, at + 1, (ticket,)))
        assert of(do.Collect, again) == [do.Collect(ticket, "s0")]
    m.handle(ev.StoreHung("s0", "no heartbeat", 22.0))
    again = m.handle(ev.StoreJoined("s0", 100, 23.0, (ticket,)))
    assert lost(again) == [ticket]
    assert of(do.Collect, again) == []


def test_a_store_whose_finished_work_waits_for_it_does_not_keep_a_place_from_others() -> None:
    policy = Policy(refill="on_arrival", buffer_size=2, max_active_stores=1, join_s=10.0, max_versions=9)
    m = machine(policy, 2)
    (asked,) = of(do.Ask, m.handle(ev.Tick(0.1)))
    (train,) = of(do.Train, m.handle(ev.StoreJoined(asked.store, 100, 0.2)))
    m.handle(trained(train.ticket, 1.0))
    m.handle(ev.StoreLeft(asked.store, "its node is gone", 2.0))
    assert [a.store for a in of(do.Release, m.handle(ev.Tick(13.0)))] == [asked.store]


def test_wait_for_all_folds_in_store_order_and_publishes_once() -> None:
    m = machine(pace("wait_for_all", 3, {"max_versions": 5}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    assert sorted(tickets) == ["s0", "s1", "s2"]
    folds = [of(do.Fold, deliver(m, tickets[s], 1.0)) for s in ("s2", "s1")]
    assert folds == [[], []], "s0 comes first in the sum"
    actions = deliver(m, tickets["s0"], 2.0)
    assert [p.store for f in of(do.Fold, actions) for p in f.portions] == ["s0", "s1", "s2"]
    (publish,) = of(do.Publish, actions)
    assert [c.store for c in publish.contributions] == ["s0", "s1", "s2"]
    assert sum(c.share for c in publish.contributions) == pytest.approx(1.0)


def test_a_version_is_durable_before_anyone_trains_on_it() -> None:
    m = machine(pace("fedbuff", 3, {"buffer_size": 1, "max_versions": 5}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    assert of(do.Train, deliver(m, tickets["s1"], 1.0)) == []
    after = m.handle(ev.Published(1, 1.1))
    assert [(a.store, a.version) for a in of(do.Train, after)] == [("s1", 1)]


def test_an_update_is_settled_when_the_weights_with_it_are_on_the_disk_and_the_run_waits_for_that() -> None:
    m = machine(pace("wait_for_all", 1, {"max_versions": 1}), 1)
    (ticket,) = of(do.Train, join_all(m))
    deliver(m, ticket.ticket, 1.0)
    assert of(do.Settle, m.handle(ev.Published(1, 1.0))) == []
    m.handle(ev.Evaluated(1, "s0", {"accuracy": 0.5}, 10, 2.0))
    m.handle(ev.Tick(1000.0))
    assert not m.finished
    assert m.handle(ev.Kept(1, 1001.0))[0] == do.Settle("s0", ticket.ticket, 1)
    assert m.finished


def test_a_late_update_weighs_less() -> None:
    policy = pace("fedbuff", 2, {"buffer_size": 1, "max_versions": 9, "weigh_staleness": lambda s: (1 + s) ** -0.5})
    m = machine(policy, 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    for version in (1, 2, 3):
        deliver(m, tickets["s0"], float(version))
        tickets["s0"] = of(do.Train, m.handle(ev.Published(version, float(version))))[0].ticket
    (fold,) = of(do.Fold, deliver(m, tickets["s1"], 4.0))
    assert fold.portions[0].weight == pytest.approx(100 * 4**-0.5)


@pytest.mark.parametrize(("action", "weights"), [("floor", [5.0]), ("drop", [])])
def test_an_update_beyond_the_relative_limit_keeps_a_floor_weight_unless_policy_drops_it(
    action: Any, weights: list[float]
) -> None:
    m = machine(pace("delta_async", 2, {"stale_limit": 1.0, "stale_action": action, "max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    for version in (1, 2, 3):  # limit: 1.0 * 2 stores / K = 1 is 2 versions
        deliver(m, tickets["s0"], float(version))
        tickets["s0"] = of(do.Train, m.handle(ev.Published(version, float(version))))[0].ticket
    actions = deliver(m, tickets["s1"], 4.0)
    assert [p.weight for f in of(do.Fold, actions) for p in f.portions] == pytest.approx(weights)
    if action == "drop":
        assert of(do.Settle, actions)[0].version is None
        assert [a.body["store"] for a in of(do.Record, actions) if a.kind == "update_rejected"] == ["s1"]


def test_a_paced_version_is_made_at_the_tick_and_late_work_joins_the_next() -> None:
    m = machine(pace("paced", 3, {"budget_s": 2.0, "max_versions": 9}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    for store in ("s0", "s1"):
        assert of(do.Publish, deliver(m, tickets[store], 2.1)) == []
    assert m.wake_at() == 3.0  # 1.25 * budget + 0.5
    (publish,) = of(do.Publish, m.handle(ev.Tick(3.0)))
    assert [c.store for c in publish.contributions] == ["s0", "s1"]
    again = of(do.Train, m.handle(ev.Published(1, 3.0)))
    assert [t.store for t in again] == ["s0", "s1"], "s2 is still at work"
    deliver(m, tickets["s2"], 3.5)
    deliver(m, again[0].ticket, 5.0)
    (publish,) = of(do.Publish, deliver(m, again[1].ticket, 5.1))
    assert {c.store: c.staleness for c in publish.contributions} == {"s0": 0, "s1": 0, "s2": 1}


def test_a_paced_ticket_trains_twice_as_long_as_it_takes_to_fetch_and_hand_over() -> None:
    m = machine(pace("paced", 3, {"max_versions": 9}))
    tickets = of(do.Train, join_all(m))
    assert [t.budget_s for t in tickets] == [FIRST_BUDGET_S] * 3
    at = 0.0
    for version in (1, 2, 3):  # trains for 0.1 s, by `trained`; the rest of a ticket's time is the link's
        begun, links = at, {"s0": 0.4, "s1": 1.0, "s2": 1.5}
        for ticket in sorted(tickets, key=lambda t: links[t.store]):
            at = begun + 0.1 + links[ticket.store]
            m.handle(ev.Trained(ticket.ticket, 5, 160, 100, 0.1, 1.0, at))
            actions = m.handle(ev.UpdateArrived(ticket.ticket, 400, at))
            for fold in of(do.Fold, actions):
                actions = m.handle(ev.Folded(tuple(p.ticket for p in fold.portions), (), at))
        if version == 1:
            assert m.budget_s == FIRST_BUDGET_S, "a first ticket has a start in it, which is no link's"
        assert of(do.Publish, actions), "nobody was late"
        tickets = of(do.Train, m.handle(ev.Published(version, at)))
    assert [t.budget_s for t in tickets] == [pytest.approx(2.0)] * 3, "the median store's link, twice"


@pytest.mark.parametrize("name", ["wait_for_all", "k_of_n", "fedbuff", "delta_async"])
def test_a_budget_that_is_said_holds_in_every_pace_and_nobody_is_late_by_it(name: str) -> None:
    m = machine(pace(name, 2, {"budget_s": 2.0, "buffer_size": 2, "max_versions": 9}), 2)
    tickets = of(do.Train, join_all(m))
    assert [t.budget_s for t in tickets] == [2.0, 2.0]
    deliver(m, tickets[0].ticket, 2.1)
    assert of(do.Publish, m.handle(ev.Tick(60.0))) == [], "its version waits for the other's update, on a slow link"
    assert of(do.Publish, deliver(m, tickets[1].ticket, 61.0))
    assert pace_in_words(m.policy, 2).endswith("; a ticket ends after 2 s of training")
    assert expected_versions(replace(m.policy, max_versions=None, max_seconds=10.0)) == 10**9, "no clock makes them"
    m = machine(pace(name, 2, {"max_versions": 9}), 2)
    assert [t.budget_s for t in of(do.Train, join_all(m))] == [None, None]


def test_under_a_deadline_a_store_is_given_what_it_can_do_in_time_by_its_measured_speed() -> None:
    m = machine(pace("delta_async", 2, {"deadline_s": 10.0, "max_versions": 9}), 2)
    first = {a.store: a for a in of(do.Train, join_all(m))}
    assert [(a.budget_s, a.max_steps) for a in first.values()] == [(10.0, None)] * 2, "nothing is known yet"
    m.handle(ev.Trained(first["s0"].ticket, 50, 1600, 100, seconds=5.0, loss=1.0, at=6.0))
    m.handle(ev.UpdateArrived(first["s0"].ticket, 400, 7.0))  # 10 steps a second; 2 s for the rest of it
    m.handle(ev.Folded((first["s0"].ticket,), (), 7.0))
    (fast,) = of(do.Train, m.handle(ev.Published(1, 7.0)))
    assert (fast.store, fast.budget_s, fast.max_steps) == ("s0", 7.0, 70), "one and a half times the rest is left"
    m.handle(ev.Trained(first["s1"].ticket, 2, 64, 100, seconds=4.0, loss=1.0, at=16.0))
    m.handle(ev.UpdateArrived(first["s1"].ticket, 400, 19.0))  # a step in two seconds; 15 s for the rest
    m.handle(ev.Folded((first["s1"].ticket,), (), 19.0))
    (slow,) = of(do.Train, m.handle(ev.Published(2, 19.0)))
    assert (slow.store, slow.budget_s, slow.max_steps) == ("s1", 2.0, 1), "a fifth of the deadline, and a step at least"


def test_late_work_alone_makes_no_version_while_the_others_are_about_to_start() -> None:
    m = machine(pace("paced", 2, {"budget_s": 2.0, "max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    deliver(m, tickets["s0"], 2.0)
    m.handle(ev.Tick(3.0))
    m.handle(trained(tickets["s1"], 3.0))
    m.handle(ev.UpdateArrived(tickets["s1"], 400, 3.0))
    actions = m.handle(ev.Published(1, 3.1))
    assert of(do.Publish, actions) == []
    assert sorted(a.store for a in of(do.Train, actions)) == ["s0", "s1"]


def test_slots_are_not_the_cohort() -> None:
    m = machine(pace("wait_for_all", 5, {"concurrency": 2, "max_versions": 2}), 5)
    first = of(do.Train, join_all(m))
    assert len(first) == 2
    open_tickets, seen = list(first), []
    while open_tickets:
        ticket = open_tickets.pop(0)
        seen.append(ticket.store)
        actions = deliver(m, ticket.ticket, 1.0)
        open_tickets += of(do.Train, actions)
    assert sorted(seen) == [f"s{i}" for i in range(5)]
    assert m.publishing is not None


def test_a_hung_store_is_restarted_and_holds_up_no_version() -> None:
    m = machine(pace("paced", 2, {"budget_s": 2.0, "hung_s": 10.0, "max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    deliver(m, tickets["s0"], 2.0)
    assert of(do.Publish, m.handle(ev.Tick(3.0)))
    (next_ticket,) = of(do.Train, m.handle(ev.Published(1, 3.0)))
    assert of(do.Publish, deliver(m, next_ticket.ticket, 5.0)), "nobody waits for s1"
    m.handle(ev.Published(2, 5.0))
    assert of(do.Restart, m.handle(ev.Tick(3.0 + 10.0))) == [], "it has just joined: it may have to warm up"
    restart = of(do.Restart, m.handle(ev.Tick(3.0 + 10.0 + WARM_UP_S)))
    assert "s1" in [r.store for r in restart]
    assert of(do.Train, m.handle(ev.StoreJoined("s1", 100, 90.0))), "taken in again"


def restarted(actions: list[do.Action]) -> list[str]:
    return [a.store for a in of(do.Restart, actions)]


@pytest.mark.parametrize("name", ["wait_for_all", "fedbuff", "k_of_n"])
def test_a_first_ticket_that_hangs_holds_nobody_up_for_an_hour_once_the_others_have_handed_over(name: str) -> None:
    m = machine(pace(name, 3, {"buffer_size": 3, "hung_s": 60.0, "max_versions": 9}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    assert m.wake_at() == FIRST_S + 60.0 + WARM_UP_S, "nothing is known of any store's speed"
    for store in ("s1", "s2"):
        deliver(m, tickets[store], 10.0)
    hung_at = SHORTEST_S + 60.0 + WARM_UP_S
    assert "s0" not in restarted(m.handle(ev.Tick(hung_at - 0.1)))
    assert "s0" in restarted(m.handle(ev.Tick(hung_at)))


def test_a_store_that_is_ten_times_slower_and_has_ten_times_the_images_does_not_hang() -> None:
    m = machine(pace("fedbuff", 2, {"buffer_size": 2, "max_versions": 99}), 2)
    tickets = {}
    for store, images in (("s0", 100), ("s1", 1000)):
        tickets |= {a.store: a.ticket for a in of(do.Train, m.handle(ev.StoreJoined(store, images, 0.0)))}
    deliver(m, tickets["s0"], 30.0)
    for at in range(60, 3060, 60):
        assert "s1" not in restarted(m.handle(ev.Tick(float(at))))
    assert of(do.Publish, deliver(m, tickets["s1"], 3060.0))
    m = machine(pace("wait_for_all", 2, {"max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    deliver(m, tickets["s1"], 1000.0)
    assert of(do.Restart, m.handle(ev.Tick(10_000.0))) == [], "the others take long: so may this one"


def test_a_store_that_is_only_slow_has_longer_the_next_time() -> None:
    m = machine(pace("fedbuff", 2, {"max_failures": 9, "hung_s": 60.0, "max_versions": 9}), 2)
    deliver(m, {a.store: a.ticket for a in of(do.Train, join_all(m))}["s1"], 10.0)
    first = SHORTEST_S + 60.0 + WARM_UP_S
    assert "s0" in restarted(m.handle(ev.Tick(first)))
    m.handle(ev.Published(1, first))
    (again,) = [a for a in of(do.Train, m.handle(ev.StoreJoined("s0", 100, 500.0))) if a.store == "s0"]
    assert restarted(m.handle(ev.Tick(500.0 + first))) == []
    assert again.ticket in [p.ticket for f in of(do.Fold, deliver(m, again.ticket, 930.0)) for p in f.portions]


def test_who_waited_for_its_turn_is_not_slow_and_a_pause_is_no_hanging() -> None:
    m = machine(pace("wait_for_all", 6, {"hung_s": 60.0, "max_versions": 9}), 6)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    for store in ("s1", "s2", "s3", "s4", "s5"):
        m.handle(trained(tickets[store], 10.0))
    for store in ("s1", "s2", "s3"):
        m.handle(ev.UpdateArrived(tickets[store], 400, 11.0))
    m.handle(ev.StorePaused("s0", "its owner needs it", 20.0))
    m.handle(ev.StoreWentOn("s0", 1020.0))
    assert of(do.Restart, m.handle(ev.Tick(1000.0 + SHORTEST_S + 119.0))) == []
    deliver(m, tickets["s0"], 1420.0)
    m.handle(ev.UpdateArrived(tickets["s4"], 400, 1421.0))
    assert m.members["s4"].last_s == pytest.approx(11.0), "it was ready after 10 s, and its update came in 1 s"


def test_a_failing_store_is_retried_with_backoff_and_set_aside_with_its_reason() -> None:
    m = machine(pace("wait_for_all", 2, {"max_failures": 2, "backoff_s": 4.0, "max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    assert of(do.Train, m.handle(ev.TrainingFailed(tickets["s1"], "loss is not finite", 1.0))) == []
    assert m.wake_at() == 5.0
    (again,) = of(do.Train, m.handle(ev.Tick(5.0)))
    actions = m.handle(ev.TrainingFailed(again.ticket, "loss is not finite", 6.0))
    assert [a.body["reason"] for a in of(do.Record, actions) if a.kind == "store_set_aside"] == ["loss is not finite"]
    assert of(do.Publish, deliver(m, tickets["s0"], 7.0)), "the others are not held up"
    m.handle(ev.StoreLeft("s1", "its operator took it out", 8.0))
    m.handle(ev.StoreJoined("s1", 100, 9.0))
    assert [a.store for a in of(do.Train, m.handle(ev.Published(1, 9.0)))] == ["s0", "s1"]


def test_images_that_cannot_be_read_are_recorded_as_they_become_more_and_said_as_they_double() -> None:
    m, board = machine(pace("delta_async", 1, {"max_versions": 99}), 1), Board("accuracy")
    (train,) = of(do.Train, join_all(m))
    counts = []
    for version, skipped in enumerate((0, 1, 1, 2, 3, 0, 4), 1):
        told = m.handle(replace(trained(train.ticket, float(version), num_train=70), skipped=skipped))
        for record in of(do.Record, told):
            board.add(record.kind, record.body)
            counts.append((record.kind, record.body["skipped"], record.body["of"]))
        m.handle(ev.UpdateArrived(train.ticket, 400, float(version)))
        m.handle(ev.Folded((train.ticket,), (), float(version)))
        (train,) = of(do.Train, m.handle(ev.Published(version, float(version))))
    assert counts == [("images_skipped", n, 70) for n in (1, 2, 3, 4)]
    assert board.lines == [f"s0: {n} of 70 images cannot be read, left out" for n in (1, 2, 4)]


def test_a_refused_update_leaves_the_weight_of_the_others() -> None:
    m = machine(pace("wait_for_all", 2, {"max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    for store in ("s0", "s1"):
        m.handle(trained(tickets[store], 1.0))
        m.handle(ev.UpdateArrived(tickets[store], 400, 1.0))
    actions = m.handle(ev.Folded((tickets["s0"],), ((tickets["s1"], "not finite"),), 1.0))
    assert [s.reason for s in of(do.Settle, actions)] == ["not finite"]
    assert of(do.Publish, actions) == [], "s1 is tried again first"


def test_two_fast_stores_cannot_hold_a_buffer_of_three() -> None:
    m = machine(pace("fedbuff", 3, {"buffer_size": 3, "deadline_s": 5.0, "max_versions": 9}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    deliver(m, tickets["s0"], 1.0)
    deliver(m, tickets["s1"], 1.0)
    for _ in range(3):  # s0 goes on; its second update joins the same sum, then it waits
        more = [t for t in m.tickets.values() if t.store == "s0" and t.phase == 1]
        for ticket in more:
            deliver(m, ticket.id, 2.0)
    assert sum(t.store == "s0" for t in m.tickets.values()) == 2
    assert of(do.Publish, m.handle(ev.Tick(6.0))), "s2 is past its deadline: two are as many as can come"


def test_a_version_that_is_scored_late_has_each_store_s_word_from_then() -> None:
    scores = Scores("accuracy")
    words = [(0, "a", 0.1), (0, "b", 0.2), (1, "b", 0.9), (2, "a", 0.3), (2, "b", 0.3)]
    for version, store, accuracy in words:
        scores.add(version, store, {"accuracy": accuracy}, 10)
    assert [scores.close(version) for version in range(3)] == [{"accuracy": pytest.approx(w)} for w in (0.15, 0.5, 0.3)]
    scores.withdraw(2)
    scores.add(2, "a", {"accuracy": 0.5}, 10)
    assert scores.close(2) == {"accuracy": pytest.approx(0.7)}


def test_a_store_that_judges_rarely_counts_with_its_last_word() -> None:
    scores = Scores("accuracy")
    scores.add(0, "slow", {"accuracy": 0.5}, 30)
    for version in range(4 * KEPT):
        scores.add(version, "fast", {"accuracy": 0.9}, 10)
        assert scores.close(version) == {"accuracy": pytest.approx(0.6)}
    assert len(scores.judged) <= KEPT + 1


def test_the_newest_version_is_judged_before_the_end() -> None:
    m = machine(pace("wait_for_all", 2, {"max_versions": 1}), 2)
    for ticket in of(do.Train, join_all(m)):
        deliver(m, ticket.ticket, 1.0)
    asked = of(do.Evaluate, m.handle(ev.Published(1, 1.0)))
    assert [(a.store, a.version) for a in asked] == [("s0", 1), ("s1", 1)]
    settled = of(do.Settle, m.handle(ev.Kept(1, 1.5)))
    assert [(s.store, s.version) for s in settled] == [("s0", 1), ("s1", 1)]
    m.handle(ev.Evaluated(1, "s0", {"accuracy": 0.5}, 10, 2.0))
    actions = m.handle(ev.Evaluated(1, "s1", {"accuracy": 0.8}, 30, 2.0))
    (record,) = [a for a in of(do.Record, actions) if a.kind == "evaluated"]
    assert record.body["metrics"]["accuracy"] == pytest.approx(0.725)
    assert actions[-1] == do.Finish("1 versions", 1)


def test_patience_ends_a_run_at_its_best_version() -> None:
    m = machine(pace("delta_async", 1, {"patience": 2, "max_versions": 50}), 1)
    (ticket,) = of(do.Train, join_all(m))
    finish: list[do.Finish] = []
    for version, accuracy in enumerate((0.3, 0.9, 0.5, 0.4, 0.3)):
        actions = m.handle(ev.Evaluated(version, "s0", {"accuracy": accuracy}, 10, float(version)))
        finish += of(do.Finish, actions)
        deliver(m, ticket.ticket, float(version))
        actions = m.handle(ev.Published(version + 1, float(version)))
        assert m.finished or of(do.Keep, actions) == [do.Keep(version + 1)]
        finish += of(do.Finish, m.handle(ev.Kept(version + 1, float(version))))
        ticket = next(iter(of(do.Train, actions)), ticket)
    assert [(f.reason, f.best_version) for f in finish] == [("no better version in 2", 1)]


@pytest.mark.parametrize(("lower", "values"), [(False, (0.3, 0.79, 0.8)), (True, (1.3, 0.81, 0.8))])
def test_a_target_that_is_reached_ends_the_run_and_none_that_is_nearly_reached(
    lower: bool, values: tuple[float, ...]
) -> None:
    m = machine(pace("delta_async", 1, {"target": 0.8, "lower_is_better": lower, "max_versions": 50}), 1)
    (train,) = of(do.Train, join_all(m))
    for version, value in enumerate(values):
        assert m.ending is None
        m.handle(ev.Evaluated(version, "s0", {"accuracy": value}, 10, float(version)))
        if m.ending is None:
            deliver(m, train.ticket, float(version))
            (train,) = of(do.Train, m.handle(ev.Published(version + 1, float(version))))
    assert m.ending == ("accuracy reached 0.8", 2.0)
    assert m.scores.best == (2, 0.8)


def test_a_run_that_ended_with_a_version_goes_on_when_that_version_is_lost() -> None:
    m = machine(pace("wait_for_all", 1, {"max_versions": 1}), 1)
    (train,) = of(do.Train, join_all(m))
    deliver(m, train.ticket, 1.0)
    m.handle(ev.Published(1, 1.0))
    m.handle(ev.Kept(1, 1.0))
    assert of(do.Finish, m.handle(ev.Evaluated(1, "s0", {"accuracy": 0.5}, 10, 2.0)))
    again = of(do.Train, m.handle(ev.Withdrawn(1, "damaged", 3.0)))
    assert [(t.version, t.store) for t in again] == [(0, "s0")]
    m = machine(pace("wait_for_all", 1, {"max_versions": 9}), 1)
    (train,) = of(do.Train, join_all(m))
    deliver(m, train.ticket, 1.0)
    m.handle(ev.Published(1, 1.0))
    m.handle(ev.StopAsked("by hand", 1.0))
    assert of(do.Train, m.handle(ev.Withdrawn(1, "damaged", 3.0))) == [], "somebody wanted the end"


def test_what_was_settled_at_the_end_is_over_although_answers_come_and_a_store_is_awaited() -> None:
    m = machine(pace("wait_for_all", 3, {"max_versions": 9, "max_failures": 1}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(ev.Resumed(2, 9.0, 1.0))
    for store in ("s0", "s1"):
        m.handle(ev.StoreJoined(store, 100, 2.0))
        m.handle(trained(tickets[store], 3.0))
    settled = of(do.Settle, m.handle(ev.StopAsked("by hand", 4.0)))
    assert {(s.ticket, s.version) for s in settled} == {(ticket, None) for ticket in tickets.values()}
    assert m.tickets == {}
    late: list[ev.Event] = [ev.TrainingFailed(tickets["s0"], "it came too late", 5.0), trained(tickets["s2"], 5.0)]
    assert [m.handle(event) for event in late] == [[], []], "nobody is blamed for what he was told to stop"
    actions = m.handle(ev.StoreJoined("s2", 100, 6.0, (tickets["s2"],)))
    assert actions == [
        do.Settle("s2", tickets["s2"], None, "it was settled"),
        *(do.Evaluate(0, store) for store in ("s0", "s1", "s2")),
    ]


def test_a_ticket_that_was_settled_at_the_end_stays_so_when_the_last_version_is_lost() -> None:
    m = machine(pace("delta_async", 3, {"max_versions": 1}))
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(ev.Resumed(2, 9.0, 0.0))
    for store in ("s0", "s1"):  # the end waits for s2
        m.handle(ev.StoreJoined(store, 100, 1.0))
    deliver(m, tickets["s0"], 1.0)
    assert do.Settle("s1", tickets["s1"], None, "the run ended") in m.handle(ev.Published(1, 1.0))
    m.handle(ev.Withdrawn(1, "damaged", 2.0))
    m.handle(ev.Resumed(3, 9.0, 2.0))
    actions = m.handle(ev.StoreJoined("s1", 100, 3.0, (tickets["s1"],)))
    assert of(do.Settle, actions) == [do.Settle("s1", tickets["s1"], None, "it was settled")]
    assert [(a.version, a.repeat) for a in of(do.Train, actions)] == [(0, 0)], "its work is done again"
    assert tickets["s1"] not in {a.ticket for a in of(do.Train, actions)}


def test_work_on_the_version_before_one_that_is_lost_counts_again_and_is_not_done_twice() -> None:
    m = machine(pace("fedbuff", 2, {"buffer_size": 2, "max_versions": 9}), 2)
    first, other = of(do.Train, join_all(m))
    (repeat,) = of(do.Train, deliver(m, first.ticket, 1.0))
    m.handle(ev.TrainingFailed(repeat.ticket, "crashed", 1.0))
    deliver(m, other.ticket, 1.0)
    later = of(do.Train, m.handle(ev.Published(1, 10.0)))
    deliver(m, next(a.ticket for a in later if a.store == "s0"), 11.0)
    m.handle(ev.Withdrawn(1, "its weights were lost", 12.0))
    m.handle(ev.Resumed(2, 9.0, 12.0))
    asked = of(do.Train, m.handle(ev.StoreJoined("s0", 100, 13.0, (first.ticket,))))
    assert first in asked, "its update counts again"
    asked += of(do.Train, deliver(m, first.ticket, 13.0))
    new = [a for a in asked if a != first]
    assert [(a.store, a.version, a.repeat) for a in new] == [("s0", 0, 1)], "other batches than the first's"


def test_work_that_outlives_a_lost_version_is_not_given_out_under_its_number_again() -> None:
    m = machine(pace("fedbuff", 2, {"buffer_size": 2, "max_versions": 9}), 2)
    first, other = of(do.Train, join_all(m))
    (repeat,) = of(do.Train, deliver(m, first.ticket, 1.0))
    deliver(m, other.ticket, 1.0)
    m.handle(ev.Published(1, 1.0))
    m.handle(ev.Kept(1, 1.0))
    m.handle(ev.Withdrawn(1, "its weights were lost", 2.0))
    m.handle(ev.Resumed(2, 9.0, 2.0))
    asked = of(do.Train, m.handle(ev.StoreJoined("s0", 100, 3.0)))
    assert asked == [repeat], "the first one is gone with its version, this one is not"
    (new,) = of(do.Train, deliver(m, repeat.ticket, 4.0))
    assert (new.store, new.version, repeat.repeat, new.repeat) == ("s0", 0, 1, 2)


def test_a_store_that_hangs_at_the_end_is_not_asked_for_its_last_word() -> None:
    m = machine(pace("fedbuff", 2, {"buffer_size": 1, "deadline_s": 5.0, "max_versions": 9}), 2)
    join_all(m)
    assert of(do.Evaluate, m.handle(ev.StopAsked("by hand", 1.0))) == [do.Evaluate(0, "s0"), do.Evaluate(0, "s1")]
    m = machine(pace("fedbuff", 2, {"buffer_size": 1, "deadline_s": 5.0, "max_versions": 9}), 2)
    (ticket, _) = of(do.Train, join_all(m))
    m.handle(ev.TrainingFailed(ticket.ticket, "crashed", 4.0))
    assert of(do.Evaluate, m.handle(ev.StopAsked("by hand", 6.0))) == [do.Evaluate(0, "s0")]


def test_a_store_that_comes_back_as_the_run_ends_is_not_asked_to_train_first() -> None:
    m = machine(pace("delta_async", 1, {"max_seconds": 10.0}), 1)
    (ticket,) = of(do.Train, join_all(m))
    m.handle(ev.Resumed(2, 9.0, 5.0))
    actions = m.handle(ev.StoreJoined("s0", 100, 12.0))
    assert actions == [do.Settle("s0", ticket.ticket, None, "the run ended"), do.Evaluate(0, "s0")]


def test_the_tick_at_the_end_of_the_time_is_the_end_whatever_floats_add_up_to() -> None:
    begin, length, budget = 5.188426604667915, 13.670741705242438, 0.9344666439487255
    assert begin + length + 0.5 * budget - begin - length < 0.5 * budget
    m = machine(pace("paced", 1, {"budget_s": budget, "deadline_s": 100.0, "max_seconds": length}), 1)
    m.handle(ev.StoreJoined("s0", 100, begin))
    for _ in range(2):
        m.handle(ev.Tick(m.wake_at()))
    assert m.ending == ("14 s", begin + length + 0.5 * budget)


def test_what_is_decided_on_the_way_back_is_of_the_new_epoch_and_numbered_after_the_record(tmp_path: Path) -> None:
    """The record may know more than the diary: a loss of power takes the diary's last lines, never the record's."""
    policy = pace("fedbuff", 1, {"buffer_size": 1, "max_versions": 9})
    m, diary = machine(policy, 1), Diary(tmp_path)
    diary.checkpoint(m.memory())
    tell = partial(told, m, diary)
    (train,) = of(do.Train, tell(ev.StoreJoined("s0", 100, 0.0)))
    tell(trained(train.ticket, 1.0))
    tell(ev.UpdateArrived(train.ticket, 4, 1.0))
    assert of(do.Publish, tell(ev.Folded((train.ticket,), (), 1.0)))
    again = machine(policy, 1)
    bring_back(again, diary, newest=1, told=7, intact=lambda v: True, epoch=2, grace_s=9.0)
    assert {t.id for t in again.tickets.values() if t.base == 1} == {"1.2-2.s0"}
    assert again.told == 7


@pytest.mark.parametrize(("newest", "lost", "withdrawn"), [(2, {2}, [2]), (1, set(), []), (1, {1}, [1])])
def test_a_version_whose_weights_are_lost_is_withdrawn_once(
    tmp_path: Path, newest: int, lost: set[int], withdrawn: list[int]
) -> None:
    """`newest` 1: the record says already that version 2 was withdrawn, the diary does not."""
    policy = pace("wait_for_all", 1, {"max_versions": 9})
    m, diary = machine(policy, 1), Diary(tmp_path)
    diary.checkpoint(m.memory())
    tell = partial(told, m, diary)
    (train,) = of(do.Train, tell(ev.StoreJoined("s0", 100, 0.0)))
    for version in (1, 2):
        tell(trained(train.ticket, 1.0))
        tell(ev.UpdateArrived(train.ticket, 4, 1.0))
        tell(ev.Folded((train.ticket,), (), 1.0))
        (train,) = of(do.Train, tell(ev.Published(version, 1.0)))
    again = machine(policy, 1)
    back = bring_back(again, diary, newest=newest, told=0, intact=lambda v: v not in lost, epoch=2, grace_s=9.0)
    assert back.withdrawn == withdrawn
    assert again.version == (0 if lost == {1} else 1)
    assert all(t.base <= again.version for t in again.tickets.values())
    assert of(do.Keep, back.actions) == [do.Keep(v) for v in range(1, again.version + 1)]


def test_records_that_were_decided_and_not_written_are_written_when_it_is_back(tmp_path: Path) -> None:
    policy = pace("wait_for_all", 2, {"max_versions": 9, "quorum": 2})
    m, diary = machine(policy, 2), Diary(tmp_path)
    diary.checkpoint(m.memory())
    decided: list[do.Record] = []

    def tell(event: ev.Event) -> list[do.Action]:
        actions = m.handle(event)
        diary.note(event, actions)
        decided.extend(of(do.Record, actions))
        return actions

    def comes_back(told: int) -> list[do.Record]:
        again = machine(policy, 2)
        back = bring_back(again, diary, newest=0, told=told, intact=lambda v: True, epoch=2, grace_s=9.0)
        assert again.told == m.told
        return [action for action in back.actions if isinstance(action, do.Record)]

    tell(ev.StoreJoined("s0", 100, 0.0))
    trains = of(do.Train, tell(ev.StoreJoined("s1", 100, 0.0)))
    tell(ev.Evaluated(0, "s0", {"accuracy": 0.5}, 10, 1.0))
    tell(ev.Evaluated(0, "s1", {"accuracy": 0.7}, 10, 1.0))
    tell(ev.TrainingFailed(trains[0].ticket, "crashed", 2.0))
    tell(ev.StoreLeft("s1", "gone", 3.0))
    assert [r.kind for r in decided] == ["evaluated", "ticket_failed", "store_left"]
    for told in range(4):
        assert comes_back(told) == decided[told:], "those after the journal's last, in their order"
    diary.checkpoint(m.memory(), decided[1:])  # it was slow to write two of them
    for told in (1, 2, 3):
        assert comes_back(told) == decided[told:]
    line = json.loads((tmp_path / "diary" / "000002.jsonl").read_text())
    del line["owed"]
    (tmp_path / "diary" / "000002.jsonl").write_text(json.dumps({**line, "schema": 1}) + "\n")
    assert comes_back(0) == [], "an older raypipe did not count them: none is written twice"
