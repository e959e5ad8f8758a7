"""What an image file is, before it is taken into a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from raypipe import MOST_PIXELS
from raypipe.data.decode import JPEG, PNG, is_whole
from raypipe.data.importers.exif import QUARTER_TURNS, orientation, segments
from raypipe.data.importers.safe import Refused

MOST_BYTES = 64 << 20  # of a file
SMALLEST = 2  # pixels, of the shorter side
LONGEST = 100  # times the shorter side
NO_PICTURE = "not an image that can be decoded"
TOO_LARGE = f"more than {MOST_PIXELS // 10**6} million pixels"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG segments that hold the size


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it will be stored. Width and height are as it is seen, after `orientation` (EXIF's, 1 to 8)."""

    data: bytes
    width: int
    height: int
    orientation: int
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
        raise Refused(TOO_LARGE)
    pixels = _decoded(raw)
    high, wide = pixels.shape[:2]
    if min(wide, high) < SMALLEST or max(wide, high) > LONGEST * min(wide, high):
        raise Refused(f"a side is shorter than {SMALLEST} pixels, or the other more than {LONGEST} times as long")
    how, notes = orientation(raw), _notes(raw)
    if width and (wide, high) != ((height, width) if how in QUARTER_TURNS else (width, height)):
        raise Refused("its EXIF rotation is not the one that it is seen with")
    if how != 1:
        notes = (*notes, "seen as its EXIF rotation says")
    if not known:
        raw = cv2.imencode(".png", pixels)[1].tobytes()
        notes = (*notes, "stored as PNG, since it was neither PNG nor JPEG")
    return Picture(raw, wide, high, how, notes)


def _decoded(raw: bytes) -> np.ndarray:
    """Pixels, turned upright. OpenCV itself refuses too many, from the header and before it takes memory for them:
    BMP, WebP, TIFF have no other check (see raypipe/__init__.py)."""
    try:
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise Refused(TOO_LARGE if "MAX_IMAGE_PIXELS" in str(error) else NO_PICTURE) from None
    if pixels is None:
        raise Refused(NO_PICTURE)
    if pixels.shape[0] * pixels.shape[1] > MOST_PIXELS:  # somebody has set a higher limit
        raise Refused(TOO_LARGE)
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
    return next((at for marker, at in segments(raw) if marker in _FRAMES and at + 8 <= len(raw)), None)


def _notes(raw: bytes) -> tuple[str, ...]:
    if raw[: len(PNG)] == PNG and raw[24] == 16:
        return ("16 bits a channel, seen with 8",)
    if raw[: len(JPEG)] == JPEG and (frame := _frame(raw)) is not None and raw[frame + 7] == 4:
        return ("four colours (CMYK), seen as RGB",)
    return ()
