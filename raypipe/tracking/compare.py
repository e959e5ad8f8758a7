"""Runs side by side: what each reached, for how much time, traffic and work. Pure, from the runs' own records.

Runs that differ in nothing but their seed are one row: mean and spread. Where a row of pooled data is there, each
other row says how it compares with it, pair by pair of equal seeds: the mean ratio and the lower end of its one-sided
95 % interval (Student's t), so that a claim of "as good as pooled" can be checked. That of the quality, of the worst
store (the run's worst over the pooled run's worst), and of each other test metric that all these runs have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from pydantic import ValidationError

from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError
from raypipe.tasks.metrics import lower_is_better
from raypipe.tracking.lineage import History, flat_params, metric_of
from raypipe.tracking.plateau import plateau_line
from raypipe.tracking.ratio import Ratio, ratio

WORST = "worst store"
UNSEEN = ("seed", "track.", "task.scale", "task.class_weights")  # what may differ between runs of one row
UNPOOLED = ("pace", "pacing.", "update", "server", "ledger.", "evaluate.recalibrate", "evaluate.own_statistics")
COLUMNS = (
    "arm", "runs", "split", "quality", "spread", "worst_store", "of_pooled", "of_pooled_low", "worst_of_pooled",
    "worst_of_pooled_low", "seconds", "bytes_up", "bytes_down", "pooling_bytes", "steps", "examples", "versions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Account:
    """One run's figures. Bytes and seconds are of the whole run; `pooling_bytes`: of its stores' training examples."""

    run: str
    name: str
    seed: int
    pooled: bool
    metric: str
    learned: str  # what, in a word or two: runs that differ in it cannot be compared
    settings: Mapping[str, str]
    data: tuple[tuple[str, str], ...]  # each store's content hash
    split: str  # test, or validation where no test was read
    quality: float
    worst: float | None
    seconds: float
    bytes_up: int
    bytes_down: int
    pooling_bytes: int
    steps: int
    examples: int
    versions: int
    at: float = 0.0  # when its last version was made
    others: Mapping[str, float] = field(default_factory=dict)  # the other test metrics, by name
    plateau: str = ""  # of a pooled run: whether it had learned what it will


@dataclass(frozen=True, slots=True)
class Row:
    """Runs that differ in their seed alone. Figures but `worst` are means; `spread` is the standard deviation.

    `against`: to pooled, by the name of a metric or WORST.
    """

    arm: str
    accounts: tuple[Account, ...]
    against: Mapping[str, Ratio] = field(default_factory=dict)

    @property
    def of_pooled(self) -> Ratio | None:
        """Of the quality."""
        return self.against.get(self.accounts[0].metric)

    def mean(self, name: str) -> float:
        return fmean(float(getattr(account, name)) for account in self.accounts)

    @property
    def spread(self) -> float | None:
        return stdev(account.quality for account in self.accounts) if len(self.accounts) > 1 else None

    @property
    def worst(self) -> float | None:
        """Of any store in any run."""
        first = self.accounts[0]
        known = [account.worst for account in self.accounts if account.worst is not None]
        return (max if lower_is_better(first.metric) else min)(known) if known else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table and what has to be known to read it."""

    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def training_bytes(data_bytes: int, counts: Mapping[str, int]) -> int:
    """What moving a store's training examples takes: its data set's bytes by their share of its examples."""
    return round(data_bytes * counts.get("train", 0) / max(1, sum(counts.values())))


def account_of(history: History) -> Account:
    """A run's figures. Raises ConfigError for a run that was never judged."""
    body, metric = history.run(), metric_of(history)
    split, quality, rows = _judged(history, metric)
    owns = [row for row in rows if row is not None]
    versions = [history.versions[number] for number in sorted(history.versions)]
    parts = [part for version in versions for part in version["contributions"]]
    asked = body.get("asked", [])
    up = sum(v["bytes_up"] for v in versions) + sum(fact["bytes_up"] for fact in asked)
    joined = history.stores.values()
    return Account(
        run=body["run"],
        name=body["name"],
        seed=int(body["config"].get("seed", 0)),
        pooled=bool(body.get("pooled")),
        metric=metric,
        learned=_learned(body["config"], metric),
        settings=_settings(body["config"], pooled=bool(body.get("pooled"))),
        data=tuple(sorted((row["store"], str(row.get("hash"))) for row in joined)),
        split=split,
        quality=quality,
        worst=(max if lower_is_better(metric) else min)(owns) if owns else None,
        seconds=versions[-1]["elapsed_s"],
        bytes_up=up,
        bytes_down=max(0, versions[-1]["bytes_total"] - up),
        pooling_bytes=sum(training_bytes(row.get("data_bytes", 0), row["counts"]) for row in joined),
        steps=sum(part["steps"] for part in parts),
        examples=sum(part["examples"] for part in parts),
        versions=versions[-1]["version"],
        at=versions[-1]["at"],
        others=_others(history, metric) if split == "test" else {},
        plateau=_plateau(history),
    )


def compare(accounts: Sequence[Account]) -> Comparison:
    """Rows in the order in which their first run was named. Raises ConfigError for runs of different tasks."""
    first = accounts[0]
    if other := next((a for a in accounts if a.learned != first.learned), None):
        raise ConfigError(
            f"runs of different tasks cannot be compared: {first.run} is of {first.learned}, "
            f"{other.run} of {other.learned}"
        )
    if twice := sorted({a.run for a in accounts if sum(b.run == a.run for b in accounts) > 1}):
        raise ConfigError(f"named twice: {', '.join(twice)}")
    groups: dict[str, list[Account]] = {}
    for account in accounts:
        groups.setdefault(_key(account), []).append(account)
    arms = _names([group[0] for group in groups.values()])
    pooled = [group for group in groups.values() if group[0].pooled]
    against = pooled[0] if len(pooled) == 1 else []
    rows = tuple(
        Row(arm, tuple(group), {} if group[0].pooled else _against(group, against))
        for arm, group in zip(arms, groups.values(), strict=True)
    )
    notes = _notes(accounts)
    if len(pooled) > 1:
        notes.append(f"{len(pooled)} rows are pooled: for a ratio to pooled name the runs of one of them")
    return Comparison(first.metric, rows, tuple(notes))


def columns_of(comparison: Comparison) -> list[str]:
    """COLUMNS, and two for each other metric that some row compares with pooled."""
    return [*COLUMNS, *(f"{name}_{of}" for name in _compared(comparison) for of in ("of_pooled", "of_pooled_low"))]


def as_table(comparison: Comparison) -> list[list[Any]]:
    """A row of `columns_of` each, plain numbers; None where there is none."""
    table: list[list[Any]] = []
    for row in comparison.rows:
        others = [figure for name in _compared(comparison) for figure in _two(row.against.get(name))]
        table.append(
            [row.arm, len(row.accounts), row.accounts[0].split, row.mean("quality"), row.spread, row.worst]
            + [*_two(row.of_pooled), *_two(row.against.get(WORST))]
            + [row.mean(name) for name in ("seconds", "bytes_up", "bytes_down", "pooling_bytes")]
            + [row.mean(name) for name in ("steps", "examples", "versions")]
            + others
        )
    return table


def comparison_key(accounts: Sequence[Account]) -> str:
    """Equal for the same runs in whatever order, so that a comparison made again is the same one."""
    return hashlib.sha256("\n".join(sorted(a.run for a in accounts)).encode()).hexdigest()[:16]


def _against(group: Sequence[Account], pooled: Sequence[Account]) -> dict[str, Ratio]:
    """By name, the quality and the worst store first; what some run lacks is left out."""
    metric, runs = group[0].metric, [*group, *pooled]
    names = [name for name in group[0].others if all(name in a.others for a in runs)]
    of: dict[str, list[dict[int, float]]] = {metric: [{a.seed: a.quality for a in g} for g in (group, pooled)]}
    of[WORST] = [{a.seed: a.worst for a in g if a.worst is not None} for g in (group, pooled)]
    of |= {name: [{a.seed: a.others[name] for a in g} for g in (group, pooled)] for name in names}
    found = {
        name: ratio(own, other, falls=lower_is_better(metric if name == WORST else name))
        for name, (own, other) in of.items()
    }
    return {name: one for name, one in found.items() if one is not None}


def _compared(comparison: Comparison) -> list[str]:
    names = dict.fromkeys(name for row in comparison.rows for name in row.against)
    return [name for name in names if name not in (comparison.metric, WORST)]


def _two(found: Ratio | None) -> tuple[float | None, float | None]:
    return (None, None) if found is None else (found.mean, found.bound)


def _others(history: History, metric: str) -> dict[str, float]:
    """The other test metrics; not those of a single class, of which there may be thousands."""
    test = history.final["test"] if history.final is not None else {}
    return {name: value for name, value in sorted(test.items()) if name != metric and "/" not in name}


def _plateau(history: History) -> str:
    final = history.final
    if final is None or "judged" not in final:
        return ""
    return plateau_line(final.get("gained"), final["judged"])


def _judged(history: History, metric: str) -> tuple[str, float, list[float | None]]:
    """Split, the run's own metric of the best version, and each store's own."""
    final, best = history.final, history.best
    if final is not None and metric in final["test"]:
        return "test", final["test"][metric], [row.get("shared") for row in final["table"]]
    for split, (_, body) in (history.evaluations.get(best, {}) if best is not None else {}).items():
        if metric in body["metrics"]:
            return split, body["metrics"][metric], [row.get(metric) for row in body["stores"].values()]
    raise ConfigError(f"run {history.run()['run']} has not been judged yet: there is no {metric} to compare")


def _learned(config: Mapping[str, Any], metric: str) -> str:
    """The task by name, what it tells apart, and the metric."""
    task = config["task"]
    target = f" of {task['target']}" if "target" in task else ""
    classes = task.get("classes")
    number = f" of {classes if isinstance(classes, int) else len(classes)} classes" if classes else ""
    if isinstance(classes, list):
        number += f" ({hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:4]})"
    return f"{task['name']}{target}{number} by {metric}"


def _settings(config: Mapping[str, Any], *, pooled: bool) -> dict[str, str]:
    """As a run of today would have them: one recorded before a key was there has its default. Of a pooled run without
    what only a federation does."""
    with suppress(ValidationError):  # of a part that is not installed here, or of a key that is gone
        config = RunConfig.model_validate(config).model_dump(mode="json")
    skipped = (*UNSEEN, *UNPOOLED) if pooled else UNSEEN
    return {key: value for key, value in flat_params(config).items() if not key.startswith(skipped)}


def _key(account: Account) -> str:
    return json.dumps([account.pooled, account.split, dict(account.settings)], sort_keys=True)


def _names(firsts: Sequence[Account]) -> list[str]:
    """A row's name: the run's; where several share it, with the settings in which they differ."""
    names = []
    for account in firsts:
        alike = [a for a in firsts if a.name == account.name and a.pooled == account.pooled]
        keys = sorted({k for a in alike for k in a.settings if len({b.settings.get(k) for b in alike}) > 1})
        said = [f"{key}={account.settings.get(key, '-')}" for key in keys[:3]]
        pooled = "pooled" if account.pooled else ""
        names.append(" ".join(filter(None, [account.name, pooled, *said])))
    return names


def _notes(accounts: Sequence[Account]) -> list[str]:
    notes = []
    for seed in sorted({a.seed for a in accounts}):
        if len({a.data for a in accounts if a.seed == seed}) > 1:
            notes.append(f"runs of seed {seed} had different data: their splits are not the same")
    if len({a.split for a in accounts}) > 1:
        notes.append("some runs read no test split: their quality is of the validation split, which chose the version")
    unlearned = [a for a in accounts if a.plateau and not a.plateau.startswith("at ")]
    notes += [f"{a.run}, pooled, is not known to have learned all it can: {a.plateau}" for a in unlearned]
    return notes
