"""Write a split as its images come, in flat memory: what has been written is not kept, whatever the number."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.data import detection, schema

ROW_GROUP_IMAGES = 256


@dataclass(frozen=True, slots=True)
class Box:
    """An object in an image: its sides in pixels of the image as it is seen."""

    label: int
    x: float
    y: float
    w: float
    h: float
    crowd: bool = False
    difficult: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """An image, its file's bytes unchanged, and what is known of it: a label or boxes."""

    image_id: str
    image: bytes
    width: int
    height: int
    label: int | None = None
    boxes: Sequence[Box] = ()


class SplitWriter:
    """One Parquet file of either schema. `classes` may grow until it is left; left by an exception the file is
    removed. Raises OSError."""

    def __init__(self, path: Path, classes: Sequence[str], *, boxes: bool, split: str) -> None:
        self._path, self._classes, self._boxes, self._split = path, classes, boxes, split
        types = detection.TYPES if boxes else schema.TYPES
        self._schema = pa.schema(types)
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="none", use_dictionary=False, write_statistics=False
        )
        self._rows: list[Example] = []
        self._held = self.num_images = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            stated = self._metadata(rows=self.num_images, digest=self._digest.hexdigest())
            self._writer.add_key_value_metadata(stated)
        self._writer.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def add(self, example: Example) -> None:
        """Image after image; nothing is checked here."""
        self._rows.append(example)
        self._held += len(example.image)
        self.num_images += 1
        self._digest.update(len(example.image).to_bytes(8, "little"))
        self._digest.update(example.image)
        self._digest.update(_truth(example, self._boxes))
        if self._held >= schema.ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_IMAGES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = self._box_columns() if self._boxes else self._label_columns()
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._held = [], 0

    def _label_columns(self) -> dict[str, list[Any]]:
        rows = self._rows
        return {name: [getattr(row, name) for row in rows] for name in schema.TYPES}

    def _box_columns(self) -> dict[str, list[Any]]:
        rows = self._rows
        plain = {name: [getattr(row, name) for row in rows] for name in ("image_id", "width", "height")}
        return plain | {
            "image": [{"bytes": row.image, "path": None} for row in rows],
            "sha256": [hashlib.sha256(row.image).digest() for row in rows],
            "objects": [[{f: getattr(box, f) for f in Box.__slots__} for box in row.boxes] for row in rows],
            "split": [self._split] * len(rows),
        }

    def _metadata(self, *, rows: int, digest: str) -> dict[str, str]:
        own = detection.box_metadata(self._classes) if self._boxes else {}
        kind = detection.SCHEMA if self._boxes else schema.SCHEMA
        return {
            **own,
            "raypipe.schema": kind,
            "raypipe.classes": json.dumps(list(self._classes)),
            "raypipe.rows": str(rows),
            "raypipe.sha256": digest,
        }


def _truth(example: Example, boxes: bool) -> bytes:
    """The labels of an image as they are hashed."""
    if not boxes:
        return int(example.label or 0).to_bytes(4, "little")
    flags = b"".join(struct.pack("<iii", b.label, b.crowd, b.difficult) for b in example.boxes)
    sides = b"".join(struct.pack("<ffff", b.x, b.y, b.w, b.h) for b in example.boxes)
    return len(example.boxes).to_bytes(4, "little") + flags + sides
