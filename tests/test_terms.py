"""What a store's policy says of now: hours, a day's bytes, a rate, and its owner's wish to have the machine."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import psutil
import pytest
from conftest import Place
from test_cluster import Federation, connected, state
from test_machine import join_all, machine, of
from test_site import Case, write

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.board import Board
from raypipe.coordinator.policy import pace
from raypipe.coordinator.stores import WARM_UP_S
from raypipe.errors import ConfigError, StoreClosed, StoreError, StoreRefused, StoreUnreachable
from raypipe.ledger.keys import digest
from raypipe.store.actor import SiteActor
from raypipe.store.going import MADE_UP_S, TRIES, Going, Pace, fetched
from raypipe.store.gpu_load import holders, load_of_others
from raypipe.store.hours import closes, opens, parse
from raypipe.store.messages import PROTOCOL, Card, Refusal, Report, Verdict, encode, expect
from raypipe.store.policy import read_policy
from raypipe.store.site import Site
from raypipe.store.terms import Pacer, Terms
from raypipe.vault.transfer import Piece

NIGHT = [parse("22:00-06:00")]


def at(text: str, zone: str | None = None) -> datetime:
    """`2026-03-02 05:00`, naive or in a zone."""
    return datetime.fromisoformat(text).replace(tzinfo=None if zone is None else ZoneInfo(zone))


@pytest.mark.parametrize(
    ("hours", "now", "then"),
    [
        ([], "2026-03-02 12:00", None),
        (["22:00-06:00"], "2026-03-02 23:59", None),
        (["22:00-06:00"], "2026-03-02 05:59", None),
        (["22:00-06:00"], "2026-03-02 06:00", "2026-03-02 22:00"),
        (["22:00-06:00"], "2026-03-02 21:59", "2026-03-02 22:00"),
        (["06:00-22:00"], "2026-03-02 23:00", "2026-03-03 06:00"),
        (["12:00-13:00", "22:00-06:00"], "2026-03-02 08:00", "2026-03-02 12:00"),
        (["12:00-13:00", "22:00-06:00"], "2026-03-02 13:00", "2026-03-02 22:00"),
        (["12:00-13:00", "22:00-06:00"], "2026-03-02 12:30", None),
    ],
)
def test_hours_open_when_they_say_over_midnight_too(hours: list[str], now: str, then: str | None) -> None:
    expected = None if then is None else at(then)
    assert opens([parse(one) for one in hours], at(now)) == expected


def test_hours_close_when_the_last_of_those_that_go_on_ends() -> None:
    both = [parse("20:00-23:00"), *NIGHT]
    assert closes(both, at("2026-03-02 22:30")) == at("2026-03-03 06:00")
    assert closes(both, at("2026-03-02 21:00")) == at("2026-03-02 23:00")
    assert closes(both, at("2026-03-02 12:00")) is None
    assert closes([], at("2026-03-02 12:00")) is None


def test_hours_of_another_zone_are_of_its_wall_clock_also_on_the_day_when_clocks_change() -> None:
    berlin = [parse("06:00-08:00 Europe/Berlin")]
    then = opens(berlin, at("2026-03-28 23:00", "UTC"))  # the night in which Berlin goes from UTC+1 to UTC+2
    assert then is not None
    assert then.astimezone(UTC) == at("2026-03-29 04:00", "UTC")
    assert opens(berlin, at("2026-03-29 04:30", "UTC")) is None


def policy(home: Path, **said: Any) -> Any:
    home.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{key}: {value}\n" for key, value in said.items())
    (home / "policy.yaml").write_text("store: south\n" + lines)
    return read_policy(home)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("hours: 9-17", "policy.yaml: hours '9-17': HH:MM-HH:MM, and a time zone if it is not the store's own"),
        ("hours: [22:00-06:00, 25:00-26:00]", "policy.yaml: hours '25:00-26:00': HH:MM-HH:MM"),
        ("hours: 09:00-17:00 Mars/Base", "policy.yaml: hours '09:00-17:00 Mars/Base': no time zone 'Mars/Base'"),
        ("hours: 09:00-09:00", "policy.yaml: hours '09:00-09:00' are no time at all; none means always"),
        ("hours: 7", "policy.yaml: hours are written HH:MM-HH:MM, or a list of such"),
        ("upload_bytes_a_day: 0", "policy.yaml: upload_bytes_a_day: input should be greater than or equal to 1"),
        ("yield_gpu_load: 30", "policy.yaml: yield_gpu_load: input should be less than or equal to 1"),
        ("max_upload_bytes_s: -1", "policy.yaml: max_upload_bytes_s: input should be greater than 0"),
        ("yeld_file: busy", "policy.yaml: no key 'yeld_file'. Did you mean 'yield_file'?"),
    ],
)
def test_terms_that_are_wrong_get_one_line(tmp_path: Path, said: str, problem: str) -> None:
    (tmp_path / "policy.yaml").write_text(f"store: south\n{said}\n")
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path)
    (line,) = caught.value.problems
    assert line.startswith(problem)


def local(text: str) -> float:
    return at(text).timestamp()


def test_a_closed_store_says_until_when_and_an_open_one_how_long(tmp_path: Path) -> None:
    now = [local("2026-03-02 07:00")]
    terms = Terms(tmp_path, policy(tmp_path, hours="22:00-06:00"), lambda: now[0])
    with pytest.raises(StoreClosed, match=r"^closed until 22:00, by its hours$") as caught:
        terms.begin()
    assert caught.value.wait_s == 15 * 3600
    now[0] = local("2026-03-02 22:30")
    assert terms.begin() == 7.5 * 3600
    assert Terms(tmp_path, policy(tmp_path), lambda: now[0]).begin() is None
    late = Terms(tmp_path, policy(tmp_path, hours="06:00-07:00"), lambda: now[0])
    with pytest.raises(StoreClosed, match="closed until Tuesday 06:00, by its hours"):
        late.begin()


def test_a_days_bytes_outlive_the_process_and_begin_anew_at_midnight_utc(tmp_path: Path) -> None:
    now = [at("2026-03-02 18:00", "UTC").timestamp()]

    def terms() -> Terms:
        return Terms(tmp_path, policy(tmp_path, upload_bytes_a_day=100), lambda: now[0])

    terms().leave(60)
    terms().begin(40)
    with pytest.raises(
        StoreClosed, match=r"today's upload bytes are spent \(100 by the store's limits\), until 00:00 U"
    ):
        terms().begin(41)
    with pytest.raises(StoreClosed) as caught:
        terms().leave(41)
    assert caught.value.wait_s == 6 * 3600
    with pytest.raises(StoreRefused, match="an update has 101 bytes, the store's policy allows 100 a day") as never:
        terms().begin(101)
    assert not isinstance(never.value, StoreClosed), "no day would do"
    now[0] += 6 * 3600
    terms().leave(100)


def test_a_closed_store_s_word_travels_and_an_older_peer_takes_it_for_a_refusal() -> None:
    error = StoreClosed("closed until 22:00", 5.0)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  as Ray does
    assert (type(again), again.message, again.wait_s) == (StoreClosed, "closed until 22:00", 5.0)
    told = Refusal("south", "refused", "closed until 22:00", "t1", 5.0)
    with pytest.raises(StoreClosed, match="store south: closed until 22:00") as caught:
        expect(Card, encode(told))
    assert caught.value.wait_s == 5.0
    assert "wait_s" not in msgpack.unpackb(encode(told, PROTOCOL - 1))["body"]


def open_case(home: Path, now: list[float], **said: Any) -> Case:
    return Case(write(home, **said), site={"wall": lambda: now[0]})


def test_a_site_trains_judges_and_measures_only_in_its_hours(tmp_path: Path) -> None:
    now = [local("2026-03-02 12:00")]
    case = open_case(tmp_path / "south", now, hours="22:00-06:00")
    for ask in (
        case.train,
        lambda: case.site.evaluate(case.plan, case.weights, "validation"),
        lambda: case.site.measure(case.plan, case.weights, "gram"),
    ):
        with pytest.raises(StoreClosed) as caught:
            ask()
        assert case.site.refusal(caught.value, "train").wait_s == 10 * 3600
    now[0] = local("2026-03-02 22:00")
    assert case.train().steps == 6


def test_a_ticket_ends_when_the_store_closes(tmp_path: Path) -> None:
    now = [local("2026-03-03 05:59") + 59.7]
    case = open_case(tmp_path / "south", now, hours="22:00-06:00")
    begin = time.monotonic()
    report = case.train({"max_epochs": 1e6})
    assert report.stopped == "budget"
    assert time.monotonic() - begin < 20


def test_a_site_pays_what_leaves_and_trains_nothing_that_could_not_leave_today(tmp_path: Path) -> None:
    now = [at("2026-03-02 12:00", "UTC").timestamp()]
    size = 4 * Case(tmp_path / "plain").layout.update_size
    case = open_case(tmp_path / "south", now, upload_bytes_a_day=int(1.5 * size))
    case.update()
    with pytest.raises(StoreClosed, match="upload bytes are spent"):
        case.train({"id": "t2"})
    assert case.site.describe("r").outbox == ("t1",), "nothing was trained for nothing"
    case.site.close()
    case.site = Site(tmp_path / "south", wall=lambda: now[0])
    with pytest.raises(StoreClosed):
        case.train({"id": "t3"})
    now[0] += 86400
    case.update({"id": "t4"})


def test_a_pacer_lets_bytes_go_at_the_rate_without_saving_up_a_burst() -> None:
    pacer = Pacer(10.0)
    assert [pacer.take(50, now) for now in (100.0, 100.0, 103.0, 1000.0)] == [0.0, 5.0, 7.0, 0.0]


def test_an_update_goes_in_pieces_of_which_each_has_its_time() -> None:
    update = np.arange(30_000, dtype="<f4")
    going = Going(update, Pace(80_000.0, 10.0))
    update[:] = 0  # its slot was given to another
    at_byte, pieces, times = 0, [], [10.0]
    while at_byte < going.about["num_bytes"]:
        piece, due_at = going.piece(at_byte, now=times[-1])
        pieces.append(piece.data)
        times.append(due_at)
        at_byte += len(piece.data)
    assert np.array_equal(np.frombuffer(b"".join(pieces), going.about["dtype"]), np.arange(30_000, dtype="<f4"))
    assert times[-1] == pytest.approx(10.0 + 120_000 / 80_000.0)
    assert max(np.diff(times)) <= 0.26


def test_two_updates_on_their_way_and_what_goes_again_have_one_rate_and_a_cut_is_not_made_up_for() -> None:
    pace = Pace(80_000.0, 0.0)
    first, second = (Going(np.zeros(30_000, "<f4"), pace) for _ in range(2))
    size = len(first.piece(0, now=0.0)[0].data)
    dues = [second.piece(0, now=0.0)[1], first.piece(0, now=0.0)[1], first.piece(size, now=0.0)[1]]
    assert dues == pytest.approx([2 * size / 80_000, 3 * size / 80_000, 4 * size / 80_000])
    for number in range(1, 9):  # the link was away for a minute
        due_at = second.piece(0, now=60.0)[1]
        assert due_at == pytest.approx(60.0 - MADE_UP_S + number * size / 80_000)


def test_a_fetch_that_is_cut_in_its_middle_fetches_the_rest_only() -> None:
    update = np.arange(60_000, dtype="<f4")
    going, asked = Going(update, Pace(80_000.0, 0.0)), list[int]()

    async def ask(at_byte: int) -> Piece:
        asked.append(at_byte)
        piece = going.piece(at_byte, now=0.0)[0]
        if len(asked) == 5:
            raise StoreUnreachable("store a: its node does not answer")
        return replace(piece, data=bytes(len(piece.data))) if len(asked) == 8 else piece

    found = asyncio.run(fetched(going.about, ask, pause_s=0))
    assert (found.dtype, found.tobytes()) == (update.dtype, update.tobytes())
    step = asked[1]
    assert asked == sorted([*range(0, update.nbytes, step), 4 * step, 6 * step]), "the cut one, the damaged one"


@pytest.mark.parametrize("error", [StoreUnreachable("gone"), StoreError("it is kept no longer; collect it again")])
def test_a_fetch_of_what_does_not_come_any_more_ends(error: StoreError) -> None:
    asked = list[int]()

    async def ask(at_byte: int) -> Piece:
        asked.append(at_byte)
        raise error

    with pytest.raises(StoreError) as caught:
        asyncio.run(fetched(Going(np.zeros(9), Pace(1.0, 0.0)).about, ask, pause_s=0))
    assert caught.value is error
    assert len(asked) == (TRIES if isinstance(error, StoreUnreachable) else 1)
    wrong = {**Going(np.zeros(9), Pace(1.0, 0.0)).about, "digest": digest(np.ones(9))}

    async def other(at_byte: int) -> Piece:
        return Going(np.zeros(9), Pace(1.0, 0.0)).piece(at_byte, now=0.0)[0]

    with pytest.raises(StoreError, match="not the one that was announced"):
        asyncio.run(fetched(wrong, other, pause_s=0))


def test_an_update_is_fetched_whole_though_the_next_one_is_ready_meanwhile(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", max_upload_bytes_s=1e7)
    actor = SiteActor("south", 1.0, 0.0, 1.0, orphan_s=1e9, transport="vault")  # it has no site of its own
    actor._site = case.site
    first, second = case.update({"id": "t1"}), case.update({"id": "t2", "seed": 6})
    about = [actor.collect(ticket, [], "r", 1) for ticket in ("t1", "t2")]

    async def piece(ticket: str, at_byte: int) -> Piece:
        answer = actor.piece(ticket, at_byte)
        assert isinstance(answer, tuple)
        return Piece(*answer)

    found = [asyncio.run(fetched(a, partial(piece, t))) for a, t in zip(about, ("t1", "t2"), strict=True)]
    assert [array.tobytes() for array in found] == [first.tobytes(), second.tobytes()]
    assert first.tobytes() != second.tobytes()
    actor.settle([encode(Verdict("t1", 1, run="r", epoch=1))])
    refused = actor.piece("t1", 0)
    assert isinstance(refused, bytes)
    with pytest.raises(StoreError, match="it is kept no longer"):
        expect(Report, refused)


def until(happened: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_while_the_yield_file_is_there_nothing_is_computed_and_no_time_counts(tmp_path: Path) -> None:
    case = Case(write(tmp_path / "south", yield_file="busy"))
    busy = tmp_path / "south" / "busy"
    reports: list[Any] = []
    busy.touch()
    thread = threading.Thread(target=lambda: reports.append(case.train({"budget_s": 0.5, "max_epochs": None})))
    thread.start()
    until(case.site.pausing, "it pauses before its first batch")
    time.sleep(0.7)
    assert not reports, "the pause took its budget"
    busy.unlink()
    until(lambda: not case.site.pausing(), "it goes on")
    busy.touch()
    until(case.site.pausing, "it pauses between batches")
    assert "yield file" in case.site.pausing()
    time.sleep(0.5)
    busy.unlink()
    thread.join(20)
    (report,) = reports
    assert 0.4 < report.seconds < 1.0
    assert report.stopped == "budget"
    assert case.site.pausing() == ""


def test_a_pause_ends_by_a_stop_and_after_closing_nothing_goes_on(tmp_path: Path) -> None:
    now = [local("2026-03-02 23:00")]
    case = open_case(tmp_path / "south", now, yield_file="busy", hours="22:00-06:00")
    busy = tmp_path / "south" / "busy"
    reports: list[Any] = []
    for number, end in enumerate((lambda: case.site.control("*", "stop"), busy.unlink)):
        busy.touch()
        asked = {"id": f"x{number}", "max_epochs": 1e6}
        thread = threading.Thread(target=lambda asked=asked: reports.append(case.train(asked)))  # type: ignore[misc]
        thread.start()
        until(case.site.pausing, "it pauses")
        if number:
            now[0] += 8 * 3600
        end()
        thread.join(20)
        assert reports[number].stopped == "control"
        assert reports[number].steps == 1


PMON = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       3485     C     62      7      -      -      -      -    python
    0       1941   C+G      -      -      -      -      -      -    shell
    1       1312     G     24      3      -      -      -      -    Xorg
    1       5678     C     15      4      -      -      -      -    detect
    2          -     -      -      -      -      -      -      -    -
"""
OLDER = """\
# gpu        pid  type    sm   mem   enc   dec   command
# Idx          #   C/G     %     %     %     %   name
    0       3485     C    62     7     0     0   python
"""


def test_a_gpus_load_is_what_others_have_of_the_busiest_one() -> None:
    assert load_of_others(PMON, lambda process: False) == 0.62
    assert load_of_others(PMON, lambda process: process == 3485) == pytest.approx(0.39)
    assert load_of_others(OLDER, lambda process: False) == 0.62
    assert load_of_others(OLDER, lambda process: True) == 0.0
    for printed in ("", "No devices were found\n", PMON + "Unable to determine\n"):
        with pytest.raises(ValueError):  # noqa: PT011  every kind of it
            load_of_others(printed, lambda process: False)


def test_while_others_need_the_gpu_nothing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a driver prints, which is written here: of the site's own process, of one that it started, of another."""
    shown, program = tmp_path / "shown", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$*" = "pmon -c 1 -s u" ] && cat {shown}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    child = subprocess.Popen(["sleep", "60"])
    own = OLDER.replace("3485", str(os.getpid())) + f"    0 {child.pid} C 30 1 - - rank\n"
    write_whole(shown, own)
    case = Case(write(tmp_path / "south", yield_gpu_load=0.4))
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(case.train({"budget_s": 3.0, "max_epochs": None})))
    thread.start()
    try:
        time.sleep(1.0)
        assert case.site.pausing() == "", "it took its own work for another's"
        write_whole(shown, own + "    0 1 C 45 1 - - checkout\n")
        began = time.monotonic()
        until(case.site.pausing, "it pauses")
        assert time.monotonic() - began < 2
        assert case.site.pausing() == "its owner needs the machine (GPU load)"
        write_whole(shown, own)
        time.sleep(1.0)
        assert case.site.pausing(), "a checkout computes in bursts"
        until(lambda: not case.site.pausing(), "it goes on")
        write_whole(shown, "Failed to initialize NVML\n")
        until(case.site.pausing, "what cannot be known is taken for a need")
        assert "GPU load, which cannot be read" in case.site.pausing()
        case.site.control("*", "stop")
    finally:
        thread.join(20)
        child.kill()
        child.wait()
    assert reports[0].seconds < 3.0, "a pause counted"


def write_whole(path: Path, text: str) -> None:
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


def test_who_works_on_another_run_of_the_store_is_none_of_the_others(tmp_path: Path) -> None:
    lock = tmp_path / "state" / "run-1" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(str(os.getpid()))
    assert holders(tmp_path) == set(), "its number is another's by now"
    with lock.open():
        assert holders(tmp_path) == {os.getpid()}


def test_a_machine_that_cannot_tell_its_gpus_load_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^yield_gpu_load: there is no nvidia-smi on this machine"):
        Site(write(tmp_path / "south", yield_gpu_load=0.5))


# -- the coordinator ----------------------------------------------------------------------------------------


def test_a_closed_store_is_asked_again_when_it_opens_and_has_no_strike() -> None:
    m = machine(pace("wait_for_all", 2, {"max_failures": 1, "max_versions": 9}), 2)
    tickets = {a.store: a for a in of(do.Train, join_all(m))}
    actions = m.handle(ev.Deferred(tickets["s1"].ticket, "closed until 06:00, by its hours", 3600.0, 1.0))
    closed, released = of(do.Record, actions)
    assert (closed.kind, closed.body["reason"]) == ("store_closed", "closed until 06:00, by its hours")
    assert (released.kind, released.body["reason"]) == ("store_released", "it is closed")
    assert m.members["s1"].failures == 0
    m.handle(ev.Trained(tickets["s0"].ticket, 1, 1, 1, 1.0, 1.0, 2.0))
    m.handle(ev.UpdateArrived(tickets["s0"].ticket, 4, 2.0))
    assert of(do.Publish, m.handle(ev.Folded((tickets["s0"].ticket,), (), 2.0))), "nobody waits for it"
    assert [a.store for a in of(do.Train, m.handle(ev.Published(1, 3.0)))] == ["s0"]
    assert [a.store for a in of(do.Train, m.handle(ev.Tick(3600.0)))] == []
    m = machine(pace("delta_async", 2, {"max_versions": 9}), 2)
    tickets = {a.store: a for a in of(do.Train, join_all(m))}
    m.handle(ev.Deferred(tickets["s1"].ticket, "closed", 50.0, 1.0))
    assert m.wake_at() == 51.0
    assert [a.store for a in of(do.Train, m.handle(ev.Tick(51.0)))] == ["s1"]


def test_a_run_whose_stores_are_all_closed_waits_for_the_night() -> None:
    m = machine(pace("fedbuff", 2, {"join_s": 120.0, "max_versions": 9}), 2)
    for ticket in of(do.Train, join_all(m)):
        m.handle(ev.Deferred(ticket.ticket, "closed until 22:00, by its hours", 10 * 3600.0, 1.0))
    assert m.handle(ev.Tick(9 * 3600.0)) == []
    assert m.ending is None
    assert [a.store for a in of(do.Ask, m.handle(ev.Tick(10 * 3600.0 + 1)))] == ["s0", "s1"]
    assert len(of(do.Train, join_all(m, 10 * 3600.0 + 5))) == 2


def test_a_store_that_pauses_is_not_hung_however_long_and_after_a_while_not_waited_for() -> None:
    m = machine(pace("wait_for_all", 2, {"deadline_s": 10.0, "hung_s": 5.0, "max_versions": 9}), 2)
    tickets = {a.store: a.ticket for a in of(do.Train, join_all(m))}
    m.handle(ev.Trained(tickets["s0"], 1, 1, 1, 1.0, 1.0, 1.0))
    (record,) = of(do.Record, m.handle(ev.StorePaused("s1", "its owner needs the machine", 2.0)))
    assert record.kind == "store_paused"
    m.handle(ev.UpdateArrived(tickets["s0"], 4, 3.0))
    assert of(do.Publish, m.handle(ev.Folded((tickets["s0"],), (), 3.0))) == []
    assert m.wake_at() == 7.0
    assert of(do.Publish, m.handle(ev.Tick(7.0))), "hung_s after its pause began, nobody waits for it"
    assert of(do.Restart, m.handle(ev.Tick(5000.0))) == []
    (record,) = of(do.Record, m.handle(ev.StoreWentOn("s1", 5002.0)))
    assert (record.kind, record.body["seconds"]) == ("store_went_on", 5000.0)
    hung_at = 10.0 + 5.0 + WARM_UP_S + 5000.0
    assert of(do.Restart, m.handle(ev.Tick(hung_at - 0.1))) == []
    assert [a.store for a in of(do.Restart, m.handle(ev.Tick(hung_at)))] == ["s1"], "what hangs then is hung"


def test_a_slow_link_by_policy_is_not_hung() -> None:
    m = machine(pace("wait_for_all", 1, {"hung_s": 5.0, "deadline_s": 50.0, "max_versions": 9}), 1)
    (ticket,) = of(do.Train, m.handle(ev.StoreJoined("s0", 100, 0.0, (), 1000.0)))
    trained = replace(ev.Trained(ticket.ticket, 1, 1, 1, 1.0, 1.0, 10.0), update_bytes=500_000)
    assert of(do.Collect, m.handle(trained))
    assert of(do.Restart, m.handle(ev.Tick(1014.0))) == []
    assert of(do.Restart, m.handle(ev.Tick(1015.0)))


def test_the_table_shows_why_a_store_is_closed_or_pauses() -> None:
    board = Board("accuracy")
    board.add("store_joined", {"store": "a", "counts": {"train": 1}})
    board.training("a", 0)
    board.add("store_paused", {"store": "a", "reason": "its owner needs the machine (yield file)"})
    assert (board.rows["a"].state, board.rows["a"].reason) == ("paused", "its owner needs the machine (yield file)")
    board.add("store_went_on", {"store": "a", "seconds": 3.2})
    assert board.rows["a"].state == "training"
    board.ready("a")
    board.add("store_closed", {"store": "a", "reason": "closed until 22:00, by its hours", "wait_s": 1.0})
    assert (board.rows["a"].state, board.rows["a"].reason) == ("closed", "closed until 22:00, by its hours")
    assert board.lines[-1] == "a is closed: closed until 22:00, by its hours"


def cpu_s(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


@pytest.mark.cluster
def test_a_real_store_pauses_within_two_seconds_and_another_hands_over_at_its_rate(cluster: Place) -> None:
    """shop-1 by its yield file, seen in the table and the record, without being restarted; shop-2, which trains in two
    processes, in pieces."""
    terms = {"shop-1": "yield_file: checkout", "shop-2": "max_upload_bytes_s: 150000"}
    before = {store: (cluster.stores / store / "policy.yaml").read_text() for store in terms}
    for store, line in terms.items():
        (cluster.stores / store / "policy.yaml").write_text(f"{before[store]}\n{line}\n")
    checkout = cluster.stores / "shop-1" / "checkout"
    pacing = {"budget_s": 1.0, "heartbeat_s": 1, "hung_s": 2}
    limits = {"local_steps": None}
    names = [{"id": store, "cpus": 0.2, "ranks": 1 + (store == "shop-2")} for store in terms]
    config = cluster.config(
        pace="paced", pacing=pacing, train=limits, stop={"max_versions": 5000}, track={"mlflow": False}, stores=names
    )
    try:
        with connected(cluster):
            federation = Federation(cluster, config)
            both = {"shop-1", "shop-2"}

            def by_both(board: dict[str, Any]) -> bool:
                made = federation.records("version_published") if board["version"] else []
                return {c["store"] for v in made for c in v["contributions"]} == both

            federation.until(by_both, 120)
            pid = federation.processes()["shop-1"]
            (rank,) = psutil.Process(federation.processes()["shop-2"]).children()
            checkout.touch()
            time.sleep(2)
            at_rest = cpu_s(pid)
            board = federation.until(lambda b: b if state(b, "shop-1") == "paused" else None, 30)
            (row,) = [row for row in board["rows"] if row["store"] == "shop-1"]
            assert row["reason"] == "its owner needs the machine (yield file)"
            version = board["version"]
            time.sleep(5)
            assert federation.until(lambda b: b["version"] > version, 30), "the others go on"
            assert cpu_s(pid) - at_rest < 1.5, "it went on computing"
            checkout.unlink()
            gone_on = federation.until(lambda b: federation.records("store_went_on"), 30)
            since = federation.board()["version"]
            federation.until(lambda b: any(c["store"] == "shop-1" for v in federation.records("version_published")
                                           if v["version"] > since for c in v["contributions"]), 60)  # fmt: skip
            assert federation.processes()["shop-1"] == pid
            federation.actor.stop.remote("seen enough")
            federation.result()
        rank.wait(20)  # it ends with its store's actor
        assert gone_on[0]["seconds"] > 4
        assert [r["store"] for r in federation.records("store_left")] == []
        assert [r["reason"] for r in federation.records("ticket_failed")] == []
    finally:
        for store, text in before.items():
            (cluster.stores / store / "policy.yaml").write_text(text)
        checkout.unlink(missing_ok=True)
