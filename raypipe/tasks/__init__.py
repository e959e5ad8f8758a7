"""Tasks: what is learned. `metrics.py` needs no torch; a user's own loss comes in by the group `raypipe.loss`."""

from __future__ import annotations

from raypipe.registry import Registry
from raypipe.tasks.task import Loss, Task

tasks: Registry[Task] = Registry("task", modules=("raypipe.tasks.classification", "raypipe.tasks.tabular"))
losses: Registry[Loss] = Registry("loss", modules=("raypipe.tasks.criteria",))

__all__ = ["Loss", "Task", "losses", "tasks"]
