"""Detection schema v1: images with boxes, one Parquet file a split, or several that were added one after the other.

    columns    image_id string; image struct<bytes, path> (path is null); sha256 of the bytes, 32 bytes;
               width, height int32, in pixels, after EXIF orientation;
               objects list<struct<label int32, x, y, w, h float32, crowd, difficult bool>>, empty for background;
               split string
    metadata   detection.version, detection.classes (JSON list), detection.classes_sha256,
               detection.box "xywh_abs_topleft", and raypipe.schema, classes, rows and sha256 as in schema.py

Boxes are absolute pixels from the left and the top, as in COCO: lossless, whatever size they are later seen at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.data.dataset import BoxTable
from raypipe.errors import ConfigError

SCHEMA = "detection/1"
_FIELDS: dict[str, pa.DataType] = {
    "label": pa.int32(),
    **dict.fromkeys(("x", "y", "w", "h"), pa.float32()),
    "crowd": pa.bool_(),
    "difficult": pa.bool_(),
}
_FILE: dict[str, pa.DataType] = {"bytes": pa.binary(), "path": pa.string()}
BOX, IMAGE = pa.struct([*_FIELDS.items()]), pa.struct([*_FILE.items()])
TYPES: dict[str, pa.DataType] = {
    "image_id": pa.string(),
    "image": IMAGE,
    "sha256": pa.binary(32),
    "width": pa.int32(),
    "height": pa.int32(),
    "objects": pa.list_(BOX),
    "split": pa.string(),
}


def box_metadata(classes: Sequence[str]) -> dict[str, str]:
    """What a file says of its boxes."""
    listed = json.dumps(list(classes))
    return {
        "detection.version": "1",
        "detection.classes": listed,
        "detection.classes_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "detection.box": "xywh_abs_topleft",
    }


def read_boxes(file: pq.ParquetFile, num_classes: int, where: str) -> BoxTable:
    """All boxes, without touching an image. Raises ConfigError for what cannot be: `where` names the split."""
    table = file.read(columns=["objects", "width", "height"])
    objects: Any = table.column("objects").combine_chunks()
    rows = file.metadata.num_rows
    if objects.null_count:
        raise ConfigError(f"{where} has images without a list of objects; an empty list means background")
    flat = objects.flatten()
    if flat.null_count or any(flat.field(i).null_count for i in range(5)):
        raise ConfigError(f"{where} has objects without a label or a side")
    offsets = _numbers(objects.offsets, np.int32).astype(np.int64) if rows else np.zeros(1, np.int64)
    labels = _numbers(flat.field("label"), np.int32).astype(np.int64)
    sides = [_numbers(flat.field(name), np.float32) for name in ("x", "y", "w", "h")]
    boxes = np.stack(sides, 1) if len(labels) else np.zeros((0, 4), np.float32)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ConfigError(f"{where} has labels outside its {num_classes} classes")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] <= 0).any():
        raise ConfigError(f"{where} has boxes without a size")
    sizes = np.stack([_numbers(table.column(n).combine_chunks(), np.int32) for n in ("width", "height")], 1)
    return BoxTable(offsets - offsets[0], labels, boxes, _flags(flat, len(labels)), sizes.astype(np.int64))


def _numbers(column: Any, dtype: type[np.number[Any]]) -> Any:
    """Without pandas, which Arrow's own `to_numpy` imports."""
    if len(column) == 0:
        return np.zeros(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), offset=np.dtype(dtype).itemsize * column.offset)


def _flags(flat: Any, num: int) -> Any:
    """True for crowds and for the difficult; a missing flag is False."""
    found = np.zeros(num, np.bool_)
    for name in ("crowd", "difficult"):
        column = flat.field(name).fill_null(False)
        if num:
            bits = np.unpackbits(np.frombuffer(column.buffers()[1], np.uint8), bitorder="little")
            found |= bits[column.offset : column.offset + num].astype(np.bool_)
    return found
