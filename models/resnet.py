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
    """Stages `layer1`, `layer2`, ... of basic blocks; each after the first doubles the channels and halves the image.

    Args:
        depth: 2 n num_stages + 2, for n blocks per stage.
        width: channels of the first stage.
        stem_width: channels of the stem; as many as the first stage's unless given.
        num_stages: 3 in the paper; small images take fewer.
        projection: option B shortcuts (1x1 convolution and BatchNorm) instead of option A (zero padding).
        num_classes: outputs.
        in_channels: image channels; images are [N, in_channels, H, W] with H and W at least 4.

    Raises:
        ValueError: a depth of another form.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        stem_width: int | None = None,
        num_stages: int = 3,
        projection: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        num_blocks, remainder = divmod(depth - 2, 2 * num_stages)
        if num_blocks < 1 or remainder:
            raise ValueError(f"resnet depth with {num_stages} stages must be {2 * num_stages}n + 2, got {depth}")
        stem_width = stem_width or width
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        widths = [width * 2**stage for stage in range(num_stages)]
        self.stages = [f"layer{stage + 1}" for stage in range(num_stages)]
        for stage, (before, after) in enumerate(zip([stem_width, *widths], widths, strict=False)):
            blocks = _stage(num_blocks, before, after, stride=2 if stage else 1, projection=projection)
            self.add_module(self.stages[stage], blocks)
        self.linear = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            out = self.get_submodule(stage)(out)
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(num_blocks: int, in_channels: int, out_channels: int, *, stride: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, projection)
    rest = [BasicBlock(out_channels, out_channels, 1, projection) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)
