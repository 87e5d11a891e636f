"""The goal table: which layers are measured, beside what, and what they must reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels_convs import Conv, Subset
from benchmarks.kernels_linears import BF16, FP16, Linear, cusparselt_case, nm24_case
from benchmarks.kernels_measure import OURS, Case, Goal, Turns
from benchmarks.soft_topk import EPSILON, WIDTHS, Step, exact, log_sinkhorn, one_step, stepper
from sparsekit.kernels.soft_topk import exact_mask


def soft_topk_turns(device: str, seed: int) -> Turns:
    """The soft masks of ResNet-50's layers, forward and backward, beside Sinkhorn's algorithm on all layers padded."""
    solvers = {OURS: exact, "sinkhorn step": one_step, "padded eager": log_sinkhorn, "padded graph": log_sinkhorn}
    steps = {name: stepper(solve, torch.device(device)) for name, solve in solvers.items()}
    reference = stepper(exact, torch.device("cpu"))()[0].to(device)
    return Turns(
        {name: partial(_mask_of, step) for name, step in steps.items()},
        {name: lambda: reference for name in (OURS, "padded eager", "padded graph")},
        eager=frozenset({"padded eager"}),
        quantities={"sum error": largest_sum_error(device)},
    )


def _mask_of(step: Step) -> Tensor:
    mask_GC, _ = step()
    return mask_GC


def largest_sum_error(device: str) -> float:
    """How far a mask's sum is from its count, over the layers and over epsilon from 0.002 to 1."""
    torch.manual_seed(0)
    sizes_G = torch.tensor(WIDTHS)
    valid_GC = (torch.arange(max(WIDTHS)) < sizes_G[:, None]).to(device)
    scores_GC, keep_G = torch.rand(valid_GC.shape).to(device), (sizes_G // 2).float().to(device)
    errors = [
        (exact_mask(scores_GC, keep_G, valid_GC, epsilon=epsilon).double().sum(1) - keep_G).abs().max()
        for epsilon in (0.002, 0.005, 0.02, 0.1, 0.25, 1.0)
    ]
    return float(max(errors))


def _percent(density: float) -> int:
    return round(100 * (1 - density))


def _square(group: tuple[int, int], bars: Sequence[tuple[float, float, float | None, float | None]]) -> list[Case]:
    """Cases of 4096 x 4096 x 4096 by density, must, stretch and kill rule."""
    return [
        Linear(4096, 4096, 4096, group, density).case(
            f"k1/4096/{group[0]}x{group[1]}-s{_percent(density)}", Goal("B0", must, stretch, drop)
        )
        for density, must, stretch, drop in bars
    ]


# Efficiency is the ratio times the density: below 0.5, groups of 128 x 16 are for sparser weights and few samples only.
_K1 = [
    *_square((128, 16), [(0.5, 1.2, 1.35, 0.5 / 0.5), (0.25, 2.3, 2.7, None), (0.1, 4.5, 6.0, None)]),
    *_square((64, 64), [(0.5, 0.9, None, None), (0.25, 1.8, None, None), (0.1, 4.0, None, None)]),
    *_square((128, 128), [(0.5, 1.35, None, None), (0.25, 2.7, None, None), (0.1, 5.5, None, None)]),
    *_square((128, 16), [(1.0, 0.65, None, None)]),
    Linear(16, 4096, 4096, (128, 16), 0.25).case("k1/m16/128x16-s75", Goal("B0", 2.5)),
]
BSR_GOAL = Goal("B1", 1.3)  # of the geometric mean
_BSR = [
    Linear(num_samples, *layer, (64, 64), 0.25, bsr=True).case(
        f"k1-bsr/{num_samples}-{layer[0]}-{layer[1]}", note="B1 with the best of six settings instead of torch's tuner"
    )
    for num_samples in (64, 1024, 4096, 50432)
    for layer in ((768, 3072), (3072, 768), (4096, 4096))
]
_SG2 = Conv(8, 512, 64, 0.5)
_K2 = [
    _SG2.case("k2/stylegan2-512-64px-s50", Goal("B2", 1.1, 1.3, drop_below=0.5 / 0.5)),
    replace(_SG2, density=0.25).case("k2/stylegan2-512-64px-s75", Goal("B2", 2.0, 2.6)),
    replace(_SG2, density=0.1).case("k2/stylegan2-512-64px-s90", Goal("B2", 4.0, 5.5)),
    Conv(256, 256, 14, 0.25).case("k2/resnet50-256-14px-s75", Goal("B2", 1.9)),
    Conv(32, 512, 28, 0.25).case("k2/vgg16-512-28px-s75", Goal("B2", 2.0)),
    Conv(256, 128, 28, 0.25).case("k2/resnet50-128-28px-s75", Goal("B2", 1.5)),
    replace(_SG2, density=1.0).case("k2/stylegan2-512-64px-s0", Goal("B2", 0.6)),
    Conv(256, 256, 14, 1.0).case("k2/resnet50-256-14px-s0", Goal("B2", 0.6)),
]
_K5_GOALS = Goal("B3", 1.5, 1.7), Goal("separate", 1.8, 3.4), Goal("TB/s", 2.4)
_K5 = [
    Subset().case("k5/layer1-conv3-fp16", *_K5_GOALS),
    Subset(dtype=BF16).case("k5/layer1-conv3-bf16", *_K5_GOALS),
]
_K6 = [
    Conv(256, channels, side, 1.0, dtype=FP16, fused=True).case(
        f"k6/{channels}-{side}px", Goal("B3", 0.95, drop_below=0.95)
    )
    for channels in (24, 40, 56, 72, 88, 104)
    for side in (56, 28, 14)
]
_K7 = Case(
    "k7/resnet50",
    soft_topk_turns,
    (
        Goal("us", 40, 20, at_most=True),
        Goal("padded eager", 50),
        Goal("padded graph", 5, 10),
        Goal("sum error", 1e-3, at_most=True),
    ),
    torch.float32,
    tolerance=1e-3,
    note=f"{len(WIDTHS)} layers, {sum(WIDTHS)} filters, forward and backward, epsilon {EPSILON}, 20 iterations padded",
)
_K3A = [
    cusparselt_case((num_samples, *layer))
    for num_samples in (1024, 4096)
    for layer in ((768, 3072), (3072, 768), (4096, 4096))
]
_K3B = [nm24_case(num_samples, size) for num_samples in (1, 8, 16) for size in (4096, 8192)]
CASES = [*_K1, *_K2, *_K3A, *_K3B, *_K5, *_K6, _K7, *_BSR]
