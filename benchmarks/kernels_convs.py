"""Convolutions as cases of the kernels' benchmarks: ours and its baselines on the same random data.

B2 is cuDNN's convolution with bias, and what follows it as separate ops; B3 the same with residual and ReLU in one
kernel. Both multiply with the masked weight, zeros and all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, relu

from benchmarks.kernels_linears import BF16, FP16, ITEMSIZE, TOLERANCE, normal
from benchmarks.kernels_measure import OURS, Case, Goal, Run, Turns
from sparsekit.kernels.group_conv2d import group_conv2d, pack_conv2d
from sparsekit.kernels.masks import group_mask
from sparsekit.kernels.residual_subset import CHANNELS, pack_subset, residual_subset_conv2d_


@dataclass(frozen=True)
class Conv:
    """A convolution of square images, stride 1, as many outputs as inputs, with a share of its groups of 128 x 16.

    Attributes:
        fused: followed by ReLU, in cuDNN's own kernel too.
    """

    num_images: int
    channels: int
    side: int
    density: float
    dtype: torch.dtype = BF16
    kernel: int = 3
    fused: bool = False

    @property
    def cols(self) -> int:
        """Inputs of a group."""
        return 8 if self.channels % 16 else 16

    def turns(self, device: str, seed: int) -> Turns:
        size, kernel = (self.channels, self.channels, self.kernel, self.kernel), (self.kernel,) * 2
        draw = partial(normal, device=device, dtype=self.dtype)
        x = draw(self.num_images, self.channels, self.side, self.side, seed=4 * seed)
        weight = draw(*size, seed=4 * seed + 1, scale=(self.channels * self.kernel**2) ** -0.5)
        bias = draw(self.channels, seed=4 * seed + 2)
        mask = conv_mask(weight, cols=self.cols, density=self.density, seed=4 * seed + 3)
        weight = (weight * mask).contiguous(memory_format=torch.channels_last)
        packed = pack_conv2d(weight, mask, cols=self.cols)
        parts = packed.values, packed.gidx, packed.ptr, packed.order, bias.float()
        pad, act = self.kernel // 2, "relu" if self.fused else "none"
        ours = partial(group_conv2d, x, *parts, n_out=self.channels, kernel_size=kernel, padding=(pad, pad), act=act)

        def followed(out: Tensor) -> Tensor:
            return relu(out) if self.fused else out

        def expected() -> Tensor:
            return followed(conv2d(x.double(), weight.double(), bias.double(), 1, pad))

        def in_cudnn() -> Tensor:
            return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [pad, pad], [1, 1], 1)

        runs: dict[str, Run] = {OURS: ours, "B2": lambda: followed(conv2d(x, weight, bias, 1, pad))}
        if self.fused:
            runs["B3"] = in_cudnn
        flops = 2 * x.numel() * weight[0].numel()
        num_flops = {name: flops * (self.density if name == OURS else 1) for name in runs}
        return Turns(runs, dict.fromkeys(runs, expected), num_flops)

    def case(self, name: str, *goals: Goal) -> Case:
        num_pixels, taps = self.num_images * self.side**2, self.kernel**2
        return Case(
            name,
            self.turns,
            goals,
            self.dtype,
            num_bytes=ITEMSIZE * (2 * num_pixels * self.channels + self.density * taps * self.channels**2),
            tolerance=TOLERANCE[self.dtype],
        )


def conv_mask(weight: Tensor, *, cols: int, density: float, seed: int) -> Tensor:
    """Bool [N, C, R, S]: random groups of 128 outputs by `cols` inputs of one tap, equally many for all outputs."""
    num_out, num_in, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    scores_NK = normal(num_out, taps * num_in, seed=seed, device=weight.device.type, dtype=torch.float32)
    mask_NK = group_mask(scores_NK, rows=128, cols=cols, density=density, taps=taps)
    return mask_NK.view(num_out, *kernel, num_in).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Subset:
    """The last 1 x 1 convolution of a bottleneck, of which half the groups of 16 outputs are kept."""

    num_images: int = 256
    num_in: int = 64
    num_out: int = 256
    side: int = 56
    density: float = 0.5
    dtype: torch.dtype = FP16

    def turns(self, device: str, seed: int) -> Turns:
        draw = partial(normal, device=device, dtype=self.dtype)
        x = draw(self.num_images, self.num_in, self.side, self.side, seed=4 * seed)
        stream = relu(draw(self.num_images, self.num_out, self.side, self.side, seed=4 * seed + 1))
        order = torch.randperm(self.num_out // CHANNELS, generator=torch.Generator().manual_seed(seed))
        groups = order[: round(self.density * len(order))].sort().values.to(device)
        channels = (groups[:, None] * CHANNELS + torch.arange(CHANNELS, device=device)).flatten()
        size = len(channels), self.num_in, 1, 1
        weight = draw(*size, seed=4 * seed + 2, scale=self.num_in**-0.5)
        bias = draw(len(channels), seed=4 * seed + 3)
        whole = weight.new_zeros(self.num_out, self.num_in, 1, 1).index_copy(0, channels, weight)
        whole_bias = bias.new_zeros(self.num_out).index_copy(0, channels, bias)
        packed = pack_subset(weight, channels=self.num_in)
        parts = packed.values, packed.gidx, packed.ptr, packed.order, groups.int()
        wide_bias, updated, gathered = bias.float(), stream.clone(), stream.clone()  # channels_last, as stream

        def ours() -> Tensor:
            residual_subset_conv2d_(updated, x, *parts, bias=wide_bias, kernel_size=(1, 1))
            return updated

        def fused() -> Tensor:
            return torch.cudnn_convolution_add_relu(x, whole, stream, 1.0, whole_bias, [1, 1], [0, 0], [1, 1], 1)

        def separate() -> Tensor:
            branch_BHWN = conv2d(x, weight, bias).permute(0, 2, 3, 1)
            last = gathered.permute(0, 2, 3, 1)  # as it lies in memory
            last.index_copy_(3, channels, relu(branch_BHWN + last.index_select(3, channels)))
            return gathered

        def expected() -> Tensor:
            return relu(conv2d(x.double(), whole.double(), whole_bias.double()) + stream.double())

        runs: dict[str, Run] = {OURS: ours, "B3": fused, "separate": separate}
        flops = 2 * stream.numel() * self.num_in
        return Turns(runs, dict.fromkeys(runs, expected), dict.fromkeys(runs, flops * self.density) | {"B3": flops})

    def case(self, name: str, *goals: Goal) -> Case:
        num_pixels = self.num_images * self.side**2
        kept = self.density * self.num_out
        return Case(
            name,
            self.turns,
            goals,
            self.dtype,
            num_bytes=ITEMSIZE * (num_pixels * (self.num_in + 2 * kept) + kept * self.num_in),
            tolerance=TOLERANCE[self.dtype],
            note="updates repeat on one stream, which grows; 'separate' gathers, convolves, adds and scatters",
        )
