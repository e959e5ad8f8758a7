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
MOST_NAMES = 64 << 20  # bytes of one list of images


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


def found_inside(root: Path, path: Path) -> Path:
    """A file or folder that was found, not named by a person. Raises ConfigError for a link that leaves the folder."""
    try:
        return inside(root, path.relative_to(root))
    except Refused as refused:
        where = path.relative_to(root).as_posix()
        raise ConfigError(f"{where}: {refused}; put into the folder what it leads to") from None


def named_file(path: Path) -> Path:
    """A file that a person named, wherever it lies. Raises ConfigError where it is none, but a folder or a device."""
    if not path.is_file():
        raise ConfigError(f"--annotations {path}: not a file")
    return path


def look_for(root: Path, folders: Sequence[Path], name: str, missing: str) -> Path:
    """Where the first of these folders of `root` has the file, as a path below `root`: one spelling for one file.

    Raises Refused: it lies elsewhere, or (in the words of `missing`) nowhere.
    """
    why = None
    for folder in folders:
        try:
            whole = inside(root, folder / name)
        except Refused as refused:
            why = why or refused
            continue
        if is_there(whole):
            own = folder / name
            plain = not own.is_absolute() and ".." not in own.parts
            return own if plain else whole.resolve().relative_to(root.resolve())
    raise why or Refused(missing)


def is_there(path: Path) -> bool:
    """Whether it is a file; a name that the file system cannot hold is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def image_files(folder: Path, *, strict: bool = True) -> Iterator[Path]:
    """Images in a folder, in the order of their names, links to other folders not followed; one folder at a time.

    Raises ConfigError for a folder that may not be read, unless such are to be passed over.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda p: p.name)
    except OSError as error:
        if not strict:
            return
        raise ConfigError(f"the folder {folder.name} cannot be read: {error.strerror}") from None
    for path in entries:
        if path.is_file() and path.suffix.lower() in IMAGES:
            yield path
    for path in entries:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from image_files(path, strict=strict)


def parse_xml(path: Path) -> ElementTree.Element:
    """A small XML file. Raises Refused for a document type, which could define entities, and for what is not XML."""
    raw = read_bytes(path, MOST_XML, "its XML is")
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
        parser.Parse(raw, True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError):
        raise Refused("its XML is not well formed") from None


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """A small file, and no more of it than is allowed. Raises Refused; `what` begins its sentence."""
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}") from None
    if len(raw) > most:
        raise Refused(f"{what} larger than {most >> 20} MiB")
    return raw


def read_text(path: Path, what: str = "its labels are", most: int = MOST_TEXT) -> str:
    """A small text file. Raises Refused."""
    try:
        return read_bytes(path, most, what).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"{what} not text in UTF-8") from None


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
