"""Stores' data sets of rows, made from a table whose every row is from somewhere. Where they lie: see stores.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.data.dataset import open_data
from raypipe.data.rows import write_rows
from raypipe.data.schema import SPLITS, reason
from raypipe.data.stores import StoreSummary, check_names, is_made, one_at_a_time, place_data
from raypipe.data.tables import TableSource
from raypipe.errors import ConfigError, RunError

RECIPE_VERSION = 1  # another one makes all stores anew
TASKS = ("tabular", "multimodal")


def make_row_stores(
    out: Path,
    store_ids: Sequence[str],
    source: Callable[[], TableSource],
    made_of: Sequence[Any],
    *,
    data_name: str = "products",
) -> list[StoreSummary]:
    """A private data set of rows for each store; what was `made_of` the same is left alone, the source then not read.

    Raises ConfigError for names that cannot be, or where data lies that raypipe did not make; RunError if the disk does
    not take it.
    """
    if problems := check_names(store_ids, data_name):
        raise ConfigError(problems)
    recipe = {
        "version": RECIPE_VERSION,
        "source": list(made_of),
        "stores": list(store_ids),
        "tasks": list(TASKS),
    }
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    try:
        with one_at_a_time(out):
            wanting = [s for s in store_ids if not is_made(out / s, s, data_name, recipe)]
            table = source() if wanting else None
            for store in wanting:
                assert table is not None
                place_data(out / store, store, data_name, recipe, partial(_write, table, store_ids.index(store)))
            return [_summary(out, store, data_name, made=store in wanting) for store in store_ids]
    except OSError as error:
        raise RunError(f"the stores' data sets cannot be written: {reason(error)}") from None


def _write(source: TableSource, place: int, folder: Path) -> None:
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero((source.origin == place) & (source.split == number))
        write_rows(folder / f"{name}.parquet", {key: _chosen(values, rows) for key, values in source.columns.items()})


def _chosen(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


def _summary(out: Path, store: str, data_name: str, *, made: bool) -> StoreSummary:
    data = open_data(out / store / "data" / data_name, name=data_name)
    policy = out / store / "policy.yaml"
    return StoreSummary(store, policy, dict(data.counts), (), (), data.content_hash, made)
