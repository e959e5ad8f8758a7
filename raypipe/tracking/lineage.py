"""A run's history, computed from its journal: pure, so it can be told again at any time and place.

Metric names start with what a chart should show first: MLflow makes a section of each first part, in the
order of the alphabet (`eval` before `fed`, `store`, `time`). Cumulated bytes and elapsed seconds are metrics, since
a plain step axis is unfair between waiting for all and not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from raypipe.errors import ConfigError
from raypipe.tracking.journal import FILE, Journal, Record
from raypipe.tracking.records import (
    ClassesChanged,
    Contribution,
    Evaluated,
    Final,
    RunFinished,
    RunStarted,
    StoreJoined,
    VersionPublished,
    WeightsKept,
)
from raypipe.tracking.versions import FOLDER, VersionStore

COLUMNS = ("version", "parent", "hash", "store", "base", "staleness", "steps", "weight", "share")
PREFIX = {"test": "test", "central": "central"}  # split -> section of charts; every other split is `eval`


@dataclass
class History:
    """What is known of a run so far. Adding a record twice changes nothing."""

    started: RunStarted | None = None
    stores: dict[str, StoreJoined] = field(default_factory=dict)  # as each joined last
    versions: dict[int, VersionPublished] = field(default_factory=dict)
    weights: dict[int, WeightsKept] = field(default_factory=dict)
    evaluations: dict[int, dict[str, tuple[float, Evaluated]]] = field(
        default_factory=dict
    )  # version -> split -> at, it
    best: int | None = None
    final: Final | None = None
    finished: RunFinished | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        history = cls()
        for record in records:
            history.add(record)
        return history

    def add(self, record: Record) -> None:
        """Take one more record in."""
        body: Any = record.body
        match record.kind:
            case "run_started":
                self.started, self.finished = body, None
            case "store_joined":
                self.stores[body["store"]] = body
            case "version_published":
                self.versions[body["version"]] = body
            case "weights_kept":
                self.weights[body["version"]] = body
            case "version_withdrawn":
                for known in (self.versions, self.weights, self.evaluations):
                    known.pop(body["version"], None)
            case "evaluated":
                self.evaluations.setdefault(body["version"], {})[body["split"]] = (record.at, body)
                self.best = body["version"] if body["best"] else self.best
            case "final":
                self.final, self.best = body, body["best_version"]
            case "run_finished":
                self.finished = body
            case _:
                pass

    def run(self) -> RunStarted:
        """How the run was started. Raises ConfigError when it never was."""
        if self.started is None:
            raise ConfigError("this run never started: its journal is empty")
        return self.started

    def version(self, number: int) -> VersionPublished:
        """One version. Raises ConfigError with those there are."""
        if number not in self.versions:
            there = f"it has {min(self.versions)} to {max(self.versions)}" if self.versions else "it has none"
            raise ConfigError(f"run {self.run()['run']} has no version {number}; {there}")
        return self.versions[number]

    def classes(self, number: int) -> ClassesChanged | None:
        """What the newest change of the class list up to a version has brought; None where there was none."""
        with_change = [version for version, body in self.versions.items() if version <= number and body.get("classes")]
        return self.versions[max(with_change)]["classes"] if with_change else None

    def task(self, number: int) -> dict[str, Any]:
        """The task's part that a version is of."""
        found = self.classes(number)
        return dict(self.run()["config"]["task"] if found is None else found["task"])

    def card(self, number: int) -> dict[str, Any]:
        """A version's `model_card`."""
        return model_card(self.run(), number, self.task(number))

    def layout(self, number: int) -> dict[str, Any]:
        """Of a version's vector, as JSON."""
        found = self.classes(number)
        return self.run()["layout"] if found is None else found["layout"]

    def file_hash(self, number: int) -> str | None:
        """The blake3 of a version's file; None where its weights never came to the disk."""
        return self.weights[number]["hash"] if number in self.weights else None

    def metrics(self, number: int) -> dict[str, float]:
        """All that is known of one version, evaluations included."""
        return {name: value for _, metrics in self.moments(number) for name, value in metrics.items()}

    def moments(self, number: int) -> list[tuple[float, dict[str, float]]]:
        """The same as (time, metrics), as they were known."""
        body = self.version(number)
        judged = self.evaluations.get(number, {}).values()
        return [(body["at"], version_metrics(body)), *((at, evaluation_metrics(it)) for at, it in judged)]


def version_metrics(body: VersionPublished) -> dict[str, float]:
    """One MLflow step. A store with several updates in a version has their sums, and its mean staleness."""
    updates = body["contributions"]
    found: dict[str, float] = {
        "fed/contributors": len({c["store"] for c in updates}),
        "fed/steps": sum(c["steps"] for c in updates),
        "fed/bytes_up": body["bytes_up"],
        "fed/bytes_down": body["bytes_down"],
        "fed/bytes_total": body["bytes_total"],
        "fed/step_norm": body["step_norm"],
        "time/version_s": body["seconds"],
        "time/elapsed_s": body["elapsed_s"],
    }
    if updates:
        found["fed/staleness_mean"] = _mean_staleness(updates)
    for store in sorted({c["store"] for c in updates}):
        own = [c for c in updates if c["store"] == store]
        found[f"store/{store}/share"] = sum(c["share"] for c in own)
        found[f"store/{store}/steps"] = sum(c["steps"] for c in own)
        found[f"store/{store}/staleness"] = _mean_staleness(own)
    return found


def evaluation_metrics(body: Evaluated) -> dict[str, float]:
    """The metrics of an evaluation: of all stores, and each store's own but for the loss."""
    section = PREFIX.get(body["split"], "eval")
    found = {f"{section}/{name}": value for name, value in body["metrics"].items()}
    if section == "eval":
        own = ((store, name, value) for store, row in body["stores"].items() for name, value in row.items())
        found |= {f"store/{s}/{name}": value for s, name, value in own if name not in ("loss", "num_examples")}
    return found


def lineage_rows(body: VersionPublished) -> Iterator[tuple[Any, ...]]:
    """A row of COLUMNS for each contribution; a version without any (the first) has one row."""
    own = (body["version"], body["parent"], body["hash"])
    if not body["contributions"]:
        yield (*own, None, None, None, None, None, None)
    for c in body["contributions"]:
        yield (*own, c["store"], c["base"], c["staleness"], c["steps"], c["weight"], c["share"])


def lineage_params(body: VersionPublished) -> dict[str, str]:
    """A version's origin in short, for a model's page."""
    updates = body["contributions"]
    return {
        "version": str(body["version"]),
        "parent": "" if body["parent"] is None else str(body["parent"]),
        "hash": body["hash"],
        "stores": ", ".join(sorted({c["store"] for c in updates})),
        "staleness_max": str(max((c["staleness"] for c in updates), default=0)),
        "steps": str(sum(c["steps"] for c in updates)),
    }


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"train": {"lr": 0.1}}` as `{"train.lr": "0.1"}`; lists as JSON; a warm start's path as its name only."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": text for inner, text in flat_params(value).items()}
        elif isinstance(value, list | tuple):
            found[key] = json.dumps(value, sort_keys=True)
        elif key == "warm_start" and isinstance(value, str) and not value.startswith("models:/"):
            found[key] = PurePath(value).name
        else:
            found[key] = str(value)
    return found


def model_card(started: RunStarted, version: int, task: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What turns a file of weights into predictions: the parts to build, as the run's configuration has them; the
    `task` of that version, where its class list is another.

    Also what was `trained` where that is not all, and over how many images a store has measured `own_statistics`.
    Nothing that differs between equal runs: equal seeds give equal files.
    """
    config = started["config"]
    said = {
        "trained": config.get("train", {}).get("trained", "all"),
        "own_statistics": config.get("evaluate", {}).get("own_statistics"),
    }
    more = {key: value for key, value in said.items() if value not in ("all", None)}
    return {"version": version, "task": dict(task or config["task"]), "model": config["model"], **more}


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A line of `raypipe versions`; metrics are None where the version was not judged."""

    version: int
    parent: int | None
    hash: str
    at: float
    contributors: int
    steps: int
    staleness_mean: float | None
    score: float | None  # of the metric that says which version is the best
    loss: float | None
    kept: bool
    whole: bool  # of one that is kept: its weights are as they were written
    pinned: bool
    best: bool


def read_history(run_dir: Path) -> History:
    """A run's history from its folder. Raises RunError where there is no journal."""
    journal = Journal(run_dir / FILE)
    try:
        return History.of(journal.read())
    finally:
        journal.close()


def metric_of(history: History) -> str:
    """The metric by which a run's versions are judged."""
    said = history.run()["config"].get("evaluate", {})
    return str(said.get("metric", "accuracy"))


def list_versions(run_dir: Path, *, check: bool = False) -> list[VersionRow]:
    """All versions of a run, from its journal alone; neither MLflow nor Ray is needed. `check` reads all weights."""
    history, store = read_history(run_dir), VersionStore(run_dir / FOLDER)
    kept, pinned = set(store.kept()), store.pinned()
    rows, metric = [], metric_of(history)
    for number, body in sorted(history.versions.items()):
        metrics = history.metrics(number)
        rows.append(
            VersionRow(
                version=number,
                parent=body["parent"],
                hash=body["hash"],
                at=body["at"],
                contributors=int(metrics["fed/contributors"]),
                steps=int(metrics["fed/steps"]),
                staleness_mean=metrics.get("fed/staleness_mean"),
                score=metrics.get(f"eval/{metric}"),
                loss=metrics.get("eval/loss"),
                kept=number in kept,
                whole=number in kept and (not check or store.is_whole(number)),
                pinned=number in pinned,
                best=number == history.best,
            )
        )
    return rows


def _mean_staleness(updates: list[Contribution]) -> float:
    return sum(c["staleness"] for c in updates) / len(updates)
