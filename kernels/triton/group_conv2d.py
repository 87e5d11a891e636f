"""Convolution as a matrix product over the weight groups that are kept; the image's patches are gathered, never stored.

Rows of the product are output pixels, columns output channels, and the sum runs over the kept groups of one row block
of the weight. One body serves `group_conv2d`, which writes all channels, and `residual_subset_conv2d_`, which updates
some channels of a stream in place.
"""

# M output pixels of one tile, N output channels of one tile, K columns of one step of the sum
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.configs import Tile, conv_tile, gpu_at
from sparsekit.kernels.dispatch import interpreted
from sparsekit.kernels.group_conv2d import Window, group_cols
from sparsekit.kernels.triton.activation import activated


def launch(
    out: Tensor,
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    *,
    window: Window,
    act: str,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_groups: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Write act(conv(x) * scale + bias + residual) to `out`, channels_last.

    Args:
        residual: as `out`, and may be `out` itself.
        out_groups: int32, where the convolution's outputs lie in `out`, in groups of 16 channels; None: all, in order.
        tile: None takes the table's.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    (num_images, channels_out, height_out, width_out), (channels, height, width) = out.shape, x.shape[1:]
    num_steps, rows, step = values.shape
    cols = group_cols(values, gidx)
    unit = math.gcd(channels_out, 16)
    num_pixels = num_images * height_out * width_out
    num_blocks = order.numel()
    tile = tile or conv_tile(
        gpu_at(x.device),
        num_pixels=num_pixels,
        num_blocks=num_blocks,
        rows=rows,
        num_steps=num_steps,
        step=step,
        itemsize=x.element_size(),
    )
    left, _, top, _ = window.padding
    num_row_tiles = num_blocks * (rows // tile.block_n)
    group_conv2d_kernel[(triton.cdiv(num_pixels, tile.block_m) * num_row_tiles,)](
        out, x, values, gidx, ptr, order, scale, bias, residual, out_groups,
        num_pixels, height_out, width_out, height, width,
        channels_out // unit if out_groups is None else out_groups.numel(), num_row_tiles,
        height * width * channels // cols, width * channels // cols, channels // cols,
        height_out * width_out * channels_out // unit, width_out * channels_out // unit, channels_out // unit,
        V=rows, COLS=cols, UNIT=unit, GROUPS_PER_TAP=channels // cols, KERNEL_W=window.kernel_size[1],
        STRIDE_H=window.stride[0], STRIDE_W=window.stride[1], TOP=top, LEFT=left,
        DILATION_H=window.dilation[0], DILATION_W=window.dilation[1],
        PADDED=any(side > 0 for side in window.padding), ACT=act, PRECISION=_precision(), UPCAST=interpreted(),
        BM=tile.block_m, BN=tile.block_n, BK=step, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _precision() -> str:
    """Of float32 products, as cuDNN's convolutions are set to compute them. AMD's GPUs have no such choice."""
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 and torch.version.hip is None else "ieee"


@triton.jit
def store_tile(
    out, scale, bias, residual, out_groups, acc_MN, n_N, pixel_M, in_M, num_units,
    UNIT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Write act(acc * scale + bias + residual) to the channels `n_N`, or where `out_groups` says that they lie."""
    unit_N = n_N // UNIT
    in_N = unit_N < num_units
    if out_groups is not None:
        unit_N = tl.load(out_groups + unit_N, mask=in_N, other=0)
    offset_MN = (pixel_M[:, None] + unit_N[None, :]) * UNIT + (n_N % UNIT)[None, :]
    in_MN = in_M[:, None] & in_N[None, :]
    if scale is not None:
        acc_MN *= tl.load(scale + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc_MN += tl.load(bias + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc_MN += tl.load(residual + offset_MN, mask=in_MN, other=0.0).to(tl.float32)
    tl.store(out + offset_MN, activated(acc_MN, ACT).to(out.dtype.element_ty), mask=in_MN)


@triton.jit
def group_conv2d_kernel(
    out, x, values, gidx, ptr, order, scale, bias, residual, out_groups,
    num_pixels, height_out, width_out, height, width, num_units, num_row_tiles,
    x_batch, x_row, x_pixel, out_batch, out_row, out_pixel,
    V: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, GROUPS_PER_TAP: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of output pixels x output channels.

    Strides of x count groups of COLS channels, strides of out and residual units of UNIT channels: so the compiler
    knows how well addresses are aligned and copies 16 bytes at once, whatever the number of channels.
    """
    # The tiles of a pixel run next to each other, so x comes from memory once and from L2 afterwards
    tile_m = tl.program_id(0) // num_row_tiles
    tile_n = tl.program_id(0) % num_row_tiles
    row = tl.load(order + tile_n // (V // BN))
    part = tile_n % (V // BN) * BN
    first = tl.load(ptr + row)
    last = tl.load(ptr + row + 1)

    m_M = tile_m * BM + tl.arange(0, BM)
    in_M = m_M < num_pixels
    # Pixels past the end repeat the last one, so only what is stored needs a mask: in place, twice is once too often
    m_M = tl.minimum(m_M, num_pixels - 1)
    w_M = m_M % width_out
    h_M = m_M // width_out % height_out
    top_M = h_M * STRIDE_H - TOP
    left_M = w_M * STRIDE_W - LEFT
    # Offsets from the tile's first image fit 32 bits, those from the start of the batch may not
    b = tile_m * BM // width_out // height_out
    b_M = m_M // width_out // height_out - b
    x += b.to(tl.int64) * x_batch * COLS
    out += b.to(tl.int64) * out_batch * UNIT
    if residual is not None:
        residual += b.to(tl.int64) * out_batch * UNIT
    x_M = (b_M * x_batch + top_M * x_row + left_M * x_pixel) * COLS

    k_K = tl.arange(0, BK)
    gidx_K = gidx + first * (BK // COLS) + k_K // COLS
    row_N = part + tl.arange(0, BN)
    values_KN = values + first.to(tl.int64) * (V * BK) + row_N[None, :] * BK + k_K[:, None]
    acc_MN = tl.zeros((BM, BN), dtype=tl.float32)
    # The group is loaded one step ahead of its use: an index loaded in the step that needs it halves the pipeline
    group_K = tl.load(gidx_K)
    for _ in range(first, last):
        tap_K = group_K // GROUPS_PER_TAP
        dh_K = tap_K // KERNEL_W * DILATION_H
        dw_K = tap_K % KERNEL_W * DILATION_W
        offset_K = (dh_K * x_row + dw_K * x_pixel + group_K % GROUPS_PER_TAP) * COLS + k_K % COLS
        x_MK = x + (x_M[:, None] + offset_K[None, :])
        if PADDED:
            h_MK = top_M[:, None] + dh_K[None, :]
            w_MK = left_M[:, None] + dw_K[None, :]
            in_MK = (h_MK >= 0) & (h_MK < height) & (w_MK >= 0) & (w_MK < width)
            x_MK = tl.load(x_MK, mask=in_MK, other=0.0)
        else:
            x_MK = tl.load(x_MK)
        weight_KN = tl.load(values_KN)
        gidx_K += BK // COLS
        values_KN += V * BK
        group_K = tl.load(gidx_K)
        if UPCAST:
            x_MK = x_MK.to(tl.float32)
            weight_KN = weight_KN.to(tl.float32)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision=PRECISION)

    pixel_M = b_M * out_batch + h_M * out_row + w_M * out_pixel
    # Half the channels at a time: the whole residual beside the whole sum does not fit the registers
    left_MN, right_MN = tl.split(acc_MN.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    n_N = row * V + part + tl.arange(0, BN // 2)
    store_tile(out, scale, bias, residual, out_groups, left_MN, n_N, pixel_M, in_M, num_units, UNIT, ACT)
    n_N += BN // 2
    store_tile(out, scale, bias, residual, out_groups, right_MN, n_N, pixel_M, in_M, num_units, UNIT, ACT)
