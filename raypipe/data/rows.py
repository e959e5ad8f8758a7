"""Schema of rows: a table in Parquet, one file a split, an image a row where there are images.

    columns    any of numbers, truth values or text, nulls allowed; `image` binary (PNG or JPEG files), if it is there
    metadata   raypipe.schema   kind and version, "rows/1"
               raypipe.rows     number of rows
               raypipe.sha256   over each column's name, kind and values, in order

Which column is asked for says the task; a column that a store does not have is missing in each of its rows. Messages
name the data set and the split only, and columns that were asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.data.dataset import Mask, Pixels, RowImages
from raypipe.data.parquet import ParquetSplit
from raypipe.data.schema import ROW_GROUP_BYTES, SPLITS, OpenSplit, reason
from raypipe.errors import ConfigError, StoreRefused, did_you_mean

Numbers: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]

SCHEMA = "rows/1"
IMAGE = "image"
ROWS_A_GROUP = 1 << 16  # without images


def write_rows(path: Path, columns: Mapping[str, Any]) -> str:
    """Write one split and return its content hash. Columns: sequences of equal length, None or NaN where missing."""
    arrays = {name: _array(values) for name, values in columns.items()}
    num = len(next(iter(arrays.values())))
    digest = _content_hash(arrays)
    metadata = {"raypipe.schema": SCHEMA, "raypipe.rows": str(num), "raypipe.sha256": digest}
    group = ROWS_A_GROUP
    if IMAGE in arrays:
        group = max(1, ROW_GROUP_BYTES * max(1, num) // max(1, arrays[IMAGE].nbytes))
    table = pa.table(arrays).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=group, write_statistics=False, use_dictionary=False)
    return digest


class RowsSplit:
    """One split. Columns are read when they are asked for; images stay on the disk until they are decoded."""

    def __init__(self, file: pq.ParquetFile, content_hash: str, where: str) -> None:
        self._file, self._where, self.content_hash = file, where, content_hash
        self._names = frozenset(file.schema_arrow.names)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def numbers(self, name: str) -> Numbers | None:
        """(N,), NaN where missing; None where the store has no such column. Raises StoreRefused for text."""
        if name not in self._names:
            return None
        column = self._read(name)
        if not (_is_number(column.type) or pa.types.is_boolean(column.type)):
            raise StoreRefused(f"{self._where}: column {name!r} holds no numbers, the task needs them")
        if pa.types.is_boolean(column.type):
            column = pc.cast(column, pa.int8())
        return _floats(pc.fill_null(pc.cast(column, pa.float64()), float("nan")))

    def places(self, name: str, values: Sequence[str]) -> Indices | None:
        """(N,): which of `values` (as text) each row holds, -1 for another or none; None: no such column."""
        if name not in self._names:
            return None
        column = self._read(name)
        if pa.types.is_floating(column.type):  # 3.0 is meant where a task says 3
            whole = pc.cast(column, pa.int64(), safe=False)
            same = pc.equal(pc.cast(whole, column.type), column)
            column = whole if pc.all(same).as_py() else column
        found: Any = pc.index_in(pc.cast(column, pa.string()), value_set=pa.array(list(values), pa.string()))
        places: Any = pc.cast(found, pa.float64())
        return _floats(pc.fill_null(places, -1.0)).astype(np.int64)

    def images(self, chosen: Indices) -> RowImages:
        """The images of these rows. Raises StoreRefused where there are none."""
        if IMAGE not in self._names or not pa.types.is_binary(self._file.schema_arrow.field(IMAGE).type):
            raise StoreRefused(f"{self._where} has no images, the task needs one a row")
        opened = OpenSplit(self._file, np.zeros(len(self), np.int64), (), self.content_hash)
        return ImagesOfRows(ParquetSplit([opened], self._where), chosen)

    def _read(self, name: str) -> Any:
        try:
            column = self._file.read(columns=[name]).column(0).combine_chunks()
        except (OSError, pa.ArrowException):  # their messages may hold a path
            raise StoreRefused(f"{self._where} is damaged: not all of its rows can be read") from None
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


class ImagesOfRows:
    """Images of chosen rows, as an image split has them."""

    def __init__(self, whole: ParquetSplit, chosen: Indices) -> None:
        self._whole, self._chosen = whole, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def decode(
        self, indices: NDArray[np.integer], *, size: int, channels: int, threads: int = 1
    ) -> tuple[Pixels, Mask]:
        """As ImageSplit says."""
        chosen = self._chosen[np.asarray(indices)]
        return self._whole.decode(chosen, size=size, channels=channels, threads=threads)


class RowsData:
    """A folder with train.parquet and, if there are any, validation.parquet and test.parquet, all of rows."""

    classes: tuple[str, ...] = ()  # what a row's class is says the task's target column

    def __init__(self, name: str, splits: Mapping[str, RowsSplit]) -> None:
        self._name, self._splits = name, splits
        hashes = {split: found.content_hash for split, found in splits.items()}
        self.content_hash = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        self.counts = {split: len(found) for split, found in splits.items()}

    def split(self, name: str) -> RowsSplit:
        """A split; an empty one too, except for training."""
        if name not in self._splits:
            raise StoreRefused(f"data set {self._name!r} has no split {name!r}.{did_you_mean(name, self._splits)}")
        if name == "train" and not self.counts[name]:
            raise StoreRefused(f"split {name!r} of data set {self._name!r} is empty")
        return self._splits[name]


def open_rows(folder: Path, name: str) -> RowsData:
    """A folder of rows. Raises ConfigError, one line, where a file is not as the schema says."""
    there = [split for split in SPLITS if (folder / f"{split}.parquet").exists()]
    return RowsData(name, {split: _open(folder / f"{split}.parquet", name, split) for split in there})


def _open(path: Path, name: str, split: str) -> RowsSplit:
    where = f"split {split!r} of data set {name!r}"
    try:
        file = pq.ParquetFile(pa.memory_map(str(path)))
        pairs: dict[bytes, bytes] = file.schema_arrow.metadata or {}
        if pairs.get(b"raypipe.schema") != SCHEMA.encode():
            raise ConfigError(f"{where} is not of schema {SCHEMA}, as train is; one schema must hold for all splits")
        rows, stated = file.metadata.num_rows, int(pairs[b"raypipe.rows"])
        if rows != stated:
            raise ConfigError(f"{where} has {rows} rows; its metadata says {stated}")
        return RowsSplit(file, pairs[b"raypipe.sha256"].decode(), where)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {reason(error)}") from None
    except (pa.ArrowException, ValueError, KeyError):  # their messages hold paths and values
        raise ConfigError(f"{where} is not a whole Parquet file of raypipe's schema {SCHEMA}") from None


def _array(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return pa.array(values, from_pandas=True)  # NaN is null
    return pa.array(values)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _floats(column: Any) -> Numbers:
    """Without Arrow's own `to_numpy`, which imports pandas."""
    chunk: Any = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if len(chunk) == 0:
        return np.zeros(0)
    return np.frombuffer(chunk.buffers()[1], np.float64, len(chunk), offset=8 * chunk.offset)


def _content_hash(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(json.dumps([name, str(array.type), len(array)]).encode())
        if _is_number(array.type):
            missing = pc.cast(pc.is_null(array), pa.float64())
            digest.update(_floats(missing).tobytes())
            digest.update(_floats(pc.fill_null(pc.cast(array, pa.float64()), 0.0)).tobytes())
            continue
        for value in array.to_pylist():
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
