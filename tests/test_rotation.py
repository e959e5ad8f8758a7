"""Which stores have an actor: at most so many, each for a turn, the longest released first."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STORES, Place
from test_cluster import Federation, connected, state
from test_config import SMALL, problems
from test_machine import deliver, machine, of

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.asking import Question, ask
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.explain import Sizes, explain
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.policy import pace
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.rotation import RESTS_S


def asked(actions: list[do.Action]) -> list[str]:
    return [a.store for a in of(do.Ask, actions)]


def released(actions: list[do.Action]) -> list[str]:
    return [a.store for a in of(do.Release, actions)]


def limited(name: str, stores: int, most: int, **said: Any) -> Coordinator:
    m = machine(pace(name, stores, {"max_versions": 99, "max_active_stores": most, **said}), stores)
    m.chance = lambda version: random.Random(f"7/{version}")
    return m


def version(m: Coordinator, at: float) -> list[do.Action]:
    """All tickets in training delivered, the version made and kept."""
    for ticket in [t.id for t in m.tickets.values() if t.phase == 1]:
        deliver(m, ticket, at)
    number = m.version + 1
    actions = m.handle(ev.Published(number, at))
    return actions + m.handle(ev.Kept(number, at))


def join(m: Coordinator, stores: list[str], at: float) -> list[do.Action]:
    return [a for store in stores for a in m.handle(ev.StoreJoined(store, 100, at))]


def test_as_many_as_may_are_asked_for_by_the_seed_and_the_others_follow_in_turn() -> None:
    m = limited("wait_for_all", 5, 2)
    turns = [asked(m.handle(ev.Tick(0.0)))]
    at = 0.0
    for _ in range(5):
        at += 10.0
        assert len(of(do.Train, join(m, turns[-1], at))) == 2
        actions = version(m, at)
        assert released(actions) == sorted(turns[-1])
        turns.append(asked(actions))
    assert sorted(turns[0] + turns[1]) != [f"s{i}" for i in range(4)], "the seed draws, not the name"
    trained = [store for turn in turns[:5] for store in turn]
    assert sorted(trained) == sorted([f"s{i}" for i in range(5)] * 2), "each twice in five turns of two"
    again = limited("wait_for_all", 5, 2)
    assert asked(again.handle(ev.Tick(0.0))) == turns[0]


def test_a_store_keeps_its_place_for_its_turn_and_where_nobody_waits() -> None:
    m = limited("wait_for_all", 3, 2, turn=2)
    first = asked(m.handle(ev.Tick(0.0)))
    join(m, first, 1.0)
    assert released(version(m, 2.0)) == []
    assert len(released(version(m, 3.0))) == 1, "one waits: one place is enough"
    m = limited("wait_for_all", 2, 2)
    join(m, asked(m.handle(ev.Tick(0.0))), 1.0)
    for number in range(4):
        assert released(version(m, 2.0 + number)) == []


def test_a_version_waits_for_those_who_were_just_asked_for_and_not_for_ever() -> None:
    m = limited("k_of_n", 4, 2, join_s=30.0)
    join(m, asked(m.handle(ev.Tick(0.0))), 1.0)
    one, other = asked(version(m, 2.0))
    (ticket,) = of(do.Train, join(m, [one], 5.0))
    deliver(m, ticket.ticket, 6.0)
    assert m.publishing is None
    actions = m.handle(ev.Tick(32.0))
    assert [c.store for p in of(do.Publish, actions) for c in p.contributions] == [one]
    assert released(actions) == [other]
    (record,) = [r for r in of(do.Record, actions) if r.kind == "store_released"]
    assert record.body == {"store": other, "reason": "it did not come within 30 s"}
    assert asked(actions) != [other], "another has its place, and it comes last"


def test_a_store_in_a_paced_run_that_is_not_there_yet_holds_no_version_up() -> None:
    m = limited("paced", 4, 2, budget_s=2.0)
    join(m, asked(m.handle(ev.Tick(0.0))), 1.0)
    one, _ = asked(version(m, 2.0))
    (ticket,) = of(do.Train, join(m, [one], 5.0))
    assert of(do.Publish, deliver(m, ticket.ticket, 7.0))


def test_nobody_is_released_before_what_he_gave_is_on_the_disk() -> None:
    m = limited("fedbuff", 3, 1, buffer_size=1)
    (one,) = asked(m.handle(ev.Tick(0.0)))
    (ticket,) = of(do.Train, join(m, [one], 1.0))
    actions = deliver(m, ticket.ticket, 2.0) + m.handle(ev.Published(1, 2.0))
    assert released(actions) == []
    assert of(do.Train, actions) == [], "another waits: it is given no more"
    actions = m.handle(ev.Kept(1, 3.0))
    assert actions[0] == do.Settle(one, ticket.ticket, 1)
    assert released(actions) == [one]
    late = m.handle(ev.StoreJoined(one, 100, 3.1))
    assert late == [], "it was on its way as it was released"
    assert not m.members[one].present


def test_a_released_store_rests_and_the_run_does_not_end_for_it() -> None:
    m = limited("fedbuff", 2, 1, buffer_size=1, cool_down_s=500.0, join_s=20.0)
    (one,) = asked(m.handle(ev.Tick(0.0)))
    join(m, [one], 1.0)
    (other,) = asked(version(m, 2.0))
    (ticket,) = of(do.Train, join(m, [other], 3.0))
    deliver(m, ticket.ticket, 4.0)
    m.handle(ev.Published(1 + m.version, 4.0))
    actions = m.handle(ev.Kept(m.version, 4.0))
    assert released(actions) == []
    assert m.wake_at() <= 502.0
    m.handle(ev.StoreLeft(other, "its node is gone", 5.0))
    assert m.handle(ev.Tick(400.0)) == []
    assert asked(m.handle(ev.Tick(502.0))) == [one], "rested; the other did not come back in time"


def test_a_store_whose_node_died_keeps_its_place_for_a_while() -> None:
    m = limited("fedbuff", 3, 1, buffer_size=1, join_s=20.0)
    (one,) = asked(m.handle(ev.Tick(0.0)))
    join(m, [one], 1.0)
    m.handle(ev.StoreLeft(one, "its node is gone", 5.0))
    assert asked(m.handle(ev.Tick(24.9))) == []
    actions = m.handle(ev.Tick(25.0))
    assert released(actions) == [one]
    assert len(asked(actions)) == 1


def test_a_run_of_which_no_store_comes_ends_when_each_had_its_chance() -> None:
    m = limited("fedbuff", 3, 1, join_s=20.0)
    chances = asked(m.handle(ev.Tick(0.0)))
    for at in (20.0, 40.0):
        chances += asked(m.handle(ev.Tick(at)))
    assert sorted(chances) == ["s0", "s1", "s2"]
    reason = "no quorum after 60 s: 0 of 3 stores are there, 1 have to be; missing: s0, s1, s2"
    assert m.handle(ev.Tick(60.0))[-1] == do.Finish(reason, 0, failed=True)


def test_a_store_that_is_set_aside_or_taken_out_gives_its_place_to_another() -> None:
    m = limited("fedbuff", 3, 1, max_failures=1)
    (one,) = asked(m.handle(ev.Tick(0.0)))
    (ticket,) = of(do.Train, join(m, [one], 1.0))
    actions = m.handle(ev.TrainingFailed(ticket.ticket, "out of memory", 2.0))
    assert released(actions) == [one]
    (two,) = asked(actions)
    join(m, [two], 3.0)
    actions = m.handle(ev.StoreLeft(two, "its operator took it out", 4.0, True))
    (three,) = asked(actions)
    join(m, [three], 5.0)
    m.handle(ev.StoreAdded(two, 6.0))
    assert asked(version(m, 7.0)) == [two], "its operator has put it in again"


def test_a_store_that_is_closed_for_long_is_released_in_every_run_and_asked_for_when_it_opens() -> None:
    m = machine(pace("delta_async", 2, {"max_versions": 9}), 2)
    tickets = {a.store: a for s in m.members for a in of(do.Train, join(m, [s], 0.0))}
    short = m.handle(ev.Deferred(tickets["s0"].ticket, "closed", RESTS_S - 1, 1.0))
    assert released(short) == []
    long = m.handle(ev.Deferred(tickets["s1"].ticket, "closed until 06:00, by its hours", 3600.0, 1.0))
    assert released(long) == ["s1"]
    assert asked(m.handle(ev.Tick(3600.0))) == []
    assert asked(m.handle(ev.Tick(3601.0))) == ["s1"]
    assert len(of(do.Train, join(m, ["s1"], 3602.0))) == 1


def test_a_coordinator_that_comes_back_asks_for_those_whose_turn_it_was(tmp_path: Path) -> None:
    m, diary = limited("fedbuff", 4, 2, buffer_size=1), Diary(tmp_path)
    names = asked(m.handle(ev.Tick(0.0)))
    diary.checkpoint(m.memory())
    event = ev.StoreJoined(names[0], 100, 1.0)
    diary.note(event, m.handle(event))
    again = limited("fedbuff", 4, 2, buffer_size=1)
    back = bring_back(again, diary, newest=0, told=0, intact=lambda v: True, epoch=2, grace_s=9.0)
    assert sorted(asked(back.actions)) == sorted(names)


@pytest.mark.parametrize(
    ("added", "line"),
    [
        ("pacing: {max_active_stores: 0}", "pacing.max_active_stores: must be at least 1, found 0"),
        ("pacing: {max_active_stores: 1, quorum: 2}", "pacing.quorum 2 is more than pacing.max_active_stores 1"),
        ("pacing: {max_active_stores: 1, cohort: 2}", "pacing.cohort 2 is more than pacing.max_active_stores 1"),
        ("pacing: {turn: 0}", "pacing.turn: must be at least 1, found 0"),
        ("pacing: {cool_down_s: -1}", "pacing.cool_down_s: must be at least 0, found -1"),
        ("pacing: {max_active: 2}", "pacing.max_active: no such key. Did you mean 'max_active_stores'?"),
    ],
)
def test_wrong_numbers_of_active_stores_get_one_line(tmp_path: Path, added: str, line: str) -> None:
    path = tmp_path / "try.yaml"
    path.write_text(SMALL + added)
    (found,) = problems(path)
    assert found.startswith(f"try.yaml: {line}")


def test_check_says_how_many_stores_have_an_actor() -> None:
    policy = pace("fedbuff", 9, {"max_active_stores": 2, "turn": 3, "max_versions": 1})
    lines = explain([("a", 1.0, 0.0)], policy, Sizes(1, 1, 1, 1, 1.0, "x"))
    assert "at most 2 stores have an actor at a time; another's turn comes after 3 updates" in lines
    assert (policy.quorum, policy.buffer_size) == (2, 2)


@pytest.mark.parametrize(
    ("name", "said", "few"),
    [
        ("wait_for_all", {"cohort": 10}, 10),
        ("wait_for_all", {"cohort": 10, "concurrency": 3}, 10),
        ("wait_for_all", {"concurrency": 3}, None),  # each version has all stores, three at a time
        ("fedbuff", {"concurrency": 10}, 10),
        ("fedbuff", {"cohort": 10}, None),  # nobody is picked there: who hands over gets new work
        ("wait_for_all", {"cohort": 10, "max_active_stores": 10}, None),
        ("paced", {}, None),
    ],
)
def test_check_says_that_stores_have_actors_that_few_of_them_need(
    name: str, said: dict[str, Any], few: int | None
) -> None:
    """And the run asks for them all: the cohort is drawn from those who are there."""
    policy = pace(name, 500, {**said, "max_versions": 1})
    stores = [(f"s{i}", 1.0, 0.0) for i in range(500)]
    found = [line for line in explain(stores, policy, Sizes(1, 1, 1, 1, 1.0, "x")) if "have an actor, and so" in line]
    line = f"all 500 stores have an actor, and so a node, though {few} work at a time"
    assert found == ([] if few is None else [f"{line}; with pacing.max_active_stores: {few} or more they take turns"])


class Counted:
    """A port that answers, and knows how many of its kind have a process."""

    there = most = 0

    async def join(self) -> None:
        Counted.there += 1
        Counted.most = max(Counted.most, Counted.there)
        await asyncio.sleep(0)

    async def measure(self, plan: bytes, weights: Any, what: str) -> np.ndarray:
        await asyncio.sleep(0)
        return np.ones(2)

    async def release(self) -> None:
        Counted.there -= 1


def test_before_the_start_too_no_more_stores_than_may_have_a_process() -> None:
    question = Question(b"", None, "moments", "code", quorum=2)
    ports: dict[str, Any] = {f"s{i}": Counted() for i in range(7)}
    answers = asyncio.run(ask(ports, question, None, join_s=5.0, at_once=2))
    assert sorted(answers.sums) == sorted(ports)
    assert (Counted.most, Counted.there) == (2, 0)


@pytest.mark.cluster
def test_stores_take_turns_and_a_released_one_has_no_process(cluster: Place) -> None:
    three = STORES[:3]
    said = {"max_active_stores": 1, "heartbeat_s": 2}
    stores = [{"id": store, "cpus": 0.2} for store in three]
    config = cluster.config(stop={"max_versions": 4}, pacing=said, track={"mlflow": False}, stores=stores)
    with connected(cluster):
        federation = Federation(cluster, config)
        seen: list[int] = []

        def two_versions(board: dict[str, Any]) -> bool:
            seen.append(len(federation.processes()))
            return board["version"] >= 2

        federation.until(two_versions, 120)
        assert "released" in {state(federation.board(), store) for store in three}
        federation.result()
    assert max(seen) == 1
    order = [body["store"] for body in federation.records("store_asked")]
    assert sorted(order[:3]) == three, "each had a turn before anybody had a second one"
    assert order[3] == order[0], "who was released first is asked for again"
    versions = federation.records("version_published")[1:]
    assert [c["store"] for v in versions for c in v["contributions"]] == order[:4]
    assert federation.records("store_left", "ticket_failed") == []
