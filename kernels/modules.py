"""Layers as they run after training: weights folded, what follows them fused. Each can be turned dense again."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparsekit.kernels.conv2d_act import ACTIVATIONS, conv2d_act


class Conv2dAct(nn.Module):
    """act(conv2d(x) + residual).

    Args:
        weight: [K, C / groups, R, S].
        bias: [K].
        act: see `conv2d_act`.
        fused: in one kernel where there is one; else as separate torch ops, which every exporter knows.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int = 1,
        act: str = "none",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.act, self.fused = act, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], residual as the output."""
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if self.fused:
            return conv2d_act(x, self.weight, self.bias, residual, act=self.act, **window)
        out = conv2d(x, self.weight, self.bias, **window)
        return ACTIVATIONS[self.act](out if residual is None else out + residual)

    def densify(self) -> Self:
        """The same of torch's own ops; the weights are shared."""
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return type(self)(self.weight, self.bias, act=self.act, fused=False, **window)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, act={self.act!r}, fused={self.fused}"
