"""Candidates into Parquet: each image checked, what is there already left alone, what is left out counted.

What is new comes as a file of its own beside the others (train-00001.parquet, ...), moved into its place whole, so
that a store may train while images are added. The class list only grows, so that what was written before stays true.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypipe.data.importers.boxes import drawn
from raypipe.data.importers.found import TWICE, Candidate, Skipped, Source
from raypipe.data.importers.known import MARK, boxes_mark, images_there, label_mark, mark
from raypipe.data.importers.picture import Picture, read_picture
from raypipe.data.importers.safe import Refused, inside
from raypipe.data.parquet import parquet, parts_of
from raypipe.data.places import one_at_a_time
from raypipe.data.schema import SPLITS, reason
from raypipe.data.writer import Box, Example, SplitWriter
from raypipe.errors import ConfigError, RunError

EXAMPLES = 3  # of each reason, named in the report
SHARES = {"validation": 0.1, "test": 0.1}  # of images whose source says no split, by a hash of their id
NO_CLASS = "a class that is not in the list"


def held_out(text: str) -> dict[str, float]:
    """Shares as written, `validation,test`. Raises ConfigError."""
    try:
        validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--held-out {text}: write two shares, e.g. 0.1,0.1") from None
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(f"--held-out {text}: shares are at least 0 and together below 1")
    return {"validation": validation, "test": test}


@dataclass(slots=True)
class Report:
    """What came of an import; reasons are sentences, with how often and for which images, a few."""

    images: Counter[str] = field(default_factory=Counter)  # by split
    boxes: int = 0
    before: int = 0  # there already
    left_out: Counter[str] = field(default_factory=Counter)  # images, by reason
    boxes_left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # taken, but not as they were
    examples: dict[str, list[str]] = field(default_factory=dict)
    content_hash: str = ""

    def count(self, which: Counter[str], why: str, where: str) -> None:
        which[why] += 1
        named = self.examples.setdefault(why, [])
        if len(named) < EXAMPLES:
            named.append(where.encode("utf-8", "backslashreplace").decode())  # a name on a disk need not be text

    def lines(self) -> list[str]:
        """For a person, at the store."""
        total = sum(self.images.values())
        shares = ", ".join(f"{self.images[name]} {name}" for name in SPLITS if self.images[name])
        said = [
            f"{total} images added" + (f": {shares}" if shares else "") + (f"; {self.boxes} boxes" * bool(self.boxes))
        ]
        said += [f"{self.before} were there already"] if self.before else []
        for what, counted in (("image", self.left_out), ("box", self.boxes_left_out), ("", self.notes)):
            for why, many in counted.most_common():
                kind = f"{what}{('es' if what == 'box' else 's') * (many > 1)} left out: " if what else "images: "
                said.append(f"{many} {kind}{why} (e.g. {', '.join(self.examples[why])})")
        return said

    def as_json(self) -> dict[str, Any]:
        return {
            "images": dict(self.images),
            "boxes": self.boxes,
            "there_already": self.before,
            "left_out": dict(self.left_out),
            "boxes_left_out": dict(self.boxes_left_out),
            "notes": dict(self.notes),
            "examples": self.examples,
            "content_hash": self.content_hash,
        }


def ingest(
    root: Path,
    source: Source,
    out: Path,
    *,
    classes: Sequence[str] | None = None,
    shares: dict[str, float] = SHARES,
    see: Callable[[int], None] = lambda done: None,
) -> Report:
    """Add what is new of a source to the data set in `out`. `classes`: a fixed list; what is not in it is left out.

    Raises ConfigError where the data set there is another kind's, RunError if the disk does not take it.
    """
    try:
        with one_at_a_time(out.parent):
            return _Ingest(root, source, out, classes, shares).run(see)
    except OSError as error:
        raise RunError(f"the data set {out} cannot be written: {reason(error)}") from None


class _Ingest:
    def __init__(
        self, root: Path, source: Source, out: Path, classes: Sequence[str] | None, shares: dict[str, float]
    ) -> None:
        self._root, self._source, self._out, self._shares = root, source, out, shares
        self._fixed = classes is not None
        self.report = Report()
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = self._opened()
        self._classes = known
        self._place = {name: place for place, name in enumerate(known)}
        for name in source.classes if classes is None else classes:
            self._label(name, grow=True)
        self._there = images_there(out)
        self._seen: set[str] = set()  # in this run
        self._writers: dict[str, SplitWriter] = {}
        self._files: list[tuple[Path, Path]] = []

    def _opened(self) -> list[str]:
        if not parts_of(self._out, "train"):
            return []
        there = parquet(self._out, self._out.name)
        if (there.split("train").boxes is not None) != self._source.boxes:
            raise ConfigError(f"{self._out.name}: images with one label and images with boxes are two data sets")
        return list(there.classes)

    def run(self, see: Callable[[int], None]) -> Report:
        with ExitStack() as stack:
            for done, found in enumerate(self._source, 1):
                if isinstance(found, Skipped):
                    self.report.count(self.report.left_out, found.reason, found.where)
                else:
                    self._one(found, stack)
                see(done)
            if not parts_of(self._out, "train"):
                self._writer("train", stack)  # a data set has one, and be it empty
        for partial, place in self._files:
            partial.rename(place)
        self.report.content_hash = parquet(self._out, self._out.name).content_hash
        if self._files:
            number = len(list(self._out.glob("import-*.json")))
            (self._out / f"import-{number:05d}.json").write_text(json.dumps(self.report.as_json(), indent=1) + "\n")
        return self.report

    def _one(self, found: Candidate, stack: ExitStack) -> None:
        name, report = found.path.as_posix(), self.report
        try:
            if not _is_text(name):
                raise Refused("its name is not text in UTF-8")
            if name in self._seen:
                raise Refused(TWICE)
            picture = read_picture(inside(self._root, found.path))
            if name in self._there:
                self._again(name, found, picture)
            else:
                self._take(name, found, picture, stack)
            self._seen.add(name)
        except Refused as refused:
            report.count(report.left_out, str(refused), name)

    def _again(self, name: str, found: Candidate, picture: Picture) -> None:
        """An image that is there from before: it stays as it is. Raises Refused where its bytes are others."""
        there, report = self._there[name], self.report
        if not there.startswith(mark(picture.data)):
            raise Refused("one image id twice with other bytes: the first is kept")
        report.before += 1
        if there[MARK:] != self._truth(found, picture):
            report.count(report.notes, "its labels are not those that it is there with, which stay", name)

    def _truth(self, found: Candidate, picture: Picture) -> bytes | None:
        """The mark of what this run would say of it; None where it would not take it. No class is added for it."""
        place = self._place.get
        try:
            boxes = [(place(b.name), (b.x, b.y, b.w, b.h), b.crowd or b.difficult) for b in drawn(found, picture).boxes]
        except Refused:
            return None
        if not self._source.boxes:
            label = place(found.label or "")
            return None if label is None else label_mark(label)
        if not self._fixed and any(label is None for label, _, _ in boxes):
            return None
        kept = [box for box in boxes if box[0] is not None]
        return boxes_mark([label for label, _, _ in kept], [s for _, s, _ in kept], [i for _, _, i in kept])

    def _take(self, name: str, found: Candidate, picture: Picture, stack: ExitStack) -> None:
        """A new image. Raises Refused."""
        report, plan = self.report, drawn(found, picture)
        label = self._label(found.label) if found.label is not None else None
        if not self._source.boxes and label is None:
            raise Refused(NO_CLASS)
        boxes = []
        for box in plan.boxes:
            number = self._label(box.name)
            if number is None:
                plan.left_out.append(NO_CLASS)
            else:
                boxes.append(Box(number, box.x, box.y, box.w, box.h, box.crowd, box.difficult))
        for problem in plan.left_out:
            report.count(report.boxes_left_out, problem, name)
        for note in (*picture.notes, *found.notes, *plan.notes):
            report.count(report.notes, note, name)
        split = found.split or self._split(name)
        self._writer(split, stack).add(Example(name, picture.data, picture.width, picture.height, label, boxes))
        report.images[split] += 1
        report.boxes += len(boxes)

    def _label(self, name: str, *, grow: bool = False) -> int | None:
        """Its number; None for one that is not in a fixed list, or has no name."""
        if name not in self._place and name and (grow or not self._fixed):
            self._place[name] = len(self._classes)
            self._classes.append(name)
        return self._place.get(name)

    def _split(self, name: str) -> str:
        """By a hash of the id: the same image goes where it went, however often it is imported."""
        at = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big") / (1 << 56)
        for split, part in self._shares.items():
            if at < part:
                return split
            at -= part
        return "train"

    def _writer(self, split: str, stack: ExitStack) -> SplitWriter:
        if split not in self._writers:
            parts = len(parts_of(self._out, split))
            place = self._out / (f"{split}-{parts:05d}.parquet" if parts else f"{split}.parquet")
            partial = self._out / f".{place.name}.new"
            self._files.append((partial, place))
            writer = SplitWriter(partial, self._classes, boxes=self._source.boxes, split=split)
            self._writers[split] = stack.enter_context(writer)
        return self._writers[split]


def _is_text(name: str) -> bool:
    """Whether it can be written down: a name on a disk may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
