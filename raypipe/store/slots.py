"""Slot files: big arrays on the store's own disk that outlive the process, at the speed of memory.

A slot is a file of a fixed size that is mapped into memory and used again and again, never cut. To write into one
whose pages are there costs what writing into an array costs; a new one costs the kernel a page at a time (ResNet-18,
45 MB: 6 ms against 45 ms on ext4). Nothing is forced to the disk: the page cache outlives a killed process.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raypipe.errors import StoreError, unwritten
from raypipe.ledger.keys import digest

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
ALIGN = 64  # bytes, between tensors in a slot
SPARE = 8  # free slots that are kept


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A mapped file; `data` is its bytes, valid for as long as it is referred to, even when the file is removed."""

    number: int
    data: Array
    file: tuple[int, int]  # device and inode

    @property
    def floats(self) -> Array:
        """float32, shape (size / 4,)."""
        return self.data.view(np.float32)

    def digest(self) -> str:
        """As `raypipe.ledger.keys.digest`."""
        return digest(self.data)


class Slots:
    """The slots of one folder. Not for two threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free: dict[int, Slot | None] = {}  # None: on the disk, not mapped yet
        self._taken: set[int] = set()

    def take(self, size: int) -> Slot:
        """A free slot of so many bytes, made where there is none. Raises StoreError when the disk is full."""
        for number in sorted(self._free):
            slot = self._free[number] or self._map(number, size)
            if slot is not None and slot.data.size == size:
                del self._free[number]
                self._taken.add(number)
                return slot
        if len(self._free) >= SPARE:
            self._drop_free()
        try:
            slot = self._made(size)
        except OSError:
            self._drop_free()  # of another size: their room is needed more
            try:
                slot = self._made(size)
            except OSError as error:
                raise disk_error(error) from None
        self._taken.add(slot.number)
        return slot

    def free(self, slot: Slot) -> None:
        """To be taken again."""
        self._taken.discard(slot.number)
        self._free[slot.number] = slot

    def drop(self, slot: Slot) -> None:
        """Never taken again; whoever has it mapped reads it as it is."""
        self._taken.discard(slot.number)
        self._path(slot.number).unlink(missing_ok=True)

    def reopen(self, number: int, size: int) -> Slot | None:
        """A slot of an earlier process, taken; None where it is not there or of another size."""
        slot = self._map(number, size)
        if slot is not None:
            self._taken.add(number)
        return slot

    def find_free(self) -> None:
        """After what is in use was reopened: all other files are free."""
        self._free = {number: None for number in numbers(self._folder) if number not in self._taken}

    def _made(self, size: int) -> Slot:
        used = self._taken | self._free.keys()
        number = next(n for n in range(len(used) + 1) if n not in used)
        handle = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Its blocks are reserved now: a full disk found while writing to mapped memory would end the process.
            os.posix_fallocate(handle, 0, max(1, size))
            return _mapped(number, handle, size)
        except OSError:
            self._path(number).unlink()
            raise
        finally:
            os.close(handle)

    def _drop_free(self) -> None:
        for number in self._free:
            self._path(number).unlink(missing_ok=True)
        self._free.clear()

    def _map(self, number: int, size: int) -> Slot | None:
        try:
            handle = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(handle).st_size != max(1, size):
                return None
            return _mapped(number, handle, size)
        finally:
            os.close(handle)

    def _path(self, number: int) -> Path:
        return path_of(self._folder, number)


def path_of(folder: Path, number: int) -> Path:
    """Of a slot in a run's folder."""
    return folder / f"slot-{number}"


def _mapped(number: int, handle: int, size: int) -> Slot:
    about = os.fstat(handle)
    data = np.frombuffer(mmap.mmap(handle, max(1, size)), np.uint8)[:size]
    return Slot(number, data, (about.st_dev, about.st_ino))


def numbers(folder: Path) -> list[int]:
    """Of the slot files in a folder."""
    return sorted(int(tail) for f in folder.glob("slot-*") if (tail := f.name.removeprefix("slot-")).isdecimal())


def disk_error(error: OSError) -> StoreError:
    """A failed write as one line without a path."""
    return unwritten("the store's disk cannot be written", error)


def outline(value: Any) -> tuple[Any, list[Tensor], int]:
    """A state dict as plain data for msgpack, its tensors beside it, and the bytes of a slot that holds them.

    Raises StoreError for what is neither a tensor, a number, a text nor a collection of these.
    """
    tensors: list[Tensor] = []
    size = 0

    def walk(part: Any) -> Any:
        nonlocal size
        if isinstance(part, Tensor):
            at, size = size, size + -(-part.numel() * part.element_size() // ALIGN) * ALIGN
            tensors.append(part)
            return {"tensor": [str(part.dtype).removeprefix("torch."), list(part.shape), at]}
        if isinstance(part, dict):
            return {"dict": [[key, walk(each)] for key, each in part.items()]}
        if isinstance(part, (list, tuple)):
            return {type(part).__name__: [walk(each) for each in part]}
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise StoreError(f"the optimizer's state holds a {type(part).__name__}, which cannot be kept")

    return walk(value), tensors, size


def write_tensors(tensors: Iterable[Tensor], slot: Slot) -> None:
    """Where `outline` has placed them."""
    at = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        room = torch.from_numpy(slot.data[at : at + num_bytes])
        if num_bytes:
            room.view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        at += -(-num_bytes // ALIGN) * ALIGN


def filled(plan: Any, slot: Slot) -> Any:
    """The state dict of an outline, its tensors copies out of the slot."""
    if not isinstance(plan, dict):
        return plan
    ((kind, inside),) = plan.items()
    if kind == "dict":
        return {key: filled(each, slot) for key, each in inside}
    if kind in ("list", "tuple"):
        parts = [filled(each, slot) for each in inside]
        return parts if kind == "list" else tuple(parts)
    name, shape, at = inside
    tensor = torch.empty(shape, dtype=getattr(torch, name))
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes:
        tensor.view(-1).copy_(torch.from_numpy(slot.data[at : at + num_bytes]).view(tensor.dtype))
    return tensor
