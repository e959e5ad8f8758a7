"""Image files in memory as a data set: what a user's own reader has to return, in one call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raypipe.data.dataset import BoxTable, Labels, Mask, Pixels, StoreData
from raypipe.data.decode import decode_images
from raypipe.data.schema import content_hash
from raypipe.errors import ConfigError, StoreRefused, did_you_mean


def of_files(name: str, splits: Mapping[str, Sequence[tuple[bytes, str]]]) -> StoreData:
    """The data set of this name: for each split (train, validation, test) PNG or JPEG files with their class.

    Classes are numbered in the order of their names. Raises ConfigError where there is nothing to train on.
    """
    if not splits.get("train"):
        raise ConfigError(f"data set {name!r} has no image to train on")
    return _Files(name, splits)


class _Files:
    """See `StoreData`."""

    def __init__(self, name: str, splits: Mapping[str, Sequence[tuple[bytes, str]]]) -> None:
        self._name = name
        self.classes = tuple(sorted({label for files in splits.values() for _, label in files}))
        number = {label: place for place, label in enumerate(self.classes)}
        self._splits = {
            split: _Split([file for file, _ in files], np.array([number[label] for _, label in files], np.int64))
            for split, files in splits.items()
        }
        self.counts = {split: len(found) for split, found in self._splits.items()}
        hashes = {split: content_hash(found.files, found.labels) for split, found in self._splits.items()}
        self.content_hash = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> _Split:
        if name not in self._splits:
            raise StoreRefused(f"data set {self._name!r} has no split {name!r}.{did_you_mean(name, self._splits)}")
        return self._splits[name]


class _Split:
    """See `ImageSplit`."""

    boxes: BoxTable | None = None

    def __init__(self, files: list[bytes], labels: Labels) -> None:
        self.files, self._labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Labels:
        return self._labels

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1, letterbox: bool = False
    ) -> tuple[Pixels, Mask]:
        files = [self.files[int(place)] for place in indices]
        return decode_images(files, size=size, channels=channels, threads=threads, letterbox=letterbox)
