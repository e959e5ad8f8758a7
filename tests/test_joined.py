"""Several stores' examples as one's, for the pooled opponent."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from raypipe.store.batches import Indices
from raypipe.store.joined import Joined

CPU = torch.device("cpu")


class Part:
    """Examples first, first + 1, ...; each with as many boxes as its number modulo 3, labelled by that number."""

    labelled = None

    def __init__(self, first: int, num: int, bad: set[int]) -> None:
        self.first, self.num, self.total, self.num_bytes, self.bad = first, num, num + len(bad), num, bad

    def check(self, max_bad_share: float) -> None: ...

    def batches(
        self, picks: Iterable[Indices], device: torch.device, max_bad_share: float
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        for pick in picks:
            ids = torch.from_numpy(pick) + self.first
            rows = [(place, float(i)) for place, i in enumerate(ids.tolist()) for _ in range(i % 3)]
            yield ids, torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)


def test_a_batch_draws_from_all_and_boxes_follow_their_images() -> None:
    joined = Joined([Part(0, 5, set()), Part(100, 4, {2}), Part(200, 1, set())], boxes=True)
    assert (joined.num, joined.total, joined.bad) == (10, 11, {5 + 2})
    picks = [np.array([8, 0, 4, 5]), np.array([9, 1, 2, 3, 6, 7])]
    seen: list[int] = []
    for images, boxes in joined.batches(iter(picks), CPU, 0.0):
        seen += images.tolist()
        owners = images[boxes[:, 0].long()]
        assert owners.tolist() == boxes[:, 1].tolist()
        assert len(boxes) == sum(i % 3 for i in images.tolist())
    assert sorted(seen) == [*range(5), *range(100, 104), 200]


def test_rows_of_two_tensors_are_joined_piece_by_piece() -> None:
    class Rows(Part):
        def batches(self, picks, device, max_bad_share):  # type: ignore[no-untyped-def, override]
            for ids, _ in super().batches(picks, device, max_bad_share):
                yield (ids, ids * 2), ids

    joined = Joined([Rows(0, 3, set()), Rows(10, 3, set())])
    ((inputs, targets),) = joined.batches([np.arange(6)], CPU, 0.0)
    assert (targets * 2).tolist() == inputs[1].tolist() == [0, 2, 4, 20, 22, 24]
