"""A coordinator that begins on a full disk waits for room, as one at work does (shell.py)."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raypipe.coordinator.shell import ROOM_BYTES, ROOM_S
from raypipe.errors import RunError

T = TypeVar("T")
log = logging.getLogger(__name__)


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
