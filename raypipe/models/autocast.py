"""Half precision where a device has it: forward passes run in it, losses do not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import device as Device


def full_precision(device: Device) -> AbstractContextManager[object]:
    """Inside of autocast; nothing on a CPU, which knows none."""
    if device.type == "cpu":
        return nullcontext()
    import torch

    return torch.autocast(device.type, enabled=False)
