"""A head that grows: vectors of a layout in the terms of a wider one, and what each update says of each class.

An entry of the head is seen as (repeats, before + classes, rest), class i in row `before + i` of each repeat:

    dense layer   (1, 0 + classes, features), its bias (1, 0 + classes, 1)
    YOLOv5 head   (anchors, 5 + classes, features), its biases (anchors, 5 + classes, 1)

Weights keep their bits. A new class begins as the mean of the classes that it is made of, or, one all new, of all that
there are: its logit is then never the largest, so that no prediction changes by growing. In a YOLOv5 head, whose
classes do not compete, it begins as in a new model: no weights, and the bias of a rare class.

An update whose bias of a class is exactly zero says nothing of it: its store cannot label the class, or trained before
there was one. It has no part in the mean of that class's rows: they are averaged over those that have them (HeteroFL,
Diao et al. 2021, arXiv:2010.01264), else a class that few stores know would hardly move.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from raypipe.types import Entry, Layout, Role

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

YOLO_HEAD = re.compile(r"^model\.24\.m\.\d+\.(weight|bias)$")
YOLO_BEFORE = 5  # centre, sides, object
USUAL_CLASS = 0.6  # as models/yolov5_net.py has it for a new head


@dataclass(frozen=True, slots=True)
class ClassRows:
    """Where an entry has something for each class; see the top of the file."""

    entry: Entry
    repeats: int
    before: int

    def of(self, vector: Array) -> Array:
        """(repeats, before + classes, rest): a view into a vector of the entry's layout."""
        return vector[self.entry.slice].reshape(self.repeats, self.entry.shape[0] // self.repeats, -1)


@dataclass(frozen=True, slots=True)
class Form:
    """A layout and where the classes lie in it; `rows` empty: nobody knows."""

    layout: Layout
    rows: tuple[ClassRows, ...] = ()
    num_classes: int = 0

    @classmethod
    def of(cls, layout: Layout, num_classes: int, *, boxes: bool = False) -> Form:
        """By names and shapes alone; of what is frozen nothing is said."""
        return cls(layout, tuple(_yolo(layout, num_classes) if boxes else _dense(layout, num_classes)), num_classes)

    def said(self, update: Array) -> Array | None:
        """Of which classes an update says something, bool (num_classes,); None: of all."""
        found = np.zeros(self.num_classes, bool)
        for row in self.rows:
            if len(row.entry.shape) == 1:
                found |= (row.of(update)[:, row.before :, 0] != 0).any(0)
        return None if found.all() or not self.rows else found


def _dense(layout: Layout, num: int) -> Iterator[ClassRows]:
    """The last dense layer with so many outputs and a bias, as models/heads.py finds it in a module."""
    shared = {entry.name: entry for entry in layout.entries if entry.role is Role.SHARED}
    for bias in reversed(shared.values()):
        weight = shared.get(re.sub("bias$", "weight", bias.name))
        if bias.shape == (num,) and bias.name.endswith("bias") and weight is not None and len(weight.shape) == 2:
            yield from (ClassRows(weight, 1, 0), ClassRows(bias, 1, 0))
            return


def _yolo(layout: Layout, num: int) -> Iterator[ClassRows]:
    for entry in layout.entries:
        if YOLO_HEAD.match(entry.name) and entry.role is Role.SHARED and entry.shape[0] % (YOLO_BEFORE + num) == 0:
            yield ClassRows(entry, entry.shape[0] // (YOLO_BEFORE + num), YOLO_BEFORE)


@dataclass(frozen=True, slots=True)
class Growth:
    """From one form to a wider one. `live`: classes that there are; `begins`: what each new one is made of, or ()."""

    old: Form
    new: Form
    live: tuple[int, ...]
    begins: tuple[tuple[int, ...], ...]

    def weights(self, vector: Array) -> Array:
        """A version's vector, float32 (old.layout.size,), as (new.layout.size,)."""
        out = np.zeros(self.new.layout.size, np.float32)
        for old, new in self._moved(vector, out):
            old_rows, new_rows = old.of(vector), new.of(out)
            for place, made_of in enumerate(self.begins, self.old.num_classes):
                new_rows[:, new.before + place] = self._beginning(old, old_rows[:, old.before :], made_of)
        return out

    def spread(self, vector: Array, out: Array) -> Array:
        """The old entries' numbers of a vector or a part of one, written into `out`, which has the new layout's."""
        for _ in self._moved(vector, out):
            pass
        return out

    def _beginning(self, old: ClassRows, rows: Array, made_of: tuple[int, ...]) -> Array:
        if not made_of and old.before:
            usual = math.log(USUAL_CLASS / (self.new.num_classes - 0.99999))
            return np.full((old.repeats, rows.shape[2]), usual if len(old.entry.shape) == 1 else 0.0, np.float32)
        mean: Array = rows[:, list(made_of or self.live)].mean(1, dtype=np.float64).astype(np.float32)
        return mean

    def _moved(self, vector: Array, out: Array) -> Iterator[tuple[ClassRows, ClassRows]]:
        """Copies what `out` has room for, and gives the rows that have become more."""
        known = {entry.name: entry for entry in self.old.layout.entries}
        before, after = ({row.entry.name: row for row in form.rows} for form in (self.old, self.new))
        for entry in self.new.layout.entries:
            was = known[entry.name]
            if entry.slice.stop > out.size:
                continue
            if was.shape == entry.shape:
                out[entry.slice] = vector[was.slice]
            else:
                old, new = before[entry.name], after[entry.name]
                new.of(out)[:, : old.entry.shape[0] // old.repeats] = old.of(vector)
                yield old, new


def no_growth(model: str) -> str:
    """Why classes cannot be added."""
    return f"model {model} has no head that can grow: that is a trained dense layer with a bias at its end, or YOLOv5's"


def padded(update: Array, old: Form, new: Form) -> Array:
    """An update of an older layout, float32 (old.layout.update_size,), in the newer one's: nothing of new classes."""
    if old.layout == new.layout:
        return update
    return Growth(old, new, (), ()).spread(update, np.zeros(new.layout.update_size, np.float32))
