"""The module of `two_towers`; a file of its own since it needs torch, and a class that can be found again by name."""

from __future__ import annotations

from torch import Tensor, cat, nn


class TwoTowers(nn.Module):
    """`image` reads (n, channels, size, size), `table` (n, columns); `head` what both say, side by side."""

    def __init__(self, image: nn.Module, table: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.image, self.table, self.head = image, table, head

    def forward(self, images: Tensor, table: Tensor) -> Tensor:
        seen = nn.functional.relu(self.image(images))
        outputs: Tensor = self.head(cat([seen, self.table(table)], 1))
        return outputs
