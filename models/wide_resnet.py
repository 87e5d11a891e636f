"""Wide residual networks, pre-activation. Zagoruyko and Komodakis 2016, arXiv:1605.07146."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        # A projection reads the activated input, an identity the raw one, as in the authors' code.
        residual: Tensor = out + (x if self.shortcut is None else self.shortcut(activated))
        return residual


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 times `widen` channels; the last two halve the image.

    Args:
        depth: 6n + 4, for n blocks per stage.
        widen: how many times wider than a CIFAR ResNet.
        num_classes: outputs.
        in_channels: image channels; images are [N, in_channels, H, W] with H and W at least 4.

    Raises:
        ValueError: a depth that is not 6n + 4.
    """

    def __init__(self, depth: int, widen: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        num_blocks, remainder = divmod(depth - 4, 6)
        if num_blocks < 1 or remainder:
            raise ValueError(f"wide resnet depth must be 10, 16, 22, ... (6n + 4), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(num_blocks, 16, 16 * widen, stride=1)
        self.layer2 = _stage(num_blocks, 16 * widen, 32 * widen, stride=2)
        self.layer3 = _stage(num_blocks, 32 * widen, 64 * widen, stride=2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.linear = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(num_blocks: int, in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))
