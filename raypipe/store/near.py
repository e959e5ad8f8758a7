"""An update between two processes of one machine: read where it lies, not copied through the object store.

A store on the coordinator's own node tells in which slot (slots.py) the update is; the coordinator maps that file. It
is whole until its ticket is settled, as what `collect` gives is. Through the object store a ResNet-18's 45 MB are
written once more, into memory that both sides first have to map: together a tenth of a step's time.

The file stays the store's: what was checked is what is folded as long as its process, which runs under this user, on
this machine and raypipe's code, does not write to it. A store that is not trusted so far has a vault, or another node.

Where the file cannot be opened, or is another one (a container's, a mount's), the update comes as from anywhere else.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreRefused
from raypipe.store.runs import run_folder
from raypipe.store.slots import Slot, path_of

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
WHERE = ("slot", "device", "inode", "size")
MAPPED = 2  # slots a store that stay mapped: one update folded, one on its way


def told(slot: Slot, update: Array) -> dict[str, int] | None:
    """Where an update lies, in numbers alone; None where it does not lie in the slot as it would travel."""
    if (update.ctypes.data, update.nbytes) != (slot.data.ctypes.data, slot.data.nbytes):
        return None
    return dict(zip(WHERE, (slot.number, *slot.file, slot.data.nbytes), strict=True))


class Near:
    """The coordinator's side, one a store and run."""

    def __init__(self, home: Path, run: str) -> None:
        self._home, self._run = home, run
        self._mapped: OrderedDict[tuple[Any, ...], Array] = OrderedDict()

    def read(self, where: dict[str, Any]) -> Array | None:
        """The update, float32, read-only, a view of the file; None where it is not to be had so."""
        key: tuple[Any, ...] = tuple(where.get(part) for part in WHERE)
        if not all(type(part) is int and part >= 0 for part in key) or key[-1] % 4:
            return None
        if key not in self._mapped:
            try:
                found = _mapped(path_of(run_folder(self._home, self._run), key[0]), *key[1:])
            except (OSError, ValueError, StoreRefused):  # no such file; too long a number; no run's name
                found = None
            if found is None:
                return None
            self._mapped[key] = found
        self._mapped.move_to_end(key)
        while len(self._mapped) > MAPPED:
            self._mapped.popitem(last=False)
        return self._mapped[key]


def _mapped(path: Path, device: int, inode: int, size: int) -> Array | None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe is not waited for
    try:
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) != (device, inode) or found.st_size != size or not size:
            return None
        return np.frombuffer(mmap.mmap(handle, size, prot=mmap.PROT_READ), np.float32)
    finally:
        os.close(handle)
