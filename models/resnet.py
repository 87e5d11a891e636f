"""Residual networks for small images. He et al. 2016, arXiv:1512.03385, section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Option A: every second pixel, new channels filled with zeros; no parameters."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [N, C, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels and projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        elif in_channels != out_channels:
            self.shortcut = ZeroPadShortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of basic blocks, `width`, 2 and 4 times `width` channels; the last two halve the image.

    Args:
        depth: 6n + 2, for n blocks per stage.
        width: channels of the stem and the first stage.
        projection: option B shortcuts (1x1 convolution and BatchNorm) instead of option A (zero padding).
        num_classes: outputs.
        in_channels: image channels; images are [N, in_channels, H, W] with H and W at least 4.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        projection: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        num_blocks, remainder = divmod(depth - 2, 6)
        if num_blocks < 1 or remainder:
            raise ValueError(f"resnet depth must be 8, 14, 20, ... (6n + 2), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(num_blocks, width, width, stride=1, projection=projection)
        self.layer2 = _stage(num_blocks, width, 2 * width, stride=2, projection=projection)
        self.layer3 = _stage(num_blocks, 2 * width, 4 * width, stride=2, projection=projection)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(num_blocks: int, in_channels: int, out_channels: int, *, stride: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, projection)
    rest = [BasicBlock(out_channels, out_channels, 1, projection) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)
