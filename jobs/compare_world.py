"""The sceptic's world: Fashion-MNIST over ten stores of unequal speed and unlike stock, the same for every arm.

    dirichlet    label skew, alpha 0.1
    two-labels   two classes a store, each class at two stores
    twin         one store alone has two of the classes, the other nine share the rest

Splits are made by raypipe's own code (data/split.py); the source is the bundled sample. A seed decides the split, the
speeds (1 to 10 times, log-uniform) and the first weights; arms of the same seed are pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from compare_clock import Stores

from raypipe.data.camera import rng_for
from raypipe.data.sample import CLASSES, load_sample, sample_image_bytes
from raypipe.data.split import balanced, share, sizes, splits
from raypipe.models import build
from raypipe.models.flat import FlatModel, layout_of
from raypipe.store.batches import Images
from raypipe.store.targets import Labels
from raypipe.tasks import Task, tasks

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
NUM = 10
IDS = tuple(f"store-{i}" for i in range(NUM))
TASK = {"name": "classification", "classes": list(CLASSES), "image_size": 28, "channels": 1}
TWIN = IDS[0]  # the store with classes of its own
SPLITS = ("dirichlet", "two-labels", "twin")
JUDGED = 250  # images a forward pass


@dataclass(frozen=True, slots=True)
class Scale:
    """How much: images of all stores together, images to judge by, seconds of a run and between looks."""

    train: int = 6000
    judged: int = 2000
    seconds: float = 120.0
    every_s: float = 4.0


class Held:
    """Pixels in memory as a split of a data set; see ImageSplit in data/dataset.py."""

    def __init__(self, pixels: Array, labels: Array) -> None:
        self._pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, indices: Array, *, size: int, channels: int, threads: int = 1) -> tuple[Array, Array]:
        return self._pixels[indices][:, None], np.ones(len(indices), np.bool_)


class World:
    """One seed's stores. `twin_slowness` is that of the store with classes of its own."""

    def __init__(self, split: str, seed: int, scale: Scale, *, judge_by: str, twin_slowness: float = 1.0) -> None:
        self.seed, self.scale = seed, scale
        source = load_sample()
        pixels, labels = source.read("train")
        chosen = balanced(labels, scale.train, rng_for("compare", "train", seed))
        pixels, labels = pixels[chosen], labels[chosen]
        mix = self._mix(split, rng_for("compare", "mix", seed))
        per_store = sizes(len(labels), NUM, 1.0)
        if split == "twin":  # what it has of its classes is all there is of them
            per_store = np.array([len(labels) // 5, *sizes(len(labels) - len(labels) // 5, NUM - 1, 1.0)])
        parts = share(labels, mix, per_store, rng_for("compare", "share", seed))
        self.task: Task = tasks.build(TASK)
        self.parts = [(pixels[part], labels[part]) for part in parts]
        slow = np.geomspace(1.0, 10.0, NUM)
        slowness = dict(zip(IDS, rng_for("compare", "speed", seed).permutation(slow).tolist(), strict=True))
        if split == "twin":
            slowness[TWIN] = twin_slowness
        images = {store: self._images(*part) for store, part in zip(IDS, self.parts, strict=True)}
        self.stores = Stores(IDS, images, slowness)
        held_pixels, held_labels = source.read(judge_by)
        held = balanced(held_labels, scale.judged, rng_for("compare", judge_by))
        self._held = torch.from_numpy(held_pixels[held][:, None]), held_labels[held]
        self.own = tuple(int(c) for c in np.flatnonzero(self.mixes[0] > 0.05))  # but for strays

    @cached_property
    def pooled(self) -> Images:
        """Everything in one place."""
        return self._images(np.concatenate([p for p, _ in self.parts]), np.concatenate([n for _, n in self.parts]))

    @property
    def pooling_bytes(self) -> list[float]:
        """Of each store's training images, as PNG files."""
        return [sample_image_bytes("fashion-mnist") * len(labels) for _, labels in self.parts]

    @property
    def mixes(self) -> Array:
        """Each store's classes, (stores, classes); rows sum to 1."""
        counts = np.array([np.bincount(labels, minlength=NUM) for _, labels in self.parts], np.float64)
        return np.asarray(counts / counts.sum(1, keepdims=True))

    def model(self, spec: dict[str, Any]) -> FlatModel:
        module: Any = build(spec, NUM, 1, 28, 0)
        return FlatModel(module, layout_of(module))

    def recalls(self, model: FlatModel) -> tuple[float, ...]:
        """By class, of the model as it is loaded, on what is held out."""
        pixels, labels = self._held
        model.eval()
        with torch.inference_mode():
            pieces = [model.module(self.task.prepare(piece)).argmax(1) for piece in torch.split(pixels, JUDGED)]
        found = torch.cat(pieces).numpy()
        return tuple(float((found[labels == c] == c).mean()) for c in range(NUM))

    def _images(self, pixels: Array, labels: Array) -> Images:
        return Images(Held(pixels, labels), Labels(labels), self.task, what="the sample", max_bytes=1 << 30)

    def _mix(self, split: str, rng: np.random.Generator) -> Array:
        names = list(CLASSES)
        if split == "dirichlet":
            return splits.build({"name": "dirichlet", "alpha": 0.1})(names, NUM, rng)
        order = [names[i] for i in rng.permutation(NUM)]
        if split == "two-labels":  # neighbours on a ring: each class at two stores
            groups = [[order[i], order[(i + 1) % NUM]] for i in range(NUM)]
        else:
            rest = order[2:]
            groups = [order[:2], *([rest[i % 8], rest[(i + 1) % 8]] for i in range(NUM - 1))]
        return splits.build({"name": "departments", "groups": groups, "mix": 0.0})(names, NUM, rng)
