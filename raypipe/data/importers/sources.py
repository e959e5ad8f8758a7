"""Formats that others write, by name: folders, yolo, coco, voc, csv. Each yields candidates one after the other.

A part is called with (folder, annotations or None). Nothing outside the folder is opened.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import Field

from raypipe.data.importers.found import Candidate, Found, FoundBox, Skipped, Source
from raypipe.data.importers.safe import Refused, image_files, inside, json_lists, parse_xml, read_text
from raypipe.errors import ConfigError
from raypipe.registry import Registry

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "val2017"), "validation"),
    **dict.fromkeys(("test", "testing", "test2017"), "test"),
}
NO_IMAGE = "labels without an image"
NO_NUMBER = "a box whose sides are not numbers"

sources: Registry[Source] = Registry(
    "importer", modules=("raypipe.data.importers.sources", "raypipe.data.importers.table")
)
Names: TypeAlias = list[str]


def open_source(kind: str, root: Path, annotations: Path | None) -> Source:
    """A folder in one of the formats. Raises ConfigError."""
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    if annotations is not None and not annotations.exists():
        raise ConfigError(f"{annotations}: no such file")
    return sources.build({"name": kind}, root, annotations)


def split_of(path: Path) -> str | None:
    """As one of the folders above says, if one does."""
    return next((SPLIT_NAMES[part] for part in path.parts[:-1] if part in SPLIT_NAMES), None)


@sources("folders")
def folders(root: Path, annotations: Path | None) -> Source:
    """A folder a class, or first a folder a split (train, val, test) and in it a folder a class."""
    if annotations is not None:
        raise ConfigError("folders: the folder's name is the label; there is no file of annotations")
    tops = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    split = any(p.name in SPLIT_NAMES for p in tops)
    places = [c for p in tops for c in sorted(p.iterdir()) if c.is_dir()] if split else tops
    names = sorted({p.name for p in places})
    if not names:
        raise ConfigError(f"{root.name}: no folder of images in it; make one for each class")
    return _Folders(root, places, names)


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

    A line is a class number, then centre and sides as shares of the image. No label file: an image without objects.
    """
    return _Yolo(root, _yolo_names(root, annotations))


def _yolo_names(root: Path, annotations: Path | None) -> Names:
    choices = [annotations] if annotations else [*root.glob("data.y*ml"), *root.glob("*.y*ml"), root / "classes.txt"]
    path = next((p for p in choices if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{root.name}: no data.yaml and no classes.txt, which say what the class numbers mean")
    try:
        if path.suffix == ".txt":
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
        names = (yaml.safe_load(read_text(path)) or {}).get("names")
    except (Refused, yaml.YAMLError, AttributeError):
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
        self._top = root / "images" if (root / "images").is_dir() else root

    def __len__(self) -> int:
        return sum(1 for _ in image_files(self._top))

    def __iter__(self) -> Iterator[Found]:
        apart = self._top != self._root
        for path in image_files(self._top):
            own = path.relative_to(self._root)
            label = (self._root / "labels" / own.relative_to("images") if apart else path).with_suffix(".txt")
            try:
                boxes, problems = self._boxes(label) if label.is_file() else ([], [])
            except Refused as refused:
                yield Skipped(str(own), str(refused))
                continue
            yield Candidate(own, boxes=boxes, split=split_of(own), problems=problems)
        yield from self._orphans(apart)

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

    def _orphans(self, apart: bool) -> Iterator[Skipped]:
        top = self._root / "labels" if apart else self._root
        for path in sorted(top.rglob("*.txt")) if top.is_dir() else []:
            if path.name == "classes.txt":
                continue
            image = self._root / "images" / path.relative_to(top) if apart else path
            if not any(image.with_suffix(end).is_file() for end in _endings()):
                yield Skipped(str(path.relative_to(self._root)), NO_IMAGE)


def _endings() -> list[str]:
    from raypipe.data.importers.safe import IMAGES

    return [*IMAGES, *(end.upper() for end in IMAGES)]


@sources("coco")
def coco(root: Path, annotations: Path | None) -> Source:
    """A JSON file of COCO's (`annotations`, or the only one in the folder); images beside it or below the folder.

    Category ids may have gaps; segmentations are passed over. The file is read piece by piece.
    """
    path = annotations
    if path is None:
        choices = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
        if len(choices) != 1:
            found = f"{len(choices)} JSON files there and in annotations/"
            raise ConfigError(f"{root}: {found}; name one with --annotations")
        path = choices[0]
    return _Coco(root, path)


class _Coco:
    """Numbers of all boxes are held, 29 bytes each: a box may stand anywhere in the file."""

    boxes = True

    def __init__(self, root: Path, path: Path) -> None:
        self._root, self._split = root, split_of(Path(re.sub(r"^instances_|\.json$", "", path.name), "_"))
        self._images: dict[int, tuple[str, int, int]] = {}
        self._names: dict[int, str] = {}
        self._owner, self._category, self._crowd = array("q"), array("q"), array("b")
        self._sides = [array("d") for _ in range(4)]
        self._skipped: list[Skipped] = []
        json_lists(path, ("images", "annotations", "categories"), self._see)
        self.classes: Sequence[str] = [self._names[key] for key in sorted(self._names)]
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"{path.name}: two categories have one name")
        folders = [root, root / "images", path.parent, *([root / self._split] if self._split else [])]
        self._folders = [f for f in dict.fromkeys(folders) if f.is_dir()]

    def _see(self, kind: str, item: Any) -> None:
        try:
            if kind == "categories":
                self._names[int(item["id"])] = str(item["name"])
            elif kind == "images":
                self._image(item)
            else:
                x, y, w, h = (float(side) for side in item["bbox"])
                self._owner.append(int(item["image_id"]))
                self._category.append(int(item["category_id"]))
                self._crowd.append(bool(item.get("iscrowd", 0)))
                for column, side in zip(self._sides, (x, y, w, h), strict=True):
                    column.append(side)
        except (KeyError, TypeError, ValueError, OverflowError):
            self._skipped.append(Skipped(kind, f"an entry of {kind} that is not as COCO has it"))

    def _image(self, item: Any) -> None:
        number, name = int(item["id"]), str(item["file_name"])
        if number in self._images:
            self._skipped.append(Skipped(name, "one image id twice: the first is taken"))
            return
        self._images[number] = (name, int(item.get("width") or 0), int(item.get("height") or 0))

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Found]:
        yield from self._skipped
        rows: dict[int, array[int]] = {}
        for row, owner in enumerate(self._owner):
            rows.setdefault(owner, array("q")).append(row)
        for number, (name, width, height) in self._images.items():
            try:
                path = self._file(name)
            except Refused as refused:
                yield Skipped(name, str(refused))
                continue
            boxes, problems = self._boxes(rows.get(number, array("q")))
            size = (width, height) if width and height else None
            own = path.relative_to(self._root)
            yield Candidate(own, boxes=boxes, split=self._split or split_of(own), size=size, problems=problems)
        lost = sum(len(own) for owner, own in rows.items() if owner not in self._images)
        yield from (Skipped("annotations", NO_IMAGE) for _ in range(lost))

    def _file(self, name: str) -> Path:
        for folder in self._folders:
            path = inside(self._root, (folder / name).relative_to(self._root) if not Path(name).is_absolute() else name)
            if path.is_file():
                return path
        raise Refused("an image that is not there")

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


@sources("voc")
def voc(root: Path, annotations: Path | None, *, first_pixel: Annotated[int, Field(ge=0, le=1)] = 1) -> Source:
    """Annotations/*.xml with JPEGImages/, split by ImageSets/Main if it is there. `first_pixel`: VOC counts from 1."""
    xml = annotations or (root / "Annotations" if (root / "Annotations").is_dir() else root)
    if not xml.is_dir():
        raise ConfigError(f"{root.name}: no folder Annotations with XML files")
    return _Voc(root, xml, first_pixel)


class _Voc:
    boxes = True
    classes: Sequence[str] = ()

    def __init__(self, root: Path, xml: Path, first: int) -> None:
        self._root, self._xml, self._first = root, xml, first
        self._splits: dict[str, str] = {}
        for path in sorted((root / "ImageSets" / "Main").glob("*.txt")):
            if path.stem in SPLIT_NAMES:
                self._splits |= dict.fromkeys(path.read_text("utf-8").split(), SPLIT_NAMES[path.stem])

    def __len__(self) -> int:
        return sum(1 for _ in self._xml.glob("*.xml"))

    def __iter__(self) -> Iterator[Found]:
        seen: set[str] = set()
        for path in sorted(self._xml.glob("*.xml")):
            try:
                inside(self._root, path.relative_to(self._root))
                found = self._read(path)
            except Refused as refused:
                yield Skipped(str(path.relative_to(self._root)), str(refused))
                continue
            seen.add(found.path.name)
            yield found
        images = self._root / "JPEGImages"
        for image in image_files(images) if images.is_dir() else []:
            if image.name not in seen:
                yield Skipped(str(image.relative_to(self._root)), "an image without labels")

    def _read(self, path: Path) -> Candidate:
        tree = parse_xml(path)
        name = (tree.findtext("filename") or f"{path.stem}.jpg").strip()
        places = (Path("JPEGImages") / name, Path("images") / name, path.parent.relative_to(self._root) / name)
        image = next((own for own in places if inside(self._root, own).is_file()), None)
        if image is None:
            raise Refused(NO_IMAGE)
        boxes, problems = [], []
        for item in tree.iter("object"):
            try:
                left, top, right, bottom = (float(item.findtext(f"bndbox/{k}") or "") for k in
                                            ("xmin", "ymin", "xmax", "ymax"))  # fmt: skip
            except ValueError:
                problems.append(NO_NUMBER)
                continue
            wide, high = right - left + self._first, bottom - top + self._first
            difficult = (item.findtext("difficult") or "0").strip() == "1"
            label = (item.findtext("name") or "").strip()
            boxes.append(FoundBox(label, left - self._first, top - self._first, wide, high, difficult=difficult))
        return Candidate(image, boxes=boxes, split=self._splits.get(path.stem), size=_size(tree), problems=problems)


def _size(tree: Any) -> tuple[int, int] | None:
    try:
        width, height = int(tree.findtext("size/width") or 0), int(tree.findtext("size/height") or 0)
    except ValueError:
        return None
    return (width, height) if width and height else None
