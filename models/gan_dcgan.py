"""DCGAN, and GGAN, which is DCGAN trained with the hinge loss.

Sources: Radford et al. 2016, arXiv:1511.06434; Lim and Ye 2017 (GGAN), arXiv:1705.02894; layers as in Miyato et al.
2018, arXiv:1802.05957, table 3, which has BatchNorm in the discriminator where spectral norm is not used.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsekit.models.gan_blocks import EPS, init_orthogonal, pyramid


class DCGANGenerator(nn.Module):
    """Noise [N, z] -> images in [-1, 1]; every transposed convolution doubles the image and halves the channels.

    Args:
        ch: channels at the full size of the image.
        image_size: height and width, as `pyramid` takes them.
    """

    def __init__(self, *, z: int = 128, ch: int = 64, image_size: int = 32, image_channels: int = 3) -> None:
        super().__init__()
        self.side, num_blocks = pyramid(image_size)
        widths = [ch * 2**step for step in range(num_blocks, -1, -1)]
        self.linear = nn.Linear(z, widths[0] * self.side**2)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after, eps=EPS), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(ch, image_channels, 3, padding=1))
        init_orthogonal(self)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.side, self.side))
        return torch.tanh(self.layers(x))


class DCGANDiscriminator(nn.Module):
    """Images [N, image_channels, H, W], H and W at least 8, -> logits [N].

    Args:
        ch: channels at the full size of the image; doubled each of the three times that it is halved.
    """

    def __init__(self, *, ch: int = 64, image_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([image_channels, ch, 2 * ch, 4 * ch]):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, eps=EPS), nn.ReLU(True)]
            layers += [nn.Conv2d(after, after, 4, 2, 1), nn.BatchNorm2d(after, eps=EPS), nn.ReLU(True)]
        layers += [nn.Conv2d(4 * ch, 8 * ch, 3, padding=1), nn.BatchNorm2d(8 * ch, eps=EPS), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(8 * ch, 1)
        init_orthogonal(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.layers(x).sum((2, 3))).squeeze(1)
        return logits
