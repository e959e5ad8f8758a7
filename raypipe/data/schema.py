"""Schema v1 of classification images: one Parquet file a split, a data set is a folder of them.

Images with boxes have another: see detection.py.

    columns    image_id string, image binary (the bytes of a PNG or JPEG file), label, width, height int32
    metadata   raypipe.schema   kind and version, "classification/1"
               raypipe.classes  JSON list of names, by label
               raypipe.rows     number of images
               raypipe.sha256   over each image's length, bytes and label, in order

Messages name the data set and the split only: no path, class name, label or value of the file, since they may
leave the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.data import detection
from raypipe.data.dataset import BoxTable, Labels
from raypipe.errors import ConfigError

SPLITS = ("train", "validation", "test")
SCHEMA = "classification/1"
TYPES: dict[str, pa.DataType] = {
    "image_id": pa.string(),
    "image": pa.binary(),
    "label": pa.int32(),
    "width": pa.int32(),
    "height": pa.int32(),
}
ROW_GROUP_BYTES = 1 << 20  # small, since a shuffled batch of a large data set reads about one group an image


@dataclass(frozen=True, slots=True)
class OpenSplit:
    """A split whose file passed the checks; images are still on disk."""

    file: pq.ParquetFile
    labels: Labels
    classes: tuple[str, ...]
    content_hash: str
    boxes: BoxTable | None = None


def write_split(
    path: Path,
    *,
    images: Sequence[bytes],
    labels: NDArray[np.integer],
    classes: Sequence[str],
    image_ids: Sequence[str],
    shapes: NDArray[np.integer],
    compression: Literal["none", "zstd"] = "none",
) -> str:
    """Write one split and return its content hash. `shapes` is (N, 2): width and height in pixels.

    Image files are compressed already, hence no compression here; "zstd" saves a tenth of thumbnails.
    """
    digest = content_hash(images, labels)
    metadata: dict[str | bytes, str | bytes] = {
        "raypipe.schema": SCHEMA,
        "raypipe.classes": json.dumps(list(classes)),
        "raypipe.rows": str(len(images)),
        "raypipe.sha256": digest,
    }
    columns = [image_ids, images, labels.astype(np.int32), *shapes.reshape(-1, 2).astype(np.int32).T]
    arrays = [pa.array(values, type_) for values, type_ in zip(columns, TYPES.values(), strict=True)]
    mean_bytes = max(1, sum(map(len, images)) // max(1, len(images)))
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(TYPES, metadata)),
        path,
        row_group_size=max(1, ROW_GROUP_BYTES // mean_bytes),
        compression=compression,
        compression_level=19 if compression == "zstd" else None,  # written once, read often
        use_dictionary=False,
        write_statistics=False,  # they would copy whole images into the footer
    )
    return digest


def open_split(path: Path, *, name: str, split: str) -> OpenSplit:
    """A split, memory-mapped and checked. Raises ConfigError, one line, if it is not as the schema says."""
    where = f"split {split!r} of data set {name!r}"
    try:
        file = pq.ParquetFile(pa.memory_map(str(path)))
        metadata = _metadata(file)
        boxed = _check_schema(file, metadata, where)
        classes = tuple(map(str, json.loads(metadata["raypipe.classes"])))
        _check_rows(file, metadata, where)
        if boxed:
            table, labels = detection.read_boxes(file, len(classes), where), np.zeros(0, np.int64)
        else:
            table, labels = None, _read_labels(file, len(classes), where)
        return OpenSplit(file, labels, classes, metadata["raypipe.sha256"], table)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {reason(error)}") from None
    except (pa.ArrowException, ValueError, TypeError):  # their messages hold paths and values
        raise ConfigError(f"{where} is not a whole Parquet file of raypipe's schema {SCHEMA}") from None
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]} in its metadata; write it with schema {SCHEMA}") from None


def schema_of(path: Path) -> str:
    """What a file says it holds, e.g. "classification/1"; empty where it says nothing or cannot be read."""
    try:
        with pa.memory_map(str(path)) as source:
            return _metadata(pq.ParquetFile(source)).get("raypipe.schema", "")
    except (OSError, pa.ArrowException, ValueError):  # whoever opens it says what is wrong
        return ""


def content_hash(images: Iterable[bytes], labels: NDArray[np.integer]) -> str:
    """Equal for equal images and labels in equal order, whatever file they lie in."""
    digest = hashlib.sha256()
    for image, label in zip(images, labels.astype("<i4"), strict=True):
        digest.update(len(image).to_bytes(8, "little"))
        digest.update(image)
        digest.update(label.tobytes())
    return digest.hexdigest()


def reason(error: OSError) -> str:
    """Why, without the path that the error's own text may hold."""
    return os.strerror(error.errno) if error.errno else "damaged file"


def _metadata(file: pq.ParquetFile) -> dict[str, str]:
    pairs = dict(file.metadata.metadata or {})
    return {key.decode(): value.decode() for key, value in pairs.items() if key.startswith(b"raypipe.")}


def _check_schema(file: pq.ParquetFile, metadata: dict[str, str], where: str) -> bool:
    """Whether its images have boxes."""
    found = metadata["raypipe.schema"]
    kinds = {SCHEMA: TYPES, detection.SCHEMA: detection.TYPES}
    if found not in kinds:
        known = found if re.fullmatch(r"[a-z]{1,30}/\d{1,6}", found) else "an unknown one"
        raise ConfigError(f"{where} has schema {known}; this raypipe reads {' and '.join(kinds)}")
    for name, type_ in kinds[found].items():
        index = file.schema_arrow.get_field_index(name)
        if index < 0 or not _same(file.schema_arrow.field(index).type, type_):
            raise ConfigError(f"{where} needs a column {name} of type {type_}")
    return found == detection.SCHEMA


def _same(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Lists may name their items as they like."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)


def _integers(column: Any) -> NDArray[np.int32]:
    """An int32 column without nulls. Arrow's own `to_numpy` imports pandas: 0.35 s of CPU in every store."""
    chunk = column.combine_chunks()
    if len(chunk) == 0:
        return np.zeros(0, np.int32)
    return np.frombuffer(chunk.buffers()[1], np.int32, len(chunk), offset=4 * chunk.offset)


def _check_rows(file: pq.ParquetFile, metadata: dict[str, str], where: str) -> None:
    rows, stated = file.metadata.num_rows, int(metadata["raypipe.rows"])
    if rows != stated:
        raise ConfigError(f"{where} has {rows} rows; its metadata says {stated}")


def _read_labels(file: pq.ParquetFile, num_classes: int, where: str) -> Labels:
    labels = file.read(columns=["label"]).column(0)
    values = np.zeros(0) if labels.null_count else _integers(labels)
    if labels.null_count or (len(values) and not 0 <= values.min() <= values.max() < num_classes):
        raise ConfigError(f"{where} has labels outside its {num_classes} classes")
    return values.astype(np.int64)
