"""The reader "parquet": raypipe's own schemas, opened by memory map; images are decoded when asked for."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.data.dataset import BoxTable, ImageSplit, Labels, Mask, Pixels, StoreData, readers
from raypipe.data.decode import Blob, decode_images
from raypipe.data.schema import SPLITS, OpenSplit, open_split, schema_of
from raypipe.errors import ConfigError, StoreRefused, did_you_mean

HELD_BYTES = 256 << 20  # of undecoded images in memory, for each split; more is read again from the map


class ParquetSplit:
    """One split. Row groups are read at first use and the latest are kept, so that any size of data set works."""

    def __init__(self, parts: Sequence[OpenSplit], where: str) -> None:
        self._where = where
        self._groups = [(part.file, g) for part in parts for g in range(part.file.num_row_groups)]
        rows = [file.metadata.row_group(g).num_rows for file, g in self._groups]
        self._starts = np.cumsum([0, *rows])
        self._labels = np.concatenate([part.labels for part in parts])
        self._boxes = joined([part.boxes for part in parts if part.boxes is not None])
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()  # a trainer may decode ahead in a thread

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def labels(self) -> Labels:
        return self._labels

    @property
    def boxes(self) -> BoxTable | None:
        return self._boxes

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1, letterbox: bool = False
    ) -> tuple[Pixels, Mask]:
        """As ImageSplit says. Raises StoreRefused for a damaged file, IndexError for an index beyond the split."""
        blobs = self._read(np.asarray(indices))
        return decode_images(blobs, size=size, channels=channels, threads=threads, letterbox=letterbox)

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
            file, number = self._groups[group]
            column = "image" if self._boxes is None else "image.bytes"
            try:
                found: Any = file.read_row_group(number, columns=[column]).column(0).combine_chunks()
                self._held[group] = found if self._boxes is None else found.field(0)
            except (OSError, pa.ArrowException):  # their messages may hold a path
                raise StoreRefused(f"{self._where} is damaged: not all of its images can be read") from None
            while len(self._held) > 1 and sum(column.nbytes for column in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]


class ParquetData:
    """A folder with train.parquet and, if there are any, validation.parquet and test.parquet.

    What was added later lies beside them, as train-00001.parquet and so on.
    """

    def __init__(self, name: str, opened: Mapping[str, Sequence[OpenSplit]]) -> None:
        self._name = name
        self._opened = opened
        self._splits: dict[str, ImageSplit] = {}
        hashes = {split: _joint_hash([part.content_hash for part in parts]) for split, parts in opened.items()}
        self.content_hash = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        self.counts = {split: sum(p.file.metadata.num_rows for p in parts) for split, parts in opened.items()}
        self.classes = max((part.classes for parts in opened.values() for part in parts), key=len)

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
    """raypipe's own format: images with a label or with boxes, or rows of a table, as train.parquet says of itself.

    Raises ConfigError if there is none or a file is not as its schema says.
    """
    if schema_of(folder / "train.parquet").startswith("rows/"):
        from raypipe.data.rows import open_rows

        return open_rows(folder, name)
    files = {split: parts_of(folder, split) for split in SPLITS}
    opened = {split: [open_split(p, name=name, split=split) for p in parts] for split, parts in files.items() if parts}
    if "train" not in opened:
        raise ConfigError(f"data set {name!r} has no train.parquet; the other splits may be missing, not this one")
    parts = [part for found in opened.values() for part in found]
    if len({part.boxes is None for part in parts}) > 1:
        raise ConfigError(f"data set {name!r} mixes images with one label and images with boxes; keep them apart")
    longest = max((part.classes for part in parts), key=len)
    if any(part.classes != longest[: len(part.classes)] for part in parts):
        raise ConfigError(f"the splits of data set {name!r} differ in their classes; one list must hold for all")
    return ParquetData(name, opened)


def parts_of(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the order in which they were added."""
    first = folder / f"{split}.parquet"
    return [*([first] if first.exists() else []), *sorted(folder.glob(f"{split}-[0-9]*.parquet"))]


def joined(tables: Sequence[BoxTable]) -> BoxTable | None:
    """One table of many; None for none."""
    if not tables:
        return None
    starts = np.cumsum([0, *(len(t.labels) for t in tables)])
    offsets = [t.offsets[:-1] + start for t, start in zip(tables, starts, strict=False)]
    return BoxTable(
        np.concatenate([*offsets, starts[-1:]]),
        *(np.concatenate([getattr(t, name) for t in tables]) for name in ("labels", "boxes", "ignored", "sizes")),
    )


def _joint_hash(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
