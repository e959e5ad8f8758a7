"""Control variates: SCAFFOLD to rounding through real sites and sums, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from conftest import CLASSES
from test_site import CNN, SIZE, Case
from torch.nn.functional import cross_entropy

from raypipe.aggregation.global_model import GlobalModel
from raypipe.aggregation.transforms import transforms
from raypipe.aggregation.variates import FORGOTTEN, Learned, Sent, Variate, Variates, derived
from raypipe.compose import reach_of
from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError, StoreRefused
from raypipe.models import models
from raypipe.models.flat import FlatModel, layout_of
from raypipe.run import check, load_run
from raypipe.store.correct import correct, reach
from raypipe.store.messages import Verdict
from raypipe.store.optimizers import optimizers
from raypipe.tracking.variates import VariateStore
from raypipe.types import Layout, Role
from raypipe.update.codec import Codec, codecs

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
LR, STEPS = 0.2, 4
SGD, HEAVY, NESTEROV = (
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
)
LABELS = {"a": [0], "b": [1, 1, 2], "c": [2]}  # unlike stocks
NUMS = {"a": 24, "b": 36, "c": 60}
SAID = {"name": "v", "stores": [{"id": "a"}], "stop": {"max_versions": 1}}


# -- the store's side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, HEAVY, NESTEROV, {"name": "sgd", "momentum": 0.5}])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_reach_is_how_far_a_gradient_of_ones_moves_the_weights(optimizer: dict[str, Any], steps: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    local = optimizers.build(optimizer)([weight])
    for _ in range(steps):
        weight.grad = torch.ones(1, dtype=torch.float64)
        local.param_groups[0]["lr"] = 0.5
        local.step()
    assert -weight.item() / 0.5 == pytest.approx(reach(optimizer, steps, kept=False), rel=1e-12)


def test_what_is_not_linear_is_corrected_in_its_steps() -> None:
    assert reach({"name": "adamw"}, 7, kept=False) == 7
    assert reach(HEAVY, 7, kept=True) == 7, "a momentum that goes on is nobody's sum"


@pytest.mark.parametrize(("optimizer", "moved"), [(SGD, -0.5 * (2 + 3)), ({"name": "adamw"}, -0.5 * (1 + 3))])
def test_the_correction_goes_into_each_step(optimizer: dict[str, Any], moved: float) -> None:
    model = FlatModel(module := torch.nn.Linear(1, 1, bias=False), layout_of(module))
    model.load(np.zeros(model.layout.size, np.float32))
    optimizer = optimizer | ({"weight_decay": 0.0} if optimizer["name"] == "adamw" else {})
    local = optimizers.build(optimizer)(model.trained)
    local.param_groups[0]["lr"] = 0.5
    correct(local, model, np.full(model.layout.shared.stop, 3.0, np.float32), optimizer, kept=False)
    model.trained[0].grad = torch.full((1, 1), 2.0)  # of which AdamW's first step makes 1
    local.step()
    assert float(model.vector[0]) == pytest.approx(moved)


def test_a_weight_without_a_gradient_is_corrected_too() -> None:
    model = FlatModel(module := torch.nn.Linear(1, 1, bias=False), layout_of(module))
    model.load(np.zeros(model.layout.size, np.float32))
    local = optimizers.build(SGD)(model.trained)
    local.param_groups[0]["lr"] = 0.5
    correct(local, model, np.full(model.layout.shared.stop, 3.0, np.float32), SGD, kept=False)
    local.step()
    assert float(model.vector[0]) == -1.5


def test_a_correction_of_another_model_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path / "south")
    with pytest.raises(StoreRefused, match="a correction of float32"):
        case.site.train(case.ticket, case.plan, case.weights, np.zeros(3, np.float32))


# -- the whole against a plain loop ---------------------------------------------------------------------------------


class Federation:
    """Three sites of unlike stock, and the coordinator's sum; every ticket is STEPS steps on all images at once."""

    def __init__(self, home: Path, optimizer: Mapping[str, Any], *, lr: float = LR, steps: int = STEPS) -> None:
        self.cases = {s: Case(home / s, num=NUMS[s], labels=LABELS[s]) for s in LABELS}
        self.steps, self.layout = steps, self.cases["a"].layout
        plan = {"optimizer": dict(optimizer), "lr": lr, "batch_size": max(NUMS.values())}
        self.plan = replace(self.cases["a"].plan, **plan)
        said = RunConfig.model_validate({**SAID, "train": {"optimizer": optimizer, "lr": lr, "control_variates": True}})
        self.sum = GlobalModel(
            self.layout, self.cases["a"].weights, transforms.build({"name": "sgd"}), how=[], normalise="sum", threads=1,
            reach=reach_of(said),
        )  # fmt: skip

    def version(self, number: int, stores: str = "abc", *, corrected: bool = True) -> None:
        """The next one, of these stores."""
        assert self.sum.variates is not None
        portions, learned = [], []
        for store in stores:
            case, name = self.cases[store], f"{number}.{store}"
            ticket = replace(case.ticket, id=name, version=number, max_epochs=None, max_steps=self.steps)
            sent = self.sum.variates.sent(store) if corrected else Sent(store)
            report = case.site.train(ticket, self.plan, self.sum.vector.copy(), sent.correction())
            update = case.site.collect(name, []).copy()
            case.site.settle(Verdict(name, number + 1))
            portions.append((update, float(NUMS[store]), None))
            learned.append(Learned(sent, report.steps, 0.0, float(NUMS[store]), number))
        assert self.sum.fold(portions, learned=learned) == {}
        self.sum.step(1.0, 1.0)

    def gradients(self) -> Callable[[str, Array], Array]:
        """Of a store's mean loss, by flat weights."""
        module: Any = models.build(CNN, 3, 1, SIZE)
        flat = FlatModel(module, self.layout)
        pictures = {}
        for store, case in self.cases.items():
            split = case.site._shelf.data("products").split("train")
            pixels = torch.from_numpy(split.decode(np.arange(NUMS[store]), size=SIZE, channels=1)[0])
            pictures[store] = (pixels.float() - 127.5) / 63.75, torch.from_numpy(split.labels)

        def gradient(store: str, weights: Array) -> Array:
            flat.load(weights.astype(np.float32))
            flat.clear()
            cross_entropy(module(pictures[store][0]), pictures[store][1]).backward()
            out = np.zeros(self.layout.size)
            shared = [entry for entry in self.layout.entries if entry.role is Role.SHARED]
            for entry, parameter in zip(shared, flat.trained, strict=True):
                out[entry.slice] = parameter.grad.numpy().ravel() if parameter.grad is not None else 0.0
            return out

        return gradient

    def loss(self) -> float:
        """Of all stores' images together, of the newest version."""
        module: Any = models.build(CNN, 3, 1, SIZE)
        FlatModel(module, self.layout).load(self.sum.vector)
        total = 0.0
        for case in self.cases.values():
            sums = case.site.evaluate(self.plan, self.sum.vector.copy(), "train").sums
            total += sums["loss"]
        return total / sum(NUMS.values())


@pytest.mark.parametrize("rho", [0.0, 0.9], ids=["sgd", "momentum"])
def test_a_run_is_scaffold_as_the_paper_writes_it(tmp_path: Path, rho: float) -> None:
    made = Federation(tmp_path, {"name": "sgd", "momentum": rho}, lr=LR * (1 - rho))
    x = made.sum.vector.astype(np.float64)
    share = {s: n / sum(NUMS.values()) for s, n in NUMS.items()}
    gradient, lr, far = made.gradients(), LR * (1 - rho), reach({"name": "sgd", "momentum": rho}, STEPS, kept=False)
    c_of, c = {s: np.zeros_like(x) for s in NUMS}, np.zeros_like(x)
    for number, there in enumerate(["abc", "abc", "ac", "b", "abc"]):
        made.version(number, there)
        # The paper's loop, option II, by weights of their own.
        new, weight = np.zeros_like(x), sum(share[s] for s in there)
        for s in there:
            y, m = x.copy(), np.zeros_like(x)
            for _ in range(STEPS):
                m = rho * m + gradient(s, y) - c_of[s] + c
                y -= lr * m
            new += share[s] / weight * (y - x)
            c_of[s] = c_of[s] - c + (x - y) / (far * lr)
        x, c = x + new, sum((share[s] * c_of[s] for s in NUMS), np.zeros_like(x))
        assert np.abs(made.sum.vector - x).max() < 2e-5, number
    assert made.sum.variates is not None
    assert made.sum.variates.mean is not None
    assert np.abs(made.sum.variates.mean - c[made.layout.shared]).max() < 2e-5
    assert np.abs(c).max() > 1e-2, "else nothing was corrected"


def test_unlike_stores_come_further_with_them_in_as_many_steps(tmp_path: Path) -> None:
    losses = {}
    for corrected in (True, False):
        made = Federation(tmp_path / str(corrected), SGD, lr=0.5, steps=40)
        for number in range(12):
            made.version(number, corrected=corrected)
        losses[corrected] = made.loss()
    assert losses[True] < 0.6 * losses[False], losses  # 0.45 against 1.45, as measured


# -- the coordinator's side ------------------------------------------------------------------------------------------


def vector(*values: float) -> Array:
    return np.array(values, np.float32)


def known(**of: tuple[Array, float, int]) -> dict[str, Variate]:
    return {store: Variate(*row) for store, row in of.items()}


def test_the_mean_is_by_worth_and_of_who_is_known() -> None:
    table = Variates.of(known(a=(vector(1.0), 1.0, 0), b=(vector(4.0), 3.0, 0)))
    assert table.mean is not None
    assert table.mean.tolist() == [3.25]
    assert [table.sent(s).correction() for s in "ab"] == [vector(2.25), vector(-0.75)]
    assert table.sent("c").correction() is None, "who has none yet steps uncorrected"
    assert Variates.of(known(a=(vector(1.0), 1.0, 0))).sent("a").correction() is None, "alone there is nobody else"


def test_a_late_update_is_read_by_the_table_of_its_own_base() -> None:
    table = Variates.of(known(a=(vector(1.0), 1.0, 0), b=(vector(3.0), 1.0, 0)))
    sent = table.sent("a")  # c - c_i is 1
    later = table.moved(known(b=(vector(9.0), 1.0, 1)))
    assert later.sent("a").correction() == vector(4.0)
    found = derived(vector(-10.0), Learned(sent, 5, 0.0, 1.0, 0), reach=2.0)  # it moved by -2 (g + 1)
    assert found is not None
    assert found.values == vector(4.0)
    assert table.sent("a").correction() == vector(1.0), "tables are never changed"


def test_who_is_gone_for_good_does_not_draw_the_others() -> None:
    table = Variates.of(known(a=(vector(1.0), 1.0, 0), b=(vector(3.0), 1.0, 0)))
    still = table.moved(known(b=(vector(3.0), 1.0, FORGOTTEN)))
    assert set(still.known) == {"a", "b"}
    gone = still.moved(known(b=(vector(3.0), 1.0, FORGOTTEN + 1)))
    assert set(gone.known) == {"b"}


def test_nothing_is_learned_of_a_rate_of_nothing_or_an_update_that_is_not_finite() -> None:
    learned = Learned(Sent("a"), 5, 0.0, 1.0, 0)
    assert derived(vector(1.0), learned, reach=0.0) is None
    assert derived(vector(np.inf), learned, reach=1.0) is None


def model_of(layout: Layout) -> GlobalModel:
    transform = transforms.build({"name": "sgd"})
    weights = np.zeros(layout.size, np.float32)
    return GlobalModel(
        layout, weights, transform, how=[], normalise="sum", threads=1, reach=lambda steps, _: float(steps)
    )


def test_statistics_have_no_variate_and_a_refused_update_leaves_none() -> None:
    layout = Layout.of([("w", (1,), "float32", Role.SHARED), ("running_mean", (1,), "float32", Role.STATISTIC)])
    model, update = model_of(layout), np.zeros(layout.update_size, np.float32)
    update[0], update[layout.statistic.start] = -2.0, 7.0
    learned = [Learned(Sent(store), 1, 0.0, 1.0, 0) for store in ("a", "b")]
    refused = model.fold([(update, 1.0, None), (np.full_like(update, np.nan), 1.0, None)], learned=learned)
    assert list(refused) == [1]
    assert model.variates is not None
    assert not model.variates.known, "not before the version"
    model.step(1.0, 1.0)
    assert set(model.variates.known) == {"a"}
    values = model.variates.known["a"].values
    assert values.shape == (layout.shared.stop,)
    assert values[0] == 2.0
    assert model.vector[layout.statistic.start] == 7.0


def test_of_two_updates_in_one_version_the_later_counts() -> None:
    layout = Layout.of([("w", (1,), "float32", Role.SHARED)])
    model = model_of(layout)
    updates = [np.full(layout.update_size, -float(n), np.float32) for n in (1, 2)]
    model.fold([(u, 1.0, None) for u in updates], learned=[Learned(Sent("a"), 1, 0.0, 1.0, 0)] * 2)
    model.step(1.0, 1.0)
    assert model.variates is not None
    assert model.variates.known["a"].values[0] == 2.0


def test_tables_outlive_the_process_and_what_nobody_needs_is_removed(tmp_path: Path) -> None:
    tables = [Variates.of(known(a=(vector(1.0, 2.0), 1.0, 0), b=(vector(3.0, 4.0), 2.0, 0)))]
    for number in range(1, 6):
        tables.append(tables[-1].moved(known(b=(vector(3.0, 4.0 + number), 2.0, number))))
    disk = VariateStore(tmp_path)
    for number, table in enumerate(tables):
        disk.write(number, table)
    disk.prune(frozenset({2}))
    again = VariateStore(tmp_path)
    for number in (2, 4, 5):
        read = again.read(number)
        assert read is not None
        assert read.mean is not None
        assert tables[number].mean is not None
        assert read.mean.tobytes() == tables[number].mean.tobytes()
        assert {s: (v.worth, v.version) for s, v in read.known.items()} == {"a": (1.0, 0), "b": (2.0, number)}
    assert again.read(3) is None
    assert len(list(tmp_path.glob("variates/a-*.f32"))) == 1, "what did not change is there once"
    assert len(list(tmp_path.glob("variates/b-*.f32"))) == 3


def test_a_damaged_variate_is_none(tmp_path: Path) -> None:
    VariateStore(tmp_path).write(0, Variates.of(known(a=(vector(1.0), 1.0, 0))))
    (file,) = tmp_path.glob("variates/*.f32")
    file.write_bytes(b"\0\0\0\0")
    assert VariateStore(tmp_path).read(0) is None
    file.unlink()
    assert VariateStore(tmp_path).read(0) is None


# -- what is said ----------------------------------------------------------------------------------------------------


def test_check_says_what_they_cost(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: v\nstores: [{id: a}, {id: b}]\nstop: {max_versions: 2}\n")
    task = f"task={{name: classification, classes: {list(CLASSES)}, image_size: 28, channels: 1}}"
    plain = check(load_run(file, [task]))
    lines = check(load_run(file, [task, "train.control_variates=true"])).splitlines()
    assert "control variates" not in plain
    assert "0.42 MB down and 0.42 MB up" in plain
    assert any("0.85 MB down and 0.42 MB up" in line for line in lines)
    (said,) = [line for line in lines if line.startswith("control variates:")]
    assert "nothing more goes up" in said
    assert "1.7 MB for 2 stores" in said


def test_not_with_updates_that_open_as_a_sum_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = Codec("sealed", lambda a, _: a, lambda a, _: a, linear=True, seals=True)
    monkeypatch.setitem(codecs._parts, "sealed", lambda: sealed)
    file = tmp_path / "run.yaml"
    file.write_text("name: v\nstores: [{id: a}]\nstop: {max_versions: 2}\nupdate: [sealed]\n")
    load_run(file, [f"task.classes={list(CLASSES)}"])
    with pytest.raises(ConfigError) as caught:
        load_run(file, [f"task.classes={list(CLASSES)}", "train.control_variates=true"])
    (line,) = caught.value.problems
    assert "train.control_variates: not with update sealed, which opens as a sum alone" in line
