"""COCO's JSON: images, categories and boxes in one file, which is read piece by piece."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raypipe.data.importers.found import NO_IMAGE, NOT_THERE, TWICE, Candidate, Found, FoundBox, Skipped, Source
from raypipe.data.importers.safe import Refused, found_inside, json_lists, look_for, named_file
from raypipe.data.importers.sources import not_named, sources, split_of
from raypipe.errors import ConfigError


@sources("coco")
def coco(root: Path, annotations: Path | None) -> Source:
    """A JSON file of COCO's (`annotations`, or the only one in the folder); images beside it or below the folder.

    Category ids may have gaps; segmentations are passed over. The file is read piece by piece.
    """
    if annotations is not None:
        return _Coco(root, named_file(annotations))
    places = [root, *([found_inside(root, root / "annotations")] if (root / "annotations").is_dir() else [])]
    choices = sorted(path for place in places for path in place.glob("*.json") if path.is_file())
    if len(choices) != 1:
        there = f"{len(choices)} JSON files there and in annotations/"
        raise ConfigError(f"{root}: {there}; name one with --annotations")
    return _Coco(root, found_inside(root, choices[0]))


class _Coco:
    """Numbers of all boxes are held, 29 bytes each: a box may stand anywhere in the file."""

    boxes = True

    def __init__(self, root: Path, path: Path) -> None:
        half = re.sub(r"^instances_|\.json$", "", path.name)  # such as val2017
        self._root, self._split = root, split_of(Path(half, "_"))
        self._images: dict[int, tuple[str, int, int]] = {}
        self._names: dict[int, str] = {}
        self._owner, self._category, self._crowd = array("q"), array("q"), array("b")
        self._sides = [array("d") for _ in range(4)]
        self._skipped: list[Skipped] = []
        json_lists(path, ("images", "annotations", "categories"), self._see)
        self.classes: Sequence[str] = [self._names[key] for key in sorted(self._names)]
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"{path.name}: two categories have one name")
        beside = path.parent.resolve()  # no place for images where it lies outside
        own = [beside.relative_to(root)] if beside.is_relative_to(root) else []
        halves = [Path(self._split), Path(half), Path("images", half)] if self._split else []
        self._folders = [Path(), Path("images"), *own, *halves]

    def _see(self, kind: str, item: Any) -> None:
        try:
            if kind == "categories":
                name = str(item["name"])
                name.encode()  # ValueError for half a character
                self._names[int(item["id"])] = name
            elif kind == "images":
                self._image(item)
            else:
                self._box(item)
        except (KeyError, TypeError, ValueError, OverflowError):
            self._skipped.append(Skipped(kind, f"an entry of {kind} that is not as COCO has it"))

    def _box(self, item: Any) -> None:
        """All of it is read before any of it is kept: the columns stay in line."""
        x, y, w, h = (float(side) for side in item["bbox"])
        numbers = array("q", (int(item["image_id"]), int(item["category_id"])))
        self._crowd.append(bool(item.get("iscrowd", 0)))
        for column, number in zip((self._owner, self._category), numbers, strict=True):
            column.append(number)
        for side, value in zip(self._sides, (x, y, w, h), strict=True):
            side.append(value)

    def _image(self, item: Any) -> None:
        number, name = int(item["id"]), str(item["file_name"])
        if number in self._images:
            self._skipped.append(Skipped(name, TWICE))
            return
        self._images[number] = (name, int(item.get("width") or 0), int(item.get("height") or 0))

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Found]:
        yield from self._skipped
        rows: dict[int, array[int]] = {}
        for row, owner in enumerate(self._owner):
            rows.setdefault(owner, array("q")).append(row)
        named: set[str] = set()
        for number, (name, width, height) in self._images.items():
            try:
                own = look_for(self._root, self._folders, name, NOT_THERE)
            except Refused as refused:
                yield Skipped(name, str(refused))
                continue
            named.add(own.as_posix())
            boxes, problems = self._boxes(rows.get(number, array("q")))
            size = (width, height) if width and height else None
            yield Candidate(own, boxes=boxes, split=self._split or split_of(own), size=size, problems=problems)
        lost = sum(len(own) for owner, own in rows.items() if owner not in self._images)
        yield from (Skipped("annotations", NO_IMAGE) for _ in range(lost))
        yield from not_named(self._root, named)

    def _boxes(self, rows: Sequence[int]) -> tuple[list[FoundBox], list[str]]:
        boxes, problems = [], []
        for row in rows:
            name = self._names.get(self._category[row])
            if name is None:
                problems.append("a category id that is not in the list")
                continue
            x, y, w, h = (column[row] for column in self._sides)
            boxes.append(FoundBox(name, x, y, w, h, crowd=bool(self._crowd[row])))
        return boxes, problems
