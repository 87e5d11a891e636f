"""Residual generators of small images, and the GANs that differ only in how they condition and normalise them.

Noise [N, z] (and class indices, int64 [N]) to images in [-1, 1]. `ch` is the number of channels of every block; sizes
by default are those for CIFAR-10, and `image_size` is as `pyramid` takes it.

Sources: Miyato et al. 2018 (SNGAN), arXiv:1802.05957, table 4; Gulrajani et al. 2017 (WGAN-GP), arXiv:1704.00028;
Odena et al. 2017 (ACGAN), arXiv:1610.09585; Miyato and Koyama 2018 (ProjGAN), arXiv:1802.05637; Zhang et al. 2019
(SAGAN), arXiv:1805.08318.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from sparsekit.models.gan_blocks import (
    EPS,
    ConditionalBatchNorm2d,
    SelfAttention,
    doubled,
    init_orthogonal,
    init_xavier,
    pyramid,
    spectrally_normed,
)


class GeneratorBlock(nn.Module):
    """norm-ReLU-double-conv-norm-ReLU-conv beside double-conv1x1: [N, ch, H, W] -> [N, ch, 2H, 2W]."""

    def __init__(self, ch: int, norm: Callable[[int], nn.Module], *, inplace: bool) -> None:
        super().__init__()
        self.norm1 = norm(ch)
        self.conv1 = nn.Conv2d(ch, ch, 3, padding=1)
        self.norm2 = norm(ch)
        self.conv2 = nn.Conv2d(ch, ch, 3, padding=1)
        self.shortcut = nn.Conv2d(ch, ch, 1)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        residual = self.conv1(doubled(self.relu(self.norm1(x, *condition))))
        residual = self.conv2(self.relu(self.norm2(residual, *condition)))
        out: Tensor = residual + self.shortcut(doubled(x))
        return out


class ResNetTrunk(nn.Module):
    """What the residual generators share.

    Args:
        norm: number of channels -> normalisation inside the blocks.
        z: features of the noise that the first layer reads.
        attention: attend to positions at half the image's size, in front of the last block.
        eps: of the last BatchNorm, which has no condition.
        inplace: whether ReLU overwrites its input.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        *,
        z: int,
        ch: int,
        image_size: int,
        image_channels: int,
        attention: bool = False,
        eps: float = EPS,
        inplace: bool = True,
    ) -> None:
        super().__init__()
        self.side, num_blocks = pyramid(image_size)
        self.linear = nn.Linear(z, ch * self.side**2)
        self.blocks = nn.ModuleList(GeneratorBlock(ch, norm, inplace=inplace) for _ in range(num_blocks))
        self.attention = SelfAttention(ch) if attention else nn.Identity()
        self.norm = nn.BatchNorm2d(ch, eps=eps)
        self.relu = nn.ReLU(inplace)
        self.conv = nn.Conv2d(ch, image_channels, 3, padding=1)

    def images(self, z: Tensor, conditions: Iterable[tuple[Tensor, ...]]) -> Tensor:
        """Images of noise [N, z]; one condition per block, empty where the normalisation takes none."""
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))
        for number, (block, condition) in enumerate(zip(self.blocks, conditions, strict=False), start=1):
            if number == len(self.blocks):
                x = self.attention(x)
            x = block(x, *condition)
        return torch.tanh(self.conv(self.relu(self.norm(x))))


class ResNetGenerator(ResNetTrunk):
    """Noise [N, z] -> images."""

    def forward(self, z: Tensor) -> Tensor:
        return self.images(z, repeat(()))


class ConditionalResNetGenerator(ResNetTrunk):
    """Noise [N, z] and class indices [N] -> images; every class has gains and biases of its own in the blocks."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.images(z, repeat((labels,)))


def sngan_generator(*, z: int = 128, ch: int = 256, image_size: int = 32, image_channels: int = 3) -> ResNetGenerator:
    """SNGAN's, in which no layer is spectrally normed."""
    network = ResNetGenerator(
        nn.BatchNorm2d, z=z, ch=ch, image_size=image_size, image_channels=image_channels, eps=1e-5, inplace=False
    )
    init_xavier(network)
    return network


def wgan_gp_generator(*, z: int = 128, ch: int = 256, image_size: int = 32, image_channels: int = 3) -> ResNetGenerator:
    """The layers of SNGAN's, with in-place ReLU."""
    norm = partial(nn.BatchNorm2d, eps=EPS)
    network = ResNetGenerator(norm, z=z, ch=ch, image_size=image_size, image_channels=image_channels)
    init_orthogonal(network)
    return network


def conditional_generator(
    *, z: int = 128, ch: int = 256, num_classes: int = 10, image_size: int = 32, image_channels: int = 3
) -> ConditionalResNetGenerator:
    """ACGAN's and ProjGAN's."""
    network = ConditionalResNetGenerator(
        _class_batch_norm(num_classes), z=z, ch=ch, image_size=image_size, image_channels=image_channels
    )
    init_orthogonal(network)
    return network


def sagan_generator(
    *, z: int = 128, ch: int = 256, num_classes: int = 10, image_size: int = 32, image_channels: int = 3
) -> ConditionalResNetGenerator:
    """Self-attention in front of the last block; every layer spectrally normed."""
    norm = _class_batch_norm(num_classes)
    network = ConditionalResNetGenerator(
        norm, z=z, ch=ch, image_size=image_size, image_channels=image_channels, attention=True
    )
    init_orthogonal(network)
    spectrally_normed(network)
    return network


def _class_batch_norm(num_classes: int) -> Callable[[int], nn.Module]:
    """BatchNorm with gains and biases per class."""

    def build(ch: int) -> nn.Module:
        return ConditionalBatchNorm2d(ch, nn.Embedding(num_classes, ch), nn.Embedding(num_classes, ch))

    return build
