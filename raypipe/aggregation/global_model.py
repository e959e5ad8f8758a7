"""The global model at the coordinator: its weights, the open sum, the server transform. Nothing else is as large.

Memory: weights + transform state + 2 update vectors (the sum's front and back), for ten stores as for a hundred;
with control variates one vector more for each store, and a second one while its next waits for the version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from raypipe.aggregation.fold import Accumulator, Weighted
from raypipe.aggregation.transforms import AVERAGE, Transform, apply, averaged
from raypipe.aggregation.variates import Learned, Reach, Variate, Variates, derived
from raypipe.errors import RunError, UpdateRejected
from raypipe.types import Layout
from raypipe.update.codec import decode_chain


class GlobalModel:
    """Folds encoded updates and steps from version to version. Not for two threads at once."""

    def __init__(
        self,
        layout: Layout,
        weights: np.ndarray,
        transform: Transform,
        *,
        how: list[dict[str, Any]],
        normalise: Literal["sum", "k"],
        threads: int | None,
        reach: Reach | None = None,
    ) -> None:
        """`reach`: stores are given control variates, and this is how far their steps go."""
        self.layout = layout
        self._weights = torch.from_numpy(np.array(weights, dtype=np.float32))
        self._transform, self._state = transform, transform.init(layout.shared.stop)
        self._sum = Accumulator(layout, threads=threads)
        self._how: list[dict[str, Any]] = how
        self._normalise = normalise
        self._reach = reach
        self.variates: Variates | None = None if reach is None else Variates()
        self._notes: dict[str, Variate] = {}  # of the open version

    @property
    def vector(self) -> np.ndarray:
        """The newest version's weights, float32 (layout.size,); changes with the next step."""
        return self._weights.numpy()

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The server transform's state, as it is after the newest version; changes with the next step."""
        return {name: tensor.numpy() for name, tensor in self._state.items()}

    @property
    def average(self) -> np.ndarray | None:
        """The running average of the versions as a whole vector of its own; None where the transform keeps none."""
        if AVERAGE not in self._state:
            return None
        return averaged(self._weights, self.layout, self._state[AVERAGE]).numpy()

    def restore(self, weights: np.ndarray, state: Mapping[str, np.ndarray], variates: Variates | None = None) -> None:
        """Be as after that version. Raises RunError when the state is not this transform's."""
        if {k: v.shape for k, v in state.items()} != {k: tuple(v.shape) for k, v in self._state.items()}:
            raise RunError("the saved state of the server's transform is another transform's")
        self._weights.copy_(torch.from_numpy(weights))
        for name, tensor in self._state.items():
            tensor.copy_(torch.from_numpy(np.array(state[name])))
        if self._reach is not None:
            self.variates = variates or Variates()
        self._notes.clear()

    def fold(
        self, portions: Sequence[tuple[np.ndarray, float, int | None]], learned: Sequence[Learned | None] = ()
    ) -> dict[int, str]:
        """Add encoded updates (array, weight, steps to normalise by) in order; index -> reason of those refused.

        `learned`: of each, where stores are given control variates, what its own is derived from.
        """
        refused: dict[int, str] = {}
        ready: dict[int, Weighted] = {}
        for index, (array, weight, steps) in enumerate(portions):
            try:
                vector = decode_chain(self._how, array, self.layout.update_size)
                ready[index] = Weighted(vector, weight, 1.0 / steps if steps else 1.0)
            except UpdateRejected as error:
                refused[index] = error.message
        places = list(ready)
        for place in self._sum.fold([ready[index] for index in places]):
            refused[places[place]] = "the update is not finite"
        for index, what in enumerate(learned):
            if what is not None and index not in refused:
                self._note(ready[index].vector, what)
        return refused

    def _note(self, update: np.ndarray, learned: Learned) -> None:
        assert self._reach is not None
        reach = self._reach(learned.steps, learned.progress)
        if (variate := derived(update[self.layout.shared], learned, reach)) is not None:
            self._notes[learned.sent.store] = variate

    def step(self, full_weight: float, statistic_mix: float) -> float:
        """Make the next version of the sum; the norm of the aggregated step."""
        mean = self._sum.take(normalise=self._normalise, expected=full_weight)
        apply(self._weights, mean, self.layout, self._transform, self._state, statistic_mix)
        if self.variates is not None:
            self.variates = self.variates.moved(self._notes)
            self._notes = {}
        return mean.norm
