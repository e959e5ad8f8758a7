"""Models: one file a family. `flat.py` lays a module's tensors out as the flat vector; `tensors.py` needs no torch."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from raypipe.errors import ConfigError
from raypipe.registry import Registry, Spec

if TYPE_CHECKING:
    from raypipe.tasks import Task

MODULES = (
    "raypipe.models.small_cnn",
    "raypipe.models.torchvision_models",
    "raypipe.models.tables",
    "raypipe.models.efficientnet",
    "raypipe.models.torchvision_detectors",
    "raypipe.models.yolov5",
    "raypipe.models.ultralytics_yolo",
)
DETECTORS = (  # as models/detector.py says
    *(f"yolov5{scale}" for scale in "nsmlx"),
    *("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "ultralytics"),
)

# A part is called with (num_outputs, channels, image_size) and returns an nn.Module; naming one costs no torch.
# One that reads table columns takes their number as a fourth, and has them as the module's last argument.
models: Registry[Any] = Registry("model", modules=MODULES)


def build(
    spec: Spec, num_outputs: int, channels: int, image_size: int, columns: int = 0, *, boxes: bool = False
) -> Any:
    """A model for what a task reads. Raises ConfigError where the model reads something else."""
    name = spec["name"]
    places = [p for p in inspect.signature(models.get(name)).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if columns and len(places) < 4:
        raise ConfigError(f"model {name} reads images only, the task's rows have columns: take two_towers or mlp")
    if not columns and len(places) > 3:
        raise ConfigError(f"model {name} reads table columns, and the task has none")
    module = models.build(spec, num_outputs, channels, image_size, *((columns,) if columns else ()))
    if boxes != (hasattr(module, "detect") and hasattr(module, "loss")):
        raise ConfigError(f"model {name} finds {'no boxes' if boxes else 'boxes'}, which is not what the task needs")
    return module


def build_for(task: Task, spec: Spec) -> Any:
    """A model for this task; see `build`."""
    shape = (task.num_outputs, task.channels, task.image_size, task.columns)
    return build(spec, *shape, boxes=task.boxes is not None)


def licence_of(spec: Spec) -> str:
    """What a run must say and record of a model from elsewhere; empty for most."""
    said: str = getattr(models.get(spec["name"]), "licence", "")
    return said


__all__ = ["DETECTORS", "build", "build_for", "licence_of", "models"]
