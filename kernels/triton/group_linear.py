"""A matrix product with the kept groups of a weight, gathered from both, and what follows it in the same kernel."""

# M samples and N outputs of one tile, K inputs of one step
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.errors import KernelError
from sparsekit.kernels.configs import Tile, gpu_at, linear_tile
from sparsekit.kernels.dispatch import interpreted
from sparsekit.kernels.triton.activation import activated

MAX_FEATURES = 2**24  # 128 rows of as many numbers are what 32-bit offsets reach
TILES_PER_BAND = 8  # tiles of samples that pass over the weight together, and find it in L2


@triton.jit
def halves(tile_MN):
    """The left and the right half."""
    BM: tl.constexpr = tile_MN.shape[0]
    BN: tl.constexpr = tile_MN.shape[1]
    return tl.split(tile_MN.reshape(BM, 2, BN // 2).permute(0, 2, 1))


@triton.jit
def store_tile(y, bias, residual, acc_MN, m_M, n_N, num_samples, num_out, ACT: tl.constexpr):
    """Write act(acc + bias + residual), in float32 until the end."""
    in_N = n_N < num_out
    in_MN = (m_M < num_samples)[:, None] & in_N[None, :]
    offset_MN = m_M[:, None] * num_out + n_N[None, :]
    if bias is not None:
        acc_MN += tl.load(bias + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc_MN += tl.load(residual + offset_MN, mask=in_MN, other=0.0).to(tl.float32)
    tl.store(y + offset_MN, activated(acc_MN, ACT).to(y.dtype.element_ty), mask=in_MN)


@triton.jit
def group_linear_kernel(
    y, x, values, gidx, ptr, order, bias, residual,
    num_samples, num_out, x_groups,
    V: tl.constexpr, COLS: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of samples x outputs.

    The stride of x counts groups: so the compiler knows that rows are aligned, and copies 16 bytes at once, whatever
    the number of inputs.
    """
    PARTS: tl.constexpr = V // BN
    num_tiles_m = tl.cdiv(num_samples, BM)
    num_tiles_n = tl.cdiv(num_out, V) * PARTS
    band = tl.program_id(0) // (BAND * num_tiles_n)
    within = tl.program_id(0) % (BAND * num_tiles_n)
    band_size = tl.minimum(num_tiles_m - band * BAND, BAND)
    tile_m = band * BAND + within % band_size
    tile_n = within // band_size
    row = tl.load(order + tile_n // PARTS)
    part = tile_n % PARTS * BN
    first = tl.load(ptr + row)
    last = tl.load(ptr + row + 1)

    # Offsets from the tile's first sample fit 32 bits, those from the first of all may not
    before = tile_m.to(tl.int64) * BM
    m_M = tl.arange(0, BM)
    num_here = num_samples - tile_m * BM
    # Samples past the end repeat the last one, so that only the store needs a mask
    safe_M = tl.minimum(m_M, num_here - 1)
    x += before * x_groups * COLS
    x_M = safe_M * x_groups * COLS
    k_K = tl.arange(0, BK)
    gidx += first * (BK // COLS)
    values += first.to(tl.int64) * (V * BK) + part * BK
    offset_KN = tl.arange(0, BN)[None, :] * BK + k_K[:, None]
    acc_MN = tl.zeros((BM, BN), dtype=tl.float32)
    # The group is loaded one step ahead of its use: an index loaded in the step that needs it halves the pipeline
    group_K = tl.load(gidx + k_K // COLS)
    for _ in range(first, last):
        col_K = group_K * COLS + k_K % COLS
        x_MK = tl.load(x + (x_M[:, None] + col_K[None, :]))
        weight_KN = tl.load(values + offset_KN)
        gidx += BK // COLS
        values += V * BK
        group_K = tl.load(gidx + k_K // COLS)
        if UPCAST:
            x_MK = x_MK.to(tl.float32)
            weight_KN = weight_KN.to(tl.float32)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision=PRECISION)

    y += before * num_out
    if residual is not None:
        residual += before * num_out
    if BN < 128:
        n_N = row * V + part + tl.arange(0, BN)
        store_tile(y, bias, residual, acc_MN, m_M, n_N, num_here, num_out, ACT)
    else:
        # A quarter of the outputs at a time: the residual beside the whole sum does not fit the registers
        n_N = row * V + part + tl.arange(0, BN // 4)
        left_MN, right_MN = halves(acc_MN)
        a_MN, b_MN = halves(left_MN)
        c_MN, d_MN = halves(right_MN)
        store_tile(y, bias, residual, a_MN, m_M, n_N, num_here, num_out, ACT)
        store_tile(y, bias, residual, b_MN, m_M, n_N + BN // 4, num_here, num_out, ACT)
        store_tile(y, bias, residual, c_MN, m_M, n_N + BN // 2, num_here, num_out, ACT)
        store_tile(y, bias, residual, d_MN, m_M, n_N + 3 * BN // 4, num_here, num_out, ACT)


def launch(
    y_MN: Tensor,
    x_MK: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias_N: Tensor | None,
    residual_MN: Tensor | None,
    *,
    act: str,
    cols: int,
    tile: Tile | None = None,
) -> None:
    """Write `group_linear` to y; all tensors are contiguous, and M > 0. `tile` overrules the table.

    Raises:
        KernelError: if a tile of x or y is too wide for 32-bit offsets.
    """
    num_samples, num_out = y_MN.shape
    _, rows, step = values.shape
    x_MK = pad(x_MK, (0, -x_MK.shape[1] % cols))
    if max(x_MK.shape[1], num_out) >= MAX_FEATURES:
        raise KernelError(f"group_linear: {x_MK.shape[1]} inputs, {num_out} outputs; must be below {MAX_FEATURES}")
    sizes = {"num_samples": num_samples, "num_out": num_out, "rows": rows, "step": step}
    tile = tile or linear_tile(gpu_at(x_MK.device), **sizes, itemsize=x_MK.element_size())
    num_tiles = triton.cdiv(num_samples, tile.block_m) * order.numel() * (rows // tile.block_n)
    group_linear_kernel[(num_tiles,)](
        y_MN, x_MK, values, gidx, ptr, order, bias_N, residual_MN,
        num_samples, num_out, x_MK.shape[1] // cols,
        V=rows, COLS=cols,
        ACT=act, PRECISION=_precision(), UPCAST=interpreted(), BAND=TILES_PER_BAND,
        BM=tile.block_m, BN=tile.block_n, BK=step,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _precision() -> str:
    """Of float32 products: what the user allows cuBLAS; most AMD GPUs have no TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and torch.version.hip is None else "ieee"
