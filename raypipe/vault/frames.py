"""Messages over a unix socket: eight bytes of header, then a msgpack map. Both sides think the other may say anything.

A frame that has begun has to be whole within seconds; a frame has a size at most; what is not a map with text keys
is not answered. File descriptors travel from the vault to the actor only: the vault reads with plain `recv`, so
those that somebody sends it are closed by the kernel.
"""

from __future__ import annotations

import array
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgpack

from raypipe.errors import StoreError

Body: TypeAlias = Mapping[str, Any]

MAGIC = b"rpv\x01"
HEADER = struct.Struct("!4sI")
MAX_FRAME = 1 << 20  # bytes; a plan with 10,000 class names has about 200 kB
SOCKET_BYTES = 1 << 16  # what is in it at a cut is sent again
FRAME_S = 10.0  # for a frame that has begun, either way


class Cut(ConnectionError):
    """The other side is gone, or has said nothing sensible and is not listened to any more."""


class Channel:
    """One end. Not for two threads at once, but for `gone`."""

    def __init__(self, sock: socket.socket, *, takes_files: bool = False, frame_s: float = FRAME_S) -> None:
        self._sock, self._takes_files, self._frame_s = sock, takes_files, frame_s
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self.bytes_sent = 0
        self.files: list[int] = []  # descriptors that came, in order; whoever takes one closes it

    def close(self) -> None:
        while self.files:
            socket.close(self.files.pop())
        self._sock.close()

    def shut(self) -> None:
        """From another thread: whoever waits in `receive` is woken by Cut."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def gone(self) -> bool:
        """Whether the other side has hung up; looks, does not wait."""
        look = select.poll()
        look.register(self._sock, select.POLLRDHUP)
        return bool(look.poll(0))

    def send(self, body: Body, files: Sequence[int] = ()) -> None:
        """Raises Cut; StoreError when the body is too big for a frame."""
        packed: bytes = msgpack.packb(body, use_bin_type=True)
        if len(packed) > MAX_FRAME:
            raise StoreError(f"a message has {MAX_FRAME} bytes at most, this one has {len(packed)}")
        content, deadline = memoryview(HEADER.pack(MAGIC, len(packed)) + packed), time.monotonic() + self._frame_s
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        try:
            while content:
                self._sock.settimeout(max(0.01, deadline - time.monotonic()))
                sent = self._sock.sendmsg([content], ancillary)
                ancillary, content = [], content[sent:]
                self.bytes_sent += sent
                if content and time.monotonic() > deadline:
                    raise Cut("the other side does not read")
        except OSError as error:
            raise Cut(str(error)) from None

    def receive(self, wait_s: float | None) -> dict[str, Any]:
        """The next frame; `wait_s` for its first byte, None: for ever. Raises Cut, TimeoutError; StoreError when it
        is none, after which this end is of no use."""
        head = bytearray(HEADER.size)
        self._fill(memoryview(head)[:1], None if wait_s is None else time.monotonic() + wait_s)
        deadline = time.monotonic() + self._frame_s
        try:
            self._fill(memoryview(head)[1:], deadline)
            magic, size = HEADER.unpack(head)
            if magic != MAGIC or size > MAX_FRAME:
                raise StoreError("not a frame of the store protocol")
            body = bytearray(size)
            self._fill(memoryview(body), deadline)
        except TimeoutError:
            raise Cut("a frame did not end") from None
        try:
            message = msgpack.unpackb(body, raw=False, strict_map_key=True)
        except (ValueError, TypeError, msgpack.UnpackException):
            raise StoreError("not a message of the store protocol") from None
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise StoreError("not a message of the store protocol")
        return message

    def _fill(self, room: memoryview, deadline: float | None) -> None:
        while room:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            try:
                count = self._read(room)
            except TimeoutError:
                raise
            except OSError as error:
                raise Cut(str(error)) from None
            if count == 0:
                raise Cut("the other side hung up")
            room = room[count:]

    def _read(self, room: memoryview) -> int:
        if not self._takes_files:
            return self._sock.recv_into(room)
        count, ancillary, _, _ = self._sock.recvmsg_into([room], socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.files += array.array("i", data[: len(data) - len(data) % 4])
        return count


def peer_user(sock: socket.socket) -> tuple[int, int]:
    """(process id, user id) of who called `connect`, as the kernel knows them."""
    process, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return process, user
