"""The chaos suite: random histories hold, its checks find what is wrong, and a short real run survives."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import numpy as np
import psutil
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import make
from test_shell import NAMES, SitePort, config, records, run

from raypipe.aggregation.variates import Variate, Variates
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.policy import Policy
from raypipe.ledger.keys import digest
from raypipe.tracking.book import RunBook
from raypipe.tracking.versions import VersionStore, read_state, save_state
from raypipe.types import Layout, Role

sys.path.insert(0, str(ROOT / "jobs"))

from chaos_bugs import BUGS
from chaos_disk import DEATHS
from chaos_pairs import IMPOSSIBLE
from chaos_planted import look, plant
from chaos_pure import History, blocks, play, random_policy
from chaos_real import QUICK, Chaos, figures, kills_of, schedule


def test_a_federation_that_dies_at_every_write_and_others_that_die_anywhere_lose_nothing() -> None:
    total, _ = blocks(seed=3, histories=250, workers=1)
    assert total.violations == []
    assert total.swept >= 1
    assert {how for _, how in total.deaths} == set(DEATHS)
    assert not set(total.seen) & set(IMPOSSIBLE)


SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
deaths = st.dictionaries(st.integers(1, 120), st.sampled_from(DEATHS), max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), deaths)
def test_whatever_moment_the_coordinator_dies_each_update_counts_once(seed: int, deaths: dict[int, str]) -> None:
    with TemporaryDirectory(dir=SHM) as folder:
        assert play(History(seed, deaths), Path(folder)).violations == []


def test_nothing_is_done_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real shell with real sites: diary before act, weights before record, disk before settle."""
    done: list[str] = []

    def watch(owner: Any, name: str, what: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            answer = real(*arguments, **more)
            done.append(f"{name} {what(*arguments, **more)}")
            return answer

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    watch(Diary, "note", lambda diary, event, actions: " ".join(decided(a) for a in actions))
    watch(RunBook, "write", lambda book, version, *_: str(version))
    watch(RunBook, "record", lambda book, kind, body: f"{kind} {body.get('version')}")
    watch(SitePort, "settle", lambda port, verdict: f"{verdict.ticket} {verdict.version}")
    real_train = SitePort.train

    async def train(port: SitePort, ticket: Any, *rest: Any) -> Any:
        done.append(f"train {ticket.id} {ticket.version}")
        return await real_train(port, ticket, *rest)

    monkeypatch.setattr(SitePort, "train", train)
    make(tmp_path / "stores")
    train_said = {"local_steps": 2, "batch_size": 16, "control_variates": True}
    said = config(stop={"max_versions": 3}, train=train_said, server="adam")
    run(said, tmp_path, {n: SitePort(tmp_path / "stores" / n) for n in NAMES})
    kept = {body["version"]: body for body in records(tmp_path, "weights_kept")}
    assert all({"state", "variates"} <= set(body) for body in kept.values())
    for place, line in enumerate(done):
        so_far, (what, about, *rest) = done[:place], (line + " ").split(" ")[:3]
        if what == "train":
            assert any(s.startswith("note") and f"Train/{about}" in s for s in so_far), "asked before it was noted"
            assert f"record version_published {rest[0]}" in so_far, "asked before its base was a fact"
        elif what == "settle" and rest != ["None"]:
            assert f"record weights_kept {rest[0]}" in so_far, "settled before it is kept"
        elif about == "weights_kept":
            forced = {s.removeprefix("fsync ") for s in so_far if s.startswith("fsync")}
            number = f"{int(rest[0]):05d}"
            needed = {f"v{number}.1.part", f"state-v{number}.safetensors", f"v{number}.json", "variates", "run"}
            assert needed <= forced, f"kept, but not on the disk: {needed - forced}"
            table = tmp_path / "runs" / "run" / "variates" / f"v{number}.json"
            named = {row[0] for row in json.loads(table.read_text()).values()} if table.is_file() else set()
            assert named <= forced, f"kept, but variates are not on the disk: {named - forced}"
        elif about == "version_published" and rest != ["0"]:
            assert f"write {rest[0]}" in so_far, "a fact before its weights"
            (noted,) = [p for p, s in enumerate(so_far) if s.startswith("note") and f"Publish/{rest[0]}" in s]
            synced = [s for s in so_far[noted:] if s.startswith("fsync") and s.endswith(".jsonl")]
            assert synced, "the record is on the disk before the diary"
    assert {line.split()[0] for line in done} == {"fsync", "note", "write", "record", "settle", "train"}


def decided(action: Any) -> str:
    return f"{type(action).__name__}/{getattr(action, 'ticket', getattr(action, 'version', ''))}"


def test_what_is_damaged_is_not_recovered(tmp_path: Path) -> None:
    layout = Layout.of([("w", (40,), "float32", Role.SHARED)])
    vector = np.zeros(layout.size, np.float32)
    vector[:40] = np.arange(40)
    store, state = VersionStore(tmp_path / "versions"), {"m": np.ones(40, np.float32)}
    store.write(1, vector, layout, {})
    save_state(tmp_path, 1, state)
    assert np.array_equal(store.recover(1, layout, digest(vector)), vector), "written is enough"
    store.keep(1)
    assert np.array_equal(store.recover(1, layout, digest(vector)), vector)
    assert np.array_equal(read_state(tmp_path, 1)["m"], state["m"])
    for file in (store.path(1), tmp_path / "state-v00001.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    assert store.recover(1, layout, digest(vector)) is None
    assert read_state(tmp_path, 1) is None


def test_a_state_or_table_that_is_whole_but_another_than_was_kept_is_not_gone_on_from(tmp_path: Path) -> None:
    book, layout = RunBook(tmp_path, 5, (10,), lambda: 0.0), Layout.of([("w", (40,), "float32", Role.SHARED)])

    def write(value: float) -> None:
        vector = np.full(layout.size, value, np.float32)
        book.write(1, vector, layout, {"m": vector})
        book.variates.write(1, Variates.of({"a": Variate(vector, 1.0, 0)}))

    write(1.0)
    book.keep(1)
    assert book.state(1)["m"][0] == 1.0
    assert book.table(1).known["a"].values[0] == 1.0
    write(2.0)
    for again in (book, RunBook(tmp_path, 5, (10,), lambda: 0.0)):
        list(again.past())
        assert again.state(1) is None
        assert again.table(1) is None
    book.record("version_withdrawn", {"version": 1})
    assert book.state(1)["m"][0] == 2.0
    book.keep(1)
    assert book.table(1).known["a"].values[0] == 2.0


def test_an_update_of_a_withdrawn_version_is_in_none(tmp_path: Path) -> None:
    book = RunBook(tmp_path, 5, (10,), lambda: 0.0)
    for version in (1, 2):
        book.record("version_published", {"version": version, "contributions": [{"ticket": f"t{version}"}]})
    assert [book.folded_into(f"t{v}") for v in (1, 2)] == [1, 2]
    book.record("version_withdrawn", {"version": 2})
    assert [book.folded_into(f"t{v}") for v in (1, 2)] == [1, None]
    again = RunBook(tmp_path, 5, (10,), lambda: 0.0)
    list(again.past())
    assert [again.folded_into(f"t{v}") for v in (1, 2)] == [1, None]


def test_random_policies_vary_every_field() -> None:
    """And leave each out that may be left out: what never varies is not fuzzed."""
    drawn = [random_policy(random.Random(seed)) for seed in range(2000)]
    for field, kind in get_type_hints(Policy).items():
        values = {getattr(policy, field) for policy in drawn}
        if field == "weigh_staleness":
            values = {tuple(weigh(late) for late in range(4)) for weigh in values}
        assert len(values - {None}) >= (1 if field == "central" else 2), field
        assert (None in values) == (type(None) in get_args(kind)), field


def test_every_planted_bug_fits_in_its_place(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        place = tmp_path / str(number) / "raypipe" / bug.file
        place.parent.mkdir(parents=True)
        shutil.copy(ROOT / "raypipe" / bug.file, place)
        plant(bug, tmp_path / str(number))
        ast.parse(place.read_text())
    assert len({bug.name for bug in BUGS}) >= 20
    with pytest.raises(ValueError, match="its place is 0 times"):
        plant(BUGS[0], tmp_path / "0")


@pytest.mark.parametrize("name", ["a double fold", "a lost write: what changes nothing to be seen is not noted"])
def test_a_planted_bug_is_found(name: str) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == name]
    found = look(bug)
    assert found.found
    assert "seed 100" in found.said


class Somewhere:
    """A place of chaos that is one process and a folder."""

    def __init__(self, home: Path) -> None:
        self.home, self.names = home, ["shop-1"]
        self.victims: list[psutil.Process] = []

    def workers(self, what: str, raylet: object) -> list[psutil.Process]:
        return self.victims

    def raylet(self, store: str | None = None) -> None:
        return None


def test_a_coordinators_long_wait_is_neither_lost_nor_blamed_on_it_when_more_struck(tmp_path: Path) -> None:
    place, diary = Somewhere(tmp_path), tmp_path / "runs" / "chaos-1" / "diary"
    diary.mkdir(parents=True)
    chaos: Any = Chaos(0, place, tmp_path / "chaos.yaml")  # type: ignore[arg-type]

    def begin(number: int) -> None:
        (diary / f"{number:06d}.jsonl").write_text('{"decided":[{"do":"Train"}]}\n')

    def kill(now: float, what: str = "coordinator killed*") -> bool:
        with subprocess.Popen(["sleep", "100"]) as victim:
            place.victims = [psutil.Process(victim.pid)]
            return bool(chaos.blow(what, now))

    begin(700)  # more than are kept
    assert not chaos.blow("coordinator killed*", 0.0), "nobody was hit"
    chaos._watch_diary(50.0)
    assert kill(100.0)
    assert kill(107.0, "store killed*")
    chaos._watch_diary(109.0)
    begin(701)
    chaos._watch_diary(112.0)
    assert chaos.waits == [12.0]
    assert kill(200.0)
    assert kill(204.0), "the second one does not begin the wait anew"
    begin(702)
    chaos._watch_diary(220.0)
    assert (chaos.waits, chaos.disturbed) == ([12.0], [20.0])
    assert kill(300.0)
    chaos.waited(330.0)  # the end
    assert chaos.waits == [12.0, 30.0]
    assert figures({"store killed*": 3, "disk full": 9}, chaos.waits, kills=4, wait_s=15.0) == [
        "3 kills; there should be 4",
        "a coordinator took 30.0 s to its next ticket; at most 15",
    ]
    assert figures({"store killed*": 4}, [9.9], kills=4, wait_s=10.0) == []


def test_where_no_disk_can_be_filled_it_is_left_out_and_all_kills_stay() -> None:
    for quick in (True, False):
        plans = [schedule(3, 40, quick=quick, fills=fills) for fills in (True, False)]
        assert [what for what in plans[0] if what != "disk full"] == plans[1] != plans[0]
    assert kills_of(Counter(plans[1])) == 40
    assert kills_of(Counter(QUICK)) == 9, "as --help says"


@pytest.mark.cluster
def test_a_real_run_survives_its_kills() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "chaos.py"), "--quick", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "chaos: all is well"


@pytest.mark.parametrize("deaths", [{}, {27: "after"}, {84: "torn"}])
def test_an_update_in_order_does_not_stand_behind_the_next_one_of_its_own_store(deaths: Any, tmp_path: Path) -> None:
    """Few stores may be there at a time and its turn is over: it is given nothing more, so nobody waits for it."""
    assert play(History(1820, deaths), tmp_path).violations == []
