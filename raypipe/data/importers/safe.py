"""Reading what strangers wrote: no path that leaves the folder, no XML entity, nothing large read at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree
from xml.parsers import expat

from raypipe.errors import ConfigError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CHUNK = 1 << 20  # characters read of a JSON file at a time
MOST_XML = 4 << 20  # bytes of one XML file
MOST_TEXT = 4 << 20  # bytes of one YOLO label file


class Refused(Exception):
    """One file that is not read, and why: a sentence that can be counted."""


def inside(root: Path, name: str | Path) -> Path:
    """The file of this name in the folder. Raises Refused when it lies elsewhere, by `..`, by `/` or by a link."""
    path = root / name
    try:
        whole = path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise Refused("its path cannot be followed") from None
    if not whole.is_relative_to(root.resolve()):
        raise Refused("its path leaves the folder")
    return path


def image_files(folder: Path, *, below: bool = True) -> Iterator[Path]:
    """Images in a folder, in the order of their names, links to other folders not followed; one folder at a time."""
    entries = sorted(folder.iterdir(), key=lambda p: p.name)
    for path in entries:
        if path.is_file() and path.suffix.lower() in IMAGES:
            yield path
    for path in entries if below else []:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from image_files(path)


def parse_xml(path: Path) -> ElementTree.Element:
    """A small XML file. Raises Refused for a document type, which could define entities, and for what is not XML."""
    if path.stat().st_size > MOST_XML:
        raise Refused(f"its XML is larger than {MOST_XML >> 20} MiB")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise Refused("its XML has a document type, which could define entities")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError):
        raise Refused("its XML is not well formed") from None


def read_text(path: Path) -> str:
    """A small text file. Raises Refused."""
    if path.stat().st_size > MOST_TEXT:
        raise Refused(f"its labels are larger than {MOST_TEXT >> 20} MiB")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused("its labels are not text in UTF-8") from None


def json_lists(path: Path, wanted: Sequence[str], see: Callable[[str, Any], None]) -> None:
    """Each item of these lists of a JSON file's outermost object, one after the other. Raises ConfigError."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            _Reader(file).run(wanted, see)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path.name} is not whole JSON of the COCO format") from None


class _Reader:
    """A window over a file. ValueError where the file is not JSON."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at, self._over = file, "", 0, False
        self._decoder = json.JSONDecoder()

    def run(self, wanted: Sequence[str], see: Callable[[str, Any], None]) -> None:
        self._take("{")
        while self._next() != "}":
            key = self._value()
            self._take(":")
            if key in wanted and self._next() == "[":
                self._items(lambda item, key=key: see(key, item))  # type: ignore[misc]
            else:
                self._value()
            if self._next() == ",":
                self._take(",")

    def _items(self, see: Callable[[Any], None]) -> None:
        self._take("[")
        while self._next() != "]":
            see(self._value())
            if self._next() == ",":
                self._take(",")
        self._take("]")

    def _value(self) -> Any:
        """The next value; more is read until it is whole, twice as much each time."""
        size = CHUNK
        while True:
            self._next()
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on beyond the window: it is whole when something else follows.
                if self._over or (end < len(self._text) and self._text[end] in ",]}: \t\r\n"):
                    self._at = end
                    return value
            except ValueError:
                if self._over:
                    raise
            self._more(size)
            size *= 2

    def _next(self) -> str:
        """The next character that is not white."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._over:
                raise ValueError("the file ends too early")
            self._more(CHUNK)

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"{character} was expected")
        self._at += 1

    def _more(self, size: int) -> None:
        read = self._file.read(size)
        self._over = not read
        self._text, self._at = self._text[self._at :] + read, 0
