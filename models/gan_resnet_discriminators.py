"""Residual discriminators of small images: images (and class indices, int64 [N]) to logits [N].

`ch` is the number of channels of every block. Images are [N, image_channels, H, W], H and W at least 4. Sources: as of
the generators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.models.gan_blocks import EPS, SelfAttention, init_orthogonal, init_xavier, spectrally_normed

Norm = Callable[[int], nn.Module]  # number of channels -> normalisation; nn.Identity for none

BATCH_NORM: Norm = partial(nn.BatchNorm2d, eps=EPS)


class FirstBlock(nn.Module):
    """conv-norm-ReLU-conv-pool beside pool-norm-conv1x1, on the image itself: halves H and W."""

    def __init__(self, image_channels: int, ch: int, norm: Norm, *, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, ch, 3, padding=1)
        self.norm = norm(ch)
        self.conv2 = nn.Conv2d(ch, ch, 3, padding=1)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), norm(image_channels), nn.Conv2d(image_channels, ch, 1))
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(self.relu(self.norm(self.conv1(x))))
        out: Tensor = F.avg_pool2d(residual, 2) + self.shortcut(x)
        return out


class DiscriminatorBlock(nn.Module):
    """norm-ReLU-conv-norm-ReLU-conv beside the identity; `down` halves H and W, beside norm-conv1x1-pool.

    Without a norm an in-place ReLU changes what the shortcut reads, too, as it does in the implementations that SAGAN's
    and BigGAN's published scores are from.
    """

    def __init__(self, ch: int, norm: Norm, *, down: bool, inplace: bool) -> None:
        super().__init__()
        self.norm1 = norm(ch)
        self.conv1 = nn.Conv2d(ch, ch, 3, padding=1)
        self.norm2 = norm(ch)
        self.conv2 = nn.Conv2d(ch, ch, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.shortcut = nn.Sequential(norm(ch), nn.Conv2d(ch, ch, 1), nn.AvgPool2d(2)) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.relu(self.norm1(x)))
        residual = self.pool(self.conv2(self.relu(self.norm2(residual))))
        out: Tensor = residual + self.shortcut(x)
        return out


class ResNetCritic(nn.Module):
    """What the residual discriminators share: four blocks, two of which halve the image, and a sum over positions.

    Args:
        norm: normalisation in the blocks.
        attention: attend to positions behind the first block, at half the image's size.
        bias: of the linear layer that makes the logit.
        inplace: whether ReLU overwrites its input.
    """

    def __init__(
        self,
        norm: Norm,
        *,
        ch: int,
        image_channels: int,
        attention: bool = False,
        bias: bool = True,
        inplace: bool = True,
    ) -> None:
        super().__init__()
        self.first = FirstBlock(image_channels, ch, norm, inplace=inplace)
        self.attention = SelfAttention(ch) if attention else nn.Identity()
        blocks = [DiscriminatorBlock(ch, norm, down=down, inplace=inplace) for down in (True, False, False)]
        self.blocks = nn.Sequential(*blocks)
        self.relu = nn.ReLU(inplace)
        self.linear = nn.Linear(ch, 1, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """[N, ch] of images."""
        summed: Tensor = self.relu(self.blocks(self.attention(self.first(x)))).sum((2, 3))
        return summed

    def realness(self, features: Tensor) -> Tensor:
        """One logit per row of features, [N]."""
        logits: Tensor = self.linear(features).squeeze(1)
        return logits


class ResNetDiscriminator(ResNetCritic):
    """Images -> logits [N]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.realness(self.features(x))


class AuxiliaryDiscriminator(ResNetCritic):
    """Images -> logits [N] and class logits [N, num_classes]."""

    def __init__(self, norm: Norm, *, ch: int, num_classes: int, image_channels: int) -> None:
        super().__init__(norm, ch=ch, image_channels=image_channels)
        self.classifier = nn.Linear(ch, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.realness(features), self.classifier(features)


class ProjectionDiscriminator(ResNetCritic):
    """Images and class indices [N] -> logits [N], with the product of features and a vector of the class in them."""

    def __init__(self, norm: Norm, *, ch: int, num_classes: int, image_channels: int, attention: bool = False) -> None:
        super().__init__(norm, ch=ch, image_channels=image_channels, attention=attention)
        self.embedding = nn.Embedding(num_classes, ch)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.features(x)
        projection: Tensor = (self.embedding(labels) * features).sum(1)
        return self.realness(features) + projection


def sngan_discriminator(*, ch: int = 128, image_channels: int = 3) -> ResNetDiscriminator:
    """SNGAN's and AutoGAN's: every layer spectrally normed, no BatchNorm."""
    network = ResNetDiscriminator(nn.Identity, ch=ch, image_channels=image_channels, bias=False, inplace=False)
    init_xavier(network)
    spectrally_normed(network)
    return network


def wgan_gp_discriminator(*, ch: int = 128, image_channels: int = 3) -> ResNetDiscriminator:
    """BatchNorm in place of spectral norm."""
    network = ResNetDiscriminator(BATCH_NORM, ch=ch, image_channels=image_channels)
    init_orthogonal(network)
    return network


def acgan_discriminator(*, ch: int = 128, num_classes: int = 10, image_channels: int = 3) -> AuxiliaryDiscriminator:
    """BatchNorm, and a second output that classifies."""
    network = AuxiliaryDiscriminator(BATCH_NORM, ch=ch, num_classes=num_classes, image_channels=image_channels)
    init_orthogonal(network)
    return network


def projgan_discriminator(*, ch: int = 128, num_classes: int = 10, image_channels: int = 3) -> ProjectionDiscriminator:
    """BatchNorm, and the class by projection."""
    network = ProjectionDiscriminator(BATCH_NORM, ch=ch, num_classes=num_classes, image_channels=image_channels)
    init_orthogonal(network)
    return network


def attentive_discriminator(
    *, ch: int = 128, num_classes: int = 10, image_channels: int = 3
) -> ProjectionDiscriminator:
    """SAGAN's, and BigGAN's at another width: projection and self-attention, every layer spectrally normed."""
    network = ProjectionDiscriminator(
        nn.Identity, ch=ch, num_classes=num_classes, image_channels=image_channels, attention=True
    )
    init_orthogonal(network)
    spectrally_normed(network)
    return network
