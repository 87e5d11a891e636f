"""CycleGAN: a generator from images to images, and a discriminator that judges overlapping patches.

Source: Zhu et al. 2017, arXiv:1703.10593, appendix 7.2. InstanceNorm has gains and biases where a channel stands in no
sum, as Chen et al. 2021, arXiv:2106.00134, need them to choose channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsekit.models.gan_blocks import init_normal


class CycleGANBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders beside the identity."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(ch, ch, 3), nn.InstanceNorm2d(ch, affine=True), nn.ReLU(True)),
            *(nn.ReflectionPad2d(1), nn.Conv2d(ch, ch, 3), nn.InstanceNorm2d(ch)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class CycleGANGenerator(nn.Module):
    """Images [N, image_channels, H, W], H and W multiples of 4 from 8, -> images in [-1, 1] of the same shape.

    Args:
        ch: channels at the full size of the image; four times as many at a quarter.
        num_blocks: residual blocks; 9 for images of 256 pixels, 6 for 128.
    """

    def __init__(self, *, ch: int = 64, num_blocks: int = 9, image_channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.ReflectionPad2d(3), nn.Conv2d(image_channels, ch, 7)),
            *(nn.InstanceNorm2d(ch, affine=True), nn.ReLU(True)),
            *(nn.Conv2d(ch, 2 * ch, 3, 2, 1), nn.InstanceNorm2d(2 * ch, affine=True), nn.ReLU(True)),
            *(nn.Conv2d(2 * ch, 4 * ch, 3, 2, 1), nn.InstanceNorm2d(4 * ch), nn.ReLU(True)),
            *(CycleGANBlock(4 * ch) for _ in range(num_blocks)),
            *(nn.ConvTranspose2d(4 * ch, 2 * ch, 3, 2, 1, 1), nn.InstanceNorm2d(2 * ch, affine=True), nn.ReLU(True)),
            *(nn.ConvTranspose2d(2 * ch, ch, 3, 2, 1, 1), nn.InstanceNorm2d(ch, affine=True), nn.ReLU(True)),
            *(nn.ReflectionPad2d(3), nn.Conv2d(ch, image_channels, 7), nn.Tanh()),
        )
        init_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.layers(x)
        return images


class CycleGANDiscriminator(nn.Module):
    """Images [N, image_channels, H, W], H and W at least 24, -> logits [N], means over patches of 70x70 pixels.

    Args:
        ch: channels of the first convolution; doubled by each of the next three.
    """

    def __init__(self, *, ch: int = 64, image_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, ch, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for before, after, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.InstanceNorm2d(after, affine=True)]
            layers.append(nn.LeakyReLU(0.2, True))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, padding=1))
        init_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x).mean((1, 2, 3))
        return logits
