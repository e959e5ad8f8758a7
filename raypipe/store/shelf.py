"""What a store builds once and keeps: opened data sets, decoded images, models bound to their vectors."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from raypipe.data.dataset import StoreData, TableSplit, open_data
from raypipe.errors import ConfigError, StoreClosed, StoreRefused
from raypipe.models import build_for
from raypipe.models.flat import FlatModel, layout_of
from raypipe.models.heads import freeze
from raypipe.store.batches import Examples, Images
from raypipe.store.messages import Plan
from raypipe.store.policy import FILE as POLICY
from raypipe.store.policy import DataSet, Policy, read_policy
from raypipe.store.rows import Rows
from raypipe.store.targets import chosen, targets_of
from raypipe.tasks import Task, tasks

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Stamp: TypeAlias = tuple[tuple[str, int, int], ...]  # of a folder's files: name, bytes, time of change

MODELS = 4  # built models that are kept
NONE_YET_S = 30.0  # a store that has nothing of the task's classes is asked again: the list may have grown


@dataclass(frozen=True, slots=True)
class Learner:
    """A model on its flat vector and the task that it learns."""

    model: FlatModel
    task: Task


def _stamp(folder: Path) -> Stamp:
    """Different when files came, went or changed; nothing for a folder that is not there."""
    try:
        with os.scandir(folder) as entries:
            seen = [(e.name, e.stat()) for e in entries if e.is_file() and not e.name.startswith(".")]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in seen))


class Shelf:
    """`cache_bytes` of decoded images are kept for each data set; what is beyond is decoded for each batch."""

    def __init__(self, policy: Policy, device: torch.device, *, threads: int, cache_bytes: int) -> None:
        self._policy, self._device, self._threads, self._cache_bytes = policy, device, threads, cache_bytes
        self._data: dict[str, StoreData] = {}
        self._stamps: dict[str, Stamp] = {}
        self._images: dict[tuple[Any, ...], Examples] = {}
        self._learners: OrderedDict[str, Learner] = OrderedDict()

    def data(self, name: str) -> StoreData:
        """A data set that the policy offers. Raises ConfigError when it cannot be read."""
        offered = self._policy.data[name]
        stamp = _stamp(offered.folder)
        if name not in self._data or stamp != self._stamps[name]:  # images were added since
            self._data[name] = open_data(offered.folder, name=name, reader=offered.reader)
            self._stamps[name] = stamp
            self._images = {key: images for key, images in self._images.items() if key[0] != name}
        return self._data[name]

    def num_bytes(self, name: str) -> int:
        """Bytes of a data set on the store's disk."""
        return sum(file.stat().st_size for file in self._policy.data[name].folder.rglob("*") if file.is_file())

    def images(self, plan: Plan, task: Task, split: str) -> Examples:
        """Raises StoreRefused: no such split, an empty one, too many broken images, labels that are not the task's."""
        self.data(plan.data)  # forgets what was read of a data set that has changed since
        read = (task.channels, task.image_size, task.table, task.boxes is None)
        listed = (task.num_outputs, task.classes, task.places, task.unknown, task.absent, task.live)
        key = (plan.data, split, read, listed)
        if key not in self._images:
            for old in [k for k in self._images if k[:3] == key[:3]]:  # of an earlier class list
                del self._images[old]
            room = self._cache_bytes - sum(i.num_bytes for k, i in self._images.items() if k[0] == plan.data)
            self._images[key] = self._examples(plan.data, task, split, max(0, room))
        images = self._images[key]
        if not images.total and self.data(plan.data).counts.get(split):
            raise StoreClosed(f"split {split!r} of data set {plan.data!r} has none of the task's classes", NONE_YET_S)
        images.check(self.max_bad_share(plan))
        return images

    def _examples(self, name: str, task: Task, split: str, room: int) -> Examples:
        """A split as the task reads it; of what is decoded so many bytes are kept."""
        data, names = self.data(name), self._policy.data[name].names
        what = f"split {split!r} of data set {name!r}"
        return examples_of(data, names, task, split, what=what, max_bytes=room, threads=self._threads)

    def max_bad_share(self, plan: Plan) -> float:
        """The stricter of the plan and the policy."""
        return min(plan.max_bad_share, self._policy.max_bad_share)

    def learner(self, plan: Plan, weights: Array) -> Learner:
        """The plan's model, not yet loaded. Raises StoreRefused when `weights` are not of its layout."""
        # Its weights come with each ticket: a store never fetches pretrained ones.
        spec = {key: value for key, value in plan.model.items() if key != "pretrained"}
        key = json.dumps([plan.task, spec, plan.trained, plan.local], sort_keys=True)
        if key not in self._learners:
            task = tasks.build(plan.task)
            module: nn.Module = build_for(task, spec)
            freeze(module, plan.trained, task.num_outputs)
            layout = layout_of(module, local=plan.local)
            self._learners[key] = Learner(FlatModel(module, layout, device=self._device), task)
            if len(self._learners) > MODELS:
                self._learners.popitem(last=False)
        self._learners.move_to_end(key)
        layout = self._learners[key].model.layout
        if plan.layout != layout.fingerprint:
            raise StoreRefused("the model built here has another layout than the plan's: the code differs")
        if weights.shape != (layout.size,) or weights.dtype != np.float32:
            raise StoreRefused(f"weights are {weights.dtype} of shape {weights.shape}, not float32 ({layout.size},)")
        return self._learners[key]


def examples_of(
    data: StoreData, names: Mapping[str, str], task: Task, split: str, *, what: str, max_bytes: int, threads: int
) -> Examples:
    """A split as the task reads it; `names`: classes as the store calls them -> as federations do. Raises StoreRefused.

    `what`: the split, for messages; of what is decoded so many bytes are kept.
    """
    opened = data.split(split)
    if (task.table is not None) != isinstance(opened, TableSplit):
        holds, needs = ("rows of a table", "labelled images") if task.table is None else ("images", "rows")
        raise StoreRefused(f"{what} holds {holds}, the task needs {needs}")
    if task.table is not None:
        return Rows(opened, task, task.table, what=what, max_bytes=max_bytes, threads=threads)
    classes = tuple(names.get(own, own) for own in data.classes)
    opened = chosen(opened, classes, task)
    targets, labelled = targets_of(opened, classes, task, what), task.labelled(classes)
    return Images(opened, targets, task, what=what, max_bytes=max_bytes, threads=threads, labelled=labelled)


def training_images(folder: Path, task: Task) -> tuple[Examples, float]:
    """The training split of a data set's folder, and the share of it that may be unreadable.

    In the words and by the reader of the policy two folders up, as a store's own site reads it, where one names it.
    Raises ConfigError, StoreRefused.
    """
    if not folder.is_dir():
        raise ConfigError("no such folder; a store's data set lies in STORE/data/NAME")
    home = folder.absolute().parent.parent
    policy = read_policy(home) if (home / POLICY).is_file() else Policy(store="here")
    own = [offered for offered in policy.data.values() if offered.folder.resolve() == folder.resolve()]
    offered = own[0] if own else DataSet(folder=folder)
    data = open_data(folder, name=folder.name, reader=offered.reader)
    what = f"split 'train' of data set {folder.name!r}"
    examples = examples_of(data, offered.names, task, "train", what=what, max_bytes=0, threads=1)
    examples.check(policy.max_bad_share)
    return examples, policy.max_bad_share
