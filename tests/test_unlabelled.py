"""Detection where stores cannot label all classes: nothing is unlearned there, and classes come and go in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from test_shell import SitePort, records, run
from torch import nn
from torchvision.ops import box_iou

from raypipe.config.schema import RunConfig
from raypipe.data.writer import Box, Example, SplitWriter
from raypipe.models import models
from raypipe.models.flat import initial
from raypipe.models.growth import Form
from raypipe.store.messages import Evaluation, Plan, Ticket
from raypipe.store.site import Site
from raypipe.tasks import Task, tasks
from raypipe.tasks.class_list import ClassList
from raypipe.tasks.metrics import metrics
from raypipe.tracking.lineage import read_history

torch.set_num_threads(1)
SIZE = 64
COLOURS = {"a": (220, 40, 40), "b": (40, 220, 40), "c": (60, 60, 240), "d": (220, 220, 40)}
ANCHORS = [[8, 8], [10, 13], [14, 10], [14, 14], [14, 20], [20, 14], [20, 20], [26, 26], [36, 36]]
MODEL = {"name": "yolov5n", "norm": "group", "anchors": ANCHORS}
TASK = {"name": "detection", "image_size": SIZE, "mosaic": 0, "flip": 0, "colour": 0}
ADAM = {"optimizer": {"name": "adamw"}, "lr": 0.005, "batch_size": 8}


def painted(home: Path, seen: Sequence[str], named: Sequence[str], num: int = 64, seed: int = 0) -> Path:
    """A store whose images have one thing of each colour `seen`; those `named` are labelled, the others stand there."""
    data, rng = home / "things", np.random.default_rng(seed)
    data.mkdir(parents=True)
    for split, many in (("train", num), ("validation", 16)):
        with SplitWriter(data / f"{split}.parquet", list(named), boxes=True, split=split) as writer:
            for i in range(many):
                pixels, boxes = rng.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8), []
                for corner, name in enumerate(seen):
                    w, h = (int(v) for v in rng.integers(14, 22, 2))
                    x, y = (32 * place + int(rng.integers(2, 30 - 20)) for place in (corner % 2, corner // 2))
                    pixels[y : y + h, x : x + w] = COLOURS[name]
                    boxes += [Box(named.index(name), x, y, w, h)] if name in named else []
                raw = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
                writer.add(Example(str(i), raw, SIZE, SIZE, boxes=boxes))
    said = {"store": home.name, "data": {"things": {"folder": "things"}}}
    (home / "policy.yaml").write_text(yaml.safe_dump(said))
    return home


def planned(classes: Sequence[str], **task: Any) -> tuple[Plan, Any]:
    part = {**TASK, "classes": list(classes), **task}
    layout, weights = initial(MODEL, len(classes), 3, SIZE, seed=0, boxes=True)
    plan = Plan(
        run="r", task=part, model=MODEL, data="things", optimizer=ADAM["optimizer"], lr=ADAM["lr"],
        schedule={"name": "constant"}, batch_size=8, layout=layout.fingerprint,
    )  # fmt: skip
    return plan, weights


def of_class(judged: Evaluation, label: int) -> float:
    """Average precision at half an overlap of one class alone."""
    own = {name: value for name, value in judged.sums.items() if name.split("/")[1] == str(label)}
    return metrics(own, judged.num_examples)["map50"]


def trained(site: Site, plan: Plan, weights: Any, steps: int) -> Any:
    name = f"{site.store}-{steps}-{plan.task.get('absent')}"
    ticket = Ticket(id=name, store=site.store, epoch=1, version=0, seed=1, progress=(0.0, 0.0), max_steps=steps)
    site.train(ticket, plan, weights)
    update = site.collect(name, [])
    after = weights.copy()
    after[: update.size] += update
    return after


def test_a_store_that_cannot_label_a_class_does_not_unlearn_it(tmp_path: Path) -> None:
    """Its things stand in the store's images without a box: as background they are gone at once (measured 1.0, 0)."""
    knows = Site(painted(tmp_path / "knows", "abc", "abc"))
    other = Site(painted(tmp_path / "other", "abc", "ac", seed=1))
    plan, weights = planned("abc")
    first = trained(knows, plan, weights, 150)
    precision = {"before": of_class(knows.evaluate(plan, first, "validation"), 1)}
    for absent in ("untouched", "negative"):
        after = trained(other, planned("abc", absent=absent)[0], first, 40)
        judged = knows.evaluate(plan, after, "validation")
        precision[absent] = of_class(judged, 1)
        assert of_class(judged, 0) >= 0.5, "what it can label it goes on to teach"
    assert precision["before"] >= 0.8
    assert precision["untouched"] >= 0.7, precision
    assert precision["negative"] <= 0.2, precision


def test_a_place_where_such_a_class_is_seen_teaches_nothing_about_objects() -> None:
    task = tasks.build({**TASK, "classes": ["a", "b", "c"]})
    module: Any = models.build(MODEL, 3, 3, SIZE)
    maps = [torch.full((2, 3, SIZE // s, SIZE // s, 8), -4.0) for s in (8, 16, 32)]
    seen = (1, 0, 1, 3, 3)  # level, image, anchor, y, x: a thing that looks like b
    maps[0][0, 1, 0, 1, [4, 5]] = 2.0  # like a, which the store would have labelled
    maps[1][0, 1, 3, 3, [4, 6]] = 2.0
    maps[2][1, 2, 0, 1, 6] = 2.0  # like b, if it were an object at all
    maps[0][0, :, 3, 3, 4], maps[0][0, :, 3, 3, 6] = 2.0, 2.0  # like b, where the store says that it is an a
    module.raw = lambda images: maps
    restricted, everything = task.among((0, 2), module), task.among(None)
    now = [found.clone().requires_grad_() for found in maps]
    module.raw = lambda images: now
    box = torch.tensor([[0, 0, 27.0, 27.0, 10.0, 13.0, 0.0]])

    def silent(some: Task) -> list[tuple[int, ...]]:
        assert some.boxes is not None
        for found in now:
            found.grad = None
        some.boxes.step(module, torch.zeros(2, 3, SIZE, SIZE), box).backward()
        slopes = [found.grad[..., 4] for found in now if found.grad is not None]
        return [(level, *place) for level, slope in enumerate(slopes) for place in (slope == 0).nonzero().tolist()]

    assert silent(everything) == []
    assert silent(restricted) == [seen], "where it has a box of its own it is taught"
    none = task.among((), module).boxes
    assert none is not None
    assert none.step(module, torch.zeros(2, 3, SIZE, SIZE), box[:0]).isfinite(), "of a store that has none of them"


B, OWN = (0.25, 0.25, 0.75, 0.75), (0.8, 0.8, 0.98, 0.98)  # shares of the side: a b without a box, an a that has one


def found_there(size: int) -> list[list[list[float]]]:
    """What a version finds: a b; then only what is no such thing (an a there, a b where the store says a, a line)."""
    b, own = ([size * share for share in box] for box in (B, OWN))
    return [[[*b, 0.9, 1.0]], [[*b, 0.9, 0.0], [*own, 0.9, 1.0], [0.0, 0.0, 0.0, 9.0, 0.9, 1.0]], []]


def taught(module: Any, size: int, found: list[list[float]]) -> None:
    """A training step at a store that knows a and c, of two images: in the first its version finds these."""
    asked = tasks.build({**TASK, "classes": ["a", "b", "c"], "image_size": size}).among((0, 2), module)
    assert asked.boxes is not None
    step: Any = asked.boxes.step
    step.keywords["version"].raw = lambda images: [torch.tensor(some).reshape(-1, 6) for some in (found, [])]
    centre, side = size * (OWN[0] + OWN[2]) / 2, size * (OWN[2] - OWN[0])
    loss = step(module.train(), torch.rand(2, 3, size, size), torch.tensor([[0, 0, centre, centre, side, side, 0.0]]))
    assert loss.isfinite()
    loss.backward()


def over(boxes: torch.Tensor, size: int, box: Sequence[float], least: float) -> torch.Tensor:
    return box_iou(size * torch.tensor([box]), boxes)[0] >= least


def test_ssdlite_is_not_taught_that_what_nobody_could_label_is_background() -> None:
    size, kept = 320, dict[str, torch.Tensor]()
    module: Any = models.build({"name": "ssdlite320_mobilenet_v3_large"}, 3, 3, size)
    net = module.net
    net.anchor_generator.register_forward_hook(lambda part, inputs, output: kept.update(anchors=output[0]))
    module.eval()(torch.rand(1, 3, size, size))
    near, own = (over(kept["anchors"], size, box, 0.5) for box in (B, OWN))
    assert near.sum() >= 3

    def like_b(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(output)
        logits[0, near, 2] = 9.0  # the hardest of all negatives
        kept["logits"] = logits.requires_grad_()
        return logits

    net.head.classification_head.register_forward_hook(like_b)
    moved = []
    for found in found_there(size):
        taught(module, size, found)
        assert kept["logits"].grad is not None
        moved.append((kept["logits"].grad[0] != 0).any(1))
    assert not moved[0][near].any()
    assert moved[0][own].any(), "what it has a box for it goes on to teach"
    for unchanged in moved[1:]:
        assert unchanged[near].any(), "seen, but not as a class that it cannot label"


def test_faster_rcnn_is_not_taught_that_what_nobody_could_label_is_background() -> None:
    size, sure, kept = 128, list[torch.Tensor](), dict[str, torch.Tensor]()
    module: Any = models.build({"name": "fasterrcnn_mobilenet_v3_large_320_fpn"}, 3, 3, size)
    net = module.net
    net.transform.min_size, net.transform.max_size = (size,), size
    net.roi_heads.box_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1024))  # a quick one
    for part in (net.rpn, net.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6  # all that there are

    def unsure(_: Any, inputs: Any, output: Any) -> Any:
        sure[:] = [torch.zeros_like(level).requires_grad_() for level in output[0]]
        return sure, [torch.zeros_like(level) for level in output[1]]

    net.rpn.anchor_generator.register_forward_hook(lambda part, inputs, output: kept.update(anchors=output[0]))
    net.rpn.head.register_forward_hook(unsure)
    net.roi_heads.box_roi_pool.register_forward_pre_hook(lambda part, inputs: kept.update(drawn=inputs[1][0]))
    seen = []
    for found in found_there(size):
        taught(module, size, found)
        slopes = [level.grad[0].permute(1, 2, 0).flatten() != 0 for level in sure if level.grad is not None]
        near = over(kept["anchors"], size, B, 0.3)
        assert near.sum() >= 3
        seen.append((torch.cat(slopes)[near], *(over(kept["drawn"], size, box, 0.5) for box in (B, OWN))))
    assert not seen[0][0].any(), "no word on whether there is an object"
    assert not seen[0][1].any(), "nor on what it is"
    assert seen[0][2].any(), "what it has a box for it goes on to teach"
    for objects, classes, _ in seen[1:]:
        assert objects.any(), "seen, but not as a class that it cannot label"
        assert classes.any(), "the same"


def test_what_a_store_cannot_label_is_no_mistake_when_it_judges(tmp_path: Path) -> None:
    plan, weights = planned("abc", score=1e-6)
    for name, named, expected in (("all", "abc", {"0", "1", "2"}), ("some", "ca", {"0", "2"})):
        judged = Site(painted(tmp_path / name, "abc", named, num=8)).evaluate(plan, weights, "validation")
        assert {key.split("/")[1] for key in judged.sums if key.startswith("found/")} == expected
        assert {key.split("/")[1] for key in judged.sums if key.startswith("boxes/")} == expected


def test_classes_come_are_merged_and_retired_in_a_detection_run_and_both_stores_go_on(tmp_path: Path) -> None:
    homes = {"knows": painted(tmp_path / "stores/knows", "abcd", "abcd")}
    homes["old"] = painted(tmp_path / "stores/old", "abcd", "abd", seed=1)
    said = RunConfig.model_validate(
        {
            "name": "grows",
            "data": "things",
            "task": {**TASK, "classes": list("abd"), "unknown": "ignore"},
            "class_changes": [{"at_version": 3, "add": ["c"]}, {"at_version": 5, "merge": {"b": "a"}, "retire": ["d"]}],
            "model": MODEL,
            "stores": [{"id": name} for name in homes],
            "train": {**ADAM, "local_steps": 20, "keep_optimizer": True},
            "pace": "wait_for_all",
            "server": "ema",
            "stop": {"max_versions": 8},
            "evaluate": {"metric": "map50"},
            "track": {"mlflow": False, "keep_last": 100},
            "local": {},
        }
    ).model_dump(mode="json")  # fmt: skip
    updates: list[Any] = []
    ports = {name: SitePort(home) for name, home in homes.items()}
    ports["old"].spoil = lambda update: updates.append(update.copy()) or update  # type: ignore[func-returns-value]
    made = run(said, tmp_path, ports, patience_s=400)
    folder = tmp_path / "runs" / "run"
    history = read_history(folder)
    assert [v for v, body in history.versions.items() if body.get("classes")] == [3, 5]
    for version, body in history.versions.items():
        assert {c["store"] for c in body["contributions"]} == (set(homes) if version else set())
    assert records(tmp_path, "store_set_aside", "update_rejected", "ticket_failed") == []
    sizes = [made.stages.at(version).form.num_classes for version in range(9)]
    assert sizes == [3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert ClassList.of(history.task(8)).live == (0, 3), "a and c"
    for version, update in enumerate(updates[3:7], 3):  # its tickets from version 3 on
        form = made.stages.at(version).form
        assert Form.said(form, update).tolist()[3] is False, "it says nothing of c"
    plan = replace(made.stages.at(8).plan, run="after")
    judged = ports["knows"].site.evaluate(plan, made.read(8), "validation")
    assert {name.split("/")[1] for name in judged.sums} == {"0", "3"}
    assert of_class(judged, 0) >= 0.9
    assert of_class(judged, 3) >= 0.8, "the new one is found"
