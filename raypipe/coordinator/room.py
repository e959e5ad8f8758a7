"""A coordinator on a full disk waits for room, at work and as it begins."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from raypipe.errors import RunError

T = TypeVar("T")
log = logging.getLogger(__name__)
ROOM_S = 2.0  # between two looks whether a full disk has room
ROOM_BYTES = 4 << 20


class Room:
    """Of a run that is at work: what finds the disk full is done when there is room, and every other error is raised.

    `free`: bytes of the run's disk; `needed`: by what is written at once; `lines` is told once.
    """

    def __init__(self, free: Callable[[], int], needed: Callable[[], int], lines: list[str]) -> None:
        self._free, self._needed, self._lines = free, needed, lines

    def patiently(self, write: Callable[..., None], *arguments: Any) -> None:
        """In a thread that may wait."""
        while True:
            try:
                return write(*arguments)
            except RunError as error:
                self._lacks(error)
                time.sleep(ROOM_S)

    async def soon(self, write: Callable[..., None], *arguments: Any) -> None:
        """On the loop."""
        while True:
            try:
                return write(*arguments)
            except RunError as error:
                self._lacks(error)
                await asyncio.sleep(ROOM_S)

    def _lacks(self, error: RunError) -> None:
        """Say it once. Raises the error when there is room: it is another one."""
        if self._free() > self._needed() + ROOM_BYTES:
            raise error
        if self._lines[-1:] != [said := f"{error.message}: it goes on when there is room"]:
            self._lines.append(said)


def when_there_is_room(write: Callable[[], T], folder: Path, num_bytes: int, say: Callable[[str], None]) -> T:
    """What `write` returns; it is tried again while the disk of `folder` has no room for so many bytes.

    `say` is told once, and the log, which is seen while there is no board yet. Raises RunError when there is room: then
    it is another error.
    """
    said = ""
    while True:
        try:
            return write()
        except RunError as error:
            if _room(folder) > num_bytes + ROOM_BYTES:
                raise
            if not said:
                said = f"{error.message}: it goes on when there is room"
                log.warning("%s", said)
                say(said)
        time.sleep(ROOM_S)


def _room(folder: Path) -> int:
    """Free bytes of the disk of a folder that may not be there yet."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free
