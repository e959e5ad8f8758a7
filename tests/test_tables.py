"""Tables, and images with sales: what stores tell adds up to what pooled rows would give; federated beats its bars."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raypipe.aggregation.fold import Accumulator, Weighted
from raypipe.data.dataset import open_data
from raypipe.data.debian import kept_package, lazy_load
from raypipe.data.row_stores import make_row_stores
from raypipe.data.rows import write_rows
from raypipe.data.sales import image_sales
from raypipe.data.sample import encode_png, load_sample
from raypipe.data.tables import TABLES, TableSource
from raypipe.errors import ConfigError, RunError, StoreRefused
from raypipe.models.flat import initial
from raypipe.store.messages import Evaluation, Plan, Ticket
from raypipe.store.site import Site
from raypipe.tasks import tasks
from raypipe.tasks.metrics import auc_error, derived, means, metrics

torch.set_num_threads(1)
LOANS: dict[str, Any] = {
    "name": "tabular",
    "target": "class",
    "features": ["income", "debt"],
    "categories": {"grade": ["A", "B"], "year": [1, 2]},
    "classes": ["good", "bad"],
    "class_weights": "balanced",
}


def loans(num: int, seed: int, share: float = 0.05) -> dict[str, Any]:
    """Rows of which a share is bad; income and debt say so, both on scales of their own."""
    rng = np.random.default_rng(seed)
    bad = rng.random(num) < share
    return {
        "income": 5e4 - 2e4 * bad + rng.normal(0, 1e4, num),
        "debt": np.where(rng.random(num) < 0.1, np.nan, 3.0 + bad + rng.normal(0, 0.8, num)),
        "grade": [["A", "B", "C", None][i] for i in rng.integers(0, 4, num)],
        "year": rng.integers(1, 4, num),
        "class": ["bad" if b else "good" for b in bad],
    }


def store(home: Path, splits: dict[str, dict[str, Any]], **policy: Any) -> Site:
    (home / "rows").mkdir(parents=True)
    for name, columns in splits.items():
        write_rows(home / "rows" / f"{name}.parquet", columns)
    data = {"loans": {"folder": "rows"}}
    (home / "policy.yaml").write_text(yaml.safe_dump({"store": home.name, "data": data, **policy}))
    return Site(home)


def plan(task: dict[str, Any], model: dict[str, Any], lr: float = 0.01, run: str = "r") -> tuple[Plan, np.ndarray]:
    made = tasks.build(task)
    layout, weights = initial(model, made.num_outputs, made.channels, made.image_size, 0, made.columns)
    asked = Plan(
        run=run, task=task, model=model, data="loans", optimizer={"name": "adamw"}, lr=lr,
        schedule={"name": "constant"}, batch_size=64, layout=layout.fingerprint,
    )  # fmt: skip
    return asked, weights


def settled(task: dict[str, Any], sites: list[Site]) -> dict[str, Any]:
    """The task with what the stores' sums come to."""
    asked, _ = plan(task, {"name": "mlp"}) if task["name"] == "tabular" else plan(task, {"name": "two_towers"})
    settle = tasks.build(task).settle
    assert settle is not None
    return {**task, **settle(sum(site.measure(asked, None, "moments") for site in sites).tolist())}


def federated(asked: Plan, weights: np.ndarray, sites: list[Site], versions: int, epochs: float = 1.0) -> np.ndarray:
    """FedAvg by the real store loop and the real fold."""
    for version in range(versions):
        updates = []
        for site in sites:
            ticket = Ticket(
                id=f"{version}", store=site.store, epoch=1, version=version, seed=version, progress=(0.0, 0.0),
                max_epochs=epochs,
            )  # fmt: skip
            report = site.train(ticket, asked, weights)
            updates.append(Weighted(site.collect(f"{version}", [], asked.run).copy(), float(report.num_train)))
        task = tasks.build(asked.task)
        layout, _ = initial(asked.model, task.num_outputs, task.channels, task.image_size, 0, task.columns)
        total = Accumulator(layout)
        total.fold(updates)
        weights = weights.copy()
        weights[layout.shared] += total.take().shared.numpy()
    return weights


def pooled(evaluations: list[Evaluation]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for evaluation in evaluations:
        for name, value in evaluation.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return metrics(sums, sum(e.num_examples for e in evaluations))


# -- what stores tell adds up ---------------------------------------------------------------------------------


def scored(seed: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of one store; each store's scores lie elsewhere, so that its own AUC says little."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(num) < 0.1).astype(np.int64)
    return labels, rng.normal(1.2 * labels + 2.0 * (seed - 1), 1.0)


def exact_auc(labels: np.ndarray, score: np.ndarray) -> float:
    """Every positive against every negative."""
    above = score[labels == 1][:, None] - score[labels == 0][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def exact_average_precision(labels: np.ndarray, score: np.ndarray) -> float:
    """Precision at each threshold, weighted by the positives that it gains."""
    gained = [(labels[score == t].sum(), labels[score >= t].mean()) for t in np.unique(score[labels == 1])]
    return float(sum(new * precision for new, precision in gained) / labels.sum())


def test_auc_and_average_precision_are_those_of_the_pooled_rows_not_the_mean_of_the_stores() -> None:
    task = tasks.build({**LOANS, "class_weights": None, "scale": {}, "score_bins": 1024})
    parts = [scored(seed, 2000) for seed in (0, 1, 2)]
    total: dict[str, float] = {}
    own = []
    for labels, score in parts:
        outputs = torch.stack([torch.zeros(len(score)), torch.from_numpy(score).float()], 1)
        found = task.sums(outputs, torch.from_numpy(labels))
        flat = {k: float(v) for k, v in found.items() if v.ndim == 0}
        flat |= {f"{k}/{i}": float(v[i]) for k, v in found.items() if v.ndim for i in range(len(v))}
        total = {name: total.get(name, 0.0) + value for name, value in flat.items()}
        own.append(metrics(flat, len(labels))["auc"])
    labels, score = (np.concatenate(each) for each in zip(*parts, strict=True))
    found = metrics(total, len(labels))
    positives, negatives = (
        {int(n.rsplit("/", 1)[1]): v for n, v in total.items() if n.startswith(f"scores/{of}/") and v} for of in (1, 0)
    )
    assert abs(found["auc"] - exact_auc(labels, score)) <= auc_error(positives, negatives) < 0.005
    rounded = np.floor((np.clip(score.astype(np.float32), -8, 7.9999) + 8) * 64)
    assert found["average_precision"] == pytest.approx(exact_average_precision(labels, rounded), abs=1e-9)
    assert found["average_precision"] == pytest.approx(exact_average_precision(labels, score), abs=0.01)
    assert abs(np.mean(own) - found["auc"]) > 0.05  # the mean of the stores' own AUC is another number


def test_r2_and_rmse_are_those_of_the_pooled_rows() -> None:
    spec = {"name": "tabular", "target": "y", "features": ["x"], "scale": {"y": [1e5, 30.0]}}
    task = tasks.build(spec)
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e5 + shift, 30.0, 500).astype(np.float32) for shift in (0, 200)]
    total: dict[str, float] = {}
    errors = []
    for y in parts:
        outputs = torch.from_numpy(((y - 1e5) / 30 + rng.normal(0, 0.5, len(y))).astype(np.float32)).unsqueeze(1)
        errors.append(task.predict(outputs).numpy().astype(np.float64) - y)
        for name, value in task.sums(outputs, torch.from_numpy(y)).items():
            total[name] = total.get(name, 0.0) + float(value)
    y, error = np.concatenate(parts).astype(np.float64), np.concatenate(errors)
    found = metrics(total, len(y))
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-3)
    assert found["r2"] == pytest.approx(1 - np.mean(error**2) / y.var(), rel=1e-3)
    assert "r2" not in derived(means({"moments/squared_error": 1.0, "moments/target": 0.0}, 1))  # a constant target


def test_columns_are_standardised_as_if_pooled_and_what_is_missing_is_masked(tmp_path: Path) -> None:
    rows = [loans(300, seed) for seed in range(3)]
    del rows[2]["debt"]  # the third store has no such column
    sites = [store(tmp_path / f"s{i}", {"train": each}) for i, each in enumerate(rows)]
    task = settled(LOANS, sites)
    income = np.concatenate([each["income"] for each in rows])
    debt = np.concatenate([each["debt"] for each in rows[:2]])
    assert task["scale"]["income"] == pytest.approx([income.mean(), income.std()], rel=1e-5)
    assert task["scale"]["debt"] == pytest.approx([np.nanmean(debt), np.nanstd(debt)], rel=1e-5)
    bad = np.concatenate([[c == "bad" for c in each["class"]] for each in rows])
    weights = task["class_weights"]
    assert weights == pytest.approx([0.5 / (1 - bad.mean()), 0.5 / bad.mean()])
    made = tasks.build(task)
    table = sites[2]._shelf.images(plan(task, {"name": "mlp"})[0], made, "train").table
    prepared = made.prepare(torch.from_numpy(table))
    assert prepared.shape == (300, made.columns) == (300, 2 * 2 + 4)
    assert torch.isfinite(prepared).all()
    assert not prepared[:, 1].any()  # debt: the mean
    assert not prepared[:, 3].any()  # and said not to be there
    assert prepared[:, 2].all()
    grades = np.array([grade == "B" for grade in rows[2]["grade"]])
    assert np.array_equal(prepared[:, 5].numpy() > 0, grades)
    assert np.array_equal(prepared[:, 7].numpy() > 0, rows[2]["year"] == 2)


def test_a_policy_says_which_sums_are_told_and_of_how_many_rows_at_least(tmp_path: Path) -> None:
    asked, _ = plan(LOANS, {"name": "mlp"})
    for name, policy, num in (("a", {"measures": ["gram"]}, 50), ("b", {}, 9), ("c", {"min_measured": 51}, 50)):
        site = store(tmp_path / name, {"train": loans(num, 0)}, **policy)
        with pytest.raises(StoreRefused, match="policy"):
            site.measure(asked, None, "moments")
    assert len(store(tmp_path / "d", {"train": loans(50, 0)}).measure(asked, None, "moments")) == 2 * 3 + 2


# -- what is refused ------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_a_task_are_refused_in_one_line_without_a_value(tmp_path: Path) -> None:
    rows = loans(40, 0)
    rows["class"][3] = "canary"
    site = store(tmp_path / "south", {"train": rows, "test": {"income": np.ones(3)}})
    asked, weights = plan({**LOANS, "scale": {}, "class_weights": None}, {"name": "mlp"})
    ticket = Ticket(id="t", store="south", epoch=1, version=0, seed=0, progress=(0.0, 0.0), max_steps=1)
    with pytest.raises(StoreRefused, match="1 of 40 rows") as refused:
        site.train(ticket, asked, weights)
    assert "canary" not in refused.value.message
    report = site.train(ticket, replace(asked, max_bad_share=0.05), weights)
    assert (report.num_train, report.skipped) == (40, 1)
    with pytest.raises(StoreRefused, match="no column 'class'"):
        site.evaluate(asked, weights, "test")
    text = {**LOANS, "features": ["grade"], "categories": {}, "scale": {}, "class_weights": None}
    asked, weights = plan(text, {"name": "mlp"})
    with pytest.raises(StoreRefused, match="column 'grade' holds no numbers"):
        site.evaluate(asked, weights, "train")
    images = {"name": "classification", "image_size": 8, "classes": 2}
    asked, weights = plan(images, {"name": "small_cnn"})
    with pytest.raises(StoreRefused, match="holds rows of a table, the task needs labelled images"):
        site.evaluate(asked, weights, "train")


@pytest.mark.parametrize(
    ("task", "model", "says"),
    [
        ({"target": "y"}, "mlp", "at least one of features and categories"),
        ({"target": "y", "features": ["y"]}, "mlp", "is among the features"),
        ({"target": "y", "features": ["x"], "class_weights": "balanced"}, "mlp", "where the target has classes"),
        ({"target": "y", "features": ["x"]}, "small_cnn", "reads images only"),
        ({"target": "y", "features": ["x"]}, "two_towers", "take mlp"),
        ({"name": "multimodal", "target": "y", "features": ["x"]}, "mlp", "take two_towers"),
        ({"name": "multimodal", "target": "y"}, "two_towers", "the task has none"),
    ],
)
def test_settings_that_cannot_be_are_said_before_anything_starts(task: Any, model: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan({"name": "tabular", **task}, {"name": model})


# -- the public tables ----------------------------------------------------------------------------------------


def r_files(folder: Path) -> Path:
    """The two data sets as Debian's packages have them, of a few rows of ours."""
    rdata, pd = pytest.importorskip("rdata"), pytest.importorskip("pandas")
    site = folder / "usr/lib/R/site-library"
    (site / "bayesm/data").mkdir(parents=True)
    (site / "modeldata/data").mkdir(parents=True)
    weeks = [(s, b, w) for s in (2, 5, 8) for b in (1, 2) for w in (128, 129, 135, 139, 140, 141)]
    frame = {"store": [s for s, _, _ in weeks], "brand": [b for _, b, _ in weeks], "week": [w for _, _, w in weeks]}
    frame |= {f"price{i}": [0.01 * i + 0.001 * s for s, _, _ in weeks] for i in range(1, 12)}
    frame |= {"logmove": [float(s + b + w) for s, b, w in weeks], "deal": [0] * len(weeks), "feat": [0.0] * len(weeks)}
    around = pd.DataFrame({"STORE": [8, 2], "INCOME": [10.5, 11.0]})
    orange = {"orangeJuice": {"yx": pd.DataFrame(frame), "storedemo": around}}
    rdata.write_rda(site / "bayesm/data/orangeJuice.rda", orange)
    states = ["CA", "NY", "TX", "WA"] * 25
    table = {"addr_state": pd.Categorical(states), "int_rate": np.arange(100.0)}
    table["Class"] = pd.Categorical(["bad" if i % 20 == 0 else "good" for i in range(100)])
    rdata.write_rds(folder / "one.rds", pd.DataFrame(table), compression=None)
    body = (folder / "one.rds").read_bytes()
    chunk = struct.pack(">I", len(body)) + zlib.compress(body)
    (site / "modeldata/data/Rdata.rdb").write_bytes(b"before" + chunk)
    index = {"variables": {"lending_club": np.array([6, len(chunk)], np.int32)}, "references": {}, "compressed": True}
    rdata.write_rds(site / "modeldata/data/Rdata.rdx", index, compression="gzip")
    return folder


def test_orange_juice_keeps_real_stores_apart_and_splits_by_time(tmp_path: Path) -> None:
    table = TABLES["orange-juice"](r_files(tmp_path / "r"), 3, 0)
    assert [int(n) for n in np.unique(table.columns["store"][table.origin == 1])] == [5]
    assert set(table.columns["week"][table.split == 0]) == {128, 129}
    assert set(table.columns["week"][table.split == 1]) == {135, 139}
    assert set(table.columns["week"][table.split == 2]) == {140, 141}
    week, last, sold = (table.columns[name] for name in ("week", "last_week", "log_units"))
    assert np.array_equal(last[week == 141], sold[week == 141] - 1)  # 140 is there
    assert np.isnan(last[week == 135]).all()  # 134 is not
    assert np.array_equal(np.isnan(table.columns["around_income"]), table.columns["store"] == 5)
    assert np.allclose(table.columns["price"], 0.01 * table.columns["brand"] + 0.001 * table.columns["store"])
    summaries = make_row_stores(tmp_path / "out", ["a", "b", "c"], lambda: table, ["orange-juice", 0])
    assert [s.counts for s in summaries] == [{"train": 4, "validation": 4, "test": 4}] * 3

    def must_not() -> TableSource:
        raise AssertionError("what is there is not fetched again")

    again = make_row_stores(tmp_path / "out", ["a", "b", "c"], must_not, ["orange-juice", 0])
    assert [s.content_hash for s in again] == [s.content_hash for s in summaries]
    assert not any(s.made for s in again)
    assert "tasks: [multimodal, tabular]" in (tmp_path / "out/a/policy.yaml").read_text()


def test_lending_club_is_read_from_a_lazy_load_database_and_states_stay_whole(tmp_path: Path) -> None:
    root = r_files(tmp_path)
    table = TABLES["lending-club"](root, 2, 0)
    assert table.columns["class"].count("bad") == 5
    assert list(table.columns["int_rate"][:3]) == [0.0, 1.0, 2.0]
    for origin in (0, 1):
        states = {s for s, o in zip(table.columns["addr_state"], table.origin, strict=True) if o == origin}
        assert states == ({"CA", "NY"}, {"TX", "WA"})[origin]
    with pytest.raises(ConfigError, match="no object 'ames'"):
        lazy_load(root / "usr/lib/R/site-library/modeldata/data/Rdata.rdx", "ames")
    with pytest.raises(ConfigError, match="rows from 4 places only"):
        TABLES["lending-club"](root, 5, 0)


def test_a_package_that_was_given_once_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (given := tmp_path / "bayesm_3.1.deb").write_bytes(b"a package")
    kept = kept_package("orange-juice", given, tmp_path / "kept")
    given.unlink()
    assert kept_package("orange-juice", None, tmp_path / "kept") == kept
    assert kept.read_bytes() == b"a package"
    assert kept_package("orange-juice", tmp_path, tmp_path / "kept") == tmp_path, "a folder stays where it is"
    with pytest.raises(ConfigError, match=r"bayesm_3\.1\.deb: no such file"):
        kept_package("orange-juice", given, tmp_path / "kept")
    with pytest.raises(RunError, match=r"then: raypipe data CONFIG --source FILE\.deb$"):
        kept_package("lending-club", None, tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["r-cran-bayesm.deb"]


def test_what_cannot_be_fetched_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="no apt-get to fetch Debian's r-cran-bayesm"):
        TABLES["orange-juice"](None, 3, 0)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"orangeJuice\.rda is not where"):
        TABLES["orange-juice"](tmp_path, 3, 0)


# -- against a bar --------------------------------------------------------------------------------------------


def test_one_bad_loan_in_twenty_is_found_by_stores_that_know_few(tmp_path: Path) -> None:
    """Four stores of 60 to 400 rows, one of which lacks a column: pooled AUC >= 0.93; the best possible is 0.95."""
    sites = []
    for i, num in enumerate((60, 120, 240, 400)):
        splits = {"train": loans(num, i), "validation": loans(400, 100 + i)}
        if i == 1:
            splits = {name: {k: v for k, v in columns.items() if k != "debt"} for name, columns in splits.items()}
        sites.append(store(tmp_path / f"s{i}", splits))
    asked, weights = plan(settled(LOANS, sites), {"name": "mlp", "hidden": [16]})
    before = pooled([site.evaluate(asked, weights, "validation") for site in sites])
    weights = federated(asked, weights, sites, versions=8, epochs=2.0)
    after = pooled([site.evaluate(asked, weights, "validation") for site in sites])
    assert before["auc"] < 0.8
    assert after["auc"] >= 0.93
    assert after["average_precision"] >= 0.5  # chance: 0.05


@lru_cache(maxsize=1)
def sales() -> TableSource:
    return image_sales(load_sample(), {"name": "dirichlet", "alpha": 0.5}, 3, 0, size_ratio=3.0, max_images=1800)


def test_image_and_sales_together_beat_either_alone(tmp_path: Path) -> None:
    """Three stores, 1,800 items, our synthesis: R2 of both at least 0.25 above the image's, 0.02 the columns'."""
    made = make_row_stores(tmp_path, ["a", "b", "c"], sales, ["image-sales"], data_name="loans")
    sites = [Site(tmp_path / s.store) for s in made]
    both = {"name": "multimodal", "target": "log_units", "features": ["price", "promotion", "last_week"]}
    image = {"name": "multimodal", "target": "log_units"}
    columns = {"name": "tabular", "target": "log_units", "features": both["features"]}
    small = {"name": "small_cnn", "width": 8, "hidden": 32}
    r2 = {}
    for name, task, model in (
        ("both", both, {"name": "two_towers", "image": small}),
        ("image", image, small),
        ("columns", columns, {"name": "mlp"}),
    ):
        settle = tasks.build(task).settle
        asked, weights = plan(task, model, lr=0.003)
        assert settle is not None
        sums = sum(site.measure(asked, None, "moments") for site in sites)
        asked, weights = plan({**task, **settle(sums.tolist())}, model, lr=0.003, run=name)
        weights = federated(asked, weights, sites, versions=4, epochs=2.0)
        r2[name] = pooled([site.evaluate(asked, weights, "test") for site in sites])["r2"]
    assert r2["both"] >= 0.5
    assert r2["both"] >= r2["image"] + 0.25
    assert r2["both"] >= r2["columns"] + 0.02


def test_an_image_that_cannot_be_read_drops_out_with_its_row_and_no_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files: list[Any] = encode_png(rng.integers(0, 255, (20, 8, 8), dtype=np.uint8), level=1)
    files[4], files[9] = files[4][:30], None
    columns = {"image": files, "x": np.arange(20.0), "y": np.arange(20.0)}
    columns["y"][0] = np.nan
    task = {"name": "multimodal", "target": "y", "features": ["x"], "image_size": 8, "scale": {}}
    for cache in (1 << 20, 0):
        home = tmp_path / str(cache)
        store(home, {"train": columns}, max_bad_share=0.5)
        site = Site(home, cache_bytes=cache)
        asked, _ = plan(task, {"name": "two_towers"})
        asked = replace(asked, max_bad_share=0.5)
        examples = site._shelf.images(asked, tasks.build(task), "train")
        seen = list(examples.batches([np.arange(examples.num)], torch.device("cpu"), 0.5))
        (pixels, table), targets = seen[0]
        assert targets.tolist() == [float(i) for i in range(20) if i not in (0, 4, 9)] == table[:, 0].tolist()
        assert len(pixels) == 17
        assert len(examples.bad) == 3


def test_rows_lie_on_the_disk_as_their_hash_says(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "train.parquet", {"x": np.array([1.0, np.nan]), "t": ["a", None]})
    other = write_rows(tmp_path / "test.parquet", {"x": np.array([1.0, 0.0]), "t": ["a", None]})
    assert one != other
    data = open_data(tmp_path, name="d")
    numbers = data.split("train").numbers("x")
    assert numbers[0] == 1.0
    assert np.isnan(numbers[1])
    assert data.split("train").places("t", ["b", "a"]).tolist() == [1, -1]
    assert data.split("train").numbers("nothing") is None
    (tmp_path / "validation.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="'validation' of data set 'd' is not"):
        open_data(tmp_path, name="d")
