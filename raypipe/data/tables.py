"""Tables as sources of stores' data sets: every row has a store it comes from, real or ours, and a split.

orange-juice is a natural federation: its 83 stores are dealt out to the stores of a run in the order of their numbers,
and time splits it (the last weeks are the test). lending-club has states in the stores' stead; which of its rows are
held out is drawn from the seed. image-sales is our synthesis, see `sales.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.data.camera import rng_for
from raypipe.data.debian import fetch
from raypipe.errors import ConfigError

VALIDATION_WEEK, TEST_WEEK = 130, 140  # of orange-juice's weeks 40 to 160
HELD_OUT = 0.2  # of lending-club's rows, for validation and for test each


@dataclass(frozen=True, slots=True)
class TableSource:
    """Columns of equal length; `origin` (N,) is each row's store by its place in the run, `split` (N,) 0 train,
    1 validation, 2 test."""

    columns: Mapping[str, Any]
    origin: NDArray[np.int64]
    split: NDArray[np.int64]


def orange_juice(source: Path | None, num_stores: int, seed: int) -> TableSource:
    """A row a week, brand and store: log of units sold, all prices, deal, feature, last week's sales, and who lives
    around the store. `price` is the brand's own; last week's sales are missing where last week is."""
    tables = fetch("orange-juice", source)
    weeks, stores = tables["weeks"], tables["stores"]
    whole = {name: np.asarray(weeks[name], np.int64) for name in ("store", "brand", "week", "deal")}
    store, brand, week = whole["store"], whole["brand"], whole["week"]
    prices = np.stack([np.asarray(weeks[f"price{i}"], np.float64) for i in range(1, 12)], 1)
    sales = np.asarray(weeks["logmove"], np.float64)
    columns: dict[str, Any] = {
        **whole,
        "feature": np.asarray(weeks["feat"], np.float64),
        "log_units": sales,
        "last_week": _week_before(store, brand, week, sales),
        "price": prices[np.arange(len(brand)), brand - 1],
        **{f"price_{i + 1}": prices[:, i] for i in range(11)},
    }
    numbers = np.asarray(stores["STORE"], np.int64)
    place = np.searchsorted(numbers, store, sorter=(order := np.argsort(numbers)))
    row = order[np.minimum(place, len(order) - 1)]
    known = numbers[row] == store
    for name in stores.columns:
        if name != "STORE":
            values = np.asarray(stores[name], np.float64)[row]
            columns[f"around_{str(name).lower()}"] = np.where(known, values, np.nan)
    split = (week >= VALIDATION_WEEK).astype(np.int64) + (week >= TEST_WEEK)
    return TableSource(columns, _dealt(store, num_stores), split)


def lending_club(source: Path | None, num_stores: int, seed: int) -> TableSource:
    """A row a loan; `class` is good or bad, all else as in R."""
    loans = fetch("lending-club", source)["loans"]
    columns: dict[str, Any] = {}
    for name in loans.columns:
        values = loans[name]
        text = values.dtype.name in ("category", "object", "str", "string")
        columns[str(name).lower()] = list(map(str, values)) if text else np.asarray(values, np.float64)
    _, state = np.unique(np.array(columns["addr_state"]), return_inverse=True)
    draw = rng_for(seed, "lending-club", "split").random(len(loans))
    split = np.select([draw < HELD_OUT, draw < 2 * HELD_OUT], [2, 1], 0)
    return TableSource(columns, _dealt(np.asarray(state, np.int64), num_stores), split)


TABLES: dict[str, Callable[[Path | None, int, int], TableSource]] = {
    "orange-juice": orange_juice,
    "lending-club": lending_club,
}


def _dealt(origin: NDArray[np.int64], num_stores: int) -> NDArray[np.int64]:
    """Which store of the run each row goes to: whole origins, in their order, as evenly by rows as that allows."""
    numbers, counts = np.unique(origin, return_counts=True)
    if num_stores > len(numbers):
        raise ConfigError(f"{num_stores} stores, and rows from {len(numbers)} places only; each needs one at least")
    middle = np.cumsum(counts) - counts / 2
    place = np.floor(middle * num_stores / counts.sum()).astype(np.int64)
    place = np.minimum(place, num_stores - 1)
    for at in range(len(place)):  # every store gets one: never more than one further, never too few left
        low = num_stores - (len(place) - at)
        step = 0 if at == 0 else place[at - 1] + 1
        place[at] = max(low, min(place[at], step))
    return np.asarray(place[np.searchsorted(numbers, origin)], np.int64)


def _week_before(
    store: NDArray[np.int64], brand: NDArray[np.int64], week: NDArray[np.int64], sales: NDArray[np.float64]
) -> NDArray[np.float64]:
    key = (store * 100 + brand) * 1000 + week
    order = np.argsort(key)
    before = np.searchsorted(key[order], key - 1)
    found = order[np.minimum(before, len(order) - 1)]
    return np.where(key[found] == key - 1, sales[found], np.nan)
