"""Detectors of the package ultralytics behind the extra `raypipe[ultralytics]`, by the name of their architecture.

AGPL-3.0. Nothing of it is part of raypipe or needed by it: it is imported where a run asks for it, and the run says so.
`yolov5n.yaml` there is YOLOv5u, with another head than the published YOLOv5, which is `yolov5n` in yolov5.py.

Each run builds its architecture from nothing and without the package's trainer, whose callbacks send statistics.
The package is told to stay off line, and keeps its settings in a folder that ends with the process; the user's own,
wherever they lie, stay as they are.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from raypipe.errors import ConfigError
from raypipe.models import models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signature without torch
    Module: TypeAlias = Any

LICENCE = (
    "this run uses ultralytics, AGPL-3.0: who passes the trained system on, or offers it over a network, owes its "
    "users the whole source"
)
File: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9-]+\.yaml$")]  # in the package; no path


@models("ultralytics")
def ultralytics(num_outputs: int, channels: int, image_size: int, *, architecture: File = "yolov5n.yaml") -> Module:
    """yolov5n.yaml: 2.7 million parameters for 80 classes; yolov8n.yaml, yolo11n.yaml and so on."""
    _quietly()
    try:
        from raypipe.models.ultralytics_adapter import Ultralytics
    except ImportError:
        raise ConfigError(
            "model ultralytics is in a package that is not installed: install raypipe[ultralytics] (AGPL-3.0) on the "
            "head and at every store, or take yolov5n"
        ) from None
    if image_size % 32:
        raise ConfigError(f"model ultralytics needs an image_size that is a multiple of 32, found {image_size}")
    try:
        return Ultralytics(architecture, num_outputs, channels)
    except FileNotFoundError:
        raise ConfigError(
            f"model.architecture: ultralytics has no {architecture}; one that it has: yolov5n.yaml"
        ) from None


ultralytics.licence = LICENCE  # type: ignore[attr-defined]  # see `licence_of`


def _quietly() -> None:
    """Before its first import: no look-ups, no settings in the user's home, nothing sent."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "YOLO_CONFIG_DIR": _own_folder()}


@cache
def _own_folder() -> str:
    """One a process: a folder that the user has named holds settings of theirs, which are not ours to change."""
    folder = tempfile.mkdtemp(prefix="raypipe-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
