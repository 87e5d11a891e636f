"""What the GANs share: image sizes, conditional BatchNorm, self-attention, spectral norm, initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

EPS = 1e-4  # that BatchNorm adds to the variance, in all GANs but SNGAN, AutoGAN and CycleGAN


def pyramid(image_size: int) -> tuple[int, int]:
    """Side of a generator's smallest feature maps, 4 to 7, and how often it is doubled to `image_size`.

    Raises:
        ValueError: `image_size` is not 4, 5, 6 or 7 times a power of two above 1.

    >>> pyramid(32), pyramid(28)
    ((4, 3), (7, 2))
    """
    side, num_doublings = image_size, 0
    while side >= 8 and side % 2 == 0:
        side, num_doublings = side // 2, num_doublings + 1
    if not (4 <= side <= 7 and num_doublings):
        raise ValueError(f"image size must be 4, 5, 6 or 7 times 2, 4, 8, ..., got {image_size}")
    return side, num_doublings


def doubled(x: Tensor, *, mode: str = "nearest") -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode=mode)


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose gains and biases are read from a condition: [N, C, H, W], condition [N, ...] -> [N, C, H, W].

    Args:
        num_features: C.
        gain: the condition to [N, C], what is added to a gain of 1.
        bias: the condition to [N, C].

    Source: de Vries et al. 2017, arXiv:1707.00683.
    """

    def __init__(self, num_features: int, gain: nn.Module, bias: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps=EPS, affine=False)
        self.gain = gain
        self.bias = bias

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain_NC, bias_NC = 1 + self.gain(condition), self.bias(condition)
        conditioned: Tensor = self.norm(x) * gain_NC[:, :, None, None] + bias_NC[:, :, None, None]
        return conditioned


class SelfAttention(nn.Module):
    """Every position looks at the 2x2 maxima of all positions; starts as the identity. [N, C, H, W], H and W even.

    Args:
        ch: C, at least 8.

    Source: Zhang et al. 2019 (SAGAN), arXiv:1805.08318, section 3; pooled keys and values, and values of half the
    channels, as in the implementations that the GANs here come from.
    """

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(ch, ch // 8, 1, bias=False)
        self.key = nn.Conv2d(ch, ch // 8, 1, bias=False)
        self.value = nn.Conv2d(ch, ch // 2, 1, bias=False)
        self.out = nn.Conv2d(ch // 2, ch, 1, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # N images, C channels, P positions, K pooled positions
        query_NCP = self.query(x).flatten(2)
        key_NCK = F.max_pool2d(self.key(x), 2).flatten(2)
        value_NCK = F.max_pool2d(self.value(x), 2).flatten(2)
        weights_NPK = torch.bmm(query_NCP.transpose(1, 2), key_NCK).softmax(-1)
        seen_NCP = torch.bmm(value_NCK, weights_NPK.transpose(1, 2))
        attended: Tensor = x + self.gate * self.out(seen_NCP.unflatten(2, x.shape[2:]))
        return attended


def spectrally_normed(*networks: nn.Module) -> None:
    """Divide, in place, every convolution's, linear layer's and embedding's weight by its largest singular value.

    Source: Miyato et al. 2018, arXiv:1802.05957.
    """
    for network in networks:
        for layer in list(network.modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
                spectral_norm(layer)


def init_xavier(network: nn.Module) -> None:
    """Convolutions uniform by Xavier's bound, BatchNorm gains N(1, 0.02); in place."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


def init_orthogonal(network: nn.Module) -> None:
    """Orthogonal weights, biases zero; in place."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(layer.weight)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_normal(network: nn.Module) -> None:
    """Convolutions N(0, 0.02); in place."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
