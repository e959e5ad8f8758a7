"""Where the private data sets of a local federation's stores lie, and how they get there whole.

OUT/STORE/policy.yaml                the store's own word; never overwritten once somebody edited it
OUT/STORE/data/NAME/...              its data
OUT/STORE/data/NAME/recipe.json      how they were made: the same recipe again leaves them as they are
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from raypipe.config.schema import NAME
from raypipe.data.dataset import open_data
from raypipe.data.schema import reason
from raypipe.errors import ConfigError, RunError

RECIPE = "recipe.json"
RECIPE_VERSION = 1  # another one makes all stores anew
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

Write: TypeAlias = Callable[[str, Path], None]  # a store's data set into a folder


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


def check_names(store_ids: Sequence[str], data_name: str) -> list[str]:
    """What is wrong with these names, a line each."""
    problems = [f"{name!r} cannot name a folder" for name in (*store_ids, data_name) if not NAME.match(name)]
    if not store_ids or len(set(store_ids)) < len(store_ids):
        problems.append("store ids must be distinct, and there must be at least one")
    return problems


def make_data_sets(
    out: Path, store_ids: Sequence[str], data_name: str, made_of: Mapping[str, Any], writer: Callable[[], Write]
) -> list[StoreSummary]:
    """A private data set for each store; those made of the same before are left alone, and `writer` then not asked.

    Raises ConfigError where data lies that raypipe did not make; RunError if the disk does not take it.
    """
    recipe = {"version": RECIPE_VERSION, "stores": list(store_ids), **made_of}
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    try:
        with one_at_a_time(out):
            wanting = [s for s in store_ids if not _is_made(out / s, s, data_name, recipe)]
            write = writer() if wanting else None
            for store in wanting:
                assert write is not None
                _place(out / store, store, data_name, recipe, write)
            return [_summary(out, store, data_name, made=store in wanting) for store in store_ids]
    except OSError as error:
        raise RunError(f"the stores' data sets cannot be written: {reason(error)}") from None


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Two commands that start at once must not write the same store."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_made(folder: Path, store: str, data_name: str, recipe: Any) -> bool:
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


def _place(folder: Path, store: str, data_name: str, recipe: Any, write: Write) -> None:
    """Write one store's data set beside its place and move it there, so that no half of one is ever found."""
    data = folder / "data"
    for private in (folder, data):
        private.mkdir(mode=0o700, exist_ok=True)
    place, partial, old = data / data_name, data / f".{data_name}.new", data / f".{data_name}.old"
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(mode=0o700)
    write(store, partial)
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


def _summary(out: Path, store: str, data_name: str, *, made: bool) -> StoreSummary:
    data = open_data(out / store / "data" / data_name, name=data_name)
    histogram = np.zeros(0, int)
    if data.classes:
        train = data.split("train")
        histogram = np.bincount(
            train.labels if train.boxes is None else train.boxes.labels, minlength=len(data.classes)
        )
    return StoreSummary(
        store=store,
        policy=out / store / "policy.yaml",
        counts=dict(data.counts),
        classes=data.classes,
        histogram=tuple(map(int, histogram)),
        content_hash=data.content_hash,
        made=made,
    )
