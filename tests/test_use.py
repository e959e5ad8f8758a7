"""Using a version: boxes in an image's own pixels, and BatchNorm's statistics of one store's images."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES
from safetensors.numpy import save_file
from test_data import jpeg_with_exif
from test_detection import SMALL
from test_own_statistics import OWN
from test_recalibration import taken_up
from test_resume import make
from test_shell import NAMES, SitePort, config, run
from torchvision.ops import box_iou

from raypipe.cli import main
from raypipe.data.dataset import BoxTable, open_data
from raypipe.data.decode import decode_images, decode_sized, fitted, unfitted
from raypipe.data.sample import load_sample
from raypipe.data.schema import write_split
from raypipe.data.shelves import HEIGHT, WIDTH, compose, look_of, make_shelves
from raypipe.errors import ConfigError, StoreRefused
from raypipe.models import build_for
from raypipe.models.flat import FlatModel, layout_of
from raypipe.store.measure import own_statistics
from raypipe.store.shelf import training_images
from raypipe.store.targets import _letterboxed
from raypipe.tasks import tasks
from raypipe.tracking.lineage import model_card, read_history
from raypipe.tracking.registry import load_weights
from raypipe.tracking.versions import HEADER, read_file
from raypipe.use import adapt, predict

SIZE = 96
BOXES: dict[str, Any] = {"name": "detection", "classes": CLASSES, "image_size": SIZE, "overlap": 0.45}
YOLO: dict[str, Any] = {"name": "yolov5n", "anchors": SMALL, "norm": "group"}


def written(file: Path, module: torch.nn.Module, task: dict[str, Any], model: dict[str, Any]) -> str:
    """A version's file of this model."""
    card = json.dumps({"version": 0, "task": task, "model": model})
    save_file({name: tensor.numpy() for name, tensor in module.state_dict().items()}, file, metadata={HEADER: card})
    return str(file)


def png(file: Path, rgb: np.ndarray) -> Path:
    cv2.imwrite(str(file), rgb[..., ::-1])
    return file


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A composed scene, what is in it, and a detector that has learned it by heart."""
    torch.set_num_threads(1)
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    items, labels = load_sample().read("test")
    pixels, boxes = compose(items[:7], labels[:7], look_of("a", strength=0.5, seed=0), rng)
    image = png(folder / "scene.png", pixels)
    assert pixels.shape == (HEIGHT, WIDTH, 3) == (128, 192, 3), "half as large it is 96 wide, below 16 rows of grey"
    centres = [((b.x + b.w / 2) / 2, (b.y + b.h / 2) / 2 + 16, b.w / 2, b.h / 2) for b in boxes]
    targets = torch.tensor([[0, b.label, *c, 0] for b, c in zip(boxes, centres, strict=True)]).float()
    task = tasks.build(BOXES)
    assert task.boxes is not None
    torch.manual_seed(0)
    module: Any = build_for(task, YOLO)
    square = task.prepare(
        torch.from_numpy(decode_images([image.read_bytes()], size=SIZE, channels=3, letterbox=True)[0])
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    module.train()
    for _ in range(120):
        optimizer.zero_grad()
        task.boxes.step(module, square, targets).backward()
        optimizer.step()
    corners = torch.tensor([[b.x, b.y, b.x + b.w, b.y + b.h] for b in boxes])
    return {
        "image": image, "pixels": pixels, "labels": [b.label for b in boxes], "corners": corners,
        "module": module.eval(), "square": square, "file": written(folder / "v.safetensors", module, BOXES, YOLO),
    }  # fmt: skip


def test_boxes_come_back_in_pixels_of_the_image(scene: dict[str, Any]) -> None:
    found = predict(scene["file"], [scene["image"]])
    assert [p.probability for p in found] == sorted((p.probability for p in found), reverse=True)
    assert all(p.probability > 0.25 for p in found)
    own = torch.tensor([p.box for p in found])
    overlap, place = box_iou(scene["corners"], own.float()).max(1)
    assert (overlap > 0.6).all(), overlap
    assert [found[at].label for at in place] == [CLASSES[label] for label in scene["labels"]]
    (rows,) = scene["module"].detect(scene["square"], score=0.25, overlap=0.45, most=100)
    by_hand = (rows[:, :4] - torch.tensor([0.0, 16, 0, 16])) * 2
    by_hand = torch.minimum(by_hand.clamp(min=0), torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    assert torch.allclose(own.float(), by_hand, atol=1e-3), "as the model itself sees them, mapped back by hand"
    weakest = min(p.probability for p in found)
    assert len(predict(scene["file"], [scene["image"]], score=weakest + 1e-6)) == len(found) - 1


def test_any_image_is_seen_as_in_training(scene: dict[str, Any], tmp_path: Path) -> None:
    """Turned by its EXIF, in grey, four times as large: boxes are those of the image as it is seen."""
    turned = np.rot90(scene["pixels"][..., ::-1])  # a quarter turn to the left, which orientation 6 undoes
    (tmp_path / "turned.jpg").write_bytes(jpeg_with_exif(np.ascontiguousarray(turned), 6))
    large = png(tmp_path / "large.png", cv2.resize(scene["pixels"], None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST))
    found = predict(scene["file"], [tmp_path / "turned.jpg", large, scene["image"]])
    boxes = {image: torch.tensor([p.box for p in found if p.path == image]) for image in {p.path for p in found}}
    plain = boxes[scene["image"]]
    assert (box_iou(plain, boxes[tmp_path / "turned.jpg"]).amax(1) > 0.7).all()
    assert (box_iou(plain * 4, boxes[large]).amax(1) > 0.9).all()
    cv2.imwrite(str(tmp_path / "grey.png"), cv2.cvtColor(scene["pixels"], cv2.COLOR_RGB2GRAY))
    seen = predict(scene["file"], [tmp_path / "grey.png"], score=0.0)
    assert all(p.box is not None and p.box[2] <= WIDTH and p.box[3] <= HEIGHT for p in seen)


def test_classes_that_are_no_more_are_not_found(scene: dict[str, Any], tmp_path: Path) -> None:
    first, other = sorted({p.label for p in predict(scene["file"], [scene["image"]])})[:2]
    named = {p.label for p in predict(scene["file"], [scene["image"]])}
    task = {**BOXES, "gone": {first: None, other: next(name for name in CLASSES if name not in named)}}
    file = written(tmp_path / "gone.safetensors", scene["module"], task, YOLO)
    assert {p.label for p in predict(file, [scene["image"]])} == named - {first, other}


def test_a_box_is_a_line(scene: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", scene["file"], str(scene["image"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = predict(scene["file"], [scene["image"]])
    assert len(lines) == len(found)
    path, label, chance, box = lines[0].split("  ")
    assert (path, label, chance) == (str(scene["image"]), found[0].label, f"{found[0].probability:.1%}")
    assert found[0].box is not None
    assert [int(side) for side in box.split(",")] == [round(side) for side in found[0].box]
    assert main(["predict", scene["file"], str(scene["image"]), "--score", "0.9999"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{scene['image']}  nothing found"]


def test_what_lies_beside_the_image_is_cut_off() -> None:
    """Boxes of images of any shape go into the square as the stores' do, and come back."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 900, (50, 2))
    corner = rng.uniform(0, 0.6, (50, 2)) * sizes
    boxes = np.concatenate([corner, rng.uniform(0.1, 0.4, (50, 2)) * sizes], 1).astype(np.float32)
    zeros = np.zeros(50, np.int64)
    table = BoxTable(np.arange(51), zeros, boxes, zeros > 0, sizes)
    there = _letterboxed(table, zeros, zeros == 0, 160).take(np.arange(50)).numpy()
    square = np.concatenate([there[:, 2:4] - there[:, 4:6] / 2, there[:, 2:4] + there[:, 4:6] / 2], 1)
    for row, box, (width, height) in zip(square, boxes, sizes.tolist(), strict=True):
        (back,) = unfitted(row[None].astype(np.float64), width, height, 160)
        assert np.allclose(back, [*box[:2], *(box[:2] + box[2:])], atol=0.02)
    left, top, wide, high = fitted(192, 128, 96)
    over = np.array([[left - 5.0, top - 9, left + wide + 9, top + high + 3], [10, 0, 40, top - 2]])
    assert unfitted(over, 192, 128, 96)[0].tolist() == [0, 0, 192, 128]
    assert unfitted(over, 192, 128, 96)[1, 1] == unfitted(over, 192, 128, 96)[1, 3] == 0, "nothing of it is left"


def test_the_size_of_an_image_is_as_it_is_seen() -> None:
    upright = cv2.imencode(".png", np.zeros((30, 50, 3), np.uint8))[1].tobytes()
    blobs = [upright, upright[:-9], jpeg_with_exif(np.zeros((30, 50, 3), np.uint8), 6)]
    assert decode_sized(blobs, size=8, channels=3)[2].tolist() == [[50, 30], [0, 0], [30, 50]]


def test_other_detectors_are_used_likewise(scene: dict[str, Any], tmp_path: Path) -> None:
    """With weights of chance: boxes lie in the image, at most a hundred, and a store's own statistics are others."""
    model = {"name": "ssdlite320_mobilenet_v3_large"}
    torch.manual_seed(1)
    file = written(tmp_path / "ssd.safetensors", build_for(tasks.build(BOXES), model), BOXES, model)
    found = predict(file, [scene["image"]], score=0.05)
    assert 0 < len(found) <= 100
    for left, top, right, bottom in (p.box for p in found if p.box is not None):
        assert 0 <= left < right <= WIDTH
        assert 0 <= top < bottom <= HEIGHT
    scenes = {"train": 6, "validation": 2, "test": 2}
    make_shelves(tmp_path / "stores", ["a"], source=load_sample(), split={"name": "iid"}, scenes=scenes)
    data = tmp_path / "stores" / "a" / "data" / "shelves"
    adapt(file, data, tmp_path / "own.safetensors")
    adapted = predict(str(tmp_path / "own.safetensors"), [scene["image"]], score=0.05)
    assert adapted == predict(file, [scene["image"]], score=0.05, statistics_of=data)
    assert adapted != found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    make(home / "stores")
    shell = run(config(**OWN), home, {name: SitePort(home / "stores" / name) for name in NAMES}).shell
    shell.publisher.book.close()
    shell.diary.close()
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "home")
    return tmp_path / "home"


def data_of(home: Path, store: str) -> Path:
    return home / "stores" / store / "data" / "products"


def test_an_adapted_version_judges_as_its_store_judges_it(home: Path, tmp_path: Path) -> None:
    made, ports = taken_up(home, OWN)
    folder, layout, base = home / "runs" / "run", made.stages.at(2).layout, made.read(2)
    plain = replace(made.plan, own_statistics=None)
    vectors = []
    for name, port in ports.items():
        file = tmp_path / f"{name}.safetensors"
        adapt(str(folder), data_of(home, name), file, version=2)
        vectors.append(load_weights(str(file), layout))  # as a warm start
        told = port.site.evaluate(made.plan, base, "validation").sums
        assert port.site.evaluate(plain, vectors[-1], "validation").sums == told
        assert port.site.evaluate(plain, base, "validation").sums != told
        assert np.array_equal(vectors[-1][layout.shared], base[layout.shared])
        assert read_file(file)[1] == read_history(folder).card(2)
    assert not np.array_equal(*vectors[:2])
    pixels, _ = open_data(data_of(home, "a"), name="x").split("test").decode(np.arange(3), size=28, channels=1)
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(images, pixels, strict=True):
        cv2.imwrite(str(file), image[0])
    by_file = predict(str(tmp_path / "a.safetensors"), images)
    assert by_file == predict(str(folder), images, version=2, statistics_of=data_of(home, "a"))
    assert by_file != predict(str(folder), images, version=2)


def test_a_version_says_over_how_many_images_and_what_was_trained(home: Path, tmp_path: Path) -> None:
    started = read_history(home / "runs" / "run").run()
    assert model_card(started, 2)["own_statistics"] == OWN["evaluate"]["own_statistics"]
    assert "trained" not in model_card(started, 2)
    plain = {**started, "config": {**started["config"], "evaluate": {}, "train": {"trained": "head"}}}
    card = model_card(plain, 2)
    assert card == {"version": 2, "task": card["task"], "model": card["model"], "trained": "head"}
    adapt(str(home / "runs" / "run"), data_of(home, "a"), tmp_path / "a.safetensors", version=2)
    tensors, own = read_file(tmp_path / "a.safetensors")
    found = {}
    for number, more in (("none", {}), ("64", {"own_statistics": 64}), ("5", {"own_statistics": 5})):
        card = {key: own[key] for key in ("version", "task", "model")} | more
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata={HEADER: json.dumps(card)})
        out = tmp_path / f"{number}-out.safetensors"
        adapt(str(tmp_path / f"{number}.safetensors"), data_of(home, "a"), out)
        found[number] = read_file(out)[0]
    for name in (n for n in tensors if n.endswith("running_mean")):
        assert np.array_equal(found["none"][name], found["64"][name])
        assert not np.array_equal(found["none"][name], found["5"][name])


def test_a_store_that_has_words_of_its_own_is_read_by_its_policy(home: Path) -> None:
    folder, called = data_of(home, "a"), ["Tasche" if name == "Bag" else name for name in CLASSES]
    task = tasks.build({"name": "classification", "classes": called, "image_size": 28, "channels": 1})
    with pytest.raises(StoreRefused, match="labels outside the task's 10 classes"):
        training_images(folder, task)
    policy = folder.parent.parent / "policy.yaml"
    said = yaml.safe_load(policy.read_text())
    said["data"]["products"]["names"] = {"Bag": "Tasche"}
    policy.write_text(yaml.safe_dump(said))
    assert training_images(folder, task)[0].num == open_data(folder, name="x").counts["train"]
    shutil.move(folder, folder.parent / "elsewhere")
    with pytest.raises(StoreRefused, match="labels outside"):
        training_images(folder.parent / "elsewhere", task)


def test_large_images_are_measured_two_by_two() -> None:
    task = tasks.build({"name": "classification", "classes": 2, "image_size": 1024, "channels": 1})
    module = torch.nn.Sequential(torch.nn.AvgPool2d(64), torch.nn.BatchNorm2d(1))
    model = FlatModel(module, layout_of(module))
    images = torch.arange(3, dtype=torch.uint8).mul(100)[:, None, None, None].expand(3, 1, 1024, 1024)

    class Three:
        num = 3

        def batches(self, picks: Any, *_: Any) -> Any:
            yield from ((images[torch.from_numpy(pick)], torch.zeros(len(pick))) for pick in picks)

    with own_statistics(model, task, Three(), 3, 0.0, lambda: False):
        assert float(module[1].running_mean) == pytest.approx(float(task.prepare(images[:2].clone()).mean()), rel=1e-3)


def test_what_cannot_be_is_one_line_each(
    home: Path, scene: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(home))
    data, image, out = str(data_of(home, "a")), str(scene["image"]), tmp_path / "out.safetensors"
    (tmp_path / "there.safetensors").touch()
    (few := tmp_path / "few").mkdir()
    write_split(
        few / "train.parquet", images=[Path(image).read_bytes()], labels=np.zeros(1, np.int64), classes=CLASSES,
        image_ids=["one"], shapes=np.array([[WIDTH, HEIGHT]]),
    )  # fmt: skip
    to = ["--to", str(out)]
    asked = (
        (["adapt", scene["file"], "--statistics-of", data, *to], "has no BatchNorm statistics that move; it is used"),
        (["predict", scene["file"], image, "--statistics-of", data], "has no BatchNorm statistics that move"),
        (["adapt", "run:2", "--statistics-of", str(tmp_path / "no"), *to], "no such folder; a store's data set lies"),
        (["adapt", "run:2", "--statistics-of", str(home / "stores" / "a"), *to], "has no train.parquet"),
        (["predict", "run:2", image, "--statistics-of", str(home / "stores")], "has no train.parquet"),
        (["adapt", "run:2", "--statistics-of", str(few), *to], "at least 2 training images"),
        (["adapt", "run:2", "--statistics-of", data, "--to", str(tmp_path / "there.safetensors")], "is there already"),
        (["adapt", "run:2", "--statistics-of", data, "--to", str(tmp_path / "no" / "x.safetensors")], "no folder"),
        (["adapt", "run:2", "--statistics-of", data, "--to", str(tmp_path / "x.bin")], "ends in .safetensors"),
        (["adapt", "run:2", "--statistics-of", data, "--to", "/proc/x.safetensors"], "could not be written"),
        (["adapt", "run:x", "--statistics-of", data, *to], "RUN:VERSION with a number"),
        (["predict", "run:2", image, "--score", "0.5"], "a score is for models that find boxes"),
        (["predict", scene["file"], image, "--score", "1.5"], "at least 0 and below 1, found 1.5"),
        (["predict", scene["file"], image, str(tmp_path / "none.png")], "none.png: no such file"),
    )
    for arguments, line in asked:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1, said.err
        assert line in said.err
        assert said.out == ""
    assert sorted(file.name for file in tmp_path.glob("*.safetensors*")) == ["there.safetensors"]
    assert main(["adapt", "run:2", "--statistics-of", data, *to]) == 0
    assert capsys.readouterr().out == f"{out}: run:2 with BatchNorm's statistics of {data}\n"
    assert os.listdir(out.parent).count(out.name) == 1
    with pytest.raises(ConfigError, match="is there already"):
        adapt("run:2", Path(data), out)
