"""A store: what it does when it is asked, what it refuses, and what never leaves it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray.exceptions import RayActorError
from torch.nn.functional import cross_entropy

from raypipe.config.schema import Store
from raypipe.data.sample import encode_png
from raypipe.data.schema import write_split
from raypipe.errors import ConfigError, RaypipeError, StoreError
from raypipe.models import models
from raypipe.models.flat import flatten, initial, state_dict_from
from raypipe.placement.plan import store_options
from raypipe.store.client import StoreClient
from raypipe.store.messages import Plan, Ticket, Verdict, encode
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import read_policy
from raypipe.store.safety import safe_reason
from raypipe.store.schedules import schedules
from raypipe.store.site import Site
from raypipe.tasks.metrics import metrics
from raypipe.types import Layout, Role

torch.set_num_threads(1)
SIZE, CLASSES = 12, ("boots", "canary-coat", "hats")
TASK = {"name": "classification", "classes": list(CLASSES), "image_size": SIZE, "channels": 1}
CNN = {"name": "small_cnn", "width": 8, "hidden": 16}
BATCH_NORM = {"name": "mobilenet_v3_small", "norm": "batch"}


def write(
    home: Path,
    *,
    num: int = 70,
    broken: tuple[int, ...] = (),
    labels: Any = None,
    classes: tuple[str, ...] = CLASSES,
    **policy: Any,
) -> Path:
    """A store's folder: a policy, `num` training images of which these are cut short, and 30 to validate on."""
    folder = home / "canary-folder"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", num), ("validation", 30)):
        own = np.arange(count) % len(classes) if labels is None else np.resize(labels, count)
        pixels = rng.integers(0, 120, (count, SIZE, SIZE), dtype=np.uint8)
        pixels[np.arange(count), :, own] += 120  # a bright column says the class
        files = encode_png(pixels, level=1)
        files = [f[: len(f) // 2] if split == "train" and i in broken else f for i, f in enumerate(files)]
        shapes = np.full((count, 2), SIZE)
        ids = [f"canary-{i}" for i in range(count)]
        write_split(
            folder / f"{split}.parquet", images=files, labels=own, classes=classes, image_ids=ids, shapes=shapes
        )
    data = {"products": {"folder": "canary-folder"}}
    (home / "policy.yaml").write_text(yaml.safe_dump({"store": "south", "data": data, **policy}))
    return home


class Case:
    """A site, and a plan and weights that fit it."""

    def __init__(self, home: Path, model: dict[str, Any] = CNN, *, site: dict[str, Any] | None = None, **data: Any):
        self.site = Site(home if (home / "policy.yaml").exists() else write(home, **data), **(site or {}))
        self.layout, self.weights = initial(model, 3, 1, SIZE, seed=0)
        self.weights.flags.writeable = False
        self.plan = Plan(
            run="r", task=TASK, model=model, data="products", optimizer={"name": "sgd"}, lr=0.1,
            schedule={"name": "constant"}, batch_size=32, layout=self.layout.fingerprint,
        )  # fmt: skip
        self.ticket = Ticket(
            id="t1", store="south", epoch=1, version=0, seed=5, progress=(0.0, 0.1), max_epochs=2.0
        )  # fmt: skip

    def train(self, ticket: dict[str, Any] | None = None, **plan: Any) -> Any:
        return self.site.train(replace(self.ticket, **(ticket or {})), replace(self.plan, **plan), self.weights)

    def update(self, ticket: dict[str, Any] | None = None, **plan: Any) -> np.ndarray[Any, Any]:
        return self.site.collect(self.train(ticket, **plan).ticket, []).copy()  # it is whole only until settled

    def refused(self, call: Callable[[], object]) -> str:
        with pytest.raises(StoreError) as caught:
            call()
        assert "\n" not in caught.value.message
        return caught.value.message


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "south")


def plain_loop(case: Case, seed: int, epochs: int) -> np.ndarray[Any, Any]:
    """What anyone would write."""
    split = case.site._shelf.data("products").split("train")
    images = (torch.from_numpy(split.decode(np.arange(70), size=SIZE, channels=1)[0]).float() - 127.5) / 63.75
    labels = torch.from_numpy(split.labels)
    model = models.build(case.plan.model, 3, 1, SIZE)
    model.load_state_dict({k: torch.tensor(v) for k, v in state_dict_from(case.layout, case.weights).items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for batch in torch.from_numpy(rng.permutation(70)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return flatten(model, case.layout)


def test_a_delta_is_bit_for_bit_that_of_a_plain_loop(case: Case) -> None:
    report = case.train()
    expected = plain_loop(case, seed=5, epochs=2) - case.weights
    assert np.array_equal(case.site.collect("t1", []), expected[: case.layout.update_size])
    assert (report.steps, report.examples, report.num_train, report.stopped) == (6, 140, 70, "done")
    assert report.update_bytes == 4 * case.layout.update_size


def test_equal_tickets_give_equal_bits_whoever_trained_before(case: Case, tmp_path: Path) -> None:
    plan = {"optimizer": {"name": "adamw"}, "model": BATCH_NORM, "batch_size": 16}
    other = Case(tmp_path / "other", BATCH_NORM)
    case.layout, case.weights = other.layout, other.weights
    plan["layout"] = other.layout.fingerprint
    first = case.update({"max_steps": 2}, **plan)
    different = case.update({"id": "t2", "seed": 6, "max_steps": 2}, **plan)
    torch.rand(3)
    assert np.array_equal(other.update({"max_steps": 2}, **plan), first)
    assert np.array_equal(case.update({"id": "t3", "max_steps": 2}, **plan), first)
    assert not np.array_equal(first, different)


def test_statistics_travel_as_values_and_counters_not_at_all(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", BATCH_NORM)
    update = case.update({"max_steps": 2})
    sent = [e for e in case.layout.entries if e.offset < case.layout.update_size]
    assert {e.role for e in sent} == {Role.SHARED, Role.STATISTIC}
    assert {e.dtype for e in sent} == {"float32"}
    variance = next(e for e in case.layout.entries if e.name == "features.0.1.running_var")
    assert (update[variance.slice] > 0).all()
    model = case.site._shelf.learner(case.plan, case.weights).model
    mean = next(e for e in case.layout.entries if e.name == "features.0.1.running_mean")
    moved = update[mean.slice] - case.weights[mean.slice]
    assert np.array_equal(update[mean.slice], model.module.get_buffer("features.0.1.running_mean").numpy())
    # Of a variance the second moment about the base's mean.
    spread = model.module.get_buffer("features.0.1.running_var").numpy() + moved**2
    assert np.allclose(update[variance.slice], spread, rtol=1e-6)
    assert update.size == case.layout.update_size < case.layout.size


def test_fixed_statistics_stay_as_the_version_has_them_and_training_uses_them(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", BATCH_NORM)
    late = {"max_steps": 2, "progress": (0.5, 0.6)}
    moving = case.update({**late, "id": "t0", "progress": (0.4, 0.5)}, fix_statistics_from=0.5)
    fixed = case.update(late, fix_statistics_from=0.5)
    statistics = [e.slice for e in case.layout.entries if e.role is Role.STATISTIC and e.dtype == "float32"]
    for place in statistics:
        assert np.array_equal(fixed[place], case.weights[place])
        assert not np.array_equal(moving[place], case.weights[place])
    shared = case.layout.shared
    assert not np.allclose(fixed[shared], moving[shared], atol=1e-4), "the same batches, normalised otherwise"


def test_the_budget_ends_a_ticket_between_batches(tmp_path: Path) -> None:
    ticks = itertools.count()
    case = Case(tmp_path / "south", site={"clock": lambda: float(next(ticks))})
    report = case.train({"max_epochs": None, "budget_s": 6.0})
    assert report.stopped == "budget"
    assert 1 <= report.steps <= 6
    assert case.site.collect("t1", []).any()
    assert case.train({"id": "t2", "max_epochs": None, "budget_s": 0.001}).steps == 1


def test_the_policy_cuts_what_a_ticket_may_take(tmp_path: Path) -> None:
    ticks = itertools.count()
    clock = lambda: float(next(ticks))  # noqa: E731
    case = Case(tmp_path / "south", site={"clock": clock}, max_seconds=4, max_examples=64)
    assert case.train({"max_epochs": None, "budget_s": 1e6}).seconds < 10
    assert case.train({"id": "t2", "max_epochs": 50}).examples <= 64


def test_stop_is_seen_within_a_batch_and_pause_waits(case: Case) -> None:
    case.site.control("t1", "pause")  # before it begins
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(case.train({"max_epochs": 1e6})))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    case.site.control("*", "stop")
    thread.join(20)
    assert reports[0].stopped == "control"
    assert reports[0].steps == 1


def test_a_slow_store_takes_so_many_times_longer_and_hears_a_stop_in_its_sleep(tmp_path: Path) -> None:
    fast, slow = Case(tmp_path / "fast"), Case(tmp_path / "slow", site={"slowdown": 20.0})
    fast.train()
    assert slow.train().seconds > 5 * fast.train({"id": "t2"}).seconds
    assert np.array_equal(slow.site.collect("t1", []), fast.site.collect("t1", []))


def test_an_update_waits_until_it_is_settled(case: Case) -> None:
    report = case.train()
    update = case.site.collect("t1", [])
    assert np.shares_memory(case.site.collect("t1", []), update), "no copy"
    assert not update.flags.writeable
    assert case.train() is report  # asked again: not trained again
    case.site.settle(Verdict("t1", version=1))
    case.site.settle(Verdict("t1", version=1))
    assert "no update waits" in case.refused(lambda: case.site.collect("t1", []))


def test_an_older_epoch_is_refused(case: Case) -> None:
    case.train({"epoch": 3})
    assert "epoch 2 of this run is over" in case.refused(lambda: case.train({"id": "t2", "epoch": 2}))
    case.train({"id": "t3", "epoch": 1}, run="another")


def test_an_optimizers_state_is_kept_only_if_its_update_was_folded(case: Case) -> None:
    plan = {"optimizer": {"name": "sgd", "momentum": 0.9}, "keep_optimizer": True}
    first = case.update(**plan)
    case.site.settle(Verdict("t1", version=None, reason="not finite"))
    assert np.array_equal(case.update({"id": "t2"}, **plan), first)
    case.site.settle(Verdict("t2", version=1))
    third = case.update({"id": "t3"}, **plan)
    assert not np.array_equal(third, first)
    assert np.array_equal(case.update({"id": "t4"}, **plan), third)  # t3 is not settled yet


def test_a_codec_encodes_what_is_collected(case: Case) -> None:
    update = case.update()
    half = case.site.collect("t1", [{"name": "float16"}])
    assert half.nbytes * 2 == update.nbytes


def test_the_upload_limit_holds_for_what_travels(tmp_path: Path) -> None:
    num_bytes = Case(tmp_path / "other").layout.update_size * 4
    case = Case(tmp_path / "south", max_upload_bytes=num_bytes - 1)
    case.train()
    assert f"the store's policy allows {num_bytes - 1}" in case.refused(lambda: case.site.collect("t1", []))
    case.site.collect("t1", [{"name": "float16"}])


@optimizers("to_infinity")
def to_infinity() -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    class ToInfinity(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    return lambda weights: ToInfinity(weights, lr=0.0)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown data": ({}, {"data": "product"}, "no data set named 'product' is offered. Did you mean 'products'?"),
    "task": ({}, {"task": {"name": "detection"}}, "does not allow task 'detection'. Allowed: classification."),
    "model": ({}, {"model": {"name": "resnet50"}}, "does not allow model 'resnet50'. Allowed: resnet18, small_cnn."),
    "layout": ({}, {"layout": "0" * 16}, "another layout than the plan's"),
    "batch": ({}, {"batch_size": 0}, "batch_size is at least 1, found 0"),
    "lr": ({}, {"lr": float("nan")}, "lr is above 0 and at most 1e+06, found nan"),
    "no end": ({"max_epochs": None}, {}, "the ticket has no end"),
    "negative": ({"max_steps": 0}, {}, "are above 0"),
    "store": ({"store": "north"}, {}, "for store 'north', this is 'south'"),
    "split": ({"judge": "vaildation"}, {}, "Did you mean 'validation'?"),
    "classes": ({}, {"task": {**TASK, "classes": ["boots", "hats", "gloves"]}}, "outside the task's 3 classes"),
    "diverged": ({"max_epochs": 20}, {"lr": 1e6}, "the loss is not finite at step "),
    "infinite": ({"max_steps": 1}, {"optimizer": {"name": "to_infinity"}}, "the update is not finite after 1 steps"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line(tmp_path: Path, name: str) -> None:
    case = Case(tmp_path / "south", tasks=["classification"], models=["small_cnn", "resnet18"])
    ticket, plan, reason = REFUSALS[name]
    message = case.refused(lambda: case.train(ticket, **plan))
    assert reason in message
    assert "canary" not in message
    assert case.site.describe("r").outbox == ()
    case.train({"id": "after"})  # and it goes on


def test_labels_beyond_a_numbered_task_are_refused_without_their_value(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", labels=[0, 1, 2, 3], classes=(*CLASSES, "scarves"))
    message = case.refused(lambda: case.train(task={**TASK, "classes": 3}))
    assert message == "split 'train' of data set 'products' holds labels outside the task's 3 classes"


def test_classes_are_matched_by_name_and_a_class_no_store_has_does_no_harm(tmp_path: Path) -> None:
    names = ["unseen", *CLASSES[::-1]]
    case = Case(tmp_path / "south")
    case.layout, case.weights = initial(CNN, 4, 1, SIZE, seed=0)
    plan = {"task": {**TASK, "classes": names}, "layout": case.layout.fingerprint}
    assert case.train({"max_epochs": 8}, **plan).steps == 24
    _, images = next(iter(case.site._shelf._images.items()))
    assert images._targets._labels.unique().tolist() == [1, 2, 3]
    assert images._targets._labels[:3].tolist() == [3, 2, 1]


def test_weights_of_another_shape_or_type_are_refused(case: Case) -> None:
    case.weights = np.zeros(case.layout.size + 1, np.float32)
    assert "not float32" in case.refused(case.train)
    case.weights = np.zeros(case.layout.size, np.float64)
    assert "weights are float64" in case.refused(case.train)


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cached", "decoded per batch"])
def test_broken_images_are_counted_and_too_many_are_refused(tmp_path: Path, cache_bytes: int) -> None:
    case = Case(tmp_path / "south", broken=(3, 11, 12), max_bad_share=0.1, site={"cache_bytes": cache_bytes})
    report = case.train({"max_epochs": 2}, max_bad_share=0.5)
    assert (report.skipped, report.num_train, report.examples) == (3, 70, 134)
    message = case.refused(lambda: case.train({"id": "t2"}, max_bad_share=0.01))
    assert message == (
        "3 of 70 images of split 'train' of data set 'products' cannot be read (4.3 %), more than the 1 % allowed"
    )


def test_a_cache_that_is_too_small_changes_nothing_but_speed(tmp_path: Path) -> None:
    cached, streamed = Case(tmp_path / "a"), Case(tmp_path / "b", site={"cache_bytes": 0})
    assert np.array_equal(cached.update(), streamed.update())
    one = cached.site.evaluate(cached.plan, cached.weights, "validation")
    assert one.sums == streamed.site.evaluate(cached.plan, cached.weights, "validation").sums


def test_one_image_is_enough_but_not_for_batch_norm(tmp_path: Path) -> None:
    assert Case(tmp_path / "a", num=1).train().steps == 2
    case = Case(tmp_path / "b", BATCH_NORM, num=1)
    assert "set norm: group" in case.refused(case.train)


def test_batch_norm_leaves_a_last_batch_of_one_image_out(tmp_path: Path) -> None:
    report = Case(tmp_path / "south", BATCH_NORM, num=17).train({"max_epochs": 1}, batch_size=8)
    assert (report.steps, report.examples) == (2, 16)


def test_evaluation_sums_are_those_of_the_base_version(case: Case) -> None:
    alone = case.site.evaluate(case.plan, case.weights, "validation")
    report = case.train({"evaluate": "validation"})
    assert report.evaluation is not None
    assert (report.evaluation.sums, report.evaluation.num_examples) == (alone.sums, 30)
    assert set(metrics(alone.sums, 30)) == {"accuracy", "loss"}
    assert metrics({}, 0) == {}


def test_an_evaluation_adds_its_batches_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.site.evaluate(case.plan, case.weights, "validation")
    monkeypatch.setattr("raypipe.store.evaluation.EVALUATION_BATCH", 8)
    parts = case.site.evaluate(case.plan, case.weights, "validation")
    assert parts.num_examples == 30
    assert parts.sums["accuracy"] == whole.sums["accuracy"]
    assert parts.sums["loss"] == pytest.approx(whole.sums["loss"], rel=1e-5)


def test_a_stopped_ticket_does_not_evaluate_on(case: Case) -> None:
    case.site.control("t1", "stop")
    report = case.train({"evaluate": "validation"})
    assert (report.evaluation, report.steps, report.stopped) == (None, 1, "control")


def test_judging_leaves_nothing_to_collect_and_sees_the_trained_model(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", site={"slowdown": 1000.0})
    report = case.train({"max_epochs": 12, "judge": "validation"})
    assert report.evaluation is not None
    assert metrics(report.evaluation.sums, 30)["accuracy"] > 0.9
    assert report.update_bytes == 0
    assert "no update waits" in case.refused(lambda: case.site.collect("t1", []))


def test_a_card_counts_and_names_no_path_or_class(tmp_path: Path) -> None:
    case = Case(tmp_path / "south", max_seconds=60)
    card = case.site.describe()
    assert card.data == {"products": {"train": 70, "validation": 30}}
    assert card.limits == {"max_seconds": 60.0}
    assert card.data_bytes["products"] > 70 * SIZE
    assert b"canary" not in encode(card)


def test_the_learning_rate_follows_the_runs_progress(case: Case) -> None:
    plan = {"schedule": {"name": "step", "at": [0.5], "factor": 0.1}}
    early = case.update({"max_steps": 1, "progress": (0.0, 0.1)}, **plan)
    late = case.update({"id": "t2", "max_steps": 1, "progress": (0.6, 0.7)}, **plan)
    np.testing.assert_allclose(late, 0.1 * early, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule_stays_between_nought_and_one(name: str) -> None:
    schedule = schedules.build({"name": name})
    values = [schedule(progress) for progress in np.linspace(0, 1, 101)]
    assert values[0] > 0
    assert all(0 <= value <= 1 for value in values)


def test_warm_up_never_stands_still() -> None:
    schedule = schedules.build({"name": "cosine", "warmup_fraction": 0.2, "final_fraction": 0.1})
    assert [schedule(at) for at in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.01, 0.5, 1.0, 0.1])


@pytest.mark.parametrize("name", sorted({*optimizers.names()} - {"to_infinity"}))
def test_every_optimizer_learns(case: Case, name: str) -> None:
    plan = {"optimizer": {"name": name}, "lr": 0.1 if name == "sgd" else 0.01}
    report = case.train({"max_epochs": 10, "judge": "validation"}, **plan)
    assert report.evaluation is not None
    assert metrics(report.evaluation.sums, 30)["accuracy"] > 0.9


def test_nothing_of_the_data_leaves_by_an_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    case = Case(tmp_path / "south")
    secret = f"canary-coat 2 {tmp_path} \x89PNG"

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(secret)

    monkeypatch.setattr("raypipe.data.parquet.decode_images", broken)
    with pytest.raises(RuntimeError) as caught:
        case.train()
    refusal = case.site.refusal(caught.value, "train", "t1")
    assert refusal.reason == "unexpected RuntimeError in train; the store's own log has it"
    assert refusal.kind == "failed"
    assert "canary-coat" in (tmp_path / "south" / "site.log").read_text()
    assert "canary" not in "".join(capfd.readouterr()) + caplog.text
    assert safe_reason(MemoryError(secret), "train").startswith("out of memory in train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("store: south\nmax_secnds: 3\n", "policy.yaml: no key 'max_secnds'. Did you mean 'max_seconds'?"),
        ("store: south\nmax_seconds: -1\n", "policy.yaml: max_seconds: input should be greater than 0"),
        ("store: south\ndata: {products: {foldr: canary}}\n", "no key 'data.<name>.foldr'. Did you mean 'folder'?"),
        ("store: [\n", "policy.yaml is not YAML: see line 2"),
        (None, "policy.yaml of the store cannot be read: No such file or directory"),
    ],
)
def test_a_policy_that_is_wrong_says_where(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path)
    assert any(problem in line for line in caught.value.problems)
    assert str(tmp_path) not in caught.value.message
    assert "canary" not in caught.value.message


def test_a_data_set_that_is_not_there_is_told_without_its_path(case: Case, tmp_path: Path) -> None:
    (tmp_path / "south" / "canary-folder").rename(tmp_path / "gone")
    with pytest.raises(RaypipeError) as caught:
        case.train()
    refusal = case.site.refusal(caught.value, "train")
    assert refusal.kind == "refused"
    assert "products" in refusal.reason
    assert "canary" not in refusal.reason


def test_gpus_that_are_not_there_are_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"store south is given 0\.5 GPUs, but torch sees none on this node"):
        Site(write(tmp_path / "south"), gpus=0.5)


def test_layouts_differ_when_code_differs(case: Case) -> None:
    other: Layout = initial({**CNN, "width": 16}, 3, 1, SIZE, seed=0)[0]
    assert other.fingerprint != case.layout.fingerprint


@pytest.mark.parametrize(("gpus", "share"), [(0.0, []), (0.25, [0.25]), (1.0, [1.0]), (2.0, [1.0])])
def test_a_share_of_a_gpu_is_that_share_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, share: list[float]
) -> None:
    """What Ray places by is a promise; the cap keeps it. Without a GPU here: what torch is told."""
    told: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    site = Site(write(tmp_path / "south"), gpus=gpus)
    assert (site._device.type, told) == ("cuda" if share else "cpu", share)
    assert store_options("south", 1, gpus)["num_gpus"] == gpus
    site.close()


@pytest.mark.parametrize("late_s", [0.13, None])
def test_a_heartbeat_that_comes_late_over_a_link_that_was_away_is_one(late_s: float | None) -> None:
    """The first answer comes while the second question, lost with its segments, is not answered any more."""

    async def watched() -> tuple[bool, str]:
        client = StoreClient(Store(id="a"), "r", 1, "code", "actor")
        silent = asyncio.get_running_loop().create_future
        answers = [silent(), silent(), silent()]
        if late_s is not None:
            asyncio.get_running_loop().call_later(late_s, answers[0].set_result, True)
            answers[2].set_exception(RayActorError())
        client._actor = SimpleNamespace(heartbeat=SimpleNamespace(remote=lambda: answers.pop(0)))
        return await client.watch(0.06, lambda _: None)

    assert asyncio.run(watched()) == (
        (True, "no heartbeat for 0 s") if late_s is None else (False, "its process ended")
    )
