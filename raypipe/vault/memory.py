"""How a big vector passes between the actor and the vault on one machine, at one copy each way.

In: the vault makes a pipe and hands the writing end out. The actor lends the pages of its array to the pipe
(vmsplice(2), no copy), the vault reads them into memory of its own. Nothing of the vault is ever shared with a
writer, so there is nothing that could change, shrink or vanish while the vault looks at it.

Out: a memory file (memfd_create(2)) of the vault, sealed so that nobody but the vault's own mapping can write to it
and nobody can resize it. It holds what was handed over last and nothing else; the outbox itself is never shared.

A fresh memory file for each vector, sealed by its writer (F_SEAL_WRITE), was measured as well: 45 MB cost 55 to 75 ms
of page allocation, a warm copy 13 ms, a copy through the pipe 13 to 17 ms.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import time
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreError
from raypipe.vault.frames import Cut

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 1, 2, 4, 16  # linux/fcntl.h
ADD_SEALS, GET_SEALS, SET_PIPE_SIZE = 1033, 1034, 1031
PIPE_BYTES = 1 << 20
STALL_S = 20.0  # in which at least something has to move


class _Pages(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Inlet:
    """The vault's end of the way in; `writer` is handed to the actor. One transfer at a time."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self.writer, SET_PIPE_SIZE, PIPE_BYTES)
        except OSError:  # the user's share of pipe memory is used up: smaller steps
            return

    def close(self) -> None:
        os.close(self._reader)
        os.close(self.writer)

    def read(self, room: Array, gone: Any) -> None:
        """Fill `room`, uint8. Raises Cut when the writer stalls or hangs up (`gone()`)."""
        left, until = room.data, time.monotonic() + STALL_S
        look = select.poll()
        look.register(self._reader, select.POLLIN)
        while left:
            try:
                count = os.readv(self._reader, [left[:PIPE_BYTES]])
                left, until = left[count:], time.monotonic() + STALL_S
            except BlockingIOError:
                if not look.poll(500) and (gone() or time.monotonic() > until):
                    raise Cut("the vector did not come whole") from None


def pour(writer: int, vector: Array) -> None:
    """The actor's end: lend the array's pages to the pipe. It must not change until the vault has answered.

    Raises Cut.
    """
    lend: Any = ctypes.CDLL(None, use_errno=True).vmsplice
    at, end = vector.ctypes.data, vector.ctypes.data + vector.nbytes
    look = select.poll()
    look.register(writer, select.POLLOUT)
    while at < end:
        pages = _Pages(at, end - at)
        count = lend(writer, ctypes.byref(pages), 1, 2)  # SPLICE_F_NONBLOCK
        if count > 0:
            at += count
            continue
        if ctypes.get_errno() != 11:  # EAGAIN
            raise Cut(os.strerror(ctypes.get_errno()))
        state = look.poll(1000 * STALL_S)
        if not state or state[0][1] & select.POLLERR:
            raise Cut("the vault does not read")


class Outlet:
    """The vault's end of the way out; `file` is handed to the actor, who can map it and read."""

    def __init__(self, num_bytes: int) -> None:
        self.file = os.memfd_create("update", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, max(1, num_bytes))
        self.data = np.frombuffer(mmap.mmap(self.file, max(1, num_bytes)), np.uint8)[:num_bytes]
        fcntl.fcntl(self.file, ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE | SEAL_SEAL)

    def close(self) -> None:
        os.close(self.file)

    def put(self, array: Array) -> None:
        np.copyto(self.data, array.reshape(-1).view(np.uint8))


def mapped(file: int, num_bytes: int) -> Array:
    """The actor's end: uint8, read-only. Raises StoreError when it is not sealed, or not of this size."""
    try:
        if fcntl.fcntl(file, GET_SEALS) & SEAL_SHRINK and os.fstat(file).st_size == max(1, num_bytes):
            return np.frombuffer(mmap.mmap(file, max(1, num_bytes), prot=mmap.PROT_READ), np.uint8)[:num_bytes]
    except OSError:
        pass
    raise StoreError("the vault handed over memory that is not sealed")
