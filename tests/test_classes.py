"""A class list changes while a run goes on: the mapping, the head that grows, the machine, and runs with real sites."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_machine import deliver, join_all, of
from test_shell import SitePort, run

from raypipe.aggregation.global_model import GlobalModel
from raypipe.aggregation.transforms import AVERAGE, transforms
from raypipe.class_verbs import change_of, listing
from raypipe.cli import main
from raypipe.compose import compose
from raypipe.config.schema import RunConfig
from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.policy import pace
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.state import Scores
from raypipe.data.sample import encode_png
from raypipe.data.schema import write_split
from raypipe.errors import ConfigError, StoreClosed, StoreRefused, StoreUnreachable
from raypipe.models.flat import initial
from raypipe.models.growth import Form, Growth, padded
from raypipe.models.tensors import state_dict_from
from raypipe.replay import Replay
from raypipe.run import load_run
from raypipe.store.messages import Plan
from raypipe.store.policy import read_policy
from raypipe.store.shelf import Shelf
from raypipe.store.targets import chosen, numbered
from raypipe.tasks import tasks
from raypipe.tasks.class_list import Change, ClassList, lists, placed
from raypipe.tasks.metrics import metrics
from raypipe.tracking.lineage import read_history
from raypipe.tracking.versions import VersionStore
from raypipe.use import predict

sys.path.insert(0, str(ROOT / "jobs"))

import bench_classes as bench

THREE = ClassList(("boot", "shirt", "bag"))


def part(classes: list[str], **more: Any) -> dict[str, Any]:
    return {"name": "classification", "classes": classes, "image_size": 28, "channels": 1, **more}


# -- the mapping ------------------------------------------------------------------------------------------------


def test_numbers_never_change_whatever_becomes_of_the_classes() -> None:
    grown = THREE.changed(Change(add=("ankle boot", "hat")))
    merged = grown.changed(Change(merge=(("boot", "ankle boot"),), retire=("hat",)))
    again = merged.changed(Change(add=("hat", "tie")))
    assert grown.names == merged.names == ("boot", "shirt", "bag", "ankle boot", "hat")
    assert again.names == (*grown.names, "tie")
    assert [merged.place(name) for name in (*grown.names, "sock")] == [3, 1, 2, 3, -2, -1]
    assert merged.live == (1, 2, 3)
    assert again.live == (1, 2, 3, 4, 5), "a retired one came back at its place"


def test_what_was_merged_into_a_class_goes_where_that_goes() -> None:
    twice = THREE.changed(Change(merge=(("boot", "shirt"),))).changed(Change(add=("rag",), merge=(("shirt", "rag"),)))
    assert twice.place("boot") == twice.place("shirt") == twice.place("rag") == 3
    assert twice.changed(Change(add=("cap",), retire=("rag",))).place("boot") == -2


def test_a_new_class_knows_of_which_old_ones_it_is_made() -> None:
    change = Change(add=("wear", "hat"), merge=(("boot", "wear"), ("bag", "wear")))
    assert THREE.begins(change) == ((0, 2), ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(), "adds, merges or retires something"),
        (Change(add=("bag",)), "'bag' is a class already"),
        (Change(add=("hat", "hat")), "'hat' is named twice"),
        (Change(add=(" ",)), "is no name"),
        (Change(retire=("bagg",)), "retire: no class named 'bagg'. Did you mean 'bag'?"),
        (Change(merge=(("boots", "bag"),)), "merge: no class named 'boots'"),
        (Change(merge=(("boot", "sock"),)), "cannot count as 'sock', which is no class"),
        (Change(merge=(("boot", "bag"), ("bag", "boot"))), "goes in a circle: bag -> boot -> bag"),
        (Change(merge=(("boot", "boot"),)), "goes in a circle: boot -> boot"),
        (Change(merge=(("boot", "bag"), ("bag", "shirt"))), "'bag' is merged too: say boot=shirt"),
        (Change(merge=(("boot", "bag"),), retire=("bag",)), "is retired by the same change"),
        (Change(merge=(("boot", "bag"),), retire=("boot",)), "'boot' is named twice"),
        (Change(retire=("boot", "bag")), "at least 2 stay"),
    ],
)
def test_a_change_that_cannot_be_is_refused_with_its_reason(change: Change, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        THREE.changed(change)
    assert said in error.value.message


def test_a_change_has_a_version_of_its_own_and_fits_those_that_are_planned() -> None:
    planned = {4: Change(add=("hat",)), 9: Change(retire=("boot",))}
    assert placed(THREE, planned, Change(add=("tie",)), soonest=4) == 5
    assert placed(THREE, planned, Change(add=("tie",)), soonest=2, wanted=8) == 8
    for change, wanted, said in (
        (Change(add=("tie",)), 1, "version 1 is made already or being made; the first that can change is 2"),
        (Change(add=("tie",)), 9, "change at version 9 already"),
        (Change(add=("hat",)), 3, "from version 4 on: add: 'hat' is a class already"),
        (Change(merge=(("boot", "bag"),)), 8, "from version 9 on: retire: no class named 'boot'"),
    ):
        with pytest.raises(ConfigError, match=said):
            placed(THREE, planned, change, soonest=2, wanted=wanted)
    with pytest.raises(ConfigError, match="no list of names"):
        placed(None, {}, Change(add=("tie",)), soonest=1)
    assert [len(one.live) for one in lists(THREE, planned).values()] == [4, 3]


def test_the_command_line_says_a_change_as_the_configuration_does() -> None:
    assert change_of(["hat"], ["boot=bag"], ["tie"]) == Change(("hat",), (("boot", "bag"),), ("tie",))
    for wrong in ("boot", "boot=", "=bag"):
        with pytest.raises(ConfigError, match="write OLD=NEW"):
            change_of([], [wrong], [])


# -- at a store -------------------------------------------------------------------------------------------------


class Split:
    """Labels alone."""

    boxes = None

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)


def test_a_store_maps_its_own_names_and_leaves_out_what_the_run_does_not_have() -> None:
    said = part(["boot", "shirt", "bag", "hat"], gone={"boot": "hat", "bag": None}, merge={"hat": ["cap"]})
    own, labels = ("cap", "sock", "bag", "shirt", "boot"), [0, 1, 2, 3, 4, 0]
    ignoring = tasks.build({**said, "unknown": "ignore"})
    some: Any = chosen(Split(labels), own, ignoring)  # type: ignore[arg-type]
    assert numbered(some.labels, own, ignoring, "it").tolist() == [3, 1, 3, 3]
    strict = tasks.build(said)
    rest: Any = chosen(Split(labels), own, strict)  # type: ignore[arg-type]
    assert len(rest) == 5, "what is no more is left out, what is unknown is refused"
    with pytest.raises(StoreRefused, match="outside the task's 4 classes"):
        numbered(rest.labels, own, strict, "it")


def test_a_store_calls_classes_as_it_likes_and_reads_its_images_anew_when_the_list_changes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images = encode_png(np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28), level=1)
    write_split(
        tmp_path / "data" / "train.parquet", images=images, labels=np.array([0, 1, 0, 2]),
        classes=["Trainers", "Hats", "Bags"], image_ids=list("abcd"), shapes=np.full((4, 2), 28),
    )  # fmt: skip
    offered = "data: {products: {folder: data, names: {Trainers: sneaker, Hats: hat}}}"
    (tmp_path / "policy.yaml").write_text(f"store: a\n{offered}\n")
    shelf = Shelf(read_policy(tmp_path), torch.device("cpu"), threads=1, cache_bytes=1 << 20)
    plan = Plan("r", {}, {}, "products", {}, 0.1, {}, 4, "")

    def targets(classes: list[str]) -> list[int]:
        found = shelf.images(plan, tasks.build(part(classes, unknown="ignore")), "train")
        assert found.num_bytes == found.num * 28 * 28, "there is room in memory"
        ((_, labels),) = found.batches([np.arange(found.num)], torch.device("cpu"), 0.0)
        return list(labels.tolist())

    assert targets(["hat", "sneaker"]) == [1, 0, 1]
    assert targets(["hat", "sneaker", "Bags"]) == [1, 0, 1, 2]
    assert len(shelf._images) == 1, "of the earlier list nothing is kept"
    with pytest.raises(StoreClosed, match="has none of the task's classes"):
        targets(["sock", "scarf"])


def test_training_leaves_classes_alone_that_the_store_cannot_label() -> None:
    task = tasks.build(part(["a", "b", "c", "d"], gone={"d": None}))
    assert task.labelled(["a", "b", "c", "x"]) == (0, 1, 2)
    assert task.labelled(["b", "a", "d"]) == (0, 1)
    assert task.labelled(["b"]) == (0, 1, 2), "among one class alone there is nothing to learn"
    assert tasks.build(part(["a", "b"])).labelled(["b", "a"]) is None
    assert tasks.build(part(["a", "b", "c"], absent="negative")).labelled(["a", "b"]) is None
    outputs = torch.randn(5, 4, requires_grad=True)
    for loss in ("cross_entropy", {"name": "cross_entropy", "label_smoothing": 0.1}, "focal"):
        smooth = tasks.build(part(["a", "b", "c", "d"], loss=loss))
        value = smooth.among((0, 2)).loss(outputs, torch.tensor([0, 2, 2, 0, 2]))
        (slope,) = torch.autograd.grad(value, outputs)
        assert slope[:, [1, 3]].eq(0).all()
        assert slope[:, [0, 2]].ne(0).all()


def test_what_is_no_more_is_no_answer_and_costs_nothing() -> None:
    task, small = tasks.build(part(["a", "b", "c"], gone={"a": "c"}, per_class=True)), tasks.build(part(["b", "c"]))
    outputs, labels = torch.randn(6, 3), torch.tensor([1, 2, 2, 1, 2, 2])
    outputs[:, 0] = 99.0
    assert task.predict(outputs).tolist() == [p + 1 for p in small.predict(outputs[:, 1:]).tolist()]
    found, expected = task.sums(outputs, labels), small.sums(outputs[:, 1:], labels - 1)
    assert (found["loss"], found["accuracy"]) == (expected["loss"], expected["accuracy"])
    assert found["labels"].tolist() == [0, 2, 4]


def test_recall_is_told_by_class_from_sums() -> None:
    sums = {"loss": 4.0, "accuracy": 4.0, "labels/0": 2.0, "labels/3": 6.0, "hits/3": 3.0}
    assert metrics(sums, 8) == {"loss": 0.5, "accuracy": 0.5, "recall/0": 0.0, "recall/3": 0.5, "recall": 0.25}


# -- the head ---------------------------------------------------------------------------------------------------

CNN = {"name": "small_cnn", "width": 8, "hidden": 16}


def form(num: int, model: dict[str, Any] = CNN, *, boxes: bool = False, size: int = 28) -> tuple[Form, Any]:
    layout, vector = initial(model, num, 3 if boxes else 1, size, seed=num, boxes=boxes)
    return Form.of(layout, num, boxes=boxes), vector


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "mobilenet_v3_small", "efficientnet_lite0"])
def test_the_head_is_found_by_names_and_shapes_and_old_answers_keep_their_bits(name: str) -> None:
    (old, vector), (new, _) = form(5, {"name": name}, size=32), form(8, {"name": name}, size=32)
    assert len(old.rows) == 2
    before = state_dict_from(old.layout, vector)
    after = state_dict_from(new.layout, Growth(old, new, (0, 1, 2, 4), ((), (1, 3), ())).weights(vector))
    head = {row.entry.name for row in old.rows}
    assert all(np.array_equal(before[key], after[key]) for key in before if key not in head)
    for key in head:
        rows = after[key].reshape(8, -1)
        assert rows[:5].tobytes() == before[key].tobytes()
        assert np.allclose(rows[5], before[key].reshape(5, -1)[[0, 1, 2, 4]].mean(0), atol=1e-7)
        assert np.allclose(rows[6], before[key].reshape(5, -1)[[1, 3]].mean(0), atol=1e-7)
        assert np.array_equal(rows[5], rows[7])


def test_yolov5s_head_grows_in_each_anchor() -> None:
    model = {"name": "yolov5n"}
    (old, vector), (new, fresh) = form(3, model, boxes=True, size=64), form(5, model, boxes=True, size=64)
    assert [row.repeats for row in old.rows] == [3] * 6
    grown = Growth(old, new, (0, 1, 2), ((), (2,))).weights(vector)
    for before, after in zip(old.rows, new.rows, strict=True):
        kept, now, usual = before.of(vector), after.of(grown), after.of(fresh)
        assert np.array_equal(now[:, :8], kept)
        assert np.array_equal(now[:, 9], kept[:, 7])
        if len(after.entry.shape) == 1:
            assert np.abs(now[:, 8] - usual[:, 8]).max() < 0.2, "as rare as in a new model"
        else:
            assert not now[:, 8].any()
    assert Form.of(*_ssd()).rows == (), "of torchvision's detectors nobody knows"


def _ssd() -> tuple[Any, int]:
    return initial({"name": "ssdlite320_mobilenet_v3_large"}, 3, 3, 320, seed=0, boxes=True)[0], 3


def model_of(made: Form, vector: Any, server: dict[str, Any]) -> GlobalModel:
    return GlobalModel(made, vector, transforms.build(server), how=[], normalise="sum", threads=1)


def update_of(made: Form, seed: int, silent: tuple[int, ...] = ()) -> Any:
    vector = np.random.default_rng(seed).standard_normal(made.layout.update_size).astype(np.float32)
    for row in made.rows:
        row.of(vector)[:, [row.before + place for place in silent]] = 0.0
    return vector


def test_an_update_of_before_counts_and_says_nothing_of_the_new_classes() -> None:
    (old, vector), (new, _) = form(5), form(8)
    model = model_of(old, vector, {"name": "sgd"})
    model.grow(Growth(old, new, (0, 1, 2, 3, 4), ((), (), ())))
    start, late, fresh = model.vector.copy(), update_of(old, 1), update_of(new, 2)
    assert model.fold([(late, 1.0, None), (fresh, 3.0, None)], [old, new]) == {}
    assert model.fold([(late, 1.0, None)], [new])[0].startswith("float32 expects")
    norm = model.step(4.0, 1.0)
    wide = padded(late, old, new)
    expected = (wide + 3 * fresh) / 4
    for row in new.rows:
        assert not row.of(wide)[:, 5:].any()
        row.of(expected)[:, 5:] = row.of(fresh)[:, 5:]  # those who know a class alone say where it goes
    moved = model.vector - start
    assert np.allclose(moved[new.layout.shared], expected[new.layout.shared], atol=1e-5)
    assert norm == pytest.approx(np.linalg.norm(expected[new.layout.shared]), rel=1e-5)


def test_a_class_that_few_stores_know_moves_as_far_as_they_say() -> None:
    made, vector = form(4)
    model, start = model_of(made, vector, {"name": "sgd"}), vector.copy()
    updates = [update_of(made, 1), update_of(made, 2, (3,)), update_of(made, 3, (2, 3))]
    assert model.fold([(update, 1.0, 2) for update in updates]) == {}
    model.step(3.0, 1.0)
    moved, all_of = model.vector - start, sum(updates)  # each in 2 steps: of the mean step 2
    for row in made.rows:
        rows, total = row.of(moved)[0], row.of(all_of)[0]
        assert np.allclose(rows[:2], total[:2] / 3, atol=1e-5)
        assert np.allclose(rows[2], total[2] / 2, atol=1e-5)
        assert np.allclose(rows[3], total[3], atol=1e-5)
    again = model_of(made, vector, {"name": "sgd"})
    again.fold([(updates[0], 1.0, None)])
    again.step(1.0, 1.0)
    plain = vector.copy()
    plain[made.layout.shared] += updates[0][made.layout.shared]
    assert np.array_equal(again.vector, plain), "who speaks of all is not touched"


@pytest.mark.parametrize("server", ["momentum", "adam", "ema"])
def test_what_the_server_remembers_grows_with_the_head(server: str) -> None:
    (old, vector), (new, _) = form(3), form(5)
    model = model_of(old, vector, {"name": server})
    assert model.average is None, "of nothing yet"
    for seed in (1, 2):
        model.fold([(update_of(old, seed), 1.0, None)])
        model.step(1.0, 1.0)
    before, weights = {name: value.copy() for name, value in model.state.items()}, model.vector.copy()
    growth = Growth(old, new, (0, 1, 2), ((), ()))
    model.grow(growth)
    size, fresh = old.layout.shared.stop, transforms.build({"name": server}).init(new.layout.shared.stop)
    for name, value in model.state.items():
        if before[name].shape != (size,):
            assert np.array_equal(value, before[name])
            continue
        for row, wide in zip(old.rows, new.rows, strict=True):
            assert np.array_equal(wide.of(value)[:, :3], row.of(before[name]))
            expected = wide.of(fresh[name].numpy())[:, 3:]
            if name == AVERAGE:
                expected = row.of(before[name]).mean(1, keepdims=True).repeat(2, 1)
            assert np.allclose(wide.of(value)[:, 3:], expected, atol=1e-6)
    assert (model.average is None) == (server != "ema")
    saved = {name: value.copy() for name, value in model.state.items()}
    other = model_of(old, vector, {"name": server})
    other.restore(model.vector, saved, new)
    for made in (model, other):
        made.fold([(update_of(new, 5), 1.0, None)])
        made.step(1.0, 1.0)
    assert np.array_equal(other.vector, model.vector), "one that is taken up goes on as it would have"
    assert not np.array_equal(model.vector[: weights.size], weights)


def test_merging_moves_no_weight() -> None:
    made, vector = form(4)
    model = model_of(made, vector, {"name": "momentum"})
    model.grow(Growth(made, replace(made), (0, 1, 2, 3), ()))
    assert np.array_equal(model.vector, vector)


# -- the machine ------------------------------------------------------------------------------------------------


def machine(changes: dict[int, Change] | None = None) -> Coordinator:
    policy = pace("wait_for_all", 2, {"max_versions": 9})
    return Coordinator(
        policy, ["s0", "s1"], metric="accuracy", chance=random.Random, start_at=0.0, classes=THREE, changes=changes
    )


def step(m: Coordinator, at: float, tell: Any = None) -> do.Publish:
    """One version, of both stores' work."""
    tell = tell or m.handle
    for ticket in [t for t in m.tickets.values() if t.base == m.version]:
        tell(ev.Trained(ticket.id, 1, 32, 100, 1.0, 1.0, at))
        for fold in of(do.Fold, tell(ev.UpdateArrived(ticket.id, 4, at))):
            actions = tell(ev.Folded(tuple(p.ticket for p in fold.portions), (), at))
    (publish,) = of(do.Publish, actions)
    return publish


def test_a_change_comes_with_its_version_and_one_asked_for_with_the_next() -> None:
    m = machine({2: Change(add=("hat",))})
    join_all(m)
    assert step(m, 1.0).change is None
    (record,) = of(do.Record, m.handle(ev.ClassesAsked(Change(retire=("bag",)), None, 1.0)))
    assert (record.kind, record.body["version"]) == ("classes_planned", 3), "version 1 is being made, 2 has a change"
    m.handle(ev.Published(1, 1.0))
    assert step(m, 2.0).change == Change(add=("hat",))
    m.handle(ev.Published(2, 2.0))
    assert step(m, 3.0).change == Change(retire=("bag",))
    m.handle(ev.Published(3, 3.0))
    (record,) = of(do.Record, m.handle(ev.ClassesAsked(Change(retire=("bag",)), 4, 3.0)))
    assert record.kind == "classes_refused"
    assert "no class named 'bag'" in record.body["reason"]


def test_an_update_is_folded_with_the_version_that_it_was_trained_from() -> None:
    m = machine()
    join_all(m)
    (ticket, other) = list(m.tickets)
    deliver(m, ticket, 1.0)
    (fold,) = of(
        do.Fold, m.handle(ev.Trained(other, 1, 1, 1, 1.0, 1.0, 1.0)) + m.handle(ev.UpdateArrived(other, 4, 1.0))
    )
    assert [p.base for p in fold.portions] == [0]


def test_a_planned_change_outlives_the_coordinator_and_a_version_that_is_withdrawn(tmp_path: Path) -> None:
    m, diary = machine(), Diary(tmp_path)
    diary.checkpoint(m.memory())

    def tell(event: ev.Event) -> list[do.Action]:
        actions = m.handle(event)
        diary.note(event, actions)
        return actions

    for store in ("s0", "s1"):
        tell(ev.StoreJoined(store, 100, 0.0))
    step(m, 1.0, tell)
    tell(ev.Published(1, 1.0))
    change = Change(("hat",), (("boot", "bag"),))
    tell(ev.ClassesAsked(change, None, 1.0))
    assert step(m, 2.0, tell).change == change
    for newest in (1, 2):  # it died before the version was a fact; or its weights were lost
        again = machine()
        back = bring_back(again, diary, newest=newest, told=0, intact=lambda v: v < 2, epoch=2, grace_s=9.0)
        assert (again.version, again.changes) == (1, {2: change})
        assert back.withdrawn == ([2] if newest == 2 else [])
        for store in ("s0", "s1"):
            again.handle(ev.StoreJoined(store, 100, 3.0))
        assert step(again, 4.0).change == change
    diary.checkpoint(m.memory())
    remembered = Diary(tmp_path).read()
    assert remembered is not None
    assert remembered.memory.changes == {2: change}
    assert remembered.memory.publishing is not None
    assert remembered.memory.publishing.change == change


def test_a_diary_of_before_there_were_changes_is_read(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    diary.checkpoint(machine().memory())
    (file,) = (tmp_path / "diary").glob("*.jsonl")
    body = json.loads(file.read_text())
    del body["memory"]["changes"], body["memory"]["scores"]["since"]
    file.write_text(json.dumps(body) + "\n")
    remembered = diary.read()
    assert remembered is not None
    assert remembered.memory.changes == {}


def test_scores_of_other_classes_are_no_match() -> None:
    scores = Scores("accuracy")
    for version, value in ((1, 0.9), (2, 0.95)):
        scores.add(version, "a", {"accuracy": value}, 10)
        scores.close(version)
    scores.add(2, "slow", {"accuracy": 0.99}, 10)
    assert scores.reached(0.9)
    scores.begin_anew(3)
    assert not scores.reached(0.9), "what another list has reached ends no run"
    assert not scores.stale_for(1)
    scores.add(3, "a", {"accuracy": 0.4}, 10)
    assert scores.close(3) == {"accuracy": 0.4}, "the slow store's word was about another list"
    assert scores.best == (3, 0.4)
    scores.add(4, "a", {"accuracy": 0.5}, 10)
    scores.close(4)
    assert scores.best == (4, 0.5)
    scores.withdraw(4)
    assert scores.best == (3, 0.4)
    scores.begin_anew(5)
    scores.add(5, "a", {"accuracy": 0.2}, 10)
    scores.close(5)
    assert scores.best == (5, 0.2)
    scores.withdraw(5)
    assert (scores.best, scores.since) == ((3, 0.4), 3), "the list of version 5 is no more either"


# -- a run ------------------------------------------------------------------------------------------------------

OLD, NEW = bench.SPLITS["apart"]
STORES = [*bench.KNOWING, *bench.OTHERS]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    bench.write_stores(folder, OLD, train=2400, judged=1200)
    return folder


def config(**changes: Any) -> dict[str, Any]:
    said = bench.configuration("apart", **changes)
    said["stores"] = [{"id": store} for store in STORES]
    return RunConfig.model_validate(said).model_dump(mode="json")


def ports(stores: Path, *, fresh: bool = True) -> dict[str, SitePort]:
    return {store: SitePort(stores / store, fresh=fresh) for store in STORES}


@pytest.fixture(scope="module")
def grown(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which five classes came at version 8; its home."""
    home = tmp_path_factory.mktemp("grown")
    run(config(versions=16, track={"mlflow": False, "keep_last": 100}), home, ports(stores), patience_s=300)
    return home


def test_five_classes_come_at_mid_run_and_all_stores_go_on(grown: Path) -> None:
    old, new, refused = bench.figures(bench.records_of(grown / "runs" / "run"), around=3)
    assert old["ok"], old
    assert new["ok"], new
    assert refused["ok"], refused
    history = read_history(grown / "runs" / "run")
    late = [c for v, body in history.versions.items() if v > 8 for c in body["contributions"]]
    assert {c["store"] for c in late} == set(STORES)
    assert len(late) == 4 * 8


def test_rows_that_a_store_cannot_label_stay_as_they_are_whatever_the_optimizer(stores: Path, tmp_path: Path) -> None:
    decaying = {"lr": 0.01, "batch_size": 32, "local_steps": 2, "optimizer": {"name": "adamw", "weight_decay": 0.5}}
    seen: dict[str, Any] = {}

    def keep(store: str) -> Any:
        return lambda update: seen.setdefault(store, update)

    asked = ports(stores)
    for store, port in asked.items():
        port.spoil = keep(store)
    made = run(config(grows=False, train=decaying, stop={"max_versions": 1}), tmp_path, asked)
    for store, update in seen.items():
        said = made.stages.at(0).form.said(np.array(update))
        assert (said is None) == (store in bench.OTHERS)
        if said is not None:
            assert said.tolist() == [True] * 5 + [False] * 5
            assert not any(row.of(np.array(update))[:, 5:].any() for row in made.stages.at(0).form.rows)


def test_each_version_answers_in_its_own_classes(grown: Path, tmp_path: Path) -> None:
    import cv2

    from raypipe.data.sample import load_sample

    images, labels = load_sample().read("test")
    names = load_sample().classes
    files = []
    for place in np.flatnonzero([names[label] in NEW for label in labels])[:20]:
        files.append(tmp_path / f"{place}.png")
        cv2.imwrite(str(files[-1]), images[place])
    folder = grown / "runs" / "run"
    assert {found.label for found in predict(str(folder), files, version=7)} <= set(OLD)
    assert {found.label for found in predict(str(folder), files)} & set(NEW)
    history = read_history(folder)
    assert history.best is not None
    assert history.best >= 8, "the best is one of those that know all classes"
    assert history.card(7)["task"]["classes"] == OLD
    assert history.card(8)["task"]["classes"] == [*OLD, *NEW]
    store = VersionStore(folder / "versions")
    kept = [v for v in store.kept() if v >= 8]
    assert kept
    assert predict(str(store.path(kept[-1])), files[:1])[0].label in [*OLD, *NEW]
    lines = listing(folder)
    assert lines[0].endswith("version 16: 10 classes")
    assert lines[1].split() == ["0", "T-shirt/top"]
    assert lines[-1].split() == ["9", "Ankle", "boot,", "since", "version", "8"]


def test_a_run_whose_classes_change_is_made_again_to_the_same_bytes(stores: Path, tmp_path: Path) -> None:
    """Late updates of before the change, the server's memory, a merge and a retirement among it."""
    changes = [
        {"at_version": 3, "add": NEW},
        {"at_version": 5, "merge": {"Sandal": "Sneaker"}, "retire": ["Coat"]},
        {"at_version": 6, "add": ["shoe"], "merge": {"Sneaker": "shoe", "Ankle boot": "shoe"}},
    ]
    said = config(
        class_changes=changes, pace="fedbuff", pacing={"buffer_size": 1}, server={"name": "adam"},
        train={"lr": 0.05, "batch_size": 16, "local_steps": 3}, stop={"max_versions": 12},
        track={"mlflow": False, "keep_last": 100},
    )  # fmt: skip
    made = ports(stores)
    made[STORES[-1]].site._slowdown = 8.0  # the others make version 3 while it trains on one before
    run(said, tmp_path, made)
    history = read_history(tmp_path / "runs" / "run")
    parts = [(v, c) for v, body in history.versions.items() for c in body["contributions"]]
    assert any(c["base"] < 3 <= v - 1 for v, c in parts), "an update came from before the change"
    assert [v for v, body in history.versions.items() if body.get("classes")] == [3, 5, 6]
    again = list(Replay(tmp_path / "runs" / "run", stores).versions())
    assert [made.version for made in again if not made.same] == []
    assert len(again) == 13
    assert not [r for r in bench.records_of(tmp_path / "runs" / "run") if r in ("store_set_aside", "update_rejected")]
    labels = history.task(12)
    assert ClassList.of(labels).live == (0, 1, 2, 4, 5, 8, 10)


def test_a_run_is_taken_up_in_the_classes_that_it_had(stores: Path, tmp_path: Path) -> None:
    said = config(
        versions=6, train={"lr": 0.05, "batch_size": 16, "local_steps": 2}, server={"name": "momentum"},
        track={"mlflow": False, "keep_last": 100},
    )  # fmt: skip
    whole = run(said, tmp_path / "whole", ports(stores))
    for stopped in (3, 4):  # just made, and one later
        home = tmp_path / f"stopped-{stopped}"
        folder = home / "runs" / "run"
        asked = ports(stores)
        made = compose(said, "run", home=str(home), put=lambda v: v.copy())
        record = made.shell.publisher.record

        def dies(kind: str, body: Any, record: Any = record, stopped: int = stopped) -> None:
            record(kind, body)
            if kind == "version_published" and body["version"] == stopped:
                raise Gone

        made.shell.publisher.record = dies  # type: ignore[method-assign]
        _drive(made, asked)
        made.shell.publisher.book._journal.close()
        for port in asked.values():
            port.site.close()
        back = run(said, home, ports(stores, fresh=False))
        assert back.read(6).tobytes() == whole.read(6).tobytes()
        assert [m.version for m in Replay(folder, stores).versions() if not m.same] == []


class Gone(Exception):
    """The end of a coordinator."""


def _drive(made: Any, asked: dict[str, SitePort]) -> None:
    """Until it dies."""
    import asyncio

    from raypipe.coordinator.loop import drive

    async def work() -> None:
        made.begin()
        lane = asyncio.create_task(made.shell.run_lane())
        keeping = [asyncio.create_task(made.shell.keep(name, port, 1.0, 1.0)) for name, port in asked.items()]
        running = asyncio.create_task(
            drive(made.machine, made.shell.perform, made.shell.inbox, made.shell.clock, made.shell.note, made.first)
        )
        await asyncio.wait({lane, running}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        for task in (lane, running, *keeping):
            task.cancel()
        ended = await asyncio.gather(lane, running, *keeping, return_exceptions=True)
        assert isinstance(ended[0], Gone)

    try:
        asyncio.run(work())
    finally:
        if made.notary is not None:
            made.notary.close()


def test_a_store_with_none_of_the_classes_yet_waits_and_is_not_refused(stores: Path, tmp_path: Path) -> None:
    """`new-1` has bags alone."""
    import shutil

    from raypipe.data.parquet import parquet
    from raypipe.store import shelf

    shutil.copytree(stores, tmp_path / "stores")
    place = tmp_path / "stores" / "new-1" / "data" / "products"
    data = parquet(place, "products")
    for split in ("train", "validation"):
        opened: Any = data.split(split)
        mine = np.flatnonzero(opened.labels == data.classes.index("Bag"))
        blobs = opened._read(mine)
        numbers = np.zeros(len(mine), np.int64)
        write_split(
            place / f"{split}.parquet", images=[bytes(b) for b in blobs], labels=numbers, classes=["Bag"],
            image_ids=[str(i) for i in mine], shapes=np.full((len(mine), 2), 28),
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "NONE_YET_S", 0.05)
        short = {"lr": 0.05, "batch_size": 16, "local_steps": 2}
        run(config(versions=8, train=short), tmp_path, ports(tmp_path / "stores"))
    records = bench.records_of(tmp_path / "runs" / "run")
    assert "store_set_aside" not in records
    assert {body["store"] for body in records["store_closed"]} == {"new-1"}
    last = {c["store"] for c in records["version_published"][-1]["contributions"]}
    assert "new-1" in last


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"at_version": 2, "retire": ["hat"]}], "from version 2 on: retire: no class named 'hat'"),
        ([{"at_version": 2, "add": ["bag"]}], "'bag' is a class already"),
        ([{"at_version": 2, "merge": {"bag": "boot", "boot": "bag"}}], "goes in a circle"),
        ([{"at_version": 2}], "adds, merges or retires something"),
        ([{"at_version": 9, "add": ["hat"]}], "version 9 comes too late: the run ends with version 9"),
        ([{"at_version": 2, "add": ["x"]}, {"at_version": 2, "add": ["y"]}], "version 2 is named twice"),
        ([{"at_version": 0, "add": ["x"]}], "class_changes.0.at_version"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_starts(
    changes: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    file = tmp_path / "run.yaml"
    body = {"name": "x", "task": part(["boot", "shirt", "bag"]), "class_changes": changes, "stores": [{"id": "a"}]}
    file.write_text(yaml.safe_dump(body | {"stop": {"max_versions": 9}, "local": {}}))
    assert main(["check", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_classes_that_are_numbers_or_of_a_head_that_cannot_grow_do_not_change(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "run.yaml"
    body = {"name": "x", "stores": [{"id": "a"}], "stop": {"max_versions": 9}, "local": {}}
    body["class_changes"] = [{"at_version": 2, "add": ["hat"]}]
    file.write_text(yaml.safe_dump(body | {"task": part(10)}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="classes that change have names"):
        load_run(file)
    head = {"task": part(["a", "b"]), "train": {"trained": ["0.*"]}}
    file.write_text(yaml.safe_dump(body | head))
    said = load_run(file).model_dump(mode="json")
    with pytest.raises(ConfigError, match="no head that can grow"):
        compose(said, "run", home=str(tmp_path), put=lambda v: v)


def test_gone_names_classes_that_there_are(tmp_path: Path) -> None:
    for gone, said in (
        ({"x": None}, "no class named 'x'"),
        ({"a": "x"}, "no class named 'x'"),
        ({"a": "b", "b": "a"}, "counts as itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            tasks.build(part(["a", "b", "c"], gone=gone))
    named = ClassList.of(part(["a", "b"], merge={"a": ["c"]}))
    with pytest.raises(ConfigError, match="add: 'c' counts as 'a' by task"):
        named.changed(Change(add=("c",)))
    with pytest.raises(ConfigError, match="counts twice"):
        tasks.build(part(["a", "b"], merge={"a": ["b"]}))


def test_what_is_frozen_travels_once_a_class_list(stores: Path, tmp_path: Path) -> None:
    """And what is put together at a store is whole after the head grew."""
    from raypipe.store.pieces import Pieces

    wide = {"model": {"name": "small_cnn", "hidden": 64}, "train": {"lr": 0.05, "local_steps": 1, "trained": "head"}}
    asked = ports(stores)
    seen: list[tuple[str, int, int | None]] = []
    for store, port in asked.items():
        pieces, given, train = Pieces(), list[Any](), port.train

        async def whole(
            ticket: Any, plan: bytes, weights: Any, how: Any = None, store: str = store, pieces: Pieces = pieces,
            given: list[Any] = given, train: Any = train,
        ) -> Any:  # fmt: skip
            """As the client and the actor of a store do it."""
            still = None if given and given[-1] is weights.still else weights.still
            given.append(weights.still)
            seen.append((store, ticket.version, None if still is None else still.size))
            return await train(ticket, plan, pieces.whole(plan, weights.moving, still))

        port.train = whole  # type: ignore[method-assign]
        port.evaluate = _no_word  # type: ignore[method-assign,assignment]
    run(config(versions=6, evaluate={"every": 100, "alone": False, "test": False}, **wide), tmp_path, asked)
    assert {(version, size is not None) for _, version, size in seen} == {(v, v in (0, 3)) for v in range(6)}


async def _no_word(*_: Any) -> Any:
    raise StoreUnreachable("it is not asked")
