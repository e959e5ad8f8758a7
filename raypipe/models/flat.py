"""A module whose float tensors are views into one flat vector: to load a base is one copy, a delta one subtraction.

Gradients stay as autograd hands them over, a tensor a parameter: gathered into a flat vector of their own they cost
4 ms of a ResNet-18 step of 155 ms more, and as much memory as the weights (measured on one core, torch 2.14, batch 32).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raypipe.errors import ConfigError
from raypipe.models import build
from raypipe.models.heads import Trained, freeze
from raypipe.models.on_cpu import fastest_on_cpu
from raypipe.models.personal import Local, with_local
from raypipe.models.tensors import Array, state_dict_from, vector_from
from raypipe.registry import Spec
from raypipe.types import Entry, Layout, Role

BLOCK = 1 << 17  # floats: half a MiB
PIXELS_A_WEIGHT = 1 / 64  # of a batch, for each weight of its convolutions, from which on channels last pays on a CPU

__all__ = ["FlatModel", "flatten", "initial", "layout_of", "state_dict_from", "vector_from"]


def layout_of(
    module: nn.Module, *, frozen: Sequence[str] = (), statistics: Sequence[str] = (), local: Local = None
) -> Layout:
    """The table of a module's tensors. `frozen`, `statistics`: patterns of names, as in fnmatch. `local`: personal.py.

    Parameters are shared, or frozen when they need no gradient; means and variances of a norm layer are statistics,
    or frozen with its affine weights; other buffers are fixed. A tied parameter has one entry, buffers that are not
    part of the state dict have none.
    """

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    norms = dict(_norm_statistics(module))

    def role(name: str, tensor: Tensor) -> Role:
        if isinstance(tensor, nn.Parameter):
            return Role.SHARED if tensor.requires_grad and not matches(name, frozen) else Role.FROZEN
        if matches(name, frozen) or norms.get(name) is False:
            return Role.FROZEN
        if tensor.is_floating_point() and (name in norms or matches(name, statistics)):
            return Role.STATISTIC
        return Role.FIXED

    rows = [(n, tuple(t.shape), _dtype(n, t), role(n, t)) for n, t in _tensors(module)]
    return Layout.of(with_local(module, rows, local))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict().keys()
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _norm_statistics(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of running means and variances, and whether they may move."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            moves = part.weight is None or part.weight.requires_grad
            dot = f"{name}." if name else ""
            yield from ((f"{dot}running_mean", moves), (f"{dot}running_var", moves))


def _dtype(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if isinstance(tensor, nn.Parameter) and dtype != "float32":
        raise ConfigError(f"parameter {name!r} is {dtype}; weights that are trained must be float32")
    if not hasattr(np, dtype):
        raise ConfigError(f"buffer {name!r} is {dtype}, which numpy cannot hold")
    return dtype


def flatten(module: nn.Module, layout: Layout) -> Array:
    """The module's tensors as a new vector of float32."""
    vector = np.zeros(layout.size, np.float32)
    tensors = dict(_tensors(module))
    for entry in layout.entries:
        vector[entry.slice] = tensors[entry.name].detach().cpu().reshape(-1).numpy()
    return vector


def initial(
    model: Spec,
    num_outputs: int,
    channels: int,
    image_size: int,
    seed: int,
    columns: int = 0,
    trained: Trained = "all",
    *,
    boxes: bool = False,
    local: Local = None,
) -> tuple[Layout, Array]:
    """A new model's layout and its weights: equal for equal seeds, the process's own random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = build(model, num_outputs, channels, image_size, columns, boxes=boxes)
    freeze(module, trained, num_outputs)
    layout = layout_of(module, local=local)
    return layout, flatten(module, layout)


def with_head(layout: Layout, vector: Array, name: str, head: Array) -> Array:
    """A copy of the vector whose dense layer `name` is `head`, (inputs + 1, outputs), its last row the bias."""
    places = {entry.name: entry.slice for entry in layout.entries}
    changed = vector.copy()
    changed[places[f"{name}.weight"]] = head[:-1].T.reshape(-1)
    changed[places[f"{name}.bias"]] = head[-1]
    return changed


class FlatModel:
    """A module bound to one vector. `trained`: views into it for a local optimizer: shared parameters, then local."""

    def __init__(self, module: nn.Module, layout: Layout, *, device: torch.device | str = "cpu") -> None:
        self.module = module.to(device)
        fastest_on_cpu(self.module)
        self.layout = layout
        self.device = torch.device(device)
        self.vector = torch.zeros(layout.size, device=self.device)
        # One page-locked copy at the host, through which vectors come and go; on the CPU it is the vector itself.
        self._host = self.vector if self.device.type == "cpu" else torch.zeros(layout.size, pin_memory=True)
        self.trained: list[nn.Parameter] = []
        self._copied: list[tuple[Entry, Tensor]] = []  # not float32: cannot be views, copied in
        tensors = dict(_tensors(self.module))
        for entry in layout.entries:
            self._bind(entry, tensors[entry.name])
        moving = {e.name for e in layout.entries if e.role in (Role.STATISTIC, Role.LOCAL)}
        norms = [(n, m) for n, m in self.module.named_modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._norms = [m for _, m in norms]
        self._still = [m for n, m in norms if (f"{n}." if n else "") + "running_mean" not in moving]
        self.has_batch_norm = len(norms) > len(self._still)
        self._conv_weights = sum(m.weight.numel() for m in self.module.modules() if isinstance(m, nn.Conv2d))

    def _bind(self, entry: Entry, tensor: Tensor) -> None:
        if tensor.dtype != torch.float32:
            self._copied.append((entry, tensor))
            return
        view = self.vector[entry.slice].view(entry.shape)
        view.copy_(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            tensor.data = view
            tensor.requires_grad_(entry.role in (Role.SHARED, Role.LOCAL))
            if tensor.requires_grad:
                self.trained.append(tensor)
        else:
            owner, _, leaf = entry.name.rpartition(".")
            self.module.get_submodule(owner)._buffers[leaf] = view

    @property
    def own(self) -> Tensor:
        """The local entries, a view: float32, of `layout.local`."""
        return self.vector[self.layout.local]

    @property
    def moving_norms(self) -> list[_NormBase]:
        """Layers of BatchNorm whose statistics are not frozen."""
        return [norm for norm in self._norms if norm not in self._still]

    def load(self, base: Array) -> None:
        """Take a version's whole vector; `base` may be read-only shared memory."""
        np.copyto(self._host.numpy(), base)
        if self._host is not self.vector:
            self.vector.copy_(self._host, non_blocking=True)
        for entry, tensor in self._copied:
            tensor.copy_(torch.tensor(base[entry.slice]).view(entry.shape))

    def update(self, base: Array, out: Array | None = None) -> tuple[Array, bool]:
        """A vector of `layout.update_size`, `out` if given: shared entries as local - base, statistics as values.
        And whether all of it is finite: looked at block by block, while a block is in the core's own cache.

        Of a variance the second moment about the base's mean is sent: the mean of those, less the square of how far
        the mean itself has moved, is the variance over all stores' images, the spread between stores included.
        """
        size, shared = self.layout.update_size, self.layout.shared
        if self._host is not self.vector:
            self._host[:size].copy_(self.vector[:size])
        local = self._host.numpy()
        update = np.empty(size, np.float32) if out is None else out
        total, looked_at = 0.0, torch.from_numpy(update)
        with np.errstate(all="ignore"):
            for start in range(0, shared.stop, BLOCK):
                block = slice(start, min(start + BLOCK, shared.stop))
                np.subtract(local[block], base[block], out=update[block])
                total += float(looked_at[block].sum())
            update[shared.stop :] = local[shared.stop : size]
            for mean, variance in self.layout.moments:
                update[variance] += np.square(update[mean] - base[mean])
            total += float(looked_at[shared.stop :].sum())
        return update, math.isfinite(total)

    def train(self, *, fixed: bool = False) -> None:
        """Training mode, but for norm layers whose statistics are frozen; `fixed`: those of all.

        A batch of one store is normalised by that store's own statistics while it trains, by all stores' when it is
        judged. With fixed ones it trains as it is judged: FixBN, Zhong et al. 2023, arXiv:2303.06530, second stage.
        """
        self.module.train()
        for norm in self._norms if fixed else self._still:
            norm.eval()

    def eval(self) -> None:
        self.module.eval()

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Images with their channels last in memory, as convolutions read them fastest.

        On a CPU weights, which lie as PyTorch has them, are turned round in each pass. Measured on one core, a step:
        small CNN -27 %, EfficientNet-lite0 at 96 pixels -31 %, YOLOv5n at 160 -20 %, ResNet-18 at 224 -15 %; but
        ResNet-18 of 32 images of 32 pixels, whose weights are many and images small, +30 %: there they stay.
        """
        if inputs.ndim != 4:
            return inputs
        pixels = inputs.shape[0] * inputs.shape[2] * inputs.shape[3]
        if self.device.type == "cpu" and pixels < PIXELS_A_WEIGHT * self._conv_weights:
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in self.trained:
            parameter.grad = None
