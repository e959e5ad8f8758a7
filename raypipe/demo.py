"""Private data sets for the stores of a run on one machine, made as its configuration's `local:` says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from raypipe.config.schema import RunConfig
from raypipe.data.debian import kept_package
from raypipe.data.places import StoreSummary
from raypipe.data.row_stores import make_row_stores
from raypipe.data.sales import image_sales
from raypipe.data.sample import full, load_sample
from raypipe.data.shelves import make_shelves
from raypipe.data.stores import make_stores
from raypipe.data.tables import TABLES, TableSource
from raypipe.errors import ConfigError
from raypipe.placement.homes import raypipe_home


def make_demo_stores(config: RunConfig, out: Path, source: str | None = None) -> list[StoreSummary]:
    """Private data sets as `local:` says; quick when they are there already.

    `source`: None for the bundled sample, else all of Fashion-MNIST as sample.full says. Of tables: None to fetch them
    from the Debian archive, else the package's .deb or a folder where it is unpacked. A .deb is kept in the home.
    """
    if config.local is None:
        raise ConfigError("local: missing; it says what data sets to make")
    ids = [store.id for store in config.stores]
    if (sample := config.local.sample) in TABLES:
        given = None if source is None else Path(source)

        def table() -> TableSource:
            package = kept_package(sample, given, raypipe_home() / "data")
            return TABLES[sample](package, len(ids), config.seed)

        return make_row_stores(out, ids, table, [sample, config.seed], data_name=config.data)
    if sample == "image-sales":
        local = config.local
        ratio, most = local.size_ratio, local.max_images
        made_of = [sample, config.seed, local.split, ratio, most]
        images = load_sample("fashion-mnist")
        sales = partial(image_sales, images, local.split, len(ids), config.seed, size_ratio=ratio, max_images=most)
        return make_row_stores(out, ids, sales, made_of, data_name=config.data)
    if source is None and sample != "fashion-mnist-full":
        images = load_sample("fashion-mnist")  # shelves are composed of it
    else:
        images = full(source, raypipe_home() / "data")
    local = config.local
    said: dict[str, Any] = {"source": images, "split": local.split, "seed": config.seed, "data_name": config.data}
    said |= {"size_ratio": local.size_ratio, "camera_shift": local.camera_shift}
    if sample == "fashion-shelves":
        return make_shelves(out, ids, scenes={str(name): many for name, many in local.scenes.items()}, **said)
    return make_stores(out, ids, max_images=local.max_images, **said)
