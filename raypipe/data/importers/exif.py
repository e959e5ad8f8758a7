"""How a camera was held: the orientation that an image file states in EXIF, and boxes turned with the image.

An orientation says how stored pixels become the image as it is seen: 1 as they are, 2 mirrored left to right, 3 upside
down, 4 mirrored top to bottom, 5 to 8 with a quarter turn, so that width and height change places (EXIF 2.32, tag
0x0112). The decoder applies it, at import and in training; so boxes have to be those of the image as it is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from raypipe.data.decode import JPEG, PNG

Sides: TypeAlias = tuple[float, float, float, float]  # x, y, w, h of a box, in pixels

TAG = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # JPEG markers without a length
_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


def orientation(raw: bytes) -> int:
    """1 to 8, as the decoder reads a JPEG, PNG, WebP or TIFF file; 1 where nothing is said, or nonsense."""
    stated = (found for block in _blocks(raw) if (found := _entry(block)) is not None)
    first = next(stated, 1)
    return first if 1 <= first <= 8 else 1


def turned(sides: Sides, how: int, across: float, down: float) -> Sides:
    """A box of the stored pixels, as it lies in the image that is seen. `across`, `down`: as stored."""
    x, y, w, h = sides
    if how in (2, 3, 7, 8):
        x = across - x - w
    if how in (3, 4, 6, 7):
        y = down - y - h
    return (y, x, h, w) if how in QUARTER_TURNS else (x, y, w, h)


def segments(raw: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of the length of each segment of a JPEG, up to its first scan."""
    at = len(JPEG)
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xDA:
            return
        if marker == 0xFF:
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            yield marker, at + 2
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")


def _blocks(raw: bytes) -> Iterator[bytes]:
    """What may hold the tag, each laid out as a TIFF file is."""
    if raw[: len(JPEG)] == JPEG:
        for marker, at in segments(raw):
            if marker == 0xE1 and raw[at + 2 : at + 8] == b"Exif\0\0":
                yield raw[at + 8 : at + int.from_bytes(raw[at : at + 2], "big")]
    elif raw[: len(PNG)] == PNG:
        yield from _chunks(raw, len(PNG), b"eXIf", png=True)
    elif raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        yield from _chunks(raw, 12, b"EXIF", png=False)
    elif raw[:4] in _ORDERS:
        yield raw


def _chunks(raw: bytes, at: int, wanted: bytes, *, png: bool) -> Iterator[bytes]:
    """The contents of chunks of this kind: PNG's have their length first and a checksum; RIFF's are of even length."""
    while at + 8 <= len(raw):
        first, second = raw[at : at + 4], raw[at + 4 : at + 8]
        kind, size = (second, int.from_bytes(first, "big")) if png else (first, int.from_bytes(second, "little"))
        if kind == wanted:
            yield raw[at + 8 : at + 8 + size]
        at += 8 + (size + 4 if png else size + size % 2)


def _entry(tiff: bytes) -> int | None:
    """The tag's value in the first directory; None where it is not there."""
    order = _ORDERS.get(tiff[:4])
    if order is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    at = number(4, 4)
    for entry in range(at + 2, min(at + 2 + 12 * number(at, 2), len(tiff) - 11), 12):
        if number(entry, 2) == TAG:
            return number(entry + 8, 2)
    return None
