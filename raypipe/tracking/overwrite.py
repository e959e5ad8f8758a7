"""A safetensors file written over one that nobody needs any more: its pages are there.

A new file's pages have to be found one by one while all stores wait for the version (ResNet-18, 45 MB: 12 ms on a quiet
machine, 40 to 110 ms where the pages come from a hypervisor; written over: 6). The bytes are those of the library,
which reads them; it can only write new files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from raypipe.models.tensors import Array

BLOCK = 1 << 20
AMPLE = 16  # files of its size that the disk has room for, where one is laid by
# Of numpy's types, in the library's order: tensors lie by these, the last ones first, then by name.
TYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "int32": "I32"}
TYPES |= {"uint32": "U32", "float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64"}


def take_over(spare: Path, part: Path) -> IO[bytes] | None:
    """A file that is no more needed, renamed and open to be written over; None where there is none, or somebody has it
    open still: then it is left to them."""
    with suppress(OSError):
        spare.rename(part)
        file = part.open("r+b", buffering=0)
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused while another has it open, or mapped
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            if os.fstat(file.fileno()).st_nlink == 1:
                return file
        except (OSError, AttributeError):  # the latter: no Linux
            pass
        file.close()
        part.unlink()
    return None


def lay_by(spare: Path, size: int) -> None:
    """A file to be taken over later, of zeros; none where there is little room."""
    try:
        if shutil.disk_usage(spare.parent).free < AMPLE * size:
            return
        with spare.open("xb", buffering=0) as file:
            for at in range(0, size, BLOCK):
                file.write(bytes(min(BLOCK, size - at)))
    except OSError:
        spare.unlink(missing_ok=True)


def can_write(tensors: Mapping[str, Array]) -> bool:
    """Whether all are of types that are known here."""
    return all(tensor.dtype.name in TYPES for tensor in tensors.values())


def write(file: IO[bytes], tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """From the beginning of an unbuffered file, which ends with them. Raises OSError."""
    rank = {name: place for place, name in enumerate(TYPES)}
    names = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype.name], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        tensor, start = tensors[name], at
        at += tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, at]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    _all_of(file, len(raw).to_bytes(8, "little") + raw)
    for name in names:
        if tensors[name].nbytes:
            _all_of(file, tensors[name].reshape(-1).view(np.uint8).data)
    file.truncate()


def _all_of(file: IO[bytes], content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
