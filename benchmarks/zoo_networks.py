"""Generators and a U-Net, each small and each with what breaks tools: in-place ReLU, PixelShuffle, attention, skips."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def dcgan(width: int = 64) -> nn.Sequential:
    """Radford et al. 2016, arXiv:1511.06434: noise [N, 100, 1, 1] to images [N, 3, 64, 64]."""
    sizes = [8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(100, sizes[0], 4, bias=False),
        nn.BatchNorm2d(sizes[0]),
        nn.ReLU(True),
    ]
    for wide, narrow in pairwise(sizes):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.block(x)
        return added


def cyclegan(width: int = 64, num_blocks: int = 9) -> nn.Sequential:
    """Zhu et al. 2017, arXiv:1703.10593, appendix 7.2: image to image, [N, 3, H, W] with H and W multiples of 4."""
    return nn.Sequential(
        *(nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU(inplace=True)),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), nn.ReLU(inplace=True)),
        *(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.InstanceNorm2d(4 * width), nn.ReLU(inplace=True)),
        *(_Residual(4 * width) for _ in range(num_blocks)),
        *(nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1), nn.InstanceNorm2d(2 * width), nn.ReLU(inplace=True)),
        *(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), nn.InstanceNorm2d(width), nn.ReLU(inplace=True)),
        *(nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()),
    )


class SuperResolution(nn.Module):
    """Lim et al. 2017 (EDSR), arXiv:1707.02921: [N, 3, H, W] to [N, 3, 4H, 4W], upsampled twice by PixelShuffle."""

    def __init__(self, width: int = 64, num_blocks: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(num_blocks)
        )
        self.fuse = nn.Conv2d(width, width, 3, padding=1)
        upsample = [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        again = [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*upsample, *again, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        stem = y = self.head(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        image: Tensor = self.tail(stem + self.fuse(y))
        return image


class SelfAttention(nn.Module):
    """Attention over positions with a learnt gate, as in SAGAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = spectral_norm(nn.Conv2d(width, width // 8, 1))
        self.key = spectral_norm(nn.Conv2d(width, width // 8, 1))
        self.value = spectral_norm(nn.Conv2d(width, width, 1))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        return x + self.gate * torch.bmm(value, weights.transpose(1, 2)).view_as(x)


def self_attention_generator(width: int = 64) -> nn.Sequential:
    """Zhang et al. 2019 (SAGAN), arXiv:1805.08318: noise [N, 128, 1, 1] to images [N, 3, 64, 64]."""
    sizes = [8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = [nn.ConvTranspose2d(128, sizes[0], 4), nn.BatchNorm2d(sizes[0]), nn.ReLU(True)]
    for wide, narrow in pairwise(sizes):
        conv = spectral_norm(nn.ConvTranspose2d(wide, narrow, 4, 2, 1))
        layers += [conv, nn.BatchNorm2d(narrow), nn.ReLU(True)]
    layers.insert(-3, SelfAttention(2 * width))
    return nn.Sequential(*layers, SelfAttention(width), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


def _double_conv(num_in: int, num_out: int) -> nn.Sequential:
    first = [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(num_out, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second)


class UNet(nn.Module):
    """Ronneberger et al. 2015, arXiv:1505.04597, padded: [N, 3, H, W] to [N, 2, H, W], H and W multiples of 16."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width, 16 * width]
        self.down = nn.ModuleList(_double_conv(a, b) for a, b in zip([3, *sizes], sizes, strict=False))
        pairs = list(pairwise(sizes))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in pairs)
        self.fuse = nn.ModuleList(_double_conv(wide, narrow) for narrow, wide in pairs)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, fuse, skip in zip(self.up, self.fuse, skips[-2::-1], strict=True):
            x = fuse(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits
