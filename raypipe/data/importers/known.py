"""What is in a data set already: each image's id, with marks of its bytes and of its label or boxes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.data.parquet import parts_of
from raypipe.data.schema import SPLITS, OpenSplit, open_split

MARK = 8  # bytes
STEPS = 8  # in a pixel: boxes that differ by less are the same


def images_there(out: Path) -> dict[str, bytes]:
    """Id -> the marks of an image's bytes and of its truth, one after the other; read group by group.

    Raises ConfigError for a damaged file.
    """
    found: dict[str, bytes] = {}
    for split in SPLITS:
        for path in parts_of(out, split):
            opened = open_split(path, name=out.name, split=split)
            truths = _truths(opened)
            boxed = opened.boxes is not None
            for batch in opened.file.iter_batches(256, columns=["image_id", "sha256" if boxed else "image"]):
                for name, cell in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
                    data = bytes(cell.as_buffer())[:MARK] if boxed else mark(cell.as_buffer())
                    found[str(name)] = data + next(truths)
    return found


def mark(data: Any) -> bytes:
    """Of an image's bytes."""
    return hashlib.sha256(data).digest()[:MARK]


def label_mark(label: int) -> bytes:
    return label.to_bytes(MARK, "little", signed=True)


def boxes_mark(labels: Any, sides: Any, ignored: Any) -> bytes:
    """Of an image's boxes, in whatever order. `sides`: (n, 4) pixels; `ignored`: crowds and the difficult."""
    numbers = np.empty((len(labels), 6), "<i4")
    numbers[:, 0], numbers[:, 5] = labels, ignored
    numbers[:, 1:5] = np.rint(np.asarray(sides, np.float32).reshape(-1, 4) * STEPS)
    return hashlib.sha256(b"".join(sorted(row.tobytes() for row in numbers))).digest()[:MARK]


def _truths(opened: OpenSplit) -> Iterator[bytes]:
    table = opened.boxes
    if table is None:
        yield from (label_mark(int(label)) for label in opened.labels)
        return
    for first, last in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        yield boxes_mark(table.labels[first:last], table.boxes[first:last], table.ignored[first:last])
