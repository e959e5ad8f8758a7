"""Models: one file a family. `flat.py` lays a module's tensors out as the flat vector; `tensors.py` needs no torch."""

from __future__ import annotations

from typing import Any

from raypipe.registry import Registry

# A part is called with (num_outputs, channels, image_size) and returns an nn.Module; naming one costs no torch.
models: Registry[Any] = Registry("model", modules=("raypipe.models.small_cnn", "raypipe.models.torchvision_models"))

__all__ = ["models"]
