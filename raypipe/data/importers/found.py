"""What a source yields. `Skipped` reasons are counted; each is one of a source's own few sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class FoundBox:
    """A box by the name of its class; pixels, or shares of the image's sides where `relative`."""

    name: str
    x: float
    y: float
    w: float
    h: float
    crowd: bool = False
    difficult: bool = False
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image of the source: its path inside the folder, which is its id, and a label or boxes.

    `size`: width and height as the source states them; boxes in pixels mean those (see boxes.py for EXIF rotations).
    """

    path: Path
    label: str | None = None
    boxes: Sequence[FoundBox] = ()
    split: str | None = None  # as the source says
    size: tuple[int, int] | None = None
    problems: Sequence[str] = ()  # of boxes that could not be read, counted; the image is taken all the same
    notes: Sequence[str] = ()  # what is unusual about it, counted when it is taken


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something of the source that cannot be used: where (a path inside the folder, a line) and why."""

    where: str
    reason: str


TWICE = "one image id twice: the first is taken"
NO_IMAGE = "labels without an image"
NOT_THERE = "an image that is not there"
NO_NUMBER = "a box whose sides are not numbers"

Found: TypeAlias = Candidate | Skipped


class Source(Protocol):
    """One format. `classes`: names in the order that the source gives, empty where they are found on the way."""

    boxes: bool
    classes: Sequence[str]

    def __iter__(self) -> Iterator[Found]: ...
    def __len__(self) -> int:
        """Images, as far as can be said without opening them; for a progress bar."""
