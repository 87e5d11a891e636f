"""A matrix product with a 2:4 weight that is read packed and unpacked in registers: for few samples, bytes are all."""

# M samples and N outputs of one tile, R runs of 4 inputs of one step
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.configs import gpu_at, max_stages
from sparsekit.kernels.dispatch import interpreted
from sparsekit.kernels.triton.activation import activated

BLOCK_M, BLOCK_N, RUNS = 16, 16, 64  # the least that tensor cores take; a program reads 4.5 KiB of weight a step
NUM_WARPS = 4


@triton.jit
def at_place(code_NR, low_NR, high_NR, place: tl.constexpr, dtype: tl.constexpr):
    """[R, N]: the weights at one of the 4 places of each run; those of a run are in ascending places."""
    weight_NR = tl.where((code_NR & 3) == place, low_NR, tl.where((code_NR >> 2) == place, high_NR, 0.0))
    return tl.trans(weight_NR.to(dtype))


@triton.jit
def nm24_linear_kernel(
    y, x, values, positions, bias,
    num_samples, num_out, num_in, num_bytes,
    ACT: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """One tile of samples x outputs; `num_bytes` is the positions' of one output, 2 runs each."""
    # Tiles of samples are next to each other: the weight comes from memory once and from L2 afterwards
    num_tiles_m = tl.cdiv(num_samples, BM)
    m_M = tl.program_id(0) % num_tiles_m * BM + tl.arange(0, BM)
    n_N = tl.program_id(0) // num_tiles_m * BN + tl.arange(0, BN)
    safe_M = tl.minimum(m_M, num_samples - 1).to(tl.int64)
    safe_N = tl.minimum(n_N, num_out - 1).to(tl.int64)
    half_H = tl.arange(0, RUNS // 2)
    slot_S = tl.arange(0, 2 * RUNS)
    input_K = tl.arange(0, 4 * RUNS)
    values += (safe_N * num_bytes * 4)[:, None] + slot_S[None, :]
    positions += (safe_N * num_bytes)[:, None] + half_H[None, :]
    x += (safe_M * num_in)[:, None] + input_K[None, :]
    acc_MN = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, num_bytes, RUNS // 2):
        in_H = half_H < num_bytes - first
        in_S = slot_S < 4 * (num_bytes - first)
        in_K = input_K < num_in - 8 * first
        byte_NH = tl.load(positions + first, mask=in_H[None, :], other=0).to(tl.int32)
        value_NS = tl.load(values + 4 * first, mask=in_S[None, :], other=0.0).to(tl.float32)
        x_MK = tl.load(x + 8 * first, mask=in_K[None, :], other=0.0)
        if UPCAST:
            x_MK = x_MK.to(tl.float32)
        code_NR = tl.join(byte_NH & 15, byte_NH >> 4).reshape(BN, RUNS)
        low_NR, high_NR = tl.split(value_NS.reshape(BN, RUNS, 2))
        even_MRP, odd_MRP = tl.split(x_MK.reshape(BM, RUNS, 2, 2))
        x0_MR, x2_MR = tl.split(even_MRP)
        x1_MR, x3_MR = tl.split(odd_MRP)
        acc_MN = tl.dot(x0_MR, at_place(code_NR, low_NR, high_NR, 0, x_MK.dtype), acc_MN, input_precision="ieee")
        acc_MN = tl.dot(x1_MR, at_place(code_NR, low_NR, high_NR, 1, x_MK.dtype), acc_MN, input_precision="ieee")
        acc_MN = tl.dot(x2_MR, at_place(code_NR, low_NR, high_NR, 2, x_MK.dtype), acc_MN, input_precision="ieee")
        acc_MN = tl.dot(x3_MR, at_place(code_NR, low_NR, high_NR, 3, x_MK.dtype), acc_MN, input_precision="ieee")
    if bias is not None:
        acc_MN += tl.load(bias + n_N, mask=n_N < num_out, other=0.0).to(tl.float32)[None, :]
    in_MN = (m_M < num_samples)[:, None] & (n_N < num_out)[None, :]
    offset_MN = m_M.to(tl.int64)[:, None] * num_out + n_N[None, :]
    tl.store(y + offset_MN, activated(acc_MN, ACT).to(y.dtype.element_ty), mask=in_MN)


def launch(y_MN: Tensor, x_MK: Tensor, values: Tensor, positions: Tensor, bias_N: Tensor | None, *, act: str) -> None:
    """Write `nm24_linear` to y; all tensors are contiguous, and M > 0."""
    num_samples, num_out = y_MN.shape
    num_tiles = triton.cdiv(num_samples, BLOCK_M) * triton.cdiv(num_out, BLOCK_N)
    nm24_linear_kernel[(num_tiles,)](
        y_MN, x_MK, values, positions, bias_N,
        num_samples, num_out, x_MK.shape[1], positions.shape[1],
        ACT=act, UPCAST=interpreted(), BM=BLOCK_M, BN=BLOCK_N, RUNS=RUNS,
        num_warps=NUM_WARPS, num_stages=stages(gpu_at(x_MK.device).arch, x_MK.element_size()),
    )  # fmt: skip


def stages(arch: str, itemsize: int) -> int:
    """Steps in flight, as Triton counts them: at most 5, and what shared memory holds beside one that is unpacked."""
    stage_bytes = (4 * BLOCK_M + 2 * BLOCK_N) * RUNS * itemsize + BLOCK_N * RUNS // 2
    return min(5, max(2, max_stages(arch, stage_bytes) - 1))
