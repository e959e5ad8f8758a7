"""What stays at its store: norm layers (FedBN) or other parts of the model, with the rest trained together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_resume import make
from test_shell import NAMES, SitePort, config, records, run
from test_site import BATCH_NORM, SIZE, Case

from raypipe.errors import ConfigError, RunError
from raypipe.models.flat import initial
from raypipe.run import check, load_run
from raypipe.store.kept import key_of
from raypipe.store.messages import Evaluation, Verdict
from raypipe.store.site import Site
from raypipe.tracking import registry
from raypipe.types import Layout, Role

MOMENTUM: dict[str, Any] = {"optimizer": {"name": "sgd", "momentum": 0.9}, "keep_optimizer": True}
SHORT: dict[str, Any] = {"max_steps": 3, "max_epochs": None}


class Personal(Case):
    """Its norm layers, or what fits these patterns, stay at the store."""

    def __init__(self, home: Path, model: dict[str, Any] = BATCH_NORM, local: Any = "norms") -> None:
        super().__init__(home, model)
        self.layout, self.weights = initial(model, 3, 1, SIZE, seed=0, local=local)
        self.plan = replace(self.plan, layout=self.layout.fingerprint, local=local)

    def own(self, **plan: Any) -> np.ndarray[Any, Any] | None:
        kept = self.site._fenced("r", 1).kept(key_of(replace(self.plan, **plan)))
        return None if kept is None else kept[1]["own"].numpy()

    def judged(self, **plan: Any) -> dict[str, float]:
        return self.site.evaluate(replace(self.plan, **plan), self.weights, "validation", 1).sums


def by_name(layout: Layout, vector: np.ndarray[Any, Any], *roles: Role) -> dict[str, np.ndarray[Any, Any]]:
    return {e.name: vector[e.slice] for e in layout.entries if e.role in roles}


def with_own(case: Personal, own: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A version whose local entries are a store's."""
    weights = case.weights.copy()
    weights[case.layout.local] = own
    return weights


def test_norm_layers_and_their_statistics_stay_and_train_as_if_they_did_not(tmp_path: Path) -> None:
    plain, own = Case(tmp_path / "plain", BATCH_NORM), Personal(tmp_path / "own")
    local = {e.name for e in own.layout.entries if e.role is Role.LOCAL}
    assert {name.rpartition(".")[2] for name in local} == {"weight", "bias", "running_mean", "running_var"}
    assert not any(e.role is Role.STATISTIC for e in own.layout.entries)
    whole, rest = plain.update(SHORT), own.update(SHORT)
    assert rest.size == own.layout.update_size < whole.size
    expected = by_name(plain.layout, whole, Role.SHARED)
    found = by_name(own.layout, rest, Role.SHARED)
    assert {*expected} == {*found} | {name for name in local if name.rpartition(".")[2] in ("weight", "bias")}
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    own.site.settle(Verdict("t1", version=1))
    kept = own.own()
    assert kept is not None
    trained = plain.site._shelf.learner(plain.plan, plain.weights).model.vector.numpy()
    trained = by_name(plain.layout, trained, Role.SHARED, Role.STATISTIC)
    now = by_name(own.layout, with_own(own, kept), Role.LOCAL)
    assert {*now} == local
    assert all(np.array_equal(now[name], trained[name]) for name in local)
    assert not np.array_equal(kept, own.weights[own.layout.local])


@pytest.mark.parametrize("plan", [{}, MOMENTUM], ids=["", "with the optimizer's state"])
def test_a_store_goes_on_with_its_own_only_once_their_update_is_in_a_version(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    case, other = Personal(tmp_path / "south"), Personal(tmp_path / "other")
    first = case.update(SHORT, **plan)
    assert case.train(SHORT, **plan).after == ""
    before = case.judged(**plan)
    case.site.settle(Verdict("t1", version=None, reason="not finite"))
    assert case.own(**plan) is None
    assert np.array_equal(case.update({**SHORT, "id": "t2"}, **plan), first)
    assert case.judged(**plan) == before, "t2 is in no version yet"
    case.site.settle(Verdict("t2", version=1))
    own = case.own(**plan)
    assert own is not None
    third = case.train({**SHORT, "id": "t3", "evaluate": "validation"}, **plan)
    assert third.after == "t2"
    assert isinstance(third.evaluation, Evaluation)
    other.weights = with_own(other, own)  # the same model, by another way
    if not plan:
        assert np.array_equal(case.site.collect("t3", []), other.update(SHORT))
    assert third.evaluation.sums == case.judged(**plan) == other.judged() != before


def test_what_is_kept_outlives_the_process_and_is_nobodys_but_its_runs(tmp_path: Path) -> None:
    case = Personal(tmp_path / "south")
    before = case.judged()
    case.train(SHORT)
    case.site.settle(Verdict("t1", version=1))
    after = case.judged()
    case.site.close()
    case.site = Site(tmp_path / "south")
    assert case.judged() == after != before
    case.plan = replace(case.plan, run="another")
    assert case.judged() == before


def test_a_store_alone_begins_with_the_version_and_not_with_what_it_kept(tmp_path: Path) -> None:
    case = Personal(tmp_path / "south")
    alone = {**SHORT, "id": "alone", "judge": "validation"}
    before = case.train(alone).evaluation
    case.train(SHORT)
    case.site.settle(Verdict("t1", version=1))
    assert replace(case.train(alone).evaluation, seconds=0) == replace(before, seconds=0)


def test_own_entries_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    case = Personal(tmp_path / "south", {"name": "small_cnn", "width": 8, "hidden": 16}, ["11.bias"])
    model = case.site._shelf.learner(case.plan, case.weights).model

    def spoil(*_: Any) -> None:
        model.own.fill_(float("inf"))

    model.module.register_forward_hook(spoil)  # too late for the loss to show it
    said = case.refused(lambda: case.train({**SHORT, "max_steps": 1}))
    assert said == "the store's own part of the model is not finite; lower lr"
    assert case.site.describe("r", 1).outbox == ()


def test_patterns_name_other_parts(tmp_path: Path) -> None:
    case = Personal(tmp_path / "south", {"name": "small_cnn", "width": 8, "hidden": 16}, ["11.*", "1.bias"])
    assert {e.name for e in case.layout.entries if e.role is Role.LOCAL} == {"11.weight", "11.bias", "1.bias"}
    case.train(SHORT)
    case.site.settle(Verdict("t1", version=1))
    own = case.own()
    assert own is not None
    assert not np.array_equal(own, case.weights[case.layout.local])


def test_in_a_run_stores_differ_in_their_own_and_in_nothing_else_and_judge_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "stores")
    ports = {name: SitePort(tmp_path / "stores" / name) for name in NAMES}
    train = {"local_steps": 3, "batch_size": 16, "local": "norms"}
    made = run(config(train=train, track={"mlflow": False}), tmp_path, ports)
    layout, plan, last = made.shell.publisher.model.layout, made.stages.at(2).plan, made.read(2)
    kept = [ports[name].site._fenced("run", 0).kept(key_of(plan)) for name in NAMES]
    own = [state["own"].numpy() for _, state in filter(None, kept)]
    assert len({values.tobytes() for values in own}) == len(NAMES)
    first = made.read(0)
    assert np.array_equal(last[layout.local], first[layout.local]), "what a store has that is new"
    assert not np.array_equal(last[layout.shared], first[layout.shared])
    judged = records(tmp_path, "evaluated")[-1]
    assert judged["version"] == 2
    for name in NAMES:  # the newest version was judged with what the newest tickets left
        found = ports[name].site.evaluate(plan, last, "validation")
        assert judged["stores"][name]["loss"] == pytest.approx(found.sums["loss"] / found.num_examples, rel=1e-12)
    said: list[str] = []
    monkeypatch.setattr(registry.log, "warning", lambda text, *values: said.append(text % values))
    with pytest.raises(RunError, match="MLflow did not do it"):
        registry.promote(tmp_path / "runs" / "run", 2, uri="http://127.0.0.1:9")
    assert said == ["version 2 has the local weights that its run began with, and no store's own"]


CHANGE = "[{at_version: 2, add: [Cap]}]"
REFUSED: dict[str, tuple[list[str], str]] = {
    "no such word": (
        ["train.local=norm"],
        "train.local: is norms or a list of patterns of tensors' names; found",
    ),
    "no pattern": (["train.local=[]"], "train.local: is norms or a list of patterns of tensors' names"),
    "no norm layers": (["train.local=norms", "model.norm=none"], "norms: this model has no norm layers that train"),
    "frozen ones": (["train.local=norms", "train.trained=head"], "norms: this model has no norm layers that train"),
    "fits nothing": (["train.local=[fc.*]"], "no name of a tensor that trains fits 'fc.*'; they begin with 0, 1, 11"),
    "all of it": (["train.local=['*']"], "nothing would be left to train together"),
    "classes": (["train.local=norms", f"class_changes={CHANGE}"], "class_changes: not with train.local"),
    "central": (["train.local=norms", "evaluate.central=head"], "evaluate.central: not with train.local"),
    "FixBN": (["train.local=norms", "train.fix_statistics_from=0.5"], "statistics are each store's own"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_go_with_it_is_one_line(case: str) -> None:
    settings, line = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        check(load_run(ROOT / "configs/quickstart.yaml", settings))
    (problem,) = caught.value.problems
    assert line in problem


def test_check_says_that_a_version_lacks_them() -> None:
    file = ROOT / "configs/quickstart.yaml"
    plain, said = (check(load_run(file, more)).splitlines() for more in ([], ["train.local=norms"]))
    assert [line for line in said if line.startswith("local: 96 numbers are each store's own and stay there; ")]
    assert not [line for line in plain if line.startswith("local:")]
