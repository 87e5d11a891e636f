"""Convolutions to test kernels with: their inputs, and what float64 makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.group_conv2d import Window, four_sides, pack_conv2d


@dataclass(frozen=True)
class Conv:
    """A convolution of [images, channels, height, width] with a share of its weight's groups kept."""

    images: int
    channels: int
    height: int
    width: int
    num_out: int
    kernel: int
    stride: int = 1
    padding: tuple[int, ...] = (0, 0)
    dilation: int = 1
    density: float = 0.5
    rows: int = 16
    cols: int = 16
    step: int = 32
    act: str = "relu"

    @property
    def window(self) -> Window:
        stride, dilation = (self.stride,) * 2, (self.dilation,) * 2
        return Window((self.kernel,) * 2, stride, four_sides(self.padding), dilation)

    @property
    def name(self) -> str:
        side = "x".join(str(side) for side in (self.images, self.channels, self.height, self.width))
        window = f"k{self.kernel}s{self.stride}p{'.'.join(map(str, self.padding))}d{self.dilation}"
        return f"{side}-{self.num_out}-{window}-{self.rows}x{self.cols}-{self.act}"


# Strides, paddings of all kinds, kernels, dilations, odd sizes, one image and more, groups of all kinds, what is empty
CONVS = (
    Conv(1, 16, 5, 7, 16, 1),
    Conv(2, 32, 5, 7, 24, 3, padding=(1, 1), act="none"),
    Conv(3, 16, 7, 5, 32, 3, stride=2, padding=(1, 0), act="silu"),
    Conv(2, 32, 9, 8, 40, 3, stride=2, padding=(2, 2), dilation=2, rows=32, act="gelu"),
    Conv(1, 16, 8, 9, 16, 5, padding=(2, 1), density=0.2),
    Conv(2, 24, 6, 5, 24, 3, padding=(1, 1), cols=8, density=0.7),
    Conv(1, 64, 4, 4, 64, 1, stride=2, rows=64, cols=32, density=1.0, act="none"),
    Conv(2, 32, 6, 6, 20, 2, padding=(0, 1, -1, 0), density=0.6),
    Conv(1, 32, 3, 3, 48, 3, padding=(1, 1), density=0.0),
    Conv(2, 48, 1, 1, 33, 1, density=0.4, step=64),
)


def masked_weight(conv: Conv) -> tuple[Tensor, GroupSparse]:
    """A weight [N, C, R, S], zero outside the kept groups, and packed. The second row block keeps nothing."""
    generator = torch.Generator().manual_seed(conv.num_out + conv.kernel)
    num_rows, num_cols = -(-conv.num_out // conv.rows), conv.channels // conv.cols
    kept = torch.rand(num_rows, num_cols, conv.kernel, conv.kernel, generator=generator) < conv.density
    kept[1:2] = False
    mask = kept.repeat_interleave(conv.rows, 0)[: conv.num_out].repeat_interleave(conv.cols, 1)
    weight = torch.randn(mask.shape, generator=generator) * mask / (conv.channels * conv.kernel**2) ** 0.5
    return weight, pack_conv2d(weight, mask, rows=conv.rows, cols=conv.cols, step=conv.step)


def random_images(*size: int, seed: int = 0) -> Tensor:
    """Normal float32 [B, C, H, W], channels_last."""
    images = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def rounded(packed: GroupSparse, weight: Tensor, dtype: torch.dtype) -> tuple[GroupSparse, Tensor]:
    """The packed weight in a dtype, and the dense one rounded to it."""
    return replace(packed, values=packed.values.to(dtype)), weight.to(dtype)


def exact(
    conv: Conv, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """act(conv(x) * scale + bias + residual) in float64."""
    window = conv.window
    out = conv2d(pad(x.double(), list(window.padding)), weight.double(), None, window.stride, 0, window.dilation)
    if scale is not None:
        out = out * scale.double()[:, None, None]
    result: Tensor = ACTIVATIONS[conv.act](out + bias.double()[:, None, None] + residual.double())
    return result
