"""Pascal VOC: an XML file an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from raypipe.data.importers.found import NO_IMAGE, NO_NUMBER, Candidate, Found, FoundBox, Skipped, Source
from raypipe.data.importers.safe import (
    MOST_NAMES,
    Refused,
    found_inside,
    image_files,
    inside,
    look_for,
    parse_xml,
    read_text,
)
from raypipe.data.importers.sources import SPLIT_NAMES, sources
from raypipe.errors import ConfigError


@sources("voc")
def voc(root: Path, annotations: Path | None, *, first_pixel: Annotated[int, Field(ge=0, le=1)] = 1) -> Source:
    """Annotations/*.xml with JPEGImages/, split by ImageSets/Main if it is there. `first_pixel`: VOC counts from 1."""
    own = root / "Annotations"
    xml = annotations or (found_inside(root, own) if own.is_dir() else root)
    if not xml.is_dir():
        raise ConfigError(f"{root.name}: no folder Annotations with XML files")
    return _Voc(root, xml.resolve(), first_pixel, _splits(root))


def _splits(root: Path) -> dict[str, str]:
    """Image -> split, as the lists say. Raises ConfigError for a list that cannot be read."""
    lists, said = root / "ImageSets" / "Main", dict[str, str]()
    for path in sorted(found_inside(root, lists).glob("*.txt")) if lists.is_dir() else []:
        if path.stem in SPLIT_NAMES:
            try:
                names = read_text(found_inside(root, path), "its names are", MOST_NAMES).split()
            except Refused as refused:
                raise ConfigError(f"{path.relative_to(root).as_posix()}: {refused}") from None
            said |= dict.fromkeys(names, SPLIT_NAMES[path.stem])
    return said


class _Voc:
    boxes = True
    classes: Sequence[str] = ()

    def __init__(self, root: Path, xml: Path, first: int, splits: dict[str, str]) -> None:
        self._root, self._xml, self._first, self._splits = root, xml, first, splits
        within = xml.is_relative_to(root)  # else a person named it
        self._bound = root if within else xml
        folders = [root / "JPEGImages", root / "images"]
        self._folders = [found_inside(root, folder) for folder in folders if folder.is_dir()]
        self._places = [Path("JPEGImages"), Path("images"), *([xml.relative_to(root)] if within else [])]

    def __len__(self) -> int:
        return sum(1 for _ in self._xml.glob("*.xml"))

    def __iter__(self) -> Iterator[Found]:
        seen: set[str] = set()
        for path in sorted(self._xml.glob("*.xml")):
            own = path.relative_to(self._bound)
            try:
                candidate = self._read(inside(self._bound, own))
            except Refused as refused:
                yield Skipped(own.as_posix(), str(refused))
                continue
            seen.add(candidate.path.as_posix())
            yield candidate
        for folder in self._folders:
            for image in image_files(folder):
                if (name := image.relative_to(self._root).as_posix()) not in seen:
                    yield Skipped(name, "an image without labels")

    def _read(self, path: Path) -> Candidate:
        tree = parse_xml(path)
        name = (tree.findtext("filename") or f"{path.stem}.jpg").strip()
        image = look_for(self._root, self._places, name, NO_IMAGE)
        boxes, problems = [], []
        for item in tree.iter("object"):
            try:
                boxes.append(self._box(item))
            except ValueError:
                problems.append(NO_NUMBER)
        return Candidate(image, boxes=boxes, split=self._splits.get(path.stem), size=_size(tree), problems=problems)

    def _box(self, item: Any) -> FoundBox:
        """Raises ValueError."""
        sides = ("xmin", "ymin", "xmax", "ymax")
        left, top, right, bottom = (float(item.findtext(f"bndbox/{side}") or "") for side in sides)
        wide, high = right - left + self._first, bottom - top + self._first
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        label = (item.findtext("name") or "").strip()
        return FoundBox(label, left - self._first, top - self._first, wide, high, difficult=difficult)


def _size(tree: Any) -> tuple[int, int] | None:
    try:
        width, height = int(tree.findtext("size/width") or 0), int(tree.findtext("size/height") or 0)
    except ValueError:
        return None
    return (width, height) if width and height else None
