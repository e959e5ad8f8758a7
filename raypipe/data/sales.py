"""Images with sales beside them: the bundled Fashion-MNIST photographs, and columns that are our synthesis.

No public data set has both, so the sales are made up, in a way that needs both to be predicted:

    log_units = what the kind of product sells (seen in the image) - price effect + promotion + what this item sells
                (seen in last week's sales alone) + chance

Prices are the store's own level times the item's; two items in five are new and have no last week, and every third
store has no figures of promotion. Call results on it what they are: of a synthesis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raypipe.data.camera import rng_for
from raypipe.data.sample import Source, encode_png
from raypipe.data.schema import SPLITS
from raypipe.data.split import balanced, share, sizes, splits
from raypipe.data.tables import TableSource
from raypipe.registry import Spec

KIND = 1.2  # deviation of log units between kinds of product
ITEM = 0.4  # ... between items of a kind
CHANCE = 0.3  # ... from week to week
PRICES = 0.25  # deviation of log price between items
ELASTICITY = 1.2  # log units lost for each unit of log price
PROMOTED, LIFT = 0.3, 0.5  # share of items, and log units gained
UNKNOWN = 0.4  # share of items that are new: without a figure of last week


def image_sales(
    source: Source, split: Spec, num_stores: int, seed: int, *, size_ratio: float = 10.0, max_images: int | None = None
) -> TableSource:
    """A row an item at a store. Which store has it says `split`, as for images; every item is at one store."""
    kinds = rng_for(seed, "sales", "kinds").normal(0, KIND, len(source.classes))
    mix = splits.build(split)(source.classes, num_stores, rng_for(seed, "mix"))
    parts: list[dict[str, np.ndarray]] = []
    for number, name in enumerate(SPLITS):
        images, labels = source.read(name)
        if max_images is not None:
            chosen = balanced(labels, min(len(labels), max_images), rng_for(seed, "pool", name))
            images, labels = images[chosen], labels[chosen]
        held = share(labels, mix, sizes(len(labels), num_stores, size_ratio), rng_for(seed, "share", name))
        for store, own in enumerate(held):
            rng = rng_for(seed, "sales", store, name)
            files = np.array(encode_png(images[own], level=1), dtype=object)
            sold = _sales(kinds[labels[own]], store, rng)
            place = {"store": np.full(len(own), store), "split": np.full(len(own), number)}
            parts.append({"image": files, **sold, **place})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    origin, half = joined.pop("store"), joined.pop("split")
    files = joined.pop("image")
    columns: dict[str, Any] = {"image": list(files), **joined}
    return TableSource(columns, origin, half)


def _sales(kind: np.ndarray, store: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of one store's items, given what their kind sells."""
    num = len(kind)
    level = 1.0 + 0.2 * (store % 3)
    log_price = np.log(level) + rng.normal(0, PRICES, num)
    promotion = (rng.random(num) < PROMOTED).astype(np.float64)
    usual = 2.0 + kind - ELASTICITY * log_price + rng.normal(0, ITEM, num)
    last = usual + rng.normal(0, CHANCE, num)
    return {
        "price": 20.0 * np.exp(log_price),
        "promotion": np.full(num, np.nan) if store % 3 == 2 else promotion,
        "last_week": np.where(rng.random(num) < UNKNOWN, np.nan, last),
        "log_units": usual + LIFT * promotion + rng.normal(0, CHANCE, num),
    }
