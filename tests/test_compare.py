"""Runs side by side, the plateau rule, and the pooled opponent that federated runs are compared with."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import CLASSES, ROOT

from raypipe.errors import ConfigError
from raypipe.run import load_run
from raypipe.tracking.compare import COLUMNS, WORST, account_of, as_table, columns_of, compare
from raypipe.tracking.console import ratios_table
from raypipe.tracking.journal import Record
from raypipe.tracking.lineage import History, list_versions, read_history
from raypipe.tracking.plateau import plateau_line, plateaued
from raypipe.tracking.ratio import Ratio, half_width, ratio

TASK = {"name": "classification", "classes": 10}


def history(
    run: str, quality: float, *, seed: int = 0, pooled: bool = False, test: bool = True,
    more: dict[str, float] | None = None, final: dict[str, Any] | None = None, **config: Any,
) -> History:  # fmt: skip
    """What a run of two stores and two versions writes down; `more`: other test metrics, `final`: more of its end."""
    said = {"seed": seed, "task": TASK, "pace": "paced", "evaluate": {"metric": "accuracy"}} | config
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("run_started", {"run": run, "name": run.split("-")[0], "config": said, "at": 0.0, "pooled": pooled})
    ]
    for store, counts in (("a", {"train": 80, "test": 20}), ("b", {"train": 40, "test": 60})):
        bodies.append(
            ("store_joined", {"store": store, "counts": counts, "data_bytes": 1000, "hash": f"{store}{seed}"})
        )
    part = {"store": "a", "ticket": "t", "base": 0, "staleness": 0, "steps": 7, "examples": 70}
    part |= {"weight": 1.0, "share": 1.0, "seconds": 1.0, "loss": 1.0, "bytes_up": 10}
    for version in range(3):
        body = {"version": version, "at": float(version), "elapsed_s": 2.0 * version, "bytes_up": 10 * (version > 0)}
        body |= {"bytes_total": 50 * version, "contributions": [part] * (version > 0), "parent": None}
        bodies.append(("version_published", body))
    rows = {"a": {"accuracy": quality - 0.2, "num_examples": 5}, "b": {"accuracy": quality, "num_examples": 5}}
    found = {"version": 2, "split": "validation", "metrics": {"accuracy": quality}, "stores": rows, "best": True}
    bodies.append(("evaluated", found))
    if test:
        table = [{"store": "a", "shared": quality - 0.1}, {"store": "b", "shared": quality + 0.1}]
        body = {"best_version": 2, "test": {"accuracy": quality} | (more or {}), "table": table, "reason": "x"}
        bodies.append(("final", body | (final or {})))
    return History.of(Record(n, float(n), kind, body) for n, (kind, body) in enumerate(bodies, 1))  # type: ignore[arg-type]


def test_an_account_holds_what_the_record_says() -> None:
    account = account_of(history("shelf-1", 0.7))
    assert (account.quality, account.split, account.seconds) == (0.7, "test", 4.0)
    assert account.worst == pytest.approx(0.6)
    assert (account.bytes_up, account.bytes_down) == (20, 80), "both ways, of the whole run"
    assert account.pooling_bytes == 800 + 400, "the training examples' share of each data set"
    assert (account.steps, account.examples, account.versions) == (14, 140, 2)


def test_runs_that_differ_in_their_seed_alone_are_one_row() -> None:
    runs = [history("shelf-1", 0.6, seed=1), history("shelf-2", 0.8, seed=2), history("shelf-3", 0.5, pace="fedbuff")]
    found = compare([account_of(run) for run in runs])
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in as_table(found))
    assert (first["arm"], second["arm"]) == ("shelf pace=paced", "shelf pace=fedbuff")
    assert (first["runs"], second["runs"]) == (2, 1)
    assert first["quality"] == pytest.approx(0.7)
    assert first["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert first["worst_store"] == pytest.approx(0.5), "of any store in any run"
    assert second["spread"] is None


def test_a_key_that_came_later_parts_no_runs_nor_does_for_pooled_ones_what_only_a_federation_does() -> None:
    now = load_run(ROOT / "configs/sync.yaml").model_dump(mode="json") | {"task": TASK}
    before = {**now, "train": {k: v for k, v in now["train"].items() if k != "control_variates"}}
    other = {**now, "pace": "fedbuff", "evaluate": {**now["evaluate"], "recalibrate": 64}}

    def rows(*configs: dict[str, Any], pooled: bool) -> list[int]:
        of = [{k: v for k, v in said.items() if k != "seed"} for said in configs]
        runs = [history(f"shelf-{n}", 0.6, seed=n, pooled=pooled, **said) for n, said in enumerate(of)]
        return [len(row.accounts) for row in compare([account_of(run) for run in runs]).rows]

    assert rows(now, before, pooled=False) == [2]
    assert rows(now, before, other, pooled=False) == [2, 1]
    assert rows(now, before, other, pooled=True) == [3]
    warmer = {**now, "train": {**now["train"], "lr": 0.3}}
    assert rows(now, warmer, pooled=True) == [1, 1]


def test_a_pooled_row_is_what_the_others_are_measured_by() -> None:
    runs = [history(f"shelf-{s}", q, seed=s) for s, q in ((1, 0.76), (2, 0.72))]
    runs += [history(f"shelf-p{s}", 0.8, seed=s, pooled=True) for s in (1, 2, 3)]
    own, pooled = compare([account_of(run) for run in runs]).rows
    assert own.of_pooled is not None
    assert own.of_pooled.mean == pytest.approx((0.95 + 0.9) / 2)
    assert own.of_pooled.low < 0.9
    assert own.of_pooled.pairs == 2
    assert (pooled.arm, pooled.of_pooled) == ("shelf pooled", None)


def test_the_worst_store_and_the_other_test_metrics_are_measured_by_pooled_too() -> None:
    """Each pair by hand: the worst of a run is 0.1 below its quality, see `history`."""
    of = {1: (0.76, 0.36), 2: (0.72, 0.34)}
    runs = [
        history(f"shelf-{s}", q, seed=s, more={"map": m, "loss": 2.0, "recall/0": 0.5, "r2": 0.1})
        for s, (q, m) in of.items()
    ]
    more = {"map": 0.4, "loss": 1.0, "recall/0": 0.5, "auc": 0.5}
    runs += [history(f"shelf-p{s}", 0.8, seed=s, pooled=True, more=more) for s in (1, 2)]
    found = compare([account_of(run) for run in runs])
    against = found.rows[0].against
    assert list(against) == ["accuracy", WORST, "loss", "map"], "auc and r2 have no partner, recall/0 is of one class"
    assert against[WORST].mean == pytest.approx((0.66 / 0.7 + 0.62 / 0.7) / 2)
    assert against[WORST].low == pytest.approx(against[WORST].mean - 6.314 * (0.04 / 0.7) / 2)
    assert against["map"] == Ratio(pytest.approx(0.875), pytest.approx(0.875 - 6.314 * 0.025), 2)
    assert against["loss"].mean == pytest.approx(0.5), "less is better: pooled / own"
    own, pooled = (dict(zip(columns_of(found), row, strict=True)) for row in as_table(found))
    assert own["map_of_pooled"] == pytest.approx(0.875)
    assert own["worst_of_pooled_low"] == against[WORST].low
    assert pooled["map_of_pooled"] is pooled["worst_of_pooled"] is None
    shown = ratios_table(found)
    assert shown is not None
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells[:3] == ["shelf", "2", "0.925 (> 0.767)"]
    assert [str(column.header) for column in shown.columns][2:4] == ["accuracy / pooled", "worst store / pooled"]
    assert cells[5] == "0.875 (> 0.717)"


def test_without_one_pooled_row_there_is_no_ratio_and_it_is_said_why() -> None:
    runs = [history("shelf-1", 0.76), history("shelf-p", 0.8, pooled=True)]
    runs += [history("shelf-q", 0.8, pooled=True, batch_size=64)]
    found = compare([account_of(run) for run in runs])
    assert ratios_table(found) is None
    assert found.notes == ("2 rows are pooled: for a ratio to pooled name the runs of one of them",)


def test_a_pooled_opponent_that_still_learns_is_no_opponent_and_it_is_said() -> None:
    assert plateau_line(0.0031, 11) == "at plateau: 0.003 gained in the last fifth"
    assert plateau_line(0.0212, 11) == "no plateau: 0.021 gained in the last fifth"
    assert plateau_line(None, 4) == "plateau unknown: judged 4 times, it takes 10"
    runs = [history("shelf-1", 0.7), history("shelf-p", 0.8, pooled=True, final={"judged": 11, "gained": 0.021})]
    (note,) = compare([account_of(run) for run in runs]).notes
    assert note.startswith("shelf-p, pooled, is not known to have learned all it can: no plateau: 0.021")
    runs[1] = history("shelf-p", 0.8, pooled=True, final={"judged": 11, "gained": 0.004})
    assert compare([account_of(run) for run in runs]).notes == ()


def test_only_pairs_of_equal_seeds_count() -> None:
    one = ratio({1: 0.9, 2: 0.5}, {1: 1.0})
    assert one is not None
    assert (one.mean, one.bound, one.pairs) == (0.9, None, 1)
    assert ratio({1: 0.9}, {2: 0.9}) is None
    five = ratio(dict(enumerate([0.95, 0.96, 0.97, 0.98, 0.99])), dict.fromkeys(range(5), 1.0))
    assert five is not None
    assert five.low == pytest.approx(0.97 - 2.132 * 0.015811 / math.sqrt(5), abs=1e-5)


@pytest.mark.parametrize(("num", "quantile"), [(2, 12.706), (5, 2.776), (12, 2.201), (31, 2.042), (121, 1.980)])
def test_the_interval_of_a_mean_is_students(num: int, quantile: float) -> None:
    values = [0.0, 1.0] + [0.5] * (num - 2)
    error = math.sqrt(0.5 / (num - 1) / num)
    assert half_width(values) == pytest.approx(quantile * error, rel=1e-3)


def test_a_run_that_learned_nothing_is_not_left_out_of_the_ratio() -> None:
    assert ratio({1: 0.0, 2: 1.0}, {1: 1.0, 2: 1.0}) == Ratio(0.5, pytest.approx(0.5 - 6.314 / 2), 2)
    assert ratio({1: 0.5}, {1: 0.0}) is None


def test_what_makes_runs_unlike_is_said() -> None:
    other = account_of(history("shoes-1", 0.5, task={"name": "tabular", "target": "price"}))
    with pytest.raises(ConfigError, match=r"shelf-1 is of classification of 10.*shoes-1 of tabular of"):
        compare([account_of(history("shelf-1", 0.7)), other])
    with pytest.raises(ConfigError, match="named twice: shelf-1"):
        compare([account_of(history("shelf-1", 0.7))] * 2)
    unlike = [account_of(history("shelf-1", 0.7)), account_of(history("shelf-2", 0.7, test=False))]
    found = compare(unlike)
    assert [row.accounts[0].split for row in found.rows] == ["test", "validation"]
    assert "read no test split" in found.notes[0]


def test_a_run_that_was_never_judged_cannot_be_compared() -> None:
    run = history("shelf-1", 0.7, test=False)
    run.evaluations.clear()
    with pytest.raises(ConfigError, match="shelf-1 has not been judged yet: there is no accuracy"):
        account_of(run)


@pytest.mark.parametrize(
    ("scores", "over"),
    [
        ([0.8] * 9, False),  # too few to say
        ([0.8] * 10, True),
        ([i / 20 for i in range(20)], False),
        ([0.1, 0.5, 0.7, 0.8, 0.85, 0.86, 0.87, 0.87, 0.874, 0.872], True),  # gains 0.004 in the last two
        ([0.1, 0.5, 0.7, 0.8, 0.85, 0.86, 0.87, 0.87, 0.876, 0.872], False),  # 0.006
        ([0.9, *[0.8] * 9], True),  # nothing later is better
    ],
)
def test_a_plateau_is_less_than_half_a_point_in_the_last_fifth(scores: list[float], over: bool) -> None:
    assert plateaued(scores) is over


def test_a_loss_has_its_plateau_from_above() -> None:
    assert not plateaued([1.0 - i / 20 for i in range(20)], lower_is_better=True)
    assert plateaued([1.0 + i / 20 for i in range(20)], lower_is_better=True)


CONFIG = """\
name: shop
task: {name: classification, classes: CLASSES, image_size: 28, channels: 1}
model: {name: small_cnn, width: 8}
stores: [{id: a}, {id: b}, {id: c}]
train: {lr: 0.05}
pace: wait_for_all
stop: {max_versions: 1}
track: {mlflow: false}
local: {max_images: 900, size_ratio: 3}
"""


def said(*command: str, home: Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="rp", dir="/tmp", ignore_cleanup_errors=True) as short:  # a socket's path
        env = {**os.environ, "RAYPIPE_HOME": str(home), "RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)}
        env = {key: value for key, value in env.items() if not key.startswith(("MLFLOW_TRACKING", "RAY_AUTH"))}
        run = [sys.executable, *command]
        done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == exit_code, done.stderr
    return done


def test_the_pooled_opponent_trains_on_what_all_stores_have_and_is_a_run_like_any_other(tmp_path: Path) -> None:
    config = tmp_path / "shop.yaml"
    config.write_text(CONFIG.replace("CLASSES", str(CLASSES)))
    home = tmp_path / "home"
    done = said("jobs/centralize.py", str(config), "--steps", "90", "--every", "30", home=home)
    assert "pooling moved" in done.stdout
    assert "ended: 90 steps" in done.stdout
    assert "plateau unknown: judged 4 times, it takes 10" in done.stdout
    (folder,) = (home / "runs").iterdir()
    account = account_of(read_history(folder))
    assert (account.pooled, account.steps, account.versions, account.split) == (True, 90, 3, "test")
    assert account.examples == 3 * (900 + 32), "each stretch of 30 steps: all images once, then one batch more"
    assert account.bytes_up == account.pooling_bytes > 100_000
    assert account.quality > 0.4, "chance is 0.1"
    assert [row.kept for row in list_versions(folder, check=True)] == [True] * 4
    compared = said("-m", "raypipe", "compare", folder.name, home=home)
    assert "shop pooled" in compared.stdout
    assert "sqlite:" in compared.stdout, "it is in MLflow too"


def test_a_schedule_needs_to_know_the_end(tmp_path: Path) -> None:
    config = tmp_path / "shop.yaml"
    config.write_text(CONFIG.replace("CLASSES", str(CLASSES)).replace("lr: 0.05", "lr: 0.05, schedule: cosine"))
    done = said("jobs/centralize.py", str(config), home=tmp_path, exit_code=2)
    assert done.stderr.splitlines() == ["raypipe: train.schedule cosine: it needs an end to go towards: set --steps"]
