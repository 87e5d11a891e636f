"""BigGAN for small images: every block reads the class and a part of the noise of its own.

Source: Brock et al. 2019, arXiv:1809.11096, appendix B; sizes and conditioning as in Zhao et al. 2020 (DiffAugment),
arXiv:2006.10738, whose channel multiplier 96 stands for four times as many channels in the generator and twice as many
in the discriminator.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sparsekit.models.gan_blocks import ConditionalBatchNorm2d, init_orthogonal, pyramid, spectrally_normed
from sparsekit.models.gan_resnet_discriminators import ProjectionDiscriminator, attentive_discriminator
from sparsekit.models.gan_resnet_generators import ResNetTrunk

NUM_SHARED = 128  # features of a class, which all blocks read


class BigGANGenerator(ResNetTrunk):
    """Noise [N, z] and class indices [N] -> images.

    Args:
        z: a multiple of the number of blocks + 1; the first part feeds the first layer, the others a block each.

    Raises:
        ValueError: `z` cannot be divided so.
    """

    def __init__(self, *, z: int, ch: int, num_classes: int, image_size: int, image_channels: int) -> None:
        num_parts = pyramid(image_size)[1] + 1
        if z % num_parts:
            raise ValueError(f"z must be a multiple of {num_parts} at image size {image_size}, got {z}")
        norm = partial(_linear_batch_norm, NUM_SHARED + z // num_parts)
        super().__init__(
            norm, z=z // num_parts, ch=ch, image_size=image_size, image_channels=image_channels, attention=True
        )
        self.shared = nn.Embedding(num_classes, NUM_SHARED)
        self.num_parts = num_parts

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        first, *rest = z.chunk(self.num_parts, 1)
        shared = self.shared(labels)
        return self.images(first, [(torch.cat([shared, part], 1),) for part in rest])


def biggan_generator(
    *, z: int = 80, ch: int = 384, num_classes: int = 10, image_size: int = 32, image_channels: int = 3
) -> BigGANGenerator:
    """Every layer spectrally normed but the embedding of the classes."""
    network = BigGANGenerator(z=z, ch=ch, num_classes=num_classes, image_size=image_size, image_channels=image_channels)
    init_orthogonal(network)
    spectrally_normed(network.linear, network.blocks, network.attention, network.conv)
    return network


def biggan_discriminator(*, ch: int = 192, num_classes: int = 10, image_channels: int = 3) -> ProjectionDiscriminator:
    """SAGAN's, half as wide again."""
    return attentive_discriminator(ch=ch, num_classes=num_classes, image_channels=image_channels)


def _linear_batch_norm(num_conditions: int, ch: int) -> nn.Module:
    gain, bias = (nn.Linear(num_conditions, ch, bias=False) for _ in range(2))
    return ConditionalBatchNorm2d(ch, gain, bias)
