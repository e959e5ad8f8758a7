"""The sceptic's experiment runs the real machine under a virtual clock: small, repeatable, and time is as it should."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "jobs"))

from compare import _everything, parsed
from compare_arms import ARMS, Result, Scale, Unit, run, twins
from compare_clock import DOWN, STEP_S, UP
from compare_kept import Kept, plan

SCALE = Scale(train=400, judged=200, seconds=12.0, every_s=2.0)
EPOCH = 2  # steps: 40 images a store
MODEL_BYTES = 4 * 26_000  # less than the small model has


@cache
def result(arm: str) -> Result:
    return run(Unit(arm, "two-labels", 1, 0.05 if arm != "closed form" else 0.01, SCALE))


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=() if arm in ("paced", "closed form") else pytest.mark.long) for arm in ARMS]
)
def test_each_arm_learns_something_in_the_time_that_it_has(arm: str) -> None:
    looks = result(arm).trace.looks
    assert [look.at for look in looks] == sorted(look.at for look in looks)
    assert max(look.quality for look in looks) > 0.15, "chance is 0.1"
    assert 0.0 <= result(arm).worst_store <= 1.0


def test_the_slowest_store_sets_the_pace_where_all_are_waited_for() -> None:
    slowest = MODEL_BYTES / DOWN + EPOCH * STEP_S * 10 + MODEL_BYTES / UP
    waited, buffered = result("wait for all").trace, result("FedBuff, long tickets").trace
    assert 2 <= waited.versions <= SCALE.seconds / slowest
    assert buffered.versions > 2 * waited.versions


def test_the_same_run_again_is_the_same_to_the_bit() -> None:
    again = run(Unit("paced", "two-labels", 1, 0.05, SCALE))
    assert again == result("paced")


def test_what_moves_is_counted() -> None:
    last = result("wait for all").trace.looks[-1]
    versions = result("wait for all").trace.versions
    assert last.up >= versions * 10 * MODEL_BYTES
    assert last.down >= last.up, "who has the newest version may not have answered yet"
    assert result("alone").trace.looks[-1].up == 0


@pytest.mark.long
def test_the_twin_test_alone_is_tuned_like_the_rest_and_runs_nothing_else() -> None:
    options = parsed(["--twins-only", "--arms", "alone", "paced", "--seeds", "2", "--images", "400"])
    units = list(_everything(options, SCALE, [1, 2], Kept(None), 3))
    assert [(unit.arm, unit.split, unit.judge_by) for unit in units[:3]] == [("paced", "two-labels", "validation")] * 3
    assert [(unit.split, unit.seed, unit.twin_slowness) for unit in units[3:]] == [
        ("twin", 1, 1.0), ("twin", 1, 10.0), ("twin", 2, 1.0), ("twin", 2, 10.0),
    ]  # fmt: skip


def test_twins_differ_in_their_speed_alone() -> None:
    fast, slow = twins(Unit("paced", "two-labels", 1, 0.05, SCALE))
    assert (fast.split, slow.split, fast.twin_slowness, slow.twin_slowness) == ("twin", "twin", 1.0, 10.0)
    assert run(slow).trace.steps < run(fast).trace.steps


def test_a_run_that_is_done_is_kept_and_not_run_again(tmp_path: Path) -> None:
    done, file = result("closed form"), tmp_path / "kept.jsonl"
    first = Kept(file)
    assert first.get(done.unit) is None
    first.add(done)
    with file.open("a") as text:
        text.write('{"key": "cut')  # as it was written
    assert Kept(file).get(done.unit) == done
    assert Kept(file).get(replace(done.unit, seed=2)) is None
    assert Kept(file).get(replace(done.unit, scale=replace(SCALE, train=500))) is None
    assert Kept(None).get(done.unit) is None


def test_what_is_left_to_be_run_is_said_with_its_time() -> None:
    done, kept = result("closed form"), Kept(None)
    kept.add(done)
    lines = plan([done.unit, replace(done.unit, seed=2), Unit("paced", "two-labels", 1, 0.05, SCALE)], kept, 2)
    assert lines[0].startswith("to be run, in about ")
    assert [line.partition(" runs")[0] for line in lines[1:]] == ["  closed form: 1", "  paced: 1"]
    assert plan([done.unit], kept, 2) == ["nothing is left to be run"]
