"""What every task and every reader keeps to: the coordinator and the trainer know none by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from raypipe import registry
from raypipe.data.dataset import ImageSplit, TableSplit, open_data, readers
from raypipe.data.rows import write_rows
from raypipe.data.sample import encode_png
from raypipe.data.schema import write_split
from raypipe.data.writer import Box, Example, SplitWriter
from raypipe.errors import StoreRefused
from raypipe.tasks import Task, tasks
from raypipe.tasks.metrics import metrics

N, SIZE = 24, 8
ABC = ["a", "b", "c"]
COLUMNS = {"target": "y", "features": ["f", "g"], "categories": {"k": ["x", "y"]}}
EXAMPLES: dict[str, list[dict[str, Any]]] = {  # of each task: a new one needs some here
    "classification": [
        {"classes": 5, "image_size": SIZE},
        {"classes": ABC, "image_size": SIZE, "per_class": True, "loss": "focal"},
        {"classes": [*ABC, "d"], "gone": {"d": None}, "image_size": SIZE, "channels": 3},
    ],
    "detection": [{"classes": ABC, "image_size": 32, "channels": 3}],
    "tabular": [
        COLUMNS,
        {**COLUMNS, "classes": ["no", "yes"], "class_weights": [0.5, 2.0]},
        {**COLUMNS, "classes": ABC},
    ],
    "multimodal": [
        {**COLUMNS, "image_size": SIZE, "scale": {"f": (1.0, 2.0), "g": (0.0, 1.0), "y": (3.0, 2.0)}},
        {"target": "y", "classes": ["no", "yes"], "image_size": SIZE},
    ],
}


class Finder:
    """Finds in each image what its first pixels say: the same whatever batch it is in."""

    def detect(self, images: torch.Tensor, **limits: Any) -> list[torch.Tensor]:
        corner = images[:, 0, 0, :6].reshape(-1, 1, 6)
        low, sides, score = corner[:, :, :2] * 10, corner[:, :, 2:4] * 20 + 1, corner[:, :, 4:5]
        label = (corner[:, :, 5:6] * 3).floor().clamp(max=2)
        return list(torch.cat([low, low + sides, score, label], 2))


def judged(task: Task, first: int, last: int) -> dict[str, float]:
    """A task's sums over examples `first` to `last` of always the same N."""
    chance, some = torch.Generator().manual_seed(1), slice(first, last)
    if task.boxes is not None:
        images = torch.randint(0, 256, (N, task.channels, 32, 32), generator=chance, dtype=torch.uint8)
        numbers = torch.rand(N, 7, generator=chance)
        targets = torch.cat([torch.arange(N)[:, None], (numbers[:, :1] * 3).floor(), 5 + 20 * numbers[:, 1:3],
                             4 + 10 * numbers[:, 3:5], (numbers[:, 5:6] > 0.9).float()], 1)[some]  # fmt: skip
        targets[:, 0] -= first
        return task.boxes.judge(Finder(), task.prepare(images[some]), targets)
    outputs = torch.randn(N, task.num_outputs, generator=chance)
    found = task.sums(outputs[some], labels_of(task)[some])
    named = {name: value.double() for name, value in found.items()}
    vectors = {f"{name}/{i}": float(v) for name, value in named.items() if value.ndim for i, v in enumerate(value)}
    return vectors | {name: float(value) for name, value in named.items() if not value.ndim}


def labels_of(task: Task) -> torch.Tensor:
    if task.table is not None and task.table.classes is None:
        return torch.linspace(-2, 9, N)
    return torch.arange(N) % len(task.live or range(task.num_outputs))


@pytest.mark.parametrize("name", tasks.names())
def test_every_tasks_sums_add_up_and_come_to_the_metrics_that_it_names(name: str) -> None:
    for settings in EXAMPLES[name]:
        task = tasks.build({"name": name, **settings})
        whole, parts = judged(task, 0, N), Counter(judged(task, 0, 7))
        parts.update(judged(task, 7, N))
        assert {key: value for key, value in parts.items() if value} == pytest.approx(
            {key: value for key, value in whole.items() if value}, rel=1e-6
        )
        found = metrics(whole, N)
        assert {key.partition("/")[0] for key in found} >= set(task.metrics), settings
        assert task.primary in task.metrics
        assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "detection"])
def test_every_tasks_loss_is_a_mean_and_its_predictions_are_one_an_example(name: str) -> None:
    for settings in EXAMPLES[name]:
        task = tasks.build({"name": name, **settings})
        outputs = torch.randn(N, task.num_outputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
        some = task.among(task.live) if task.live is not None else task
        loss = some.loss(outputs, labels_of(task))
        loss.backward()
        assert outputs.grad is not None
        assert torch.isfinite(outputs.grad).all()
        assert loss.item() == pytest.approx(judged(task, 0, N)["loss"] / N, rel=1e-5)
        assert task.predict(outputs.detach()).shape == (N,)
        assert task.one_hot is not None
        assert task.one_hot(labels_of(task)).shape == (N, task.num_outputs)
        images = torch.zeros(N, task.channels, task.image_size, task.image_size, dtype=torch.uint8)
        table = torch.zeros(N, task.table.width if task.table else 0)
        table[:, : len(task.table.features) if task.table else 0] = float("nan")  # missing
        inputs = (images, table) if task.table and task.table.image and task.table.width else images
        prepared = task.prepare(table if task.table and not task.table.image else inputs)
        for made in prepared if isinstance(prepared, tuple) else (prepared,):
            assert made.dtype == torch.float32
            assert torch.isfinite(made).all()
        if task.columns:
            assert (prepared[-1] if isinstance(prepared, tuple) else prepared).shape == (N, task.columns)


def pictures(num: int) -> list[bytes]:
    return encode_png(np.random.default_rng(0).integers(0, 256, (num, SIZE, SIZE), np.uint8), level=1)


def labelled(folder: Path) -> None:
    for split, num in (("train", 6), ("validation", 3)):
        given: dict[str, Any] = {"classes": ["bag", "hat"], "image_ids": list("012345")[:num]}
        given["shapes"] = np.full((num, 2), SIZE)
        write_split(folder / f"{split}.parquet", images=pictures(num), labels=np.arange(num) % 2, **given)


def boxed(folder: Path) -> None:
    for split, num in (("train", 6), ("validation", 3)):
        with SplitWriter(folder / f"{split}.parquet", ["bag", "hat"], boxes=True, split=split) as writer:
            for number, image in enumerate(pictures(num)):
                writer.add(Example(f"i{number}", image, SIZE, SIZE, boxes=(Box(number % 2, 1.0, 1.0, 3.0, 3.0),)))


def rows(folder: Path) -> None:
    for split, num in (("train", 6), ("validation", 3)):
        write_rows(folder / f"{split}.parquet", {"y": np.arange(num) * 1.0, "image": pictures(num)})


def photos(folder: Path) -> None:
    for split, num in (("train", 6), ("validation", 3)):
        (folder / split).mkdir()
        for number, image in enumerate(pictures(num)):
            (folder / split / f"{('bag', 'hat')[number % 2]}-{number}.png").write_bytes(image)


FOLDERS: dict[str, list[Callable[[Path], None]]] = {"parquet": [labelled, boxed, rows], "own_photos": [photos]}


@pytest.fixture
def own_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "own_parts"))
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.mark.usefixtures("own_parts")
def test_every_reader_keeps_its_contract(tmp_path: Path) -> None:
    assert sorted(FOLDERS) == readers.names(), "a new reader needs a folder here"
    for reader, write in ((reader, write) for reader, folders in FOLDERS.items() for write in folders):
        (folder := tmp_path / f"{reader}-{write.__name__}").mkdir()
        write(folder)
        data, again = (open_data(folder, name="products", reader=reader) for _ in range(2))
        assert dict(data.counts) == {"train": 6, "validation": 3}
        assert data.content_hash == again.content_hash != ""
        split = data.split("train")
        assert len(split) == 6
        if isinstance(split, TableSplit):
            images = split.images(np.array([5, 0]))
        else:
            assert data.classes == ("bag", "hat")
            assert_labelled(split, boxes=write is boxed)
            images = split
        pixels, good = images.decode(np.array([1, 0]), size=SIZE, channels=1)
        assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((2, 1, SIZE, SIZE), np.uint8, True)
        assert good.tolist() == [True, True]
        with pytest.raises(StoreRefused, match=r"^data set 'products' has no split 'tarin'\. Did you mean 'train'\?$"):
            data.split("tarin")
        damage(folder)
        assert open_data(folder, name="products", reader=reader).content_hash != data.content_hash


def assert_labelled(split: ImageSplit, *, boxes: bool) -> None:
    assert (split.boxes is not None) == boxes
    if split.boxes is not None:
        assert len(split.boxes) == 6
        assert sorted(split.boxes.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    else:
        assert sorted(split.labels.tolist()) == [0, 0, 0, 1, 1, 1]
        assert split.labels.dtype == np.int64


def damage(folder: Path) -> None:
    """An image less to train on."""
    if (folder / "train").is_dir():
        next((folder / "train").iterdir()).unlink()
    else:
        (folder / "validation.parquet").unlink()
