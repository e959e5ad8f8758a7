"""Tasks: what is learned. `metrics.py` and `precision.py` need no torch.

A user's own loss comes in by the entry point group `raypipe.loss`.
"""

from __future__ import annotations

from raypipe.registry import Registry
from raypipe.tasks.task import Loss, Task

MODULES = ("raypipe.tasks.classification", "raypipe.tasks.tabular", "raypipe.tasks.detection")

tasks: Registry[Task] = Registry("task", modules=MODULES)
losses: Registry[Loss] = Registry("loss", modules=("raypipe.tasks.criteria",))

__all__ = ["Loss", "Task", "losses", "tasks"]
