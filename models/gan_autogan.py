"""AutoGAN's three generators, found by search; their discriminator is SNGAN's.

Source: Gong et al. 2019, arXiv:1908.03835; cells as in the authors' released networks A, B and C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.models.gan_blocks import doubled, init_xavier, pyramid


@dataclass(frozen=True)
class Cell:
    """What the search decides of a cell: how it doubles the image ("nearest" or "bilinear"), and which parts it has."""

    mode: str
    shortcut: bool
    norm: bool = False


A = (Cell("nearest", True), Cell("bilinear", True), Cell("nearest", False))
B = (Cell("nearest", True), Cell("nearest", True), Cell("nearest", True))
C = (Cell("nearest", True, norm=True), Cell("bilinear", True), Cell("nearest", False))


class AutoGANCell(nn.Module):
    """[BN-]ReLU-double-conv-[+ skips]-[BN-]ReLU-conv beside an optional double-conv1x1.

    `skips` are what earlier cells hand on: convolved, and resized to this cell's. Returns what the cell computes,
    [N, ch, 2H, 2W], and what it hands on itself, the sum with the skips, of the same shape.
    """

    def __init__(self, ch: int, cell: Cell, *, num_skips: int) -> None:
        super().__init__()
        self.mode = cell.mode
        self.norm1 = nn.BatchNorm2d(ch) if cell.norm else nn.Identity()
        self.conv1 = nn.Conv2d(ch, ch, 3, padding=1)
        self.skips = nn.ModuleList(nn.Conv2d(ch, ch, 1) for _ in range(num_skips))
        self.norm2 = nn.BatchNorm2d(ch) if cell.norm else nn.Identity()
        self.conv2 = nn.Conv2d(ch, ch, 3, padding=1)
        self.shortcut = nn.Conv2d(ch, ch, 1) if cell.shortcut else None

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        inner = self.conv1(doubled(F.relu(self.norm1(x)), mode=self.mode))
        for conv, skip in zip(self.skips, skips, strict=True):
            inner += conv(F.interpolate(skip, size=inner.shape[2:], mode=self.mode))
        out = self.conv2(F.relu(self.norm2(inner)))
        if self.shortcut is not None:
            out += self.shortcut(doubled(x, mode=self.mode))
        return out, inner


class AutoGANGenerator(nn.Module):
    """Noise [N, z] -> images in [-1, 1].

    Args:
        cells: one for each time that the image is doubled, at least; the last ones are not used for smaller images.
        ch: channels of every cell.
        image_size: height and width, as `pyramid` takes them.

    Raises:
        ValueError: images too large for that many cells.
    """

    def __init__(
        self, cells: Sequence[Cell], *, z: int = 128, ch: int = 256, image_size: int = 32, image_channels: int = 3
    ) -> None:
        super().__init__()
        self.side, num_cells = pyramid(image_size)
        if num_cells > len(cells):
            raise ValueError(f"image size {image_size} needs {num_cells} cells, the network has {len(cells)}")
        self.linear = nn.Linear(z, ch * self.side**2)
        self.cells = nn.ModuleList(
            AutoGANCell(ch, cell, num_skips=number) for number, cell in enumerate(cells[:num_cells])
        )
        self.norm = nn.BatchNorm2d(ch)
        self.conv = nn.Conv2d(ch, image_channels, 3, padding=1)
        init_xavier(self)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))
        skips: list[Tensor] = []
        for cell in self.cells:
            x, skip = cell(x, skips)
            skips.append(skip)
        return torch.tanh(self.conv(F.relu(self.norm(x))))
