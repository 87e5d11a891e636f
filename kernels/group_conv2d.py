"""Convolution with a weight of which only groups of channels are kept: act(conv(x) + bias + residual).

The weight is a `GroupSparse` of [N, taps * C], tap-major. A dense one packs as well: all of its groups are kept.
"""

# B images, C input channels, N output channels
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.dispatch import runs_triton
from sparsekit.kernels.formats import GroupSparse, gather_groups, pack, scatter_groups


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves over its input.

    Attributes:
        kernel_size: rows and columns, and so in `stride` and `dilation`.
        padding: zeros at the left, right, top and bottom, as `torch.nn.functional.pad` takes them; negative ones crop.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel_size[0] * self.kernel_size[1]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output.

        >>> Window((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)).out_size(56, 28)
        (28, 14)
        """
        left, right, top, bottom = self.padding
        reach_h, reach_w = (d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return (
            (height + top + bottom - reach_h) // self.stride[0] + 1,
            (width + left + right - reach_w) // self.stride[1] + 1,
        )

    def dense_conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution [B, N, H_out, W_out] of x [B, C, H, W] by a dense weight [N, C, R, S]."""
        return conv2d(pad(x, list(self.padding)), weight, None, self.stride, 0, self.dilation)


def group_conv2d(
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    n_out: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    act: str = "none",
) -> Tensor:
    """act(conv2d(x, weight) + bias + residual), summed in float32.

    Differentiable once in x, values, bias and residual. The gradients are those of the dense convolution, which
    torch computes with the weight filled up with zeros: training gains nothing from the zeros.

    Args:
        x: [B, C, H, W], fastest as channels_last. C is a multiple of the group's columns.
        values, gidx, ptr, order: a `GroupSparse` of [N, taps * C], tap-major as `pack_conv2d` makes it.
        bias: [N], best float32.
        residual: as the output.
        n_out: N.
        padding: of rows and columns; or left, right, top and bottom, where negative ones crop.
        act: "none", "relu", "gelu" or "silu".

    Returns:
        [B, N, H_out, W_out] in channels_last and x's dtype.

    Raises:
        KernelError: if the sizes or dtypes do not go together.

    >>> x, weight = torch.ones(1, 16, 4, 4), torch.ones(16, 16, 3, 3)
    >>> packed = pack_conv2d(weight)
    >>> parts = packed.values, packed.gidx, packed.ptr, packed.order
    >>> group_conv2d(x, *parts, n_out=16, kernel_size=(3, 3)).unique().tolist()
    [144.0]
    """
    window = Window(tuple(kernel_size), tuple(stride), four_sides(padding), tuple(dilation))
    check_conv(x, values, gidx, ptr, n_out, window, act)
    if residual is not None and residual.shape != (expected := (x.shape[0], n_out, *window.out_size(*x.shape[2:]))):
        raise KernelError(f"residual: must be {list(expected)} like the output, got {list(residual.shape)}")
    sizes = window.kernel_size, window.stride, window.padding, window.dilation
    out: Tensor = torch.ops.sparsekit.group_conv2d(x, values, gidx, ptr, order, bias, residual, n_out, *sizes, act)
    return out


def pack_conv2d(
    weight: Tensor, mask: Tensor | None = None, *, rows: int | None = None, cols: int = 16, step: int = 64
) -> GroupSparse:
    """Pack a convolution's weight [N, C, R, S] for `group_conv2d`.

    Args:
        mask: bool, as the weight, True where it is kept; None keeps what is not zero.
        rows: outputs of a group; None takes the most that leave few rows empty.
        cols: inputs of a group; C must be a multiple of it. 8 serves channel counts that 16 does not.
        step: see `formats.pack`; 32 suits float32.

    Raises:
        KernelError: if C is no multiple of `cols`, or `formats.pack` refuses.
    """
    num_out, num_in, *_ = weight.shape
    if num_in % cols:
        raise KernelError(f"weight: {num_in} input channels are no multiple of {cols}, the columns of a group")
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    flat_mask = None if mask is None else mask.permute(0, 2, 3, 1).flatten(1)
    rows = fitting_rows(num_out) if rows is None else rows
    return pack(flat, flat_mask, rows=rows, cols=cols, step=step, taps=weight[0, 0].numel())


def fitting_rows(num_out: int) -> int:
    """The tallest group with which at most a sixth of the rows is padding.

    >>> [fitting_rows(num_out) for num_out in (256, 112, 144, 24)]
    [128, 128, 32, 16]
    """
    return next((rows for rows in (128, 64, 32) if -num_out % rows * 6 <= num_out), 16)


def four_sides(padding: Sequence[int]) -> tuple[int, ...]:
    """Left, right, top and bottom, of those or of rows and columns."""
    if len(padding) == 2:
        return padding[1], padding[1], padding[0], padding[0]
    return tuple(padding)


def check_conv(x: Tensor, values: Tensor, gidx: Tensor, ptr: Tensor, n_out: int, window: Window, act: str) -> None:
    """Refuse what no kernel could compute.

    Raises:
        KernelError: naming it.
    """
    cols, num_rows = group_cols(values, gidx), (ptr.numel() - 1) * values.shape[1]
    if act not in ACTIVATIONS:
        raise KernelError(f"act {act!r}: must be one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4 or x.shape[1] % cols:
        raise KernelError(f"x: must be [B, C, H, W] with C a multiple of {cols}, got {list(x.shape)}")
    if x.dtype != values.dtype or x.device != values.device:
        expected, got = f"{values.dtype} on {values.device}", f"{x.dtype} on {x.device}"
        raise KernelError(f"x: must be {expected} like the weight's values, got {got}")
    if not 0 <= num_rows - n_out < values.shape[1]:
        raise KernelError(f"n_out {n_out}: the packed weight has {num_rows} rows in blocks of {values.shape[1]}")
    if min(window.out_size(*x.shape[2:])) < 1:
        raise KernelError(f"x: {x.shape[2]} x {x.shape[3]} pixels are fewer than the padded kernel covers")


def group_cols(values: Tensor, gidx: Tensor) -> int:
    """Input channels of a group."""
    return (values.shape[0] + 1) * values.shape[2] // gidx.numel()


def dense_weight(values: Tensor, gidx: Tensor, ptr: Tensor, n_out: int, channels: int, window: Window) -> Tensor:
    """The packed weight as [N, C, R, S]."""
    shape, cols = (n_out, window.taps * channels), group_cols(values, gidx)
    flat = scatter_groups(values, gidx, ptr, shape=shape, cols=cols, taps=window.taps)
    return flat.view(n_out, *window.kernel_size, channels).permute(0, 3, 1, 2)


def wide_conv(x: Tensor, values: Tensor, gidx: Tensor, ptr: Tensor, n_out: int, window: Window) -> Tensor:
    """The convolution in float32 at least: what the kernels are held against."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return window.dense_conv(x.to(wide), dense_weight(values.to(wide), gidx, ptr, n_out, x.shape[1], window))


@torch.library.custom_op("sparsekit::group_conv2d", mutates_args=())
def _group_conv2d(
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n_out: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> Tensor:
    window = Window(kernel_size, stride, padding, dilation)
    out = _empty_output(x, n_out, window)
    if runs_triton(x):
        from sparsekit.kernels.triton.group_conv2d import launch

        launch(out, x, values, gidx, ptr, order, bias=bias, residual=residual, window=window, act=act)
        return out
    sum_ = wide_conv(x, values, gidx, ptr, n_out, window)
    sum_ = sum_ if bias is None else sum_ + bias.to(sum_.dtype)[:, None, None]
    return out.copy_(ACTIVATIONS[act](sum_ if residual is None else sum_ + residual.to(sum_.dtype)))


@_group_conv2d.register_fake
def _(
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n_out: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> Tensor:
    return _empty_output(x, n_out, Window(kernel_size, stride, padding, dilation))


def _empty_output(x: Tensor, n_out: int, window: Window) -> Tensor:
    size = x.shape[0], n_out, *window.out_size(x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, gidx, ptr, order, bias, residual, *rest = inputs
    ctx.rest = rest
    ctx.save_for_backward(x, values, gidx, ptr, order, bias, residual, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, gidx, ptr, order, bias, residual, out = ctx.saved_tensors
    n_out, kernel_size, stride, padding, dilation, act = ctx.rest
    window = Window(kernel_size, stride, padding, dilation)
    if act == "relu":
        grad = grad * (out > 0)
    elif act != "none":
        before = torch.ops.sparsekit.group_conv2d(
            x, values, gidx, ptr, order, bias, residual, n_out, kernel_size, stride, padding, dilation, "none"
        )
        slope = torch.ops.aten.gelu_backward if act == "gelu" else torch.ops.aten.silu_backward
        grad = slope(grad, before)
    need_x, need_values, *_ = ctx.needs_input_grad
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, pad(x, padding), dense_weight(values, gidx, ptr, n_out, x.shape[1], window), None,
        stride, [0, 0], dilation, False, [0, 0], 1, [need_x, need_values, False],
    )  # fmt: skip
    grad_values = grad_bias = grad_residual = None
    if need_x:
        grad_x = pad(grad_x, [-side for side in padding])
    if need_values:
        flat, cols = grad_weight.permute(0, 2, 3, 1).flatten(1), group_cols(values, gidx)
        grad_values = gather_groups(
            flat, gidx, ptr, rows=values.shape[1], cols=cols, num_groups=values.shape[2] // cols, taps=window.taps
        )
    if bias is not None:
        grad_bias = grad.sum((0, 2, 3)).to(bias.dtype)
    if residual is not None:
        grad_residual = grad.to(residual.dtype)
    return grad_x, grad_values, None, None, None, grad_bias, grad_residual, None, None, None, None, None, None


_group_conv2d.register_autograd(_backward, setup_context=_setup_context)
