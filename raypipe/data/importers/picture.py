"""What an image file is, before it is taken into a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from raypipe.data.decode import JPEG, PNG, is_whole
from raypipe.data.importers.safe import Refused

MOST_BYTES = 64 << 20  # of a file
MOST_PIXELS = 100_000_000
SMALLEST = 2  # pixels, of the shorter side
LONGEST = 100  # times the shorter side
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG segments that hold the size


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it will be stored. Width and height are after EXIF rotation; `turned`: a quarter turn was in it."""

    data: bytes
    width: int
    height: int
    turned: bool
    notes: tuple[str, ...]  # what was unusual and how it is handled


def read_picture(path: Path) -> Picture:
    """A whole image. Raises Refused with one of few sentences."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise Refused("an empty file")
        if size > MOST_BYTES:
            raise Refused(f"a file larger than {MOST_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}") from None
    known = raw[: len(PNG)] == PNG or raw[: len(JPEG)] == JPEG
    if known and not is_whole(memoryview(raw)):
        raise Refused("not a whole image")
    width, height = _stated(raw) if known else (0, 0)
    if width * height > MOST_PIXELS:
        raise Refused(f"more than {MOST_PIXELS // 10**6} million pixels")
    pixels = _decoded(raw)
    high, wide = pixels.shape[:2]
    if min(wide, high) < SMALLEST or max(wide, high) > LONGEST * min(wide, high):
        raise Refused(f"a side is shorter than {SMALLEST} pixels, or the other more than {LONGEST} times as long")
    notes = _notes(raw)
    if not known:
        raw, notes = (
            cv2.imencode(".png", pixels)[1].tobytes(),
            (*notes, "stored as PNG, since it was neither PNG nor JPEG"),
        )
    turned = known and (wide, high) == (height, width) and width != height
    return Picture(raw, wide, high, turned, (*notes, "seen as its EXIF rotation says") if turned else notes)


def _decoded(raw: bytes) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Refused("not an image that can be decoded")
    return np.asarray(pixels)


def _stated(raw: bytes) -> tuple[int, int]:
    """Width and height as the file's own header says, before EXIF rotation; (0, 0) where it does not."""
    if raw[: len(PNG)] == PNG:
        return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    frame = _frame(raw)
    return (0, 0) if frame is None else (int.from_bytes(raw[frame + 5 : frame + 7], "big"), _height(raw, frame))


def _height(raw: bytes, frame: int) -> int:
    return int.from_bytes(raw[frame + 3 : frame + 5], "big")


def _frame(raw: bytes) -> int | None:
    """Where the JPEG segment with the size has its length."""
    at = 2
    while at + 9 < len(raw) and raw[at] == 0xFF:
        if raw[at + 1] in _FRAMES:
            return at + 2
        at += 1 if raw[at + 1] == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return None


def _notes(raw: bytes) -> tuple[str, ...]:
    if raw[: len(PNG)] == PNG and raw[24] == 16:
        return ("16 bits a channel, seen with 8",)
    if raw[: len(JPEG)] == JPEG and (frame := _frame(raw)) is not None and raw[frame + 7] == 4:
        return ("four colours (CMYK), seen as RGB",)
    return ()
