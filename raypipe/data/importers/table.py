"""CSV with a row an image or a box. Columns: image (or path, file, filename), label; for boxes x, y, w, h or
xmin, ymin, xmax, ymax, in pixels; split if there is one; width and height of the image, which say on what the boxes of
an image with an EXIF rotation were drawn."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from raypipe.data.importers.found import NOT_THERE, TWICE, Candidate, Found, FoundBox, Skipped, Source
from raypipe.data.importers.safe import Refused, found_inside, look_for, named_file
from raypipe.data.importers.sources import SPLIT_NAMES, not_named, sources
from raypipe.errors import ConfigError, did_you_mean

IMAGE = ("image", "path", "file", "filename", "image_path")
LABEL = ("label", "class", "name", "category")
SIDES, CORNERS = ("x", "y", "w", "h"), ("xmin", "ymin", "xmax", "ymax")
MOST_FIELD = 1 << 20  # characters


@sources("csv")
def csv_table(root: Path, annotations: Path | None) -> Source:
    """`annotations`: the CSV, or the only one in the folder; images by their path inside the folder."""
    if annotations is not None:
        return _Table(root, named_file(annotations))
    choices = sorted(path for path in root.glob("*.csv") if path.is_file())
    if len(choices) != 1:
        raise ConfigError(f"{root.name}: {len(choices)} CSV files; name one with --annotations")
    return _Table(root, found_inside(root, choices[0]))


class _Table:
    """Rows are held as numbers only: an image's boxes may stand anywhere."""

    def __init__(self, root: Path, path: Path) -> None:
        self._root, self._path = root, path
        self.classes: Sequence[str] = ()
        self._images: dict[str, tuple[str | None, tuple[int, int] | None]] = {}  # path -> split, size
        self._names: dict[str, int] = {}
        self._owner, self._label = array("l"), array("l")
        self._sides = [array("d") for _ in range(4)]
        self._skipped: list[Skipped] = []
        csv.field_size_limit(MOST_FIELD)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                self._read(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error):
            raise ConfigError(f"{path.name} is not a CSV file in UTF-8") from None
        self.classes = sorted(self._names)

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, rows: csv.DictReader[str]) -> None:
        columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        image, label = self._column(columns, IMAGE), self._column(columns, LABEL)
        kinds = [kind for kind in (SIDES, CORNERS) if all(name in columns for name in kind)]
        self.boxes = bool(kinds)
        sides = [columns[name] for name in kinds[0]] if kinds else []
        corners = bool(kinds) and kinds[0] == CORNERS
        places: dict[str, int] = {}
        for row in rows:
            where = f"line {rows.line_num}"
            name, own = (row.get(image) or "").strip(), (row.get(label) or "").strip()
            if not name:
                self._skipped.append(Skipped(where, "a row without an image"))
                continue
            split = SPLIT_NAMES.get((row.get(columns.get("split", "")) or "").strip().lower())
            numbers = self._numbers(row, sides, where, corners) if own else []
            if numbers is None or (not own and not self.boxes):
                if not own:
                    self._skipped.append(Skipped(where, "a row without a label"))
                continue
            if not self.boxes and name in places:
                self._skipped.append(Skipped(where, TWICE))
                continue
            place = places.setdefault(name, len(places))
            self._images.setdefault(name, (split, _size(row, columns)))
            if own:
                self._owner.append(place)
                self._label.append(self._names.setdefault(own, len(self._names)))
                for column, number in zip(self._sides, numbers or [0.0] * 4, strict=True):
                    column.append(number)

    def _column(self, columns: dict[str, str], names: Sequence[str]) -> str:
        found = next((columns[name] for name in names if name in columns), None)
        if found is None:
            raise ConfigError(f"{self._path.name}: no column {names[0]!r}.{did_you_mean(names[0], columns)}")
        return found

    def _numbers(self, row: dict[str, str], columns: Sequence[str], where: str, corners: bool) -> list[float] | None:
        found = []
        for column in columns:
            try:
                found.append(float(row.get(column) or ""))
            except ValueError:
                self._skipped.append(Skipped(where, f"column {column!r} holds something that is not a number"))
                return None
        if corners:
            found[2:] = [found[2] - found[0], found[3] - found[1]]
        return found

    def __iter__(self) -> Iterator[Found]:
        yield from self._skipped
        names = list(self._names)
        rows: dict[int, array[int]] = {}
        for row, owner in enumerate(self._owner):
            rows.setdefault(owner, array("l")).append(row)
        seen: set[str] = set()
        for place, (name, (split, size)) in enumerate(self._images.items()):
            try:
                path = look_for(self._root, [Path()], name, NOT_THERE)
            except Refused as refused:
                yield Skipped(name, str(refused))
                continue
            seen.add(path.as_posix())
            own = rows.get(place, array("l"))
            if not self.boxes:
                yield Candidate(path, label=names[self._label[own[0]]], split=split)
                continue
            x, y, w, h = self._sides
            boxes = [FoundBox(names[self._label[r]], x[r], y[r], w[r], h[r]) for r in own]
            yield Candidate(path, boxes=boxes, split=split, size=size)
        yield from not_named(self._root, seen)


def _size(row: dict[str, str], columns: dict[str, str]) -> tuple[int, int] | None:
    """Width and height of the image, where the row says them."""
    try:
        width, height = (int(row.get(columns[name]) or 0) for name in ("width", "height"))
    except (KeyError, ValueError):
        return None
    return (width, height) if width and height else None
