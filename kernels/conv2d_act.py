"""A dense convolution with what follows it, act(conv(x) + bias + residual), in one kernel where cuDNN has it.

cuDNN fuses ReLU, with or without a residual, in float32 and float16 on channels_last tensors; all else runs as separate
ops, which a compiler may fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": relu, "gelu": gelu, "silu": silu}
_FUSED = (torch.float32, torch.float16)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    """act(conv2d(x, weight) + bias + residual), for inference.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S], as `torch.nn.functional.conv2d` takes it.
        bias: [K].
        residual: as the output.
        act: "none", "relu", "gelu" or "silu".
    """
    if act == "relu" and x.dtype in _FUSED:
        fused: Tensor = torch.ops.sparsekit.conv2d_relu(x, weight, bias, residual, stride, padding, dilation, groups)
        return fused
    out = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[act](out if residual is None else out + residual)


@torch.library.custom_op("sparsekit::conv2d_relu", mutates_args=(), device_types="cuda")
def _conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


@_conv2d_relu.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    out = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return relu(out if residual is None else out + residual)


@_conv2d_relu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return conv2d(x, weight, bias, stride, padding, dilation, groups)
