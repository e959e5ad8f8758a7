"""What a trainer sees of a store's data set, whatever format lies underneath.

A reader is a function `(folder, name) -> StoreData`. A user's own comes in by package entry point in the group
`raypipe.reader`; `files.of_files` makes its data set from image files, `decode.decode_images` pixels from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError
from raypipe.registry import Registry

Pixels: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BoxTable:
    """The boxes of N images, M in all: image i has those from offsets[i] to offsets[i + 1]."""

    offsets: NDArray[np.int64]  # (N + 1,)
    labels: Labels  # (M,)
    boxes: NDArray[np.float32]  # (M, 4): left, top, width, height in the image's own pixels
    ignored: Mask  # (M,): crowds and what is marked difficult: neither learned nor counted
    sizes: NDArray[np.int64]  # (N, 2): each image's width and height

    def __len__(self) -> int:
        return len(self.sizes)


class ImageSplit(Protocol):
    """One split of a data set: labelled images that are decoded when asked for."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Labels:
        """(N,), in the order of the images; empty where images have boxes."""

    @property
    def boxes(self) -> BoxTable | None:
        """None where each image has one label."""

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1, letterbox: bool = False
    ) -> tuple[Pixels, Mask]:
        """(n, channels, size, size), contiguous, RGB; and (n,), False where an image is broken and its row zero.

        `letterbox`: another shape is fitted into the square and the rest filled; else it is stretched.
        """


@runtime_checkable
class TableSplit(Protocol):
    """One split of a data set: rows whose columns, and images if there are any, are read when asked for."""

    def __len__(self) -> int: ...

    def numbers(self, name: str) -> NDArray[np.float64] | None:
        """(N,), NaN where missing; None where there is no such column. Raises StoreRefused for text."""

    def places(self, name: str, values: Sequence[str]) -> Labels | None:
        """(N,): which of `values` each row holds, -1 for another or none; None where there is no such column."""

    def images(self, chosen: Labels) -> RowImages:
        """Those of these rows. Raises StoreRefused where there are none."""


class RowImages(Protocol):
    """Images without labels; `decode` as ImageSplit has it."""

    def __len__(self) -> int: ...

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1
    ) -> tuple[Pixels, Mask]: ...


class StoreData(Protocol):
    """A data set at a store. Nothing here but counts and the hash may leave the store."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Images of each split that there is."""

    @property
    def content_hash(self) -> str:
        """Of all splits' images and labels in order; equal data, equal hash."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""

    def split(self, name: str) -> Any:
        """An ImageSplit, or a TableSplit where the data are rows.

        Raises StoreRefused if there is none of this name, or nothing to train on.
        """


readers: Registry[StoreData] = Registry("reader", modules=("raypipe.data.parquet",))


def open_data(folder: Path, *, name: str, reader: str = "parquet") -> StoreData:
    """The data set in a store's folder. Errors (ConfigError) know it by name, since a path may not leave the store."""
    if not folder.is_dir():
        raise ConfigError(f"data set {name!r} has no folder where the store's policy says")
    return readers.build({"name": reader}, folder, name)
