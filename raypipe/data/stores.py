"""Private data sets for the stores of a local federation, made from a public source.

    OUT/STORE/policy.yaml                      the store's own word; never overwritten once somebody edited it
    OUT/STORE/data/NAME/{train,...}.parquet    its images
    OUT/STORE/data/NAME/recipe.json            how they were made: the same recipe again leaves them as they are

Train and validation are the store's alone. Test is the same items for all stores, each seen by its own camera, so
that a model is judged on what a store rarely sells too.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raypipe.config.schema import NAME
from raypipe.data.camera import camera_of, rng_for, shoot
from raypipe.data.dataset import Labels, open_data
from raypipe.data.sample import Images, Source, encode_png
from raypipe.data.schema import SPLITS, reason, write_split
from raypipe.data.split import Counts, balanced, share, sizes, splits
from raypipe.errors import ConfigError, RunError
from raypipe.registry import Spec

RECIPE = "recipe.json"
RECIPE_VERSION = 1  # another one makes all stores anew
LEAST = 100  # images that max_images leaves for validation and test, since fewer judge nothing
POLICY = """\
# The store's own policy. It is enforced at the store; nothing outside can change it.
{store}
# Data sets by name. A folder is relative to this file, or absolute.
{data}
tasks: {tasks}
models: all  # or a list of model names
max_examples: 1000000  # images per ticket
max_seconds: 3600  # per ticket
max_upload_bytes: 1000000000  # per update
"""


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What a store has; `histogram` counts training images, or boxes, by class; not `made`: it was there already."""

    store: str
    policy: Path
    counts: dict[str, int]
    classes: tuple[str, ...]
    histogram: tuple[int, ...]
    content_hash: str
    made: bool


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
    recipe = {
        "version": RECIPE_VERSION,
        "source": [source.name, source.content_hash],
        "stores": list(store_ids),
        "split": dict(split),
        "size_ratio": size_ratio,
        "camera_shift": camera_shift,
        "seed": seed,
        "max_images": max_images,
    }
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    mix = splits.build(split)(source.classes, len(store_ids), rng_for(seed, "mix"))
    try:
        with one_at_a_time(out):
            wanting = [s for s in store_ids if not is_made(out / s, s, data_name, recipe)]
            if wanting:
                _make_stores(out, wanting, data_name, source, mix, recipe)
            return [summary(out, store, data_name, made=store in wanting) for store in store_ids]
    except OSError as error:
        raise RunError(f"the stores' data sets cannot be written: {reason(error)}") from None


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


def check_names(store_ids: Sequence[str], data_name: str) -> list[str]:
    """What is wrong with these names, a line each."""
    problems = [f"{name!r} cannot name a folder" for name in (*store_ids, data_name) if not NAME.match(name)]
    if not store_ids or len(set(store_ids)) < len(store_ids):
        problems.append("store ids must be distinct, and there must be at least one")
    return problems


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


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Two commands that start at once must not write the same store."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_stores(out: Path, wanting: Sequence[str], data_name: str, source: Source, mix: Any, recipe: Any) -> None:
    seed = recipe["seed"]
    pool = _pool(source, recipe["max_images"], seed)
    shares = _shares(pool, mix, recipe["size_ratio"], seed)
    for store in wanting:
        place = recipe["stores"].index(store)
        mine = {name: shares[name][place] for name in SPLITS}
        _make(out / store, store, data_name, _seen(store, pool, mine, recipe["camera_shift"], seed), source, recipe)


def is_made(folder: Path, store: str, data_name: str, recipe: Any) -> bool:
    """Whether the recipe's data set lies there. Raises ConfigError if another lies there that raypipe did not make."""
    place = folder / "data" / data_name
    if not place.exists():
        return False
    try:
        return json.loads((place / RECIPE).read_text()) == recipe and (folder / "policy.yaml").exists()
    except (FileNotFoundError, ValueError):
        raise ConfigError(
            f"store {store} has a data set {data_name!r} that raypipe did not make; it is left as it is. "
            "Choose another folder or name"
        ) from None


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


def _make(
    folder: Path, store: str, data_name: str, shares: dict[str, tuple[Images, Counts]], source: Source, recipe: Any
) -> None:
    def write(partial: Path) -> None:
        for name, ((images, labels), ids) in shares.items():
            write_split(
                partial / f"{name}.parquet",
                images=encode_png(images, level=1),
                labels=labels,
                classes=source.classes,
                image_ids=[f"{name}-{i:05d}" for i in ids],
                shapes=np.tile(images.shape[:0:-1], (len(images), 1)),
            )

    place_data(folder, store, data_name, recipe, write)


def place_data(folder: Path, store: str, data_name: str, recipe: Any, write: Callable[[Path], None]) -> None:
    """Write one store's data set beside its place and move it there, so that no half of one is ever found."""
    data = folder / "data"
    for private in (folder, data):
        private.mkdir(mode=0o700, exist_ok=True)
    place, partial, old = data / data_name, data / f".{data_name}.new", data / f".{data_name}.old"
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(mode=0o700)
    write(partial)
    (partial / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
    _allow(folder, store, data_name, _tasks(recipe))
    if place.exists():
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _allow(folder: Path, store: str, data_name: str, tasks: list[str]) -> None:
    """Write the store's policy, or add the data set to it, unless somebody edited it: then it is theirs."""
    policy = folder / "policy.yaml"
    recipes = (folder / "data").glob(f"[!.]*/{RECIPE}")
    made = {path.parent.name: _tasks(json.loads(path.read_text())) for path in recipes}
    if policy.exists() and policy.read_text() != _policy(store, made):
        return
    new = folder / ".policy.new"
    new.write_text(_policy(store, made | {data_name: tasks}))
    new.replace(policy)


def _tasks(recipe: Any) -> list[str]:
    """What a data set of this recipe is for."""
    return list(recipe.get("tasks", ["classification"]))


def _policy(store: str, made: dict[str, list[str]]) -> str:
    data = {name: {"folder": f"data/{name}", "reader": "parquet"} for name in sorted(made)}
    return POLICY.format(
        tasks=f"[{', '.join(sorted({task for tasks in made.values() for task in tasks}))}]",
        store=yaml.safe_dump({"store": store}).strip(),
        data=yaml.safe_dump({"data": data}, default_flow_style=None).strip(),
    )


def summary(out: Path, store: str, data_name: str, *, made: bool) -> StoreSummary:
    """What lies there now."""
    data = open_data(out / store / "data" / data_name, name=data_name)
    train = data.split("train")
    labels = train.labels if train.boxes is None else train.boxes.labels
    histogram = np.bincount(labels, minlength=len(data.classes))
    return StoreSummary(
        store=store,
        policy=out / store / "policy.yaml",
        counts=dict(data.counts),
        classes=data.classes,
        histogram=tuple(map(int, histogram)),
        content_hash=data.content_hash,
        made=made,
    )


def _bars(histogram: Sequence[int]) -> str:
    most = max([1, *histogram])
    return "".join("▁▂▃▄▅▆▇█"[-(-7 * n // most)] if n else "·" for n in histogram)


def _mostly(store: StoreSummary) -> str:
    total = max(1, sum(store.histogram))
    order = sorted(zip(store.histogram, store.classes, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {100 * n / total:.0f} %" for n, name in order[:2] if n)
