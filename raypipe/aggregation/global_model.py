"""The global model at the coordinator: its weights, the open sum, the server transform. Nothing else is as large.

Memory: weights + transform state + 2 update vectors (the sum's front and back), for ten stores as for a hundred, and
beside it a few updates that lie in the object store still (fold.py); with control variates one vector more for each
store, and a second one while its next waits for the version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from raypipe.aggregation.fold import Accumulator, Mean, Weighted
from raypipe.aggregation.transforms import AVERAGE, Transform, apply, averaged
from raypipe.aggregation.variates import Learned, Reach, Variate, Variates, derived
from raypipe.errors import RunError, UpdateRejected
from raypipe.models.growth import Form, Growth, padded
from raypipe.types import Layout
from raypipe.update.codec import decode_chain


class GlobalModel:
    """Folds encoded updates and steps from version to version. Not for two threads at once."""

    def __init__(
        self,
        layout: Layout | Form,
        weights: np.ndarray,
        transform: Transform,
        *,
        how: list[dict[str, Any]],
        normalise: Literal["sum", "k"],
        threads: int | None,
        reach: Reach | None = None,
    ) -> None:
        """`reach`: stores are given control variates, and this is how far their steps go."""
        self._transform, self._threads = transform, threads
        self._shape(layout if isinstance(layout, Form) else Form(layout), np.array(weights, dtype=np.float32))
        self._how: list[dict[str, Any]] = how
        self._normalise = normalise
        self._reach = reach
        self.variates: Variates | None = None if reach is None else Variates()
        self._notes: dict[str, Variate] = {}  # of the open version

    def _shape(self, form: Form, weights: np.ndarray) -> None:
        """Have everything in this form; the transform begins anew."""
        self.form, self._weights = form, torch.from_numpy(weights)
        self._state = self._transform.init(form.layout.shared.stop)
        self._sum = Accumulator(form.layout, threads=self._threads)
        self._partial: list[tuple[float, np.ndarray]] = []  # weights of updates that do not speak of all classes
        self._total = 0.0  # of the open sum

    @property
    def layout(self) -> Layout:
        """Of the newest version."""
        return self.form.layout

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
        """The running average of the versions as a whole vector of its own; None where the transform has none (yet)."""
        if AVERAGE not in self._state or not self._state["versions"]:
            return None
        return averaged(self._weights, self.layout, self._state[AVERAGE]).numpy()

    def grow(self, growth: Growth) -> None:
        """Between two versions, the open sum empty: the newest version, and all that goes with it, in a wider form.

        What the server's transform remembers of new classes is what it begins with; an average begins as they do.
        """
        if growth.new.layout == growth.old.layout:  # classes were merged or retired
            self.form = growth.new
            return
        before, size = self.state, growth.old.layout.shared.stop
        self._shape(growth.new, growth.weights(self.vector))
        for name, tensor in self._state.items():
            old = before[name]
            if old.shape != (size,):
                tensor.copy_(torch.from_numpy(old))
            elif name == AVERAGE:
                whole = np.zeros(growth.old.layout.size, np.float32)
                whole[:size] = old
                tensor.copy_(torch.from_numpy(growth.weights(whole)[: tensor.numel()]))
            else:
                growth.spread(old, tensor.numpy())

    def restore(
        self,
        weights: np.ndarray,
        state: Mapping[str, np.ndarray],
        form: Form | None = None,
        variates: Variates | None = None,
    ) -> None:
        """Be as after that version, which had this form. Raises RunError when the state is not this transform's."""
        if form is not None and form is not self.form:
            self._shape(form, np.zeros(form.layout.size, np.float32))
        if {k: v.shape for k, v in state.items()} != {k: tuple(v.shape) for k, v in self._state.items()}:
            raise RunError("the saved state of the server's transform is another transform's")
        self._weights.copy_(torch.from_numpy(weights))
        for name, tensor in self._state.items():
            tensor.copy_(torch.from_numpy(np.array(state[name])))
        if self._reach is not None:
            self.variates = variates or Variates()
        self._notes.clear()

    def fold(
        self,
        portions: Sequence[tuple[np.ndarray, float, int | None]],
        forms: Sequence[Form] | None = None,
        learned: Sequence[Learned | None] = (),
    ) -> dict[int, str]:
        """Add encoded updates (array, weight, steps to normalise by) in order; index -> reason of those refused.

        `forms`: of the versions that they were trained from; None: the newest one's. `learned`: of each, where stores
        are given control variates, what its own is derived from.
        """
        refused: dict[int, str] = {}
        ready: dict[int, Weighted] = {}
        for index, (array, weight, steps) in enumerate(portions):
            try:
                form = self.form if forms is None else forms[index]
                vector = padded(decode_chain(self._how, array, form.layout.update_size), form, self.form)
                borrowed = vector is array and not array.flags.writeable  # else it came in pieces, into this process
                ready[index] = Weighted(vector, weight, 1.0 / steps if steps else 1.0, borrowed=borrowed)
            except UpdateRejected as error:
                refused[index] = error.message
        places = list(ready)
        for place in self._sum.fold([ready[index] for index in places]):
            refused[places[place]] = "the update is not finite"
        for index, what in enumerate(learned):
            if what is not None and index not in refused:
                self._note(ready[index].vector, what)
        for index in [index for index in places if index not in refused]:
            self._total += ready[index].weight
            if (said := self.form.said(ready[index].vector)) is not None:
                self._partial.append((ready[index].weight, said))
        return refused

    def _note(self, update: np.ndarray, learned: Learned) -> None:
        assert self._reach is not None
        reach = self._reach(learned.steps, learned.progress)
        if (variate := derived(update[self.layout.shared], learned, reach)) is not None:
            self._notes[learned.sent.store] = variate

    def _heard(self, mean: Mean) -> Mean:
        """Each class's rows as the mean over the updates that speak of it; see models/growth.py."""
        partial, total, self._partial, self._total = self._partial, self._total, [], 0.0
        if not partial or not total:
            return mean
        silent = np.sum([weight * ~said for weight, said in partial], axis=0)
        factor = np.where(silent < total * (1 - 1e-9), total / np.maximum(total - silent, 1e-30), 1.0)
        shared = mean.shared.numpy()
        for row in self.form.rows:
            row.of(shared)[:, row.before :] *= factor.astype(np.float32)[:, None]
        return replace(mean, norm=float(torch.linalg.vector_norm(mean.shared)))

    def step(self, full_weight: float, statistic_mix: float) -> float:
        """Make the next version of the sum; the norm of the aggregated step."""
        mean = self._heard(self._sum.take(normalise=self._normalise, expected=full_weight))
        apply(self._weights, mean, self.layout, self._transform, self._state, statistic_mix)
        if self.variates is not None:
            self.variates = self.variates.moved(self._notes)
            self._notes = {}
        return mean.norm
