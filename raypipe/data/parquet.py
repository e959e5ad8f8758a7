"""The reader "parquet": raypipe's own schemas, opened by memory map; images are decoded when asked for."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.data.dataset import ImageSplit, Labels, Mask, Pixels, StoreData, readers
from raypipe.data.decode import Blob, decode_images
from raypipe.data.schema import SPLITS, OpenSplit, open_split, schema_of
from raypipe.errors import ConfigError, StoreRefused, did_you_mean

HELD_BYTES = 256 << 20  # of undecoded images in memory, for each split; more is read again from the map


class ParquetSplit:
    """One split. Row groups are read at first use and the latest are kept, so that any size of data set works."""

    def __init__(self, opened: OpenSplit, where: str) -> None:
        self._where = where
        self._file = opened.file
        self._labels = opened.labels
        rows = [opened.file.metadata.row_group(g).num_rows for g in range(opened.file.num_row_groups)]
        self._starts = np.cumsum([0, *rows])
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()  # a trainer may decode ahead in a thread

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Labels:
        return self._labels

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1
    ) -> tuple[Pixels, Mask]:
        """As ImageSplit says. Raises StoreRefused for a damaged file, IndexError for an index beyond the split."""
        return decode_images(self._read(np.asarray(indices)), size=size, channels=channels, threads=threads)

    def _read(self, indices: NDArray[np.integer]) -> list[Blob]:
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError("an image index lies outside its split")
        blobs: list[Blob] = [None] * len(indices)
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        with self._lock:
            for group in np.unique(groups):
                column, start = self._group(int(group)), self._starts[group]
                for place in np.flatnonzero(groups == group):
                    blobs[place] = column[int(indices[place] - start)].as_buffer()
        return blobs

    def _group(self, group: int) -> Any:
        if group not in self._held:
            try:
                self._held[group] = self._file.read_row_group(group, columns=["image"]).column(0).combine_chunks()
            except (OSError, pa.ArrowException):  # their messages may hold a path
                raise StoreRefused(f"{self._where} is damaged: not all of its images can be read") from None
            while len(self._held) > 1 and sum(column.nbytes for column in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]


class ParquetData:
    """A folder with train.parquet and, if there are any, validation.parquet and test.parquet."""

    def __init__(self, name: str, opened: Mapping[str, OpenSplit]) -> None:
        self._name = name
        self._opened = opened
        self._splits: dict[str, ImageSplit] = {}
        hashes = {split: found.content_hash for split, found in opened.items()}
        self.content_hash = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        self.counts = {split: len(found.labels) for split, found in opened.items()}
        self.classes = opened["train"].classes

    def split(self, name: str) -> ImageSplit:
        """A split; an empty one too, except for training."""
        if name not in self._opened:
            raise StoreRefused(f"data set {self._name!r} has no split {name!r}.{did_you_mean(name, self._opened)}")
        if name == "train" and not self.counts[name]:
            raise StoreRefused(f"split {name!r} of data set {self._name!r} is empty")
        if name not in self._splits:
            self._splits[name] = ParquetSplit(self._opened[name], f"split {name!r} of data set {self._name!r}")
        return self._splits[name]


@readers("parquet")
def parquet(folder: Path, name: str) -> StoreData:
    """raypipe's own format: labelled images, or rows of a table, as train.parquet says of itself.

    Raises ConfigError if there is none or a file is not as its schema says.
    """
    if schema_of(folder / "train.parquet").startswith("rows/"):
        from raypipe.data.rows import open_rows

        return open_rows(folder, name)
    opened = {
        split: open_split(folder / f"{split}.parquet", name=name, split=split)
        for split in SPLITS
        if (folder / f"{split}.parquet").exists()
    }
    if "train" not in opened:
        raise ConfigError(f"data set {name!r} has no train.parquet; the other splits may be missing, not this one")
    if len({found.classes for found in opened.values()}) > 1:
        raise ConfigError(f"the splits of data set {name!r} differ in their classes; one list must hold for all")
    return ParquetData(name, opened)
