"""A store whose tickets are trained by two processes together: gloo, on this machine's CPUs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_config import SMALL, problems
from test_site import CNN, SIZE, Case, write
from test_terms import until

from raypipe.config.schema import Store
from raypipe.errors import StoreError
from raypipe.models.flat import initial
from raypipe.store.messages import Verdict
from raypipe.store.ranks import part

HARD: dict[str, Any] = {"broken": (3, 11, 12), "max_bad_share": 0.1}
PLAN: dict[str, Any] = {"optimizer": {"name": "sgd", "momentum": 0.9}, "max_bad_share": 0.5, "keep_optimizer": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Its images are decoded for each batch, and some cannot be: parts of a batch differ in size."""
    home = write(tmp_path_factory.mktemp("pair") / "south", **HARD)
    case = Case(home, site={"ranks": 2, "cpus": 2, "cache_bytes": 0})
    yield case
    case.site.close()


def processes(case: Case) -> list[int]:
    assert case.site._ranks is not None
    return case.site._ranks.processes


def test_two_ranks_give_what_one_process_gives_of_the_same_batches_ticket_after_ticket(
    pair: Case, tmp_path: Path
) -> None:
    alone = Case(write(tmp_path / "south", **HARD), site={"cache_bytes": 0})
    pids = []
    for number in range(3):
        ticket = {"id": f"t{number}", "seed": number, "max_epochs": 2.0}
        one, two = (case.train(ticket, **PLAN) for case in (alone, pair))
        assert (two.steps, two.examples, two.skipped) == (one.steps, one.examples, one.skipped)
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
        updates = [case.site.collect(f"t{number}", []).copy() for case in (alone, pair)]
        assert np.abs(updates[0]).max() > 1e-3
        np.testing.assert_allclose(updates[1], updates[0], rtol=1e-3, atol=2e-6)
        for case in (alone, pair):
            case.site.settle(Verdict(f"t{number}", number))  # so that the optimizer goes on
        pids.append(processes(pair))
    assert pids[0] == pids[2] != []


def test_two_ranks_go_on_with_what_is_the_stores_own(
    pair: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Case(write(tmp_path / "south", **HARD), site={"cache_bytes": 0})
    layout, weights = initial(CNN, 3, 1, SIZE, seed=0, local="norms")
    plan = {**PLAN, "run": "own", "local": "norms", "layout": layout.fingerprint, "lr": 0.3}
    for number in range(2):
        for case in (alone, pair):
            monkeypatch.setattr(case, "weights", weights)
            case.train({"id": f"own{number}", "seed": number, "max_epochs": 2.0}, **plan)
        updates = [case.site.collect(f"own{number}", []).copy() for case in (alone, pair)]
        np.testing.assert_allclose(updates[1], updates[0], rtol=1e-3, atol=2e-5)
        for case in (alone, pair):
            case.site.settle(Verdict(f"own{number}", number, run="own"))


def test_a_ticket_of_two_ranks_is_stopped_within_a_batch(pair: Case) -> None:
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(pair.train({"id": "long", "max_epochs": 1e6}, **PLAN)))
    thread.start()
    until(lambda: pair.site._controls.current is not None, "it trains")
    pair.site.control("long", "stop")
    thread.join(20)
    assert reports[0].stopped == "control"


@pytest.mark.parametrize("when", ["between tickets", "in a ticket"])
def test_a_dead_rank_fails_its_ticket_and_new_ranks_train_the_next(pair: Case, when: str) -> None:
    pair.train({"id": f"before {when}"}, **PLAN)
    (dead,) = processes(pair)
    said: list[str] = []

    def train() -> None:
        with pytest.raises(StoreError) as caught:
            pair.train({"id": when, "max_epochs": 1e6}, **PLAN)
        said.append(caught.value.message)

    if when == "between tickets":
        os.kill(dead, signal.SIGKILL)
        train()
    else:
        thread = threading.Thread(target=train)
        thread.start()
        until(lambda: pair.site._ranks is not None and pair.site._ranks._amid, "it trains")
        os.kill(dead, signal.SIGKILL)
        thread.join(20)
    assert said == ["rank 1 of 2 ended while it trained; they are started anew. The store's own log may say why"]
    assert processes(pair) == []
    assert pair.train({"id": f"after {when}"}, **PLAN).steps == 6
    assert processes(pair) != [dead]


def test_a_rank_ends_when_its_store_s_process_does_however_it_does(pair: Case) -> None:
    pair.train({"id": "last"}, **PLAN)
    assert pair.site._ranks is not None
    (other,) = pair.site._ranks._others
    assert other.stdin is not None
    other.stdin.close()  # as the end of a process does
    assert other.wait(10) == 0
    pair.site._ranks.close()


def test_the_parts_of_a_batch_are_the_batch() -> None:
    pick = np.arange(11)
    parts = [part(pick, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == pick.tolist()
    assert {len(p) for p in parts} == {3, 4}


@pytest.mark.parametrize(
    ("store", "ranks"), [({}, 1), ({"gpus": 0.5}, 1), ({"gpus": 1}, 1), ({"gpus": 4}, 4), ({"ranks": 2}, 2)]
)
def test_a_store_has_a_rank_for_each_whole_gpu(store: dict[str, Any], ranks: int) -> None:
    assert Store(id="a", **store).num_ranks == ranks


@pytest.mark.parametrize(
    ("store", "line"),
    [
        ("{id: mall, gpus: 1.5}", "stores.0: gpus 1.5: above 1 they are whole"),
        ("{id: mall, gpus: 2, ranks: 3}", "stores.0: ranks 3: with 2 GPUs there is one for each; leave it out"),
        ("{id: mall, ranks: 0}", "stores.0.ranks: must be at least 1, found 0"),
        ("{id: mall, ranks: 2, transport: vault}", "ranks of mall: a vault trains in one process"),
    ],
)
def test_ranks_that_cannot_be_get_one_line(tmp_path: Path, store: str, line: str) -> None:
    path = tmp_path / "try.yaml"
    path.write_text(SMALL.replace("{id: mall}", store))
    (found,) = problems(path)
    assert found.startswith(f"try.yaml: {line}")
