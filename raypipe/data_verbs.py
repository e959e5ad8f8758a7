"""Console verbs about stores' data sets: data, anchors, import. Thin; see cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raypipe.config.shipped import DEFAULT, shipped
from raypipe.errors import ConfigError
from raypipe.placement.homes import stores_home
from raypipe.record_verbs import Verb

if TYPE_CHECKING:
    from raypipe.config.schema import RunConfig
    from raypipe.tasks import Task

NAMED = {  # data sets, and the configurations that say which stores there are
    "orange-juice": "orange_juice.yaml",
    "lending-club": "lending_club.yaml",
    "image-sales": "image_sales.yaml",
    "shelves": "shelves_detection.yaml",
}
SOURCE = (
    "images: all of Fashion-MNIST instead of the sample that comes with raypipe, from a folder of its files, a .deb or "
    "'download' (fashion-mnist-full without it: from the Debian archive). Tables: the package's .deb, or a folder "
    "where it is unpacked; without it: from the Debian archive"
)


def add(verb: Verb, configured: Callable[[argparse.ArgumentParser], None]) -> None:
    """The verbs of this file; `configured` gives one a configuration and --set."""
    data = verb("data", _data, f"make private store data sets: of a configuration, or {', '.join(NAMED)}")
    configured(data)
    data.add_argument("--out", type=Path, help="default: $RAYPIPE_STORES, else ~/.raypipe/stores")
    data.add_argument("--source", help=SOURCE)
    fitted = verb("anchors", _anchors, "print nine anchors, for model.anchors, fitted to the boxes of the stores here")
    configured(fitted)
    fitted.add_argument(
        "--stores",
        type=Path,
        help="their folders; default: $RAYPIPE_STORES, else ~/.raypipe/stores",
    )
    bring = verb("import", _import, "at a store: bring images and their labels into a data set; again: what is new")
    bring.add_argument("kind", metavar="KIND", help="folders, yolo, coco, voc or csv")
    bring.add_argument("folder", metavar="FOLDER", type=Path, help="where they lie")
    bring.add_argument(
        "--to", required=True, type=Path, metavar="DATA_SET", help="the data set's folder, e.g. data/products"
    )
    bring.add_argument("--annotations", type=Path, metavar="FILE", help="of coco and csv, where there are several")
    bring.add_argument("--classes", metavar="NAME,NAME", help="these alone, in this order; default: all that are found")
    bring.add_argument(
        "--held-out", default="0.1,0.1", metavar="VALIDATION,TEST", help="shares, where no split is said"
    )


def _loaded(options: argparse.Namespace) -> RunConfig:
    from raypipe.run import load_run

    path = options.config_option or options.config or DEFAULT
    return load_run(shipped(NAMED[str(path)]) if str(path) in NAMED else path, options.set)


def _data(options: argparse.Namespace, console: Console) -> int:
    from raypipe.data.stores import describe_stores
    from raypipe.demo import make_demo_stores

    made = make_demo_stores(_loaded(options), options.out or stores_home(), options.source)
    console.print(describe_stores(made), highlight=False, markup=False, soft_wrap=True)
    return 0


def _anchors(options: argparse.Namespace, console: Console) -> int:
    import numpy as np

    from raypipe.models.anchors import fit_anchors, matching
    from raypipe.tasks import tasks

    config, folder = _loaded(options), options.stores or stores_home()
    task = tasks.build(config.task)
    if task.boxes is None:
        raise ConfigError(f"task {config.task['name']} has no boxes to fit anchors to: take one of detection")
    here = [store.id for store in config.stores if (folder / store.id / "policy.yaml").is_file()]
    if not here:
        raise ConfigError(f"none of the stores of {config.name} lies in {folder}: say where with --stores")
    sizes = np.concatenate([_sizes(folder / store, config.data, task) for store in here])
    anchors = fit_anchors(sizes)
    share = matching(sizes, anchors, match_ratio=config.model.get("match_ratio", 4.0))
    told = f"at {task.image_size} pixels, of {len(sizes):,} boxes at {', '.join(here)}; {share:.1%} match one"
    lines = [
        f"  anchors:  # {told}",
        *(f"    - [{width}, {height}]" for width, height in anchors),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _sizes(store: Path, name: str, task: Task) -> Any:
    """Width and height (n, 2) of the boxes that a store trains on, in pixels of the task's square.

    Raises ConfigError, StoreRefused.
    """
    import numpy as np

    from raypipe.data.dataset import open_data
    from raypipe.store.policy import read_policy
    from raypipe.store.targets import targets_of

    policy = read_policy(store)
    if name not in policy.data:
        raise ConfigError(f"store {policy.store} has no data set named {name!r}")
    offered = policy.data[name]
    data = open_data(offered.folder, name=name, reader=offered.reader)
    classes = tuple(offered.names.get(own, own) for own in data.classes)
    targets = targets_of(data.split("train"), classes, task, f"data set {name!r} of store {policy.store}")
    rows = targets.take(np.arange(len(targets))).numpy()
    return rows[rows[:, 6] == 0, 4:6]


def _import(options: argparse.Namespace, console: Console) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from raypipe.data.importers.ingest import held_out, ingest
    from raypipe.data.importers.sources import open_source

    shares, source = held_out(options.held_out), open_source(options.kind, options.folder, options.annotations)
    classes = [name.strip() for name in options.classes.split(",") if name.strip()] if options.classes else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = len(source)
        bar = progress.add_task("images", total=total)
        report = ingest(
            *(options.folder, source, options.to),
            classes=classes,
            shares=shares,
            see=lambda done: progress.update(bar, completed=min(done, total)),  # labels without image are seen too
        )
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0
