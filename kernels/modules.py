"""Layers as they run after training: what follows them fused, zeros skipped. Each can be turned dense again.

Weights are buffers: these layers are for inference, and their state dicts are plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sparsekit.kernels.conv2d_act import ACTIVATIONS, conv2d_act
from sparsekit.kernels.cusparselt_linear import compress, cusparselt_linear
from sparsekit.kernels.formats import NM24, GroupSparse, pack
from sparsekit.kernels.group_conv2d import group_conv2d, pack_conv2d
from sparsekit.kernels.group_linear import group_linear
from sparsekit.kernels.nm24_linear import nm24_linear
from sparsekit.kernels.residual_subset import CHANNELS, pack_subset, residual_subset_conv2d_


class LinearAct(nn.Module):
    """act(x W^T + bias + residual).

    Args:
        weight: [N, K].
        bias: [N].
        act: "none", "relu", "gelu" or "silu".
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, act: str = "none") -> None:
        super().__init__()
        self.weight, self.bias, self.act = nn.Buffer(weight), nn.Buffer(bias), act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K], residual as the output."""
        out = linear(x, self.weight, self.bias)
        return ACTIVATIONS[self.act](out if residual is None else out + residual)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, act={self.act!r}"


class Conv2dAct(nn.Module):
    """act(conv2d(x) + bias + residual).

    The weight is stored as GPUs read it, [N, R, S, C / groups].

    Args:
        weight: [N, C / groups, R, S].
        bias: [N].
        act: as for `LinearAct`.
        fused: in one kernel where there is one; else as separate torch ops, which every exporter knows.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        act: str = "none",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.channels_last, self.bias = nn.Buffer(weight.permute(0, 2, 3, 1).contiguous()), nn.Buffer(bias)
        self.groups, self.act, self.fused = groups, act, fused
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)

    @property
    def weight(self) -> Tensor:
        """[N, C / groups, R, S], a view."""
        return self.channels_last.permute(0, 3, 1, 2)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], residual as the output."""
        window = self.stride, self.padding, self.dilation, self.groups
        if self.fused:
            return conv2d_act(x, self.weight, self.bias, residual, *window, self.act)
        out = conv2d(x, self.weight, self.bias, *window)
        return ACTIVATIONS[self.act](out if residual is None else out + residual)

    def densify(self) -> Conv2dAct:
        """The same of torch's own ops; the weights are shared."""
        return Conv2dAct(
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            act=self.act,
            fused=False,
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, act={self.act!r}, fused={self.fused}"


class _Packed(nn.Module):
    """Holds a `GroupSparse` as buffers."""

    def __init__(self, packed: GroupSparse) -> None:
        super().__init__()
        self.values, self.gidx = nn.Buffer(packed.values), nn.Buffer(packed.gidx)
        self.ptr, self.order = nn.Buffer(packed.ptr), nn.Buffer(packed.order)
        self.shape, self.taps = packed.shape, packed.taps

    @property
    def packed(self) -> GroupSparse:
        """The weight, [N, taps * C]."""
        return GroupSparse(self.values, self.gidx, self.ptr, self.order, self.shape, self.taps)


class SparseLinear(_Packed):
    """A `LinearAct` of whose weight only groups of `rows` outputs by `cols` inputs are kept that are not all zero."""

    def __init__(self, dense: LinearAct, *, rows: int, cols: int) -> None:
        super().__init__(pack(dense.weight, rows=rows, cols=cols))
        self.bias, self.act = nn.Buffer(dense.bias), dense.act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As `LinearAct`."""
        return group_linear(x, self.packed, self.bias, residual, act=self.act)

    def densify(self) -> LinearAct:
        """The same of torch's own ops, with its zeros."""
        return LinearAct(self.packed.to_dense(), self.bias, act=self.act)


class NM24Linear(nn.Module):
    """A `LinearAct` of whose weight at most 2 of every 4 consecutive inputs are not zero, for few samples."""

    def __init__(self, dense: LinearAct) -> None:
        super().__init__()
        packed = NM24.pack(dense.weight)
        self.values, self.positions, self.bias = map(nn.Buffer, (packed.values, packed.positions, dense.bias))
        self.shape, self.act = packed.shape, dense.act

    @property
    def packed(self) -> NM24:
        """The weight, [N, K]."""
        return NM24(self.values, self.positions, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K]."""
        return nm24_linear(x, self.packed, self.bias, act=self.act)

    def densify(self) -> LinearAct:
        """The same of torch's own ops, with its zeros."""
        return LinearAct(self.packed.to_dense(), self.bias, act=self.act)


class CusparseltLinear(nn.Module):
    """A `LinearAct` of whose weight at most 2 of every 4 consecutive inputs are not zero, for many samples.

    Made on the GPU that it runs on: what cuSPARSELt multiplies with is not part of the state.
    """

    def __init__(self, dense: LinearAct) -> None:
        super().__init__()
        self.weight, self.bias, self.act = nn.Buffer(dense.weight), nn.Buffer(dense.bias), dense.act
        self.compressed = nn.Buffer(compress(dense.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K]."""
        return cusparselt_linear(x, self.weight, self.compressed, self.bias, act=self.act)

    def densify(self) -> LinearAct:
        """The same of torch's own ops; the weight is shared."""
        return LinearAct(self.weight, self.bias, act=self.act)


class SparseConv2d(_Packed):
    """A `Conv2dAct` without groups, likewise, channels in the place of inputs."""

    def __init__(self, dense: Conv2dAct, *, rows: int, cols: int) -> None:
        super().__init__(pack_conv2d(dense.weight, rows=rows, cols=cols))
        self.bias, self.act, self.kernel_size = nn.Buffer(dense.bias), dense.act, list(dense.weight.shape[2:])
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As `Conv2dAct`."""
        return group_conv2d(
            x,
            *(self.values, self.gidx, self.ptr, self.order, self.bias, residual),
            n_out=self.shape[0],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            act=self.act,
        )

    def densify(self) -> Conv2dAct:
        """The same of torch's own ops, with its zeros."""
        weight = _unflat(self.packed, self.kernel_size)
        return Conv2dAct(
            weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            act=self.act,
            fused=False,
        )


class ResidualSubset(_Packed):
    """A `Conv2dAct` with a residual and a ReLU, whose weight and bias are zero but at some channels, 16 by 16.

    The residual becomes the output, in place: nothing else may read it afterwards, and it must not be negative, as
    after a ReLU. Channels that the layer does not touch are neither read nor written.
    """

    def __init__(self, dense: Conv2dAct) -> None:
        groups = touched_groups(dense)
        channels = (groups[:, None] * CHANNELS + torch.arange(CHANNELS, device=groups.device)).flatten()
        super().__init__(pack_subset(dense.weight[channels], channels=dense.weight.shape[1]))
        self.out_groups, self.bias = nn.Buffer(groups.int()), nn.Buffer(dense.bias[channels])
        self.kernel_size, self.num_out = list(dense.weight.shape[2:]), len(dense.weight)
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `Conv2dAct`; returns the residual, updated."""
        stream = residual.contiguous(memory_format=torch.channels_last)
        residual_subset_conv2d_(
            stream,
            x,
            *(self.values, self.gidx, self.ptr, self.order, self.out_groups),
            bias=self.bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return stream

    def densify(self) -> Conv2dAct:
        """The same of torch's own ops, with its zeros; the residual stays as it is."""
        channels = (self.out_groups[:, None] * CHANNELS + torch.arange(CHANNELS, device=self.bias.device)).flatten()
        part = _unflat(self.packed, self.kernel_size)
        weight = part.new_zeros(self.num_out, *part.shape[1:]).index_copy(0, channels, part)
        bias = self.bias.new_zeros(self.num_out).index_copy(0, channels, self.bias)
        return Conv2dAct(
            weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation, act="relu", fused=False
        )


def touched_groups(dense: Conv2dAct) -> Tensor:
    """Int64, the groups of 16 outputs in which a weight or a bias is not zero."""
    touched_N = dense.weight.flatten(1).any(1) | (dense.bias != 0)
    return touched_N.view(-1, CHANNELS).any(1).nonzero().flatten()


def _unflat(packed: GroupSparse, kernel_size: Sequence[int]) -> Tensor:
    """[N, C, R, S] from [N, taps * C]."""
    weight_NK = packed.to_dense()
    return weight_NK.view(len(weight_NK), *kernel_size, -1).permute(0, 3, 1, 2).contiguous()
