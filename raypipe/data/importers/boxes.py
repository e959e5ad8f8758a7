"""A source's boxes as pixels of the image as it is seen, or why one cannot be used. Pure.

EXIF rotations. The decoder turns an image as its orientation says. Shares of the sides (YOLO) are taken as those of the
turned image, since the tools that draw them show it so. Boxes in pixels may have been drawn on either; the width and
height that the source states beside them tell which: those of the stored pixels, and the boxes are turned with the
image; those of the turned one, and they are taken as they are. Where the two sizes are equal (mirrored, upside down,
square) or none is stated, nobody knows, and an image with boxes is refused rather than taken with wrong ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from raypipe.data.importers.exif import QUARTER_TURNS, turned
from raypipe.data.importers.found import Candidate, FoundBox
from raypipe.data.importers.picture import Picture
from raypipe.data.importers.safe import Refused

LEAST_SIDE = 1.0  # pixels, of a box
ROUNDING = 1.0  # pixels beyond the image that are cut off without a word


@dataclass(slots=True)
class Drawn:
    """Boxes in pixels, cut to the image; why others are left out; what was changed. A sentence for each."""

    boxes: list[FoundBox] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def drawn(found: Candidate, picture: Picture) -> Drawn:
    """Every box of a candidate. Raises Refused where its labels are for another image than this."""
    how = _drawn_before(found, picture)
    done = Drawn(left_out=list(found.problems))
    for box in found.boxes:
        try:
            done.boxes.append(_cut(_placed(box, picture, how), picture, done.notes))
        except Refused as refused:
            done.left_out.append(str(refused))
    if how != 1:
        done.notes.append("its boxes were drawn on the image before its EXIF rotation, and are turned with it")
    return done


def _drawn_before(found: Candidate, picture: Picture) -> int:
    """The orientation by which boxes are still to be turned; 1 where they are for the image as it is seen."""
    seen = (picture.width, picture.height)
    stored = seen[::-1] if picture.orientation in QUARTER_TURNS else seen
    if found.size not in (None, seen, stored):
        raise Refused("its labels are for another size than the image has")
    if picture.orientation == 1 or all(box.relative for box in found.boxes):
        return 1
    if found.size is None or seen == stored:
        raise Refused("it has an EXIF rotation, and nothing says whether its boxes were drawn before or after it")
    return picture.orientation if found.size == stored else 1


def _placed(box: FoundBox, picture: Picture, how: int) -> FoundBox:
    """In pixels of the image as it is seen."""
    wide, high = picture.width, picture.height
    across, down = (wide, high) if box.relative else (1, 1)
    sides = (box.x * across, box.y * down, box.w * across, box.h * down)
    if how != 1:
        sides = turned(sides, how, *((high, wide) if how in QUARTER_TURNS else (wide, high)))
    x, y, w, h = sides
    return replace(box, x=x, y=y, w=w, h=h, relative=False)


def _cut(box: FoundBox, picture: Picture, notes: list[str]) -> FoundBox:
    """Cut to the image. Raises Refused."""
    x, y, w, h = box.x, box.y, box.w, box.h
    if not box.name:
        raise Refused("a box without the name of a class")
    if not all(map(math.isfinite, (x, y, w, h))):
        raise Refused("a side that is not a finite number")
    if w <= 0 or h <= 0:
        raise Refused("no area")
    left, top = max(0.0, x), max(0.0, y)
    right, bottom = min(float(picture.width), x + w), min(float(picture.height), y + h)
    if right <= left or bottom <= top:
        raise Refused("outside the image")
    if right - left < LEAST_SIDE or bottom - top < LEAST_SIDE:
        raise Refused("less than a pixel of it in the image")
    if left - x + (x + w - right) > ROUNDING or top - y + (y + h - bottom) > ROUNDING:
        notes.append("a box that reached beyond the image was cut")
    return replace(box, x=left, y=top, w=right - left, h=bottom - top)
