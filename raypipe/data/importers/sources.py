"""Formats that others write, by name: folders and yolo here, coco, voc and csv in files of their own.

Each yields candidates one after the other. A part is called with (folder, annotations or None). Nothing outside the
folder is opened but `annotations`, which a person named: no image, no label, no list, by whatever path or link.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import yaml

from raypipe.data.importers.found import NO_IMAGE, Candidate, Found, FoundBox, Skipped, Source
from raypipe.data.importers.safe import (
    IMAGES,
    Refused,
    found_inside,
    image_files,
    inside,
    is_there,
    named_file,
    read_text,
)
from raypipe.data.schema import reason
from raypipe.errors import ConfigError
from raypipe.registry import Registry

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "val2017"), "validation"),
    **dict.fromkeys(("test", "testing", "test2017"), "test"),
}
NO_LABELS = "no label file: taken as background"
ENDINGS = (*IMAGES, *(end.upper() for end in IMAGES))

sources: Registry[Source] = Registry(
    "importer", modules=tuple(f"raypipe.data.importers.{name}" for name in ("sources", "coco", "voc", "table"))
)
Names: TypeAlias = list[str]


def open_source(kind: str, root: Path, annotations: Path | None) -> Source:
    """A folder in one of the formats. Raises ConfigError."""
    try:
        if not root.is_dir():
            raise ConfigError(f"{root}: no such folder")
        if annotations is not None and not annotations.exists():
            raise ConfigError(f"{annotations}: no such file")
        return sources.build({"name": kind}, root.resolve(), annotations)
    except OSError as error:
        raise ConfigError(f"{root}: not all of it can be read: {reason(error)}") from None


def not_named(root: Path, names: Container[str]) -> Iterator[Skipped]:
    """Images in the folder that a list does not name, or has no good entry for."""
    for path in image_files(root, strict=False):
        own = path.relative_to(root).as_posix()
        if own not in names:
            yield Skipped(own, "an image without labels in the list")


def split_of(path: Path) -> str | None:
    """As one of the folders above says, if one does."""
    return next((SPLIT_NAMES[part] for part in path.parts[:-1] if part in SPLIT_NAMES), None)


@sources("folders")
def folders(root: Path, annotations: Path | None) -> Source:
    """A folder a class, or first a folder a split (train, val, test) and in it a folder a class."""
    if annotations is not None:
        raise ConfigError("folders: the folder's name is the label; there is no file of annotations")
    tops = _below(root, root)
    split = any(p.name in SPLIT_NAMES for p in tops)
    places = [c for p in tops for c in _below(root, p)] if split else tops
    names = sorted({p.name for p in places})
    if not names:
        raise ConfigError(f"{root.name}: no folder of images in it; make one for each class")
    return _Folders(root, places, names)


def _below(root: Path, folder: Path) -> list[Path]:
    """Folders in a folder, by name. Raises ConfigError for a link out of `root`."""
    return [found_inside(root, p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


class _Folders:
    boxes = False

    def __init__(self, root: Path, places: Sequence[Path], names: Sequence[str]) -> None:
        self._root, self._places, self.classes = root, places, names

    def __len__(self) -> int:
        return sum(1 for place in self._places for _ in image_files(place))

    def __iter__(self) -> Iterator[Found]:
        for place in self._places:
            for path in image_files(place):
                own = path.relative_to(self._root)
                yield Candidate(own, label=place.name, split=split_of(own))


@sources("yolo")
def yolo(root: Path, annotations: Path | None) -> Source:
    """images/[split/]NAME.jpg with labels/[split/]NAME.txt, or both side by side; names in data.yaml or classes.txt.

    A line is a class number, then centre and sides as shares of the image as it is seen, turned as its EXIF says. No
    label file: an image without objects, and it is said how many there are.
    """
    return _Yolo(root, _yolo_names(root, annotations))


def _yolo_names(root: Path, annotations: Path | None) -> Names:
    choices = [*root.glob("data.y*ml"), *root.glob("*.y*ml"), root / "classes.txt"]
    path = named_file(annotations) if annotations else next((p for p in choices if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{root.name}: no data.yaml and no classes.txt, which say what the class numbers mean")
    if annotations is None:
        found_inside(root, path)
    try:
        if path.suffix == ".txt":
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
        names = (yaml.safe_load(read_text(path)) or {}).get("names")
    except (Refused, yaml.YAMLError, AttributeError, ValueError, RecursionError):  # such as a date without a month
        raise ConfigError(f"{path.name} is not YAML with a list of names") from None
    if isinstance(names, dict):
        names = [names.get(i) for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path.name}: names must be a list of texts, or numbered from 0 without a gap")
    return list(names)


class _Yolo:
    boxes = True

    def __init__(self, root: Path, names: Names) -> None:
        self._root = root
        self.classes: Sequence[str] = names
        self._top = found_inside(root, root / "images") if (root / "images").is_dir() else root
        self._labels = found_inside(root, root / "labels") if self._top != root else root

    def __len__(self) -> int:
        return sum(1 for _ in image_files(self._top))

    def __iter__(self) -> Iterator[Found]:
        for path in image_files(self._top):
            own, label = path.relative_to(self._root), self._labels / path.relative_to(self._top).with_suffix(".txt")
            there = is_there(label)
            try:
                boxes, problems = self._boxes(label) if there else ([], [])
            except Refused as refused:
                yield Skipped(str(own), str(refused))
                continue
            notes = () if there else (NO_LABELS,)
            yield Candidate(own, boxes=boxes, split=split_of(own), problems=problems, notes=notes)
        yield from self._orphans()

    def _boxes(self, path: Path) -> tuple[list[FoundBox], list[str]]:
        inside(self._root, path.relative_to(self._root))
        boxes, problems = [], []
        for line in read_text(path).splitlines():
            words = line.split()
            if not words:
                continue
            try:
                number, x, y, w, h = int(words[0]), *(float(word) for word in words[1:])
            except ValueError:
                problems.append("a line that is not a class number and four numbers")
                continue
            if not 0 <= number < len(self.classes):
                problems.append("a class number that is not in the list of names")
                continue
            boxes.append(FoundBox(self.classes[number], x - w / 2, y - h / 2, w, h, relative=True))
        return boxes, problems

    def _orphans(self) -> Iterator[Skipped]:
        for path in sorted(self._labels.rglob("*.txt")) if self._labels.is_dir() else []:
            if path.name == "classes.txt":
                continue
            image = self._top / path.relative_to(self._labels)
            if not any(image.with_suffix(end).is_file() for end in ENDINGS):
                yield Skipped(str(path.relative_to(self._root)), NO_IMAGE)
