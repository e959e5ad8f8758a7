"""What a store owes outlives its process: real kills, damaged disks, full disks, coordinators that come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Place
from test_site import Case

from raypipe.config.schema import RunConfig, Store
from raypipe.errors import StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.ledger.keys import digest
from raypipe.ledger.receipts import read_receipts
from raypipe.models.flat import initial
from raypipe.store import outbox as boxes
from raypipe.store.messages import Card, Plan, Refusal, Ticket, Verdict, encode, expect, refusal_error
from raypipe.store.near import Near
from raypipe.store.outbox import OUTBOX
from raypipe.store.runs import UNUSED_S, end_holder
from raypipe.store.safety import refusal
from raypipe.store.site import Site
from raypipe.store.slots import Slots, filled, outline, write_tensors

TICKETS = 6
MOMENTUM: dict[str, Any] = {"optimizer": {"name": "sgd", "momentum": 0.9}, "keep_optimizer": True}
POINTS = {  # what was just done on the way to the disk, and which time of it to be killed at
    "epoch has no name": 1,
    "epoch written": 1,
    "slots written": 2,
    "ticket has no name": 2,
    "ticket written": 2,
    "kept has no name": 2,
    "kept written": 2,
    "entry removed": 2,
}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["raypipe.store.site", "raypipe.models.small_cnn", "raypipe.data.parquet", "pytest"])


def reopened(case: Case, **site: Any) -> Case:
    """As after a restart: another site on the same folder."""
    case.site.close()
    case.site = Site(case.site._home, **site)
    return case


def converse(home: Path, journal: Path, kill_at: str = "", times: int = 0) -> None:
    """A site, and a coordinator that writes down what it knows and goes on from there; in a process of its own.

    `kill_at`: end this process without a word when this has been done so many times.
    """
    done: Counter[str] = Counter()

    def point(what: str) -> None:
        done[what] += 1
        if what == kill_at and done[what] == times:
            os.kill(os.getpid(), signal.SIGKILL)

    case = Case(home, site={"point": point})
    known = journal.read_text().splitlines() if journal.exists() else []
    with journal.open("a") as says:

        def say(text: str) -> None:
            says.write(text + "\n")
            says.flush()

        waiting = case.site.describe("r", 1).outbox
        for number in range(TICKETS):
            ticket = f"t{number}"
            if f"folded {ticket}" not in known:
                told = [line for line in known if line.startswith(f"trained {ticket} ")]
                if told and ticket not in waiting:
                    say(f"LOST {ticket}")
                case.train({"id": ticket, "seed": number}, **MOMENTUM)
                trained = f"trained {ticket} {digest(case.site.collect(ticket, [], 'r', 1))}"
                if told and trained not in told:
                    say(f"CHANGED {ticket}")
                say(trained)
                say(f"folded {ticket}")
            case.site.settle(Verdict(ticket, number, run="r", epoch=1))
            case.site.settle(Verdict(ticket, number, run="r", epoch=1))
        say("over, " + digest(case.update({"id": "last"}, **MOMENTUM)))


def run(*arguments: Any, after_s: float | None = None, work: Callable[..., None] = converse) -> int | None:
    """The exit code of `work` in a process, killed after so many seconds."""
    process = processes.Process(target=work, args=arguments)
    process.start()
    process.join(60 if after_s is None else after_s)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is written down when nothing goes wrong."""
    home = tmp_path_factory.mktemp("calm")
    Case(home / "south").site.close()
    assert run(home / "south", home / "journal") == 0
    return (home / "journal").read_text().splitlines()


def check(journal: Path, never_killed: list[str]) -> None:
    """Every ticket trained with the same bits, folded once, and the momentum at the end the same."""
    lines = journal.read_text().splitlines()
    assert not [line for line in lines if line.startswith(("LOST", "CHANGED"))]
    assert list(dict.fromkeys(lines)) == never_killed
    assert [line for line in lines if line.startswith("folded")] == [f"folded t{n}" for n in range(TICKETS)]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_to_the_disk_a_store_goes_on_with_the_same_bits(
    point: str, tmp_path: Path, never_killed: list[str]
) -> None:
    Case(tmp_path / "south").site.close()
    assert run(tmp_path / "south", tmp_path / "journal", point, POINTS[point]) == -signal.SIGKILL
    assert run(tmp_path / "south", tmp_path / "journal") == 0
    check(tmp_path / "journal", never_killed)


def test_killed_between_the_two_steps_of_settling_a_ticket_is_settled(tmp_path: Path) -> None:
    Case(tmp_path / "south").site.close()
    assert run(tmp_path / "south", tmp_path / "journal", "kept written", 1) == -signal.SIGKILL
    case = Case(tmp_path / "south")
    assert case.site.describe("r", 1).outbox == ()
    after_one = case.update({"id": "t1", "seed": 1}, **MOMENTUM)
    trained = [line for line in (tmp_path / "journal").read_text().splitlines() if line.startswith("trained")]
    assert trained != [f"trained t0 {digest(after_one)}"]
    assert reopened(case).site.describe("r", 1).outbox == ("t1",)
    case.site.close()


def test_killed_at_random_moments_a_store_goes_on_with_the_same_bits(tmp_path: Path, never_killed: list[str]) -> None:
    Case(tmp_path / "south").site.close()
    began = time.monotonic()
    assert run(tmp_path / "south", tmp_path / "other") == 0
    whole_s = time.monotonic() - began
    Case(tmp_path / "again").site.close()
    moments = random.Random(4)
    for _ in range(20):
        run(tmp_path / "again", tmp_path / "journal", after_s=whole_s * moments.uniform(0.3, 1.0))
    assert run(tmp_path / "again", tmp_path / "journal") == 0
    check(tmp_path / "journal", never_killed)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path / "south")
    yield made
    made.site.close()


def test_after_a_restart_what_waits_is_listed_and_given_again(case: Case) -> None:
    reports, updates = [], []
    for seed, name in enumerate("cab"):
        reports.append(case.train({"id": name, "seed": seed}))
        updates.append(case.site.collect(name, []).copy())  # before the next one could write over it
    reopened(case)
    assert case.site.describe("r", 1).outbox == ("c", "a", "b")
    assert case.site.describe("another", 1).outbox == ()
    for name, report, update in zip("cab", reports, updates, strict=True):
        assert case.site.train(replace(case.ticket, id=name), case.plan, case.weights) == report
        assert np.array_equal(case.site.collect(name, [], "r", 1), update)
    case.site.settle(Verdict("a", 1, run="r", epoch=1))
    assert reopened(case).site.describe("r", 1).outbox == ("c", "b")


def test_an_older_epoch_is_refused_by_every_method_and_after_a_restart(case: Case) -> None:
    case.train({"epoch": 2})
    case.site.describe("r", 3)
    for restarted in (False, True):
        site = reopened(case).site if restarted else case.site
        calls: list[Callable[[], object]] = [
            lambda: site.describe("r", 2),  # noqa: B023  called in this turn of the loop
            lambda: site.train(replace(case.ticket, id="t2", epoch=2), case.plan, case.weights),  # noqa: B023
            lambda: site.collect("t1", [], "r", 2),  # noqa: B023
            lambda: site.settle(Verdict("t1", 1, run="r", epoch=2)),  # noqa: B023
            lambda: site.evaluate(case.plan, case.weights, "validation", 2),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(StoreSuperseded, match="epoch 2 of this run is over, epoch 3 has begun"):
                call()
        assert site.describe("r", 3).outbox == ("t1",)
        site.control("next", "stop", "r", 2)
        assert site.train(replace(case.ticket, id="next", epoch=3), case.plan, case.weights).stopped == "done"
        site.settle(Verdict("next", None, run="r", epoch=3))


def test_superseded_arrives_as_an_error_of_its_own(case: Case) -> None:
    said = refusal(StoreSuperseded("epoch 2 is over"), "south", "collect", case.site._log)
    with pytest.raises(StoreSuperseded, match="store south: epoch 2 is over"):
        expect(Card, encode(said))
    assert type(refusal_error(Refusal("south", "refused", "no"))) is StoreRefused


def flip(folder: Path, number: int) -> None:
    file = folder / f"slot-{number}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found_said_and_the_ticket_trained_again_with_the_same_bits(case: Case) -> None:
    first, second = case.update(), case.update({"id": "t2", "seed": 6})
    case.site._outboxes["r"].seal()
    case.site.close()
    flip(case.site._home / "state" / "r", 0)
    reopened(case)
    assert case.site.describe("r", 1).outbox == ("t2",)
    assert "dropped a ticket, it will be trained again" in (case.site._home / "site.log").read_text()
    assert np.array_equal(case.update(), first)
    assert np.array_equal(case.site.collect("t2", []), second)


def test_a_damaged_momentum_is_dropped_and_said(case: Case) -> None:
    first = case.update(**MOMENTUM)
    case.site.settle(Verdict("t1", 1))
    later = case.update({"id": "t2"}, **MOMENTUM)
    case.site.settle(Verdict("t2", None))
    assert not np.array_equal(later, first)
    case.site._outboxes["r"].seal()
    ((kept,),) = [box._kept.values() for box in case.site._outboxes.values()]
    case.site.close()
    assert np.array_equal(reopened(case).update({"id": "t3"}, **MOMENTUM), later)
    case.site.settle(Verdict("t3", None))
    case.site.close()
    flip(case.site._home / "state" / "r", kept.slots[0].number)
    assert np.array_equal(reopened(case).update({"id": "t4"}, **MOMENTUM), first)
    assert "dropped what was kept of the last one" in (case.site._home / "site.log").read_text()


def test_a_damaged_or_empty_entry_is_none(case: Case) -> None:
    case.train()
    case.train({"id": "t2"})
    case.site.close()
    one, two = (case.site._home / "state" / "r").glob("*.ticket")
    one.write_bytes(b"")
    content = bytearray(two.read_bytes())
    content[-1] ^= 1
    two.write_bytes(content)
    assert reopened(case).site.describe("r", 1).outbox == ()


def test_after_a_power_cut_only_what_has_a_checksum_counts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "SEAL_EVERY_S", 0.1)
    case.train()
    until = time.monotonic() + 10
    while not all(held.entry.digests for held in case.site._outboxes["r"]._waiting.values()):
        assert time.monotonic() < until, "nothing is sealed"
        time.sleep(0.05)
    monkeypatch.setattr(boxes.Outbox, "seal", lambda *_, **__: None)
    case.train({"id": "t2"})
    assert reopened(case).site.describe("r", 1).outbox == ("t1", "t2")
    monkeypatch.setattr(boxes, "boot_id", lambda: "another boot")
    assert reopened(case).site.describe("r", 1).outbox == ("t1",)


@pytest.mark.parametrize("limit", [4096, 50], ids=["no room for the update", "no room for the entry"])
def test_a_full_disk_is_one_line_and_loses_nothing(case: Case, limit: int) -> None:
    first = case.update(**MOMENTUM)
    case.site.settle(Verdict("t1", 1))
    kept = case.update({"id": "t2", "seed": 6}, **MOMENTUM)
    if limit == 50:  # its slots are there already
        case.train({"id": "t3"}, **MOMENTUM)
        case.site.settle(Verdict("t3", None))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = case.refused(lambda: case.train({"id": "t3"}, **MOMENTUM))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message == "the store's disk cannot be written: File too large"
    for restarted in (False, True):
        site = reopened(case).site if restarted else case.site
        assert site.describe("r", 1).outbox == ("t2",)
        assert np.array_equal(site.collect("t2", [], "r", 1), kept)
    assert np.array_equal(case.update({"id": "t3", "seed": 6}, **MOMENTUM), kept), "the momentum is that of before"
    assert not np.array_equal(first, kept)


def fill(home: Path, said: Path) -> None:
    case = Case(home)
    case.train()
    with (home / "rubbish").open("wb", buffering=0) as rubbish, contextlib.suppress(OSError):
        while rubbish.write(bytes(4096)):
            pass
    with pytest.raises(StoreClosed) as caught:
        case.train({"id": "t2"})
    assert caught.value.wait_s == 30
    said.write_text(caught.value.message + str(case.site.describe("r", 1).outbox))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small filesystem: needs root")
def test_a_disk_without_a_free_block_ends_no_process(tmp_path: Path) -> None:
    home = tmp_path / "south"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "raypipe-test", str(home)], check=True)
    try:
        assert run(home, tmp_path / "said", work=fill) == 0
        assert "No space left on device; free some room there('t1',)" in (tmp_path / "said").read_text()
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def near(case: Case, ticket: str) -> np.ndarray[Any, Any]:
    """What a coordinator on this machine reads."""
    where = case.site.place(ticket, "r", case.site.collect(ticket, []))
    assert where is not None
    found = Near(case.site._home, "r").read(where)
    assert found is not None
    return found


def test_a_slot_is_used_again_but_not_before_its_ticket_is_settled(case: Case) -> None:
    updates = {f"t{n}": case.update({"id": f"t{n}", "seed": n}) for n in range(OUTBOX)}
    for ticket, update in updates.items():
        assert np.array_equal(case.site.collect(ticket, []), update)
    for ticket in updates:
        case.site.settle(Verdict(ticket, 1))
    slots = sorted((case.site._home / "state" / "r").glob("slot-*"))
    before = [(slot.name, slot.stat().st_ino) for slot in slots]
    for number in range(20, 25):
        case.train({"id": f"t{number}"}, **MOMENTUM)
        case.site.settle(Verdict(f"t{number}", 1))
    after = [(slot.name, slot.stat().st_ino) for slot in sorted((case.site._home / "state" / "r").glob("slot-*"))]
    assert before == after[: len(before)] or len(after) <= OUTBOX + 3
    assert {inode for _, inode in before[:1]} <= {inode for _, inode in after}


def test_beyond_its_bound_the_oldest_goes_first_and_is_named(case: Case) -> None:
    for number in range(OUTBOX + 1):
        case.train({"id": f"t{number}", "max_steps": 1})
        if number == 0:
            oldest = near(case, "t0")
            was = oldest.copy()
    assert case.site.describe("r", 1).outbox == tuple(f"t{n}" for n in range(1, OUTBOX + 1))
    assert f"ticket t0 is dropped: more than {OUTBOX} wait" in (case.site._home / "site.log").read_text()
    case.train({"id": "next", "max_steps": 1, "seed": 99})
    assert np.array_equal(oldest, was), "who reads it yet is not written over"
    assert len(reopened(case).site.describe("r", 1).outbox) == OUTBOX


def test_what_a_process_here_reads_is_the_update_itself_or_nothing(case: Case) -> None:
    update = case.update({"id": "t1"})
    found = near(case, "t1")
    assert np.array_equal(found, update)
    assert not found.flags.writeable
    where = case.site.place("t1", "r", case.site.collect("t1", []))
    assert where is not None
    assert case.site.place("t1", "r", case.site.collect("t1", [{"name": "bfloat16"}])) is None, (
        "encoded: not as it lies"
    )
    assert case.site.place("t2", "r", update) is None
    wrong: list[dict[str, Any]] = [{"inode": where["inode"] + 1}, {"slot": 99}, {"size": where["size"] - 4}]
    wrong += [{"slot": "0"}, {"slot": -1}, {"slot": True}, {"size": 0}, {"device": None}, {"slot": 10**5000}]
    for one in wrong:
        assert Near(case.site._home, "r").read({**where, **one}) is None
    assert Near(case.site._home, "r").read({}) is None
    path = case.site._home / "state" / "r" / f"slot-{where['slot']}"
    path.rename(path.with_name("away"))
    path.symlink_to("away")
    assert Near(case.site._home, "r").read(where) is None, "a link is not followed"
    path.unlink()
    os.mkfifo(path)
    assert Near(case.site._home, "r").read(where) is None, "a pipe is not waited for"
    path.unlink()
    path.with_name("away").rename(path)
    assert Near(case.site._home, "../r").read(where) is None
    here = Near(case.site._home, "r")
    assert here.read(where) is here.read(where), "mapped once"


def test_a_run_belongs_to_one_process_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "LOCK_TRIES", 2)
    case.train()
    other = Site(case.site._home)
    with pytest.raises(StoreError, match="another process of this store is at work on this run"):
        other.describe("r", 1)
    assert other.describe("another", 1).outbox == ()
    case.site.close()
    assert other.describe("r", 1).outbox == ("t1",)
    other.close()


def hold(home: Path, ready: Path) -> None:
    site = Site(home)
    site.describe("r", 1)
    ready.touch()
    os.kill(os.getpid(), signal.SIGSTOP)
    site.close()


def test_a_frozen_process_is_ended_by_its_lock_and_nobody_else_is(case: Case, tmp_path: Path) -> None:
    home = case.site._home
    assert not end_holder(home, "r"), "nobody has it"
    process = processes.Process(target=hold, args=(home, tmp_path / "ready"))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    assert end_holder(home, "r")
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert case.site.describe("r", 1).outbox == ()


def test_what_no_run_uses_goes_after_a_month_and_free_slots_at_once(case: Case) -> None:
    case.train()
    case.train({"id": "t1"}, run="old")
    case.train({"id": "t1"}, run="other")
    case.train({"id": "t2"}, run="other")
    case.site.settle(Verdict("t2", None, run="other"))
    case.site.close()
    state = case.site._home / "state"
    now = time.time()
    os.utime(state / "old", (now, now - UNUSED_S - 100))
    case.site = Site(case.site._home, wall=lambda: now)
    assert sorted(f.name for f in state.iterdir()) == ["other", "r"]
    assert sorted(f.name for f in (state / "other").glob("slot-*")) == ["slot-0"]
    assert case.site.describe("other", 1).outbox == ("t1",)
    assert (state / "r").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "x" * 129])
def test_a_run_that_names_no_folder_is_refused(case: Case, name: str) -> None:
    with pytest.raises(StoreRefused, match="a run's name has letters"):
        case.train(run=name)


def test_any_state_of_plain_parts_and_tensors_comes_back(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "square": torch.rand(5, 7), "half": torch.rand(3).bfloat16()}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "fused": None, "names": ["a", True], "params": [0, 1]}],
        "empty": torch.zeros(0, 4),
        "count": torch.arange(3),
    }
    plan, tensors, size = outline(state)
    slot = Slots(tmp_path).take(size)
    write_tensors(tensors, slot)
    back = filled(plan, slot)
    assert str(back) == str(state)
    assert [t.dtype for t in back["state"][0].values()] == [t.dtype for t in state["state"][0].values()]
    back["count"] += 1
    assert filled(plan, slot)["count"].tolist() == [0, 1, 2], "copies"
    with pytest.raises(StoreError, match="holds a set, which cannot be kept"):
        outline({"a": {1}})


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "adamw"}], ids=lambda part: part["name"])
def test_every_kept_optimizer_goes_on_after_a_restart_as_without_one(case: Case, optimizer: dict[str, Any]) -> None:
    plan = {"optimizer": optimizer, "keep_optimizer": True, "lr": 0.01}
    for number, restarts in itertools.product(range(3), (False, True)):
        site = case.site if not restarts else reopened(case).site
        run = f"run-{restarts}"
        case.train({"id": f"t{number}", "seed": number}, run=run, **plan)
        site.settle(Verdict(f"t{number}", 1, run=run, epoch=1))
    last = [case.site.train(replace(case.ticket, id="last"), replace(case.plan, run=f"run-{r}", **plan), case.weights)
            for r in (False, True)]  # fmt: skip
    updates = [case.site.collect("last", [], f"run-{r}", 1) for r in (False, True)]
    assert last[0].steps == last[1].steps
    assert np.array_equal(*updates)


def alone(home: Path, spoken_to: Path) -> None:
    os.environ["RAYPIPE_STORES"] = str(home)
    from raypipe.store.actor import SiteActor

    actor = SiteActor("south", 1.0, 0.0, 1.0, orphan_s=1.0)
    for _ in range(6):
        time.sleep(0.5)
        actor.heartbeat()
    spoken_to.touch()
    time.sleep(40)
    raise AssertionError("still there")


def test_an_actor_that_no_coordinator_speaks_to_ends_itself(case: Case, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path, tmp_path / "spoken", work=alone) == 0
    assert (tmp_path / "spoken").exists(), "while it is spoken to it stays"
    assert time.monotonic() - began < 30
    assert "this process ends" in (tmp_path / "south" / "site.log").read_text()


@pytest.mark.cluster
def test_a_store_outlives_its_coordinator_and_is_found_again_even_frozen(cluster: Place) -> None:
    from raypipe.placement.actor import connect, shut_down
    from raypipe.store.client import StoreClient

    said = RunConfig.model_validate(cluster.config())
    layout, weights = initial(said.model, 10, 1, 28, 0)
    parts = {"optimizer": said.train.optimizer, "lr": 0.05, "schedule": said.train.schedule, "batch_size": 16}
    plan = encode(
        Plan(run="outlived", task=said.task, model=said.model, data=said.data, layout=layout.fingerprint, **parts)
    )

    def client(epoch: int) -> StoreClient:
        return StoreClient(Store(id="shop-1", cpus=0.2), "outlived", epoch, "c0dec0dec0de", "actor")

    def ticket(epoch: int) -> Ticket:
        return Ticket("t1", "shop-1", epoch, 0, 5, (0.0, 0.1), max_steps=2)

    async def first() -> tuple[int, np.ndarray[Any, Any]]:
        old = client(1)
        card = await old.join()
        await old.train(ticket(1), plan, weights)
        return card.process, (await old.collect("t1", [])).copy()

    async def second(process: int, update: np.ndarray[Any, Any]) -> None:
        old, new = client(1), client(2)
        await old.join()
        card = await new.join()
        assert (card.process, card.outbox) == (process, ("t1",)), "the same actor, found by its name"
        assert np.array_equal(await new.collect("t1", []), update)
        with pytest.raises(StoreSuperseded):
            await old.train(ticket(1), plan, weights)
        old.kill()
        assert await new._actor.heartbeat.remote(), "the older coordinator ends nothing of the newer's"
        os.kill(process, signal.SIGSTOP)
        third = client(3)
        card = await third.join()
        assert (card.process != process, card.outbox) == (True, ("t1",)), "another process, from the store's disk"
        assert not Path(f"/proc/{process}").exists(), "the frozen one was ended"
        assert (await third.train(ticket(3), plan, weights)).ticket == "t1"
        assert np.array_equal(await third.collect("t1", []), update)
        third.kill()

    connect(cluster.address)  # each time as another job
    try:
        found = asyncio.run(first())
    finally:
        shut_down()
    connect(cluster.address)
    try:
        asyncio.run(second(*found))
    finally:
        shut_down()


@pytest.mark.cluster
def test_on_one_node_an_update_is_read_where_it_lies(cluster: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from raypipe.placement.actor import connect, shut_down
    from raypipe.store import client as module

    said = RunConfig.model_validate(cluster.config())
    layout, weights = initial(said.model, 10, 1, 28, 0)
    parts = {"optimizer": said.train.optimizer, "lr": 0.05, "schedule": said.train.schedule, "batch_size": 16}
    plan = encode(
        Plan(run="near", task=said.task, model=said.model, data=said.data, layout=layout.fingerprint, **parts)
    )

    async def joined(here: str) -> tuple[str, Any]:
        monkeypatch.setattr(module, "node_here", lambda: here)  # the cluster's nodes are all on this machine
        store = module.StoreClient(Store(id="shop-1", cpus=0.2), "near", 1, "c0dec0dec0de", "actor")
        return (await store.join()).node, store

    async def trained(store: Any, ticket: str) -> np.ndarray[Any, Any]:
        await store.train(Ticket(ticket, "shop-1", 1, 0, 5, (0.0, 0.1), max_steps=2), plan, weights, [])
        update: np.ndarray[Any, Any] = await store.collect(ticket, [])
        return update

    async def work() -> None:
        node, other = await joined("another node")
        far = await trained(other, "t1")
        _, here = await joined(node)
        near = await trained(here, "t2")
        assert np.array_equal(far, near)
        assert [in_a_slot(update) for update in (far, near)] == [False, True]
        monkeypatch.setattr(module, "stores_home", lambda: Path("/of a container"))
        _, behind = await joined(node)
        sent = []
        for ticket in ("t3", "t4"):
            assert np.array_equal(far, await trained(behind, ticket))
            sent.append(read_receipts(cluster.stores / "shop-1" / "egress" / "near").kinds["update"].messages)
        assert sent == [4, 5], "t3 was sent twice: only then was it known that it cannot be mapped"

    connect(cluster.address)
    try:
        asyncio.run(work())
    finally:
        shut_down()


def in_a_slot(vector: np.ndarray[Any, Any]) -> bool:
    """Whether the memory it lies in is one of a store's slot files."""
    at = vector.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= at < end:
            return "/slot-" in line
    raise AssertionError("an address that is not mapped")
