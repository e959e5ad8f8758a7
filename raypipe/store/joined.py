"""Examples of several stores as if one had them all: for the opponent that federated training is compared with.

In a federation nothing uses it, since there no process sees two stores' data.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypipe.store.batches import Batch, Examples, Indices


class Joined:
    """A batch draws from all of them; see `Examples` in batches.py. `boxes`: targets are boxes, see tasks/task.py."""

    def __init__(self, parts: Sequence[Examples], *, boxes: bool = False) -> None:
        self._parts, self._boxes = list(parts), boxes
        self._starts = np.cumsum([0, *(part.num for part in parts)])
        self.total = sum(part.total for part in parts)
        self.num = int(self._starts[-1])
        self.num_bytes = sum(part.num_bytes for part in parts)
        known = [part.labelled for part in parts]
        whole = any(some is None for some in known)
        self.labelled = None if whole else tuple(sorted({place for some in known for place in some or ()}))

    @property
    def bad(self) -> AbstractSet[int]:
        before = np.cumsum([0, *(part.total for part in self._parts)])
        return {int(start) + place for start, part in zip(before, self._parts, strict=False) for place in part.bad}

    def check(self, max_bad_share: float) -> None:
        for part in self._parts:
            part.check(max_bad_share)

    def batches(
        self, picks: Iterable[Indices], device: torch.device, max_bad_share: float
    ) -> Generator[Batch, None, None]:
        for pick in picks:
            owner = np.searchsorted(self._starts, pick, side="right") - 1
            found: list[Batch] = []
            for place in np.unique(owner):
                own = pick[owner == place] - self._starts[place]
                with closing(self._parts[place].batches(iter([own]), device, max_bad_share)) as stream:
                    found += list(stream)
            if found:
                inputs, targets = [inputs for inputs, _ in found], [targets for _, targets in found]
                yield together(inputs), together(_renumbered(inputs, targets) if self._boxes else targets)


def together(pieces: Sequence[Any]) -> Any:
    """One of several: tensors end to end, tuples of them piece by piece."""
    if isinstance(pieces[0], tuple):
        return tuple(together(column) for column in zip(*pieces, strict=True))
    return torch.cat(list(pieces))


def _renumbered(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Boxes whose first number is the image's place in the batch that becomes of these."""
    before, moved = 0, []
    for images, boxes in zip(inputs, targets, strict=True):
        boxes = boxes.clone()
        boxes[:, 0] += before
        before += len(images)
        moved.append(boxes)
    return moved
