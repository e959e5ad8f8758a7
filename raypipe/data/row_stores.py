"""Stores' data sets of rows, made from a table whose every row is from somewhere. Where they lie: see places.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.data.places import StoreSummary, Write, check_names, make_data_sets
from raypipe.data.rows import write_rows
from raypipe.data.schema import SPLITS
from raypipe.data.tables import TableSource
from raypipe.errors import ConfigError

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
    recipe = {"source": list(made_of), "tasks": list(TASKS)}
    return make_data_sets(out, store_ids, data_name, recipe, lambda: _writer(source(), store_ids))


def _writer(source: TableSource, store_ids: Sequence[str]) -> Write:
    def write(store: str, folder: Path) -> None:
        mine = source.origin == store_ids.index(store)
        for number, name in enumerate(SPLITS):
            rows = np.flatnonzero(mine & (source.split == number))
            columns = {key: _chosen(values, rows) for key, values in source.columns.items()}
            write_rows(folder / f"{name}.parquet", columns)

    return write


def _chosen(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
