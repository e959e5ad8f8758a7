"""Composed Fashion shelves: products of Fashion-MNIST put on a shelf, with exact boxes. Composed, not photographed.

Each store has its own look (camera, light, colour of wall and board), its own mix of products and its own share of
the training items; test scenes hold test items only, every class as often, and the store's own look.

    OUT/STORE/data/NAME/{train,validation,test}.parquet     detection schema v1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raypipe.data.camera import Camera, camera_of, rng_for, shoot
from raypipe.data.dataset import Labels, Pixels
from raypipe.data.places import StoreSummary, Write, make_data_sets
from raypipe.data.sample import Source
from raypipe.data.schema import SPLITS
from raypipe.data.split import Counts, share, sizes, splits
from raypipe.data.stores import problems_of
from raypipe.data.writer import Box, Example, SplitWriter
from raypipe.errors import ConfigError
from raypipe.registry import Spec

WIDTH, HEIGHT, SHELVES = 192, 128, 2
SMALLEST, LARGEST = 1.3, 1.9  # of the items' own 28 pixels
GAP = 14  # pixels between two items, at most
OPAQUE = 40  # grey level from which an item hides what is behind it
JPEG_QUALITY = 92
SCENES = {"train": 1200, "validation": 200, "test": 1000}  # of all stores together


@dataclass(frozen=True, slots=True)
class Look:
    """A store's camera, the colours (RGB) of its wall and boards, and how uneven its light is, in grey levels."""

    camera: Camera
    wall: NDArray[np.float32]
    board: NDArray[np.float32]
    shade: float


def look_of(store: str, *, strength: float, seed: int) -> Look:
    """The same for the same names; `strength` in [0, 1]: at 0 all stores look alike."""
    rng = rng_for(seed, "look", store)
    wall, board = rng.uniform(30, 160, 3), rng.uniform(60, 220, 3)
    plain = np.array([70.0, 72.0, 78.0]), np.array([150.0, 120.0, 90.0])
    mixed = [strength * own + (1 - strength) * same for own, same in zip((wall, board), plain, strict=True)]
    shade = float(rng.uniform(0, 50) * strength)
    camera = camera_of(store, strength=strength, seed=seed)
    return Look(camera, mixed[0].astype(np.float32), mixed[1].astype(np.float32), shade)


def compose(items: Pixels, labels: Labels, look: Look, rng: np.random.Generator) -> tuple[Pixels, list[Box]]:
    """A scene (HEIGHT, WIDTH, 3) in RGB with as many of these grey items (k, 28, 28) as find room, and their boxes."""
    scene = np.broadcast_to(look.wall, (HEIGHT, WIDTH, 3)).copy()
    scene += look.shade * np.linspace(-1, 1, WIDTH, dtype=np.float32)[None, :, None]
    boxes: list[Box] = []
    todo = list(range(len(items)))
    floor = HEIGHT // SHELVES
    for shelf in range(1, SHELVES + 1):
        bottom = shelf * floor - 6
        scene[bottom : bottom + 5] = look.board
        left = int(rng.integers(0, GAP))
        while todo:
            item, scale = todo[0], float(rng.uniform(SMALLEST, LARGEST))
            grey, tint = _scaled(items[item], scale), rng.uniform(90, 255, 3).astype(np.float32)
            if left + grey.shape[1] > WIDTH:
                break
            boxes.append(_put(scene, grey, tint, left, bottom, int(labels[item])))
            left += grey.shape[1] + int(rng.integers(0, GAP))
            todo.pop(0)
    shot = shoot(look.camera, np.clip(scene, 0, 255).astype(np.uint8)[None], rng)
    return shot[0], boxes


def make_shelves(
    out: Path,
    store_ids: Sequence[str],
    *,
    source: Source,
    split: Spec,
    size_ratio: float = 2.0,
    camera_shift: float = 0.5,
    seed: int = 0,
    scenes: Mapping[str, int] | None = None,
    data_name: str = "shelves",
) -> list[StoreSummary]:
    """A private data set of scenes for each store, the first the largest; what the same recipe made is left alone.

    `scenes`: of each split, for all stores together (SCENES). Raises ConfigError, RunError as `make_stores`.
    """
    counts = {**SCENES, **(scenes or {})}
    problems = problems_of(store_ids, data_name, size_ratio, camera_shift)
    problems += [f"scenes.{name}: {counts[name]} for {len(store_ids)} stores; each needs at least 2"
                 for name in SPLITS if counts[name] < 2 * len(store_ids)]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    mix = splits.build(split)(source.classes, len(store_ids), rng_for(seed, "mix"))
    made_of = {
        "kind": "shelves",
        "tasks": ["detection"],
        "source": [source.name, source.content_hash],
        "split": dict(split),
        "size_ratio": size_ratio,
        "camera_shift": camera_shift,
        "seed": seed,
        "scenes": counts,
    }
    return make_data_sets(out, store_ids, data_name, made_of, lambda: _writer(source, store_ids, mix, made_of))


def _writer(source: Source, stores: Sequence[str], mix: Any, made_of: dict[str, Any]) -> Write:
    seed, ratio, scenes = made_of["seed"], made_of["size_ratio"], made_of["scenes"]
    pool = {name: source.read(name) for name in SPLITS}
    own: dict[str, list[Counts]] = {}
    for name in SPLITS:
        labels = pool[name][1]
        even = 1.0 if name == "test" else ratio
        mine = np.full_like(mix, 1 / mix.shape[1]) if name == "test" else mix
        own[name] = share(labels, mine, sizes(len(labels), len(stores), even), rng_for(seed, "share", name))

    def write(store: str, folder: Path) -> None:
        place, look = stores.index(store), look_of(store, strength=made_of["camera_shift"], seed=seed)
        for name in SPLITS:
            many = sizes(scenes[name], len(stores), ratio if name == "train" else 1.0)[place]
            items, labels = pool[name]
            mine, rng = own[name][place], rng_for(seed, "scenes", store, name)
            file = folder / f"{name}.parquet"
            write_scenes(file, items[mine], labels[mine], source.classes, look, int(many), rng, name)

    return write


def write_scenes(
    path: Path,
    items: Pixels,
    labels: Labels,
    classes: Sequence[str],
    look: Look,
    count: int,
    rng: np.random.Generator,
    split: str,
) -> None:
    """A split of so many scenes from these items, drawn with repeats."""
    with SplitWriter(path, classes, boxes=True, split=split) as writer:
        for number in range(count):
            chosen = rng.integers(0, len(items), int(rng.integers(4, 11)))
            scene, boxes = compose(items[chosen], labels[chosen], look, rng)
            quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            file = cv2.imencode(".jpg", cv2.cvtColor(scene, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
            writer.add(Example(f"{split}-{number:06d}", file, WIDTH, HEIGHT, boxes=boxes))


def _scaled(item: Pixels, scale: float) -> NDArray[np.float32]:
    """Cut to what is seen of it, and larger."""
    rows, columns = np.flatnonzero((item > OPAQUE).any(1)), np.flatnonzero((item > OPAQUE).any(0))
    if rows.size:
        item = item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    wide, high = (max(4, round(side * scale)) for side in item.shape[::-1])
    return np.asarray(cv2.resize(item, (wide, high), interpolation=cv2.INTER_LINEAR), np.float32)


def _put(
    scene: NDArray[np.float32], grey: NDArray[np.float32], tint: NDArray[np.float32], left: int, bottom: int, label: int
) -> Box:
    """Stand an item on its shelf; its box is exact."""
    high, wide = grey.shape
    top = max(0, bottom - high)
    grey = grey[-(bottom - top) :]
    place = scene[top:bottom, left : left + wide]
    alpha = np.clip(grey / OPAQUE, 0, 1)[:, :, None]
    place *= 1 - alpha
    place += alpha * tint * (0.2 + 0.8 * grey / 255)[:, :, None]
    return Box(label, float(left), float(top), float(wide), float(bottom - top))
