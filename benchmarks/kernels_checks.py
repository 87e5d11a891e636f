"""Are the kernels right on this GPU? Every tile with 4 and 8 warps and every depth of the tables, and every dtype.

Against float64 on the GPU, on shapes small enough that compiling takes the time.
"""

# M samples, N outputs, K inputs
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import conv2d, linear, relu

from benchmarks.kernels_convs import conv_mask
from benchmarks.kernels_linears import normal
from benchmarks.kernels_measure import described, failures, relative_error
from benchmarks.kernels_run import alive
from sparsekit.kernels.configs import CONV_TILES, LINEAR_TILES, Tile, gpu_at, max_stages
from sparsekit.kernels.formats import NM24, pack
from sparsekit.kernels.group_conv2d import Window, pack_conv2d
from sparsekit.kernels.masks import group_mask, nm_mask
from sparsekit.kernels.nm24_linear import nm24_linear
from sparsekit.kernels.residual_subset import CHANNELS, pack_subset
from sparsekit.kernels.soft_topk import exact_mask, sinkhorn_step

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-3}  # float32 in TF32
_STEP = 64

Check = tuple[str, torch.dtype, Callable[[], float]]


def configurations(tiles: tuple[Tile, ...], device: str) -> Iterator[tuple[Tile, torch.dtype]]:
    """In bfloat16 each tile with 4 and 8 warps and each depth that any has; in other dtypes as the tables have it."""
    depths = sorted({tile.num_stages for tile in tiles} | {2})
    arch = gpu_at(torch.device(device)).arch
    for tile in tiles:
        for dtype in TOLERANCE:
            stage_bytes = (tile.block_m + tile.block_n) * _STEP * dtype.itemsize
            most = max_stages(arch, stage_bytes)
            if dtype != torch.bfloat16 and most > 1:
                yield replace(tile, num_stages=min(tile.num_stages, most)), dtype
            for num_warps in (4, 8) if dtype == torch.bfloat16 else ():
                for num_stages in depths:
                    if num_stages <= most:
                        yield replace(tile, num_warps=num_warps, num_stages=num_stages), dtype


def linear_checks(device: str = "cuda") -> Iterator[Check]:
    for tile, dtype in configurations(LINEAR_TILES, device):
        yield f"{tile}, {dtype}", dtype, partial(_linear_error, tile, dtype, device)


def _linear_error(tile: Tile, dtype: torch.dtype, device: str) -> float:
    from sparsekit.kernels.triton.group_linear import launch

    draw = partial(normal, device=device, dtype=dtype)
    x_MK, w_NK = draw(300, 1024, seed=0), draw(640, 1024, seed=1, scale=1 / 32)
    bias_N, residual_MN = draw(640, seed=2), draw(300, 640, seed=3)
    mask_NK = group_mask(draw(640, 1024, seed=4).float(), rows=128, cols=16, density=0.4, balanced=False)
    packed = pack(w_NK, mask_NK, rows=128, cols=16, step=_STEP)
    y_MN = torch.full_like(residual_MN, torch.nan)
    parts = packed.values, packed.gidx, packed.ptr, packed.order, bias_N, residual_MN
    launch(y_MN, x_MK, *parts, act="relu", cols=packed.cols, tile=tile)
    truth_MN = linear(x_MK.double(), (w_NK * mask_NK).double(), bias_N.double()) + residual_MN.double()
    return relative_error(y_MN, relu(truth_MN))


def conv_checks(device: str = "cuda") -> Iterator[Check]:
    for tile, dtype in configurations(CONV_TILES, device):
        yield f"{tile}, {dtype}", dtype, partial(_conv_error, tile, dtype, device)


def _conv_error(tile: Tile, dtype: torch.dtype, device: str) -> float:
    from sparsekit.kernels.triton.group_conv2d import launch

    draw = partial(normal, device=device, dtype=dtype)
    x, weight = draw(3, 128, 15, 13, seed=0), draw(256, 128, 3, 3, seed=1, scale=1 / 34)
    bias, residual = draw(256, seed=2), draw(3, 256, 15, 13, seed=3)
    mask = conv_mask(weight, cols=16, density=0.4, seed=4)
    packed = pack_conv2d(weight, mask, rows=128, step=_STEP)
    out = torch.full_like(residual, torch.nan)
    window = Window((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    parts = packed.values, packed.gidx, packed.ptr, packed.order
    launch(out, x, *parts, window=window, act="relu", bias=bias, residual=residual, tile=tile)
    truth = conv2d(x.double(), (weight * mask).double(), bias.double(), padding=1) + residual.double()
    return relative_error(out, relu(truth))


def subset_checks(device: str = "cuda") -> Iterator[Check]:
    """In place, as 1 x 1 convolution."""
    for tile, dtype in configurations(CONV_TILES, device):
        yield f"{tile}, {dtype}", dtype, partial(_subset_error, tile, dtype, device)


def _subset_error(tile: Tile, dtype: torch.dtype, device: str) -> float:
    from sparsekit.kernels.triton.group_conv2d import launch

    draw = partial(normal, device=device, dtype=dtype)
    x, weight, bias = draw(3, 64, 15, 13, seed=0), draw(128, 64, 1, 1, seed=1, scale=1 / 8), draw(128, seed=2)
    stream, groups = relu(draw(3, 256, 15, 13, seed=3)), torch.arange(15, -1, -2, device=device)
    channels = (groups[:, None] * CHANNELS + torch.arange(CHANNELS, device=device)).flatten()
    branch = conv2d(x.double(), weight.double(), bias.double())
    truth = stream.double().index_add(1, channels, branch).relu()
    packed = pack_subset(weight, channels=64, rows=128, step=_STEP)
    window = Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    parts = packed.values, packed.gidx, packed.ptr, packed.order
    out_groups = groups.int()
    launch(stream, x, *parts, window=window, act="relu", bias=bias, residual=stream, out_groups=out_groups, tile=tile)
    return relative_error(stream, truth)


def nm24_checks(device: str = "cuda") -> Iterator[Check]:
    for dtype in TOLERANCE:
        for shape in ((1, 4096, 4096), (8, 1000, 4100), (33, 300, 520)):
            yield f"{shape}, {dtype}", dtype, partial(_nm24_error, shape, dtype, device)


def _nm24_error(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    num_samples, num_out, num_in = shape
    draw = partial(normal, device=device, dtype=dtype)
    x_MK, w_NK = draw(num_samples, num_in, seed=0), draw(num_out, num_in, seed=1, scale=num_in**-0.5)
    w_NK = w_NK * nm_mask(w_NK.abs())
    return relative_error(nm24_linear(x_MK, NM24.pack(w_NK)), x_MK.double() @ w_NK.double().T)


def soft_topk_checks(device: str = "cuda") -> Iterator[Check]:
    """A width for each number of warps, and one of several tiles."""
    for num_columns in (64, 200, 500, 1000, 2048, 4099):
        for name in ("exact", "sinkhorn"):
            yield f"{name}, {num_columns}", torch.float32, partial(_soft_topk_error, name, num_columns, device)


def _soft_topk_error(name: str, num_columns: int, device: str) -> float:
    """Of the mask and of its gradient, against float64."""
    size = 5, num_columns
    scores, direction = (normal(*size, seed=seed, device=device, dtype=torch.float32) for seed in (0, 1))
    counts = torch.linspace(1, num_columns - 1, 5, device=device)
    valid = torch.ones(size, dtype=torch.bool, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.sigmoid().to(dtype).requires_grad_()
        keep = counts.to(dtype)
        if name == "exact":
            mask = exact_mask(leaf, keep, valid, epsilon=0.25)
        else:
            start = torch.zeros_like(leaf), torch.zeros_like(keep)
            mask, *_ = sinkhorn_step(leaf, keep, *start, valid, epsilon=0.25)
        results.append((mask.detach(), *torch.autograd.grad(mask, leaf, direction.to(dtype))))
    return max(relative_error(out, truth) for out, truth in zip(*results, strict=True))


def checked(checks: Iterator[Check]) -> dict[str, Any]:
    """How many of the configurations are right, and what is wrong with the others."""
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it anyway
    num_right, wrong, largest = 0, {}, 0.0
    try:
        for name, dtype, run in checks:
            try:
                error = run()
            except failures() as failure:
                wrong[name] = described(failure)
                if not alive():
                    break  # the rest would fail as well, whatever it is worth
                continue
            largest = max(largest, error / TOLERANCE[dtype])
            if error <= TOLERANCE[dtype]:
                num_right += 1
            else:
                wrong[name] = f"wrong by {error:.2g}, allowed are {TOLERANCE[dtype]}"
    finally:
        torch.set_float32_matmul_precision("highest")
    largest_share = largest if largest < float("inf") else None
    return {
        "num_right": num_right,
        "num_wrong": len(wrong),
        "wrong": wrong,
        "largest_share_of_tolerance": largest_share,
    }


CHECKS = {
    "check/k1": linear_checks,
    "check/k2": conv_checks,
    "check/k3b": nm24_checks,
    "check/k5": subset_checks,
    "check/k7": soft_topk_checks,
}
