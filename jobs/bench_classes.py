"""The figure of a class list that grows: five classes come to a run at its middle. Ray on this machine, real stores.

    .venv/bin/python jobs/bench_classes.py                # clothes, and then trousers, shoes and bags
    .venv/bin/python jobs/bench_classes.py --split mixed  # Fashion-MNIST's first five classes, then its other five

Four stores share the bundled sample. Two have images of the old classes alone, and a list of those, to the end; two
have images of all ten, of which they leave the new ones out until the run knows them. What is measured, each version
judged on the same images of all stores, the mean of each class's recall:

    classes_old      points that the old classes gained from the five versions before the change to the last five
    classes_new      recall of the new classes over the last five versions
    classes_refused  stores that were set aside, updates that were refused, tickets that failed

`--reference` trains a second run that has all ten classes from its beginning: what the old ones come to beside the new
ones, however those are added. Exit code 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.config.schema import RunConfig
from raypipe.data.places import make_data_sets
from raypipe.data.sample import SIZE, encode_png, load_sample
from raypipe.data.schema import write_split
from raypipe.run import new_run_id
from raypipe.tracking.journal import FILE, Journal

KNOWING, OTHERS = ["old-1", "old-2"], ["new-1", "new-2"]  # stores of the old classes alone, and of all
CLOTHES = ["T-shirt/top", "Pullover", "Dress", "Coat", "Shirt"]
SPLITS = {
    "apart": (CLOTHES, ["Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot"]),
    "mixed": (
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"],
        ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    ),
}
VERSIONS, AROUND = 24, 5
MUST = {"classes_old": -1.0, "classes_new": 0.8, "classes_refused": 0.0}
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # bodies by kind


def write_stores(folder: Path, old: Sequence[str], train: int | None = None, judged: int | None = None) -> None:
    """Data sets and policies of the four stores; each image is at one store. `train`, `judged`: images at most."""
    source = load_sample()
    parts = {"train": source.read("train"), "validation": _both(source.read("validation"), source.read("test"))}
    most = {"train": train, "validation": judged}
    places = {store: place for place, store in enumerate([*KNOWING, *OTHERS])}

    def write(store: str, data: Path) -> None:
        names = list(old) if store in KNOWING else list(source.classes)
        number = np.array([names.index(name) if name in names else -1 for name in source.classes])
        for split, (images, labels) in parts.items():
            end = len(labels) if most[split] is None else most[split]
            mine = np.arange(places[store], end, len(places))
            mine = mine[number[labels[mine]] >= 0]
            write_split(
                data / f"{split}.parquet",
                images=encode_png(images[mine], level=1),
                labels=number[labels[mine]],
                classes=names,
                image_ids=[str(image) for image in mine],
                shapes=np.full((len(mine), 2), SIZE),
            )

    make_data_sets(folder, list(places), "products", {"made by": "bench_classes"}, lambda: write)


def _both(one: Any, other: Any) -> Any:
    return tuple(np.concatenate(pair) for pair in zip(one, other, strict=True))


def configuration(split: str, *, grows: bool = True, versions: int = VERSIONS, **changes: Any) -> dict[str, Any]:
    """As it would be written in YAML."""
    old, new = SPLITS[split]
    task: dict[str, Any] = {"name": "classification", "classes": old if grows else [*old, *new]}
    said: dict[str, Any] = {
        "name": f"classes-{split}",
        "task": task | {"image_size": SIZE, "channels": 1, "unknown": "ignore", "per_class": True},
        "class_changes": [{"at_version": versions // 2, "add": new}] if grows else [],
        "model": {"name": "small_cnn"},
        "stores": [{"id": store, "cpus": 0.5} for store in (*KNOWING, *OTHERS)],
        "train": {"lr": 0.05, "batch_size": 32, "local_epochs": 1},
        "pace": "wait_for_all",
        "stop": {"max_versions": versions},
        "evaluate": {"alone": False, "test": False},
        "track": {"mlflow": False},
        "local": {},
    }
    return {**said, **changes}


def recall(records: Records, places: Sequence[int], versions: Sequence[int]) -> list[float]:
    """Of each of these classes, the mean over these versions."""
    judged = [body["metrics"] for body in records["evaluated"] if body["version"] in versions]
    return [float(np.mean([metrics[f"recall/{place}"] for metrics in judged])) for place in places]


def figures(records: Records, num_old: int = 5, num_new: int = 5, around: int = AROUND) -> list[dict[str, Any]]:
    """The three of the top of the file, from a run's records."""
    (change,) = [body["version"] for body in records["version_published"] if body.get("classes")]
    last = max(body["version"] for body in records["version_published"])
    old, new = range(num_old), range(num_old, num_old + num_new)
    before, after = range(change - around, change), range(last - around + 1, last + 1)
    sides = [float(np.mean(recall(records, old, versions))) for versions in (before, after)]
    found = recall(records, new, after)
    trouble = {kind: len(records.get(kind, [])) for kind in ("store_set_aside", "update_rejected", "ticket_failed")}
    return [
        _line("classes_old", 100 * (sides[1] - sides[0]), {"before": sides[0], "after": sides[1], "at": change}),
        _line("classes_new", float(np.mean(found)), {"each": [round(value, 3) for value in found]}),
        _line("classes_refused", float(sum(trouble.values())), trouble),
    ]


def _line(figure: str, value: float, detail: dict[str, Any]) -> dict[str, Any]:
    must = MUST[figure]
    ok = value <= must if figure == "classes_refused" else value >= must
    return {"figure": figure, "value": round(value, 4), "must": must, "ok": ok, "detail": detail}


def federate(folder: Path, said: Mapping[str, Any]) -> Records:
    """A run on Ray of this machine; its records."""
    import ray

    from raypipe.launch import begin, watch
    from raypipe.placement.actor import shut_down, start_local

    os.environ |= {"RAYPIPE_HOME": str(folder), "RAYPIPE_STORES": str(folder / "stores"), "RAY_TMPDIR": str(folder)}
    os.environ |= {"RAY_AUTH_MODE": "disabled"}
    os.environ.pop("RAY_ADDRESS", None)
    config = RunConfig.model_validate(said)
    ids = [store.id for store in config.stores]
    run = new_run_id(config.name, time.time())
    start_local(ids, len(ids), 64 * 2**20)
    try:
        actor = begin(config, run, str(folder), {})
        summary = watch(actor, lambda state: None, lambda: None)
        ray.kill(actor)
    finally:
        shut_down()
    if summary["status"] != "finished":
        raise RuntimeError(f"{run} ended: {summary['reason']}")
    return records_of(folder / "runs" / run)


def records_of(run: Path) -> Records:
    """By kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in Journal(run / FILE).read():
        found.setdefault(record.kind, []).append(record.body)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=sorted(SPLITS), default="apart")
    parser.add_argument("--versions", type=int, default=VERSIONS)
    parser.add_argument("--reference", action="store_true", help="a run with all classes from its beginning too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rpc", dir="/tmp"))  # short: sockets lie in it
    try:
        write_stores(folder / "stores", SPLITS[options.split][0])
        lines = figures(federate(folder, configuration(options.split, versions=options.versions)))
        for line in lines:
            print(json.dumps(line), flush=True)
        if options.reference:
            records = federate(folder, configuration(options.split, grows=False, versions=options.versions))
            last = range(options.versions - AROUND + 1, options.versions + 1)
            sides = {name: np.mean(recall(records, p, last)) for name, p in (("old", range(5)), ("new", range(5, 10)))}
            print(json.dumps({"reference": {name: round(float(value), 4) for name, value in sides.items()}}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
