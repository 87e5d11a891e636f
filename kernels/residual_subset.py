"""A residual branch that touches some channels of the stream only: stream[:, S] = act(stream[:, S] + conv(x)).

The other channels are neither read nor written. In a block that ends in ReLU this is exact where the branch's weight is
zero outside S: the stream is not negative already, and relu(s + 0) = s. Channels are taken in groups of 16, 32 bytes in
a 16-bit dtype, which is what a GPU's memory moves at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.dispatch import runs_triton
from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.group_conv2d import Window, check_conv, four_sides, group_conv2d, pack_conv2d, wide_conv

CHANNELS = 16  # of a group of the stream


def residual_subset_conv2d_(
    stream: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    out_groups: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    act: str = "relu",
) -> None:
    """Set stream[:, S] to act(stream[:, S] + conv2d(x, weight) * scale + bias), in place, for inference.

    Args:
        stream: [B, D, H_out, W_out], channels_last, D a multiple of 16; shares no memory with x.
        x: [B, C, H, W], fastest as channels_last; C is a multiple of the columns of the weight's groups.
        values, gidx, ptr, order: the weight [N, taps * C] as `pack_subset` or `pack_conv2d` makes it.
        out_groups: int32 [N / 16], the channels S: 16 i to 16 i + 15 for each i of it. No i may occur twice.
        scale, bias: [N], best float32.
        padding: of rows and columns; or left, right, top and bottom, where negative ones crop.
        act: "none", "relu", "gelu" or "silu".

    Raises:
        KernelError: if a gradient is asked for, or sizes, dtypes or strides do not go together.
    """
    tensors = (stream, x, values, scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise KernelError("residual_subset_conv2d_: works in place and has no gradient; use residual_subset_conv2d")
    if not stream.is_contiguous(memory_format=torch.channels_last):
        raise KernelError(f"stream: must be channels_last to be updated in place, has strides {list(stream.stride())}")
    window = Window(tuple(kernel_size), tuple(stride), four_sides(padding), tuple(dilation))
    _check_stream(stream, x, values, gidx, ptr, out_groups, window, act)
    sizes = window.kernel_size, window.stride, window.padding, window.dilation
    torch.ops.sparsekit.residual_subset_conv2d_(
        stream, x, values, gidx, ptr, order, out_groups, scale, bias, *sizes, act
    )


def residual_subset_conv2d(
    stream: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    out_groups: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    act: str = "relu",
) -> Tensor:
    """The stream that `residual_subset_conv2d_` would leave, as a new tensor; for training, not for speed.

    Differentiable once in stream, x, values, scale and bias. Arguments and errors as there; the stream may have any
    strides.

    >>> stream, x = torch.zeros(1, 32, 1, 1), torch.ones(1, 16, 1, 1)
    >>> packed = pack_subset(torch.ones(16, 16, 1, 1), channels=16)
    >>> parts = packed.values, packed.gidx, packed.ptr, packed.order
    >>> out = residual_subset_conv2d(stream, x, *parts, torch.tensor([1]), kernel_size=(1, 1))
    >>> out.flatten()[[0, 15, 16, 31]].tolist()
    [0.0, 0.0, 16.0, 16.0]
    """
    window = Window(tuple(kernel_size), tuple(stride), four_sides(padding), tuple(dilation))
    _check_stream(stream, x, values, gidx, ptr, out_groups, window, act)
    branch = group_conv2d(
        x, values, gidx, ptr, order, n_out=out_groups.numel() * CHANNELS, kernel_size=kernel_size, stride=stride,
        padding=padding, dilation=dilation,
    )  # fmt: skip
    return stream.index_copy(1, _channels(out_groups), _updated(stream, branch, out_groups, scale, bias, act))


def pack_subset(
    weight: Tensor, in_groups: Tensor | None = None, *, channels: int, rows: int | None = None, step: int = 64
) -> GroupSparse:
    """Pack the weight of a convolution that reads some channels of its input, and writes some of the stream.

    Args:
        weight: [N, C', R, S], C' the channels read.
        in_groups: [C' / 16] the channels read, 16 i to 16 i + 15 for each i of it; None reads all.
        channels: of the input, a multiple of 16.
        rows: see `pack_conv2d`.
        step: see `formats.pack`; 32 suits float32.

    Raises:
        KernelError: if `in_groups` does not fit the weight or the input.
    """
    num_out, num_read, *kernel_size = weight.shape
    if in_groups is None:
        in_groups = torch.arange(channels // CHANNELS, device=weight.device)
    index = _channels(in_groups)
    fits = index.numel() == num_read and index.unique().numel() == num_read
    if not fits or bool((index < 0).any() or (index >= channels).any()):
        raise KernelError(f"in_groups: {in_groups.tolist()} are not {num_read} of {channels} channels")
    dense = weight.new_zeros(num_out, channels, *kernel_size).index_copy_(1, index, weight)
    mask = torch.zeros_like(dense, dtype=torch.bool).index_fill_(1, index, True)
    return pack_conv2d(dense, mask, rows=rows, cols=CHANNELS, step=step)


def _check_stream(
    stream: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    out_groups: Tensor,
    window: Window,
    act: str,
) -> None:
    num_out = out_groups.numel() * CHANNELS
    check_conv(x, values, gidx, ptr, num_out, window, act)
    height, width = window.out_size(*x.shape[2:])
    if stream.dim() != 4 or (stream.shape[0], *stream.shape[2:]) != (x.shape[0], height, width):
        raise KernelError(f"stream: must be [{x.shape[0]}, D, {height}, {width}], got {list(stream.shape)}")
    if stream.shape[1] % CHANNELS or stream.shape[1] < num_out:
        raise KernelError(f"stream: {stream.shape[1]} channels must be a multiple of {CHANNELS}, at least {num_out}")
    if stream.dtype != x.dtype or stream.device != x.device:
        expected, got = f"{x.dtype} on {x.device}", f"{stream.dtype} on {stream.device}"
        raise KernelError(f"stream: must be {expected} like x, got {got}")


def _channels(groups: Tensor) -> Tensor:
    """The channels of groups, int64."""
    return (groups.long()[:, None] * CHANNELS + torch.arange(CHANNELS, device=groups.device)).flatten()


def _updated(
    stream: Tensor, branch: Tensor, out_groups: Tensor, scale: Tensor | None, bias: Tensor | None, act: str
) -> Tensor:
    """What the stream's channels of `out_groups` become, in float32 until the end."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    sum_ = branch.to(wide)
    if scale is not None:
        sum_ = sum_ * scale.to(wide)[:, None, None]
    if bias is not None:
        sum_ = sum_ + bias.to(wide)[:, None, None]
    sum_ = sum_ + stream.index_select(1, _channels(out_groups)).to(wide)
    updated: Tensor = ACTIVATIONS[act](sum_).to(stream.dtype)
    return updated


@torch.library.custom_op("sparsekit::residual_subset_conv2d_", mutates_args={"stream"})
def _residual_subset_conv2d_(
    stream: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    out_groups: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> None:
    window = Window(kernel_size, stride, padding, dilation)
    if runs_triton(x):
        from sparsekit.kernels.triton.group_conv2d import launch

        launch(
            stream, x, values, gidx, ptr, order,
            window=window, act=act, scale=scale, bias=bias, residual=stream, out_groups=out_groups,
        )  # fmt: skip
        return
    branch = wide_conv(x, values, gidx, ptr, out_groups.numel() * CHANNELS, window)
    stream.index_copy_(1, _channels(out_groups), _updated(stream, branch, out_groups, scale, bias, act))


@_residual_subset_conv2d_.register_fake
def _(
    stream: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    out_groups: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> None:
    return None
