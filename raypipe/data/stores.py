"""Private images for the stores of a local federation, made from a public source; where they lie: see places.py.

Train and validation are the store's alone. Test is the same items for all stores, each seen by its own camera, so
that a model is judged on what a store rarely sells too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.data.camera import camera_of, rng_for, shoot
from raypipe.data.dataset import Labels
from raypipe.data.places import StoreSummary, Write, check_names, make_data_sets
from raypipe.data.sample import Images, Source, encode_png
from raypipe.data.schema import SPLITS, write_split
from raypipe.data.split import Counts, balanced, share, sizes, splits
from raypipe.errors import ConfigError
from raypipe.registry import Spec

LEAST = 100  # images that max_images leaves for validation and test, since fewer judge nothing


def make_stores(
    out: Path,
    store_ids: Sequence[str],
    *,
    source: Source,
    split: Spec,
    size_ratio: float = 10.0,
    camera_shift: float = 0.5,
    seed: int = 0,
    max_images: int | None = None,
    data_name: str = "products",
) -> list[StoreSummary]:
    """A private data set for each store, the first the largest; what the same recipe made before is left alone.

    `max_images` counts training images of all stores together; validation and test shrink with it. Raises
    ConfigError for names or settings that cannot be, or where data lies that raypipe did not make; RunError if the
    disk does not take it.
    """
    _check(store_ids, data_name, size_ratio, camera_shift, max_images)
    mix = splits.build(split)(source.classes, len(store_ids), rng_for(seed, "mix"))
    made_of = {
        "source": [source.name, source.content_hash],
        "split": dict(split),
        "size_ratio": size_ratio,
        "camera_shift": camera_shift,
        "seed": seed,
        "max_images": max_images,
    }
    return make_data_sets(out, store_ids, data_name, made_of, lambda: _writer(source, store_ids, mix, made_of))


def describe_stores(summaries: Sequence[StoreSummary]) -> str:
    """A plain table, a line a store; one bar a class, in the order of the labels, and the two most frequent."""
    of_classes = any(store.classes for store in summaries)  # rows have none
    rows: list[tuple[str, ...]] = [("store", *SPLITS, *(("classes", "mostly") if of_classes else ()))]
    for store in summaries:
        counts = [str(store.counts.get(name, 0)) for name in SPLITS]
        shown = (_bars(store.histogram), _mostly(store)) if of_classes else ()
        rows.append((store.store, *counts, *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {1, 2, 3}
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _check(
    store_ids: Sequence[str], data_name: str, size_ratio: float, camera_shift: float, max_images: int | None
) -> None:
    problems = problems_of(store_ids, data_name, size_ratio, camera_shift)
    if max_images is not None and max_images < len(store_ids):
        problems.append(f"max_images is {max_images} for {len(store_ids)} stores; each needs at least one")
    if problems:
        raise ConfigError(problems)


def problems_of(store_ids: Sequence[str], data_name: str, size_ratio: float, camera_shift: float) -> list[str]:
    """What is wrong with the settings of private data sets, a line each."""
    problems = check_names(store_ids, data_name)
    if not 1 <= size_ratio < float("inf"):
        problems.append(f"size_ratio is at least 1; found {size_ratio}")
    if not 0 <= camera_shift <= 1:
        problems.append(f"camera_shift is between 0 and 1; found {camera_shift}")
    return problems


def _writer(source: Source, store_ids: Sequence[str], mix: Any, made_of: dict[str, Any]) -> Write:
    seed = made_of["seed"]
    pool = _pool(source, made_of["max_images"], seed)
    shares = _shares(pool, mix, made_of["size_ratio"], seed)

    def write(store: str, folder: Path) -> None:
        mine = {name: shares[name][store_ids.index(store)] for name in SPLITS}
        for name, ((images, labels), ids) in _seen(store, pool, mine, made_of["camera_shift"], seed).items():
            write_split(
                folder / f"{name}.parquet",
                images=encode_png(images, level=1),
                labels=labels,
                classes=source.classes,
                image_ids=[f"{name}-{i:05d}" for i in ids],
                shapes=np.tile(images.shape[:0:-1], (len(images), 1)),
            )

    return write


def _pool(source: Source, max_images: int | None, seed: int) -> dict[str, tuple[Images, Counts]]:
    """What the stores share out: each split's images and labels, and which of the source's images they are."""
    pool = {}
    part = 1.0
    for name in SPLITS:
        images, labels = source.read(name)
        if max_images is None:
            chosen = np.arange(len(labels))
        else:
            part = min(1.0, max_images / len(labels)) if name == "train" else part
            least = 0 if name == "train" else LEAST
            count = min(len(labels), max(least, round(part * len(labels))))
            chosen = balanced(labels, count, rng_for(seed, "pool", name))
        pool[name] = (images[chosen], labels[chosen]), chosen
    return pool


def _shares(pool: dict[str, tuple[Images, Counts]], mix: Any, ratio: float, seed: int) -> dict[str, list[Counts]]:
    labels: dict[str, Labels] = {name: images[1] for name, (images, _) in pool.items()}
    num_stores, num_classes = mix.shape
    parts = {}
    for name in ("train", "validation"):
        counts = sizes(len(labels[name]), num_stores, ratio)
        parts[name] = share(labels[name], mix, counts, rng_for(seed, "share", name))
        # What a store validates on is mixed as what it has, not as what it was meant to have.
        sold = [np.bincount(labels[name][own], minlength=num_classes) for own in parts[name]]
        mix = np.array([row / max(1, row.sum()) for row in sold])
    return {**parts, "test": [np.arange(len(labels["test"]))] * num_stores}


def _seen(
    store: str, pool: dict[str, tuple[Images, Counts]], mine: dict[str, Counts], camera_shift: float, seed: int
) -> dict[str, tuple[Images, Counts]]:
    """A store's share of each split, through its camera."""
    camera = camera_of(store, strength=camera_shift, seed=seed)
    seen = {}
    for name, ((images, labels), ids) in pool.items():
        own = mine[name]
        seen[name] = (shoot(camera, images[own], rng_for(seed, "noise", store, name)), labels[own]), ids[own]
    return seen


def _bars(histogram: Sequence[int]) -> str:
    most = max([1, *histogram])
    return "".join("▁▂▃▄▅▆▇█"[-(-7 * n // most)] if n else "·" for n in histogram)


def _mostly(store: StoreSummary) -> str:
    total = max(1, sum(store.histogram))
    order = sorted(zip(store.histogram, store.classes, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {100 * n / total:.0f} %" for n, name in order[:2] if n)
