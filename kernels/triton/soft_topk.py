"""The soft top-k and the Sinkhorn step on the GPU: one program per row, float32, rows longer than a tile in tiles.

A row that fits one tile stays in registers while Newton runs; of a longer one each step reads the rest from the cache.
"""

# T entries of a tile. Names that end in _T are vectors; all others are pointers, or one number per row.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, uint8

MAX_TILE = 2048  # ResNet-50's widest layer. With 16 warps for 4096, ptxas stops at 64 registers and some kernels spill.


@triton.jit
def _sigmoid(x_T):
    decay_T = tl.exp(-tl.abs(x_T))  # never overflows
    return tl.where(x_T < 0, decay_T, 1.0) / (1.0 + decay_T)


@triton.jit
def _exact_logits(scores_ptr, valid_ptr, columns_T, num_columns, epsilon):
    """(2 s - 1) / epsilon, -inf at padding and beyond the row."""
    inside_T = columns_T < num_columns
    valid_T = tl.load(valid_ptr + columns_T, inside_T, 0) != 0
    scores_T = tl.load(scores_ptr + columns_T, inside_T, 0.0)
    return tl.where(valid_T, (2.0 * scores_T - 1.0) / epsilon, -float("inf"))


@triton.jit
def _bracket(scores_ptr, keep, valid_ptr, num_columns, epsilon, TILE: tl.constexpr):
    """Shifts at which every entry is at most, and at least, the mean that the row shall have; and its size."""
    columns_T = tl.arange(0, TILE)
    num_T = tl.zeros([TILE], tl.float32)
    largest_T = tl.full([TILE], -float("inf"), tl.float32)
    smallest_T = tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, num_columns, TILE):
        logits_T = _exact_logits(scores_ptr, valid_ptr, start + columns_T, num_columns, epsilon)
        valid_T = logits_T > -float("inf")
        num_T += tl.where(valid_T, 1.0, 0.0)
        largest_T = tl.maximum(largest_T, logits_T)
        smallest_T = tl.minimum(smallest_T, tl.where(valid_T, logits_T, float("inf")))
    num = tl.sum(num_T)
    mean = tl.minimum(tl.maximum(keep / num, 1e-6), 1.0 - 1e-6)  # the clamp only matters to full rows, set apart
    target = tl.log(mean / (1.0 - mean))
    return target - tl.max(largest_T), target - tl.min(smallest_T), num


@triton.jit
def _newton(shift, low, high, excess, slope):
    """The next shift, and the bracket that this one narrows; where Newton would leave it, or has no slope, bisect."""
    low = tl.where(excess < 0, shift, low)
    high = tl.where(excess < 0, high, shift)
    steep = slope > 1e-30  # any flatter, and Newton leaves every bracket
    step = shift - excess / tl.where(steep, slope, 1.0)
    inside = steep & (low <= step) & (step <= high)
    return tl.where(inside, step, (low + high) / 2), low, high


@triton.jit
def exact_mask_kernel(scores_ptr, keep_ptr, valid_ptr, mask_ptr, max_steps, num_columns, epsilon, TILE: tl.constexpr):
    row = tl.program_id(0)
    scores_ptr += row.to(tl.int64) * num_columns
    valid_ptr += row.to(tl.int64) * num_columns
    mask_ptr += row.to(tl.int64) * num_columns
    columns_T = tl.arange(0, TILE)
    keep = tl.load(keep_ptr + row)
    low, high, num = _bracket(scores_ptr, keep, valid_ptr, num_columns, epsilon, TILE)
    first_T = _exact_logits(scores_ptr, valid_ptr, columns_T, num_columns, epsilon)
    shift = (low + high) / 2
    move = high - low
    step = 0
    while (step < max_steps) & (move != 0):  # once still it stays so: the steps left would change nothing
        mask_T = _sigmoid(first_T + shift)
        total_T = mask_T
        slope_T = mask_T * (1.0 - mask_T)
        for start in range(TILE, num_columns, TILE):
            logits_T = _exact_logits(scores_ptr, valid_ptr, start + columns_T, num_columns, epsilon)
            mask_T = _sigmoid(logits_T + shift)
            total_T += mask_T
            slope_T += mask_T * (1.0 - mask_T)
        last = shift
        shift, low, high = _newton(shift, low, high, tl.sum(total_T) - keep, tl.sum(slope_T))
        move = shift - last
        step += 1
    for start in range(0, num_columns, TILE):
        logits_T = _exact_logits(scores_ptr, valid_ptr, start + columns_T, num_columns, epsilon)
        mask_T = tl.where(keep == num, tl.where(logits_T > -float("inf"), 1.0, 0.0), _sigmoid(logits_T + shift))
        tl.store(mask_ptr + start + columns_T, mask_T, start + columns_T < num_columns)


@triton.jit
def exact_mask_backward_kernel(
    grad_ptr, mask_ptr, grad_scores_ptr, grad_keep_ptr, num_columns, epsilon, TILE: tl.constexpr
):
    row = tl.program_id(0)
    grad_ptr += row.to(tl.int64) * num_columns
    mask_ptr += row.to(tl.int64) * num_columns
    grad_scores_ptr += row.to(tl.int64) * num_columns
    total_T = tl.zeros([TILE], tl.float32)
    product_T = tl.zeros([TILE], tl.float32)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        mask_T = tl.load(mask_ptr + columns_T, columns_T < num_columns, 0.0)
        slope_T = mask_T * (1.0 - mask_T)
        total_T += slope_T
        product_T += slope_T * tl.load(grad_ptr + columns_T, columns_T < num_columns, 0.0)
    mean = tl.sum(product_T) / tl.maximum(tl.sum(total_T), 1.1754943508222875e-38)  # the least normal number
    tl.store(grad_keep_ptr + row, mean)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        mask_T = tl.load(mask_ptr + columns_T, columns_T < num_columns, 0.0)
        grad_T = tl.load(grad_ptr + columns_T, columns_T < num_columns, 0.0)
        grad_scores_T = mask_T * (1.0 - mask_T) * (grad_T - mean) / epsilon * 2.0
        tl.store(grad_scores_ptr + columns_T, grad_scores_T, columns_T < num_columns)


@triton.jit
def _moved_log_odds(scores_ptr, log_odds_ptr, valid_ptr, columns_T, num_columns, epsilon):
    """The last plan's log-odds moved by the scores, and which entries are neither padding nor beyond the row."""
    inside_T = columns_T < num_columns
    valid_T = tl.load(valid_ptr + columns_T, inside_T, 0) != 0
    scores_T = tl.load(scores_ptr + columns_T, inside_T, 0.0)
    return tl.load(log_odds_ptr + columns_T, inside_T, 0.0) + (2.0 * scores_T - 1.0) / epsilon, valid_T


@triton.jit
def _scaled_sigmoid(x_T, largest):
    """sigmoid(x) / exp(min(largest, 0)) where x <= largest: however far both fall, the largest does not vanish."""
    return tl.exp(tl.minimum(x_T, 0.0) - tl.minimum(largest, 0.0)) / (1.0 + tl.exp(-tl.abs(x_T)))


@triton.jit
def _extent(scores_ptr, log_odds_ptr, valid_ptr, num_columns, epsilon, TILE: tl.constexpr):
    """Largest and smallest moved log-odds of a row, and its size."""
    num_T = tl.zeros([TILE], tl.float32)
    largest_T = tl.full([TILE], -float("inf"), tl.float32)
    smallest_T = tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        logits_T, valid_T = _moved_log_odds(scores_ptr, log_odds_ptr, valid_ptr, columns_T, num_columns, epsilon)
        num_T += tl.where(valid_T, 1.0, 0.0)
        largest_T = tl.maximum(largest_T, tl.where(valid_T, logits_T, -float("inf")))
        smallest_T = tl.minimum(smallest_T, tl.where(valid_T, logits_T, float("inf")))
    return tl.max(largest_T), tl.min(smallest_T), tl.sum(num_T)


@triton.jit
def sinkhorn_step_kernel(
    scores_ptr,
    keep_ptr,
    log_odds_ptr,
    potential_ptr,
    valid_ptr,
    mask_ptr,
    new_log_odds_ptr,
    new_potential_ptr,
    rise_ptr,
    num_columns,
    epsilon,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * num_columns
    row_ptrs = scores_ptr + first, log_odds_ptr + first, valid_ptr + first
    keep = tl.load(keep_ptr + row)
    potential = tl.load(potential_ptr + row)
    largest, smallest, num = _extent(*row_ptrs, num_columns, epsilon, TILE)
    largest += potential
    smallest += potential
    keep_T = tl.zeros([TILE], tl.float32)
    drop_T = tl.zeros([TILE], tl.float32)
    for start in range(0, num_columns, TILE):
        logits_T, valid_T = _moved_log_odds(*row_ptrs, start + tl.arange(0, TILE), num_columns, epsilon)
        x_T = tl.where(valid_T, logits_T + potential, largest)  # what is not valid could overflow
        keep_T += tl.where(valid_T, _scaled_sigmoid(x_T, largest), 0.0)
        drop_T += tl.where(valid_T, _scaled_sigmoid(-x_T, -smallest), 0.0)
    kept = tl.sum(keep_T)
    log_kept = tl.minimum(largest, 0.0) + tl.log(kept)
    log_dropped = tl.minimum(-smallest, 0.0) + tl.log(tl.sum(drop_T))
    new_potential = potential + tl.log(keep / (num - keep)) - log_kept + log_dropped
    tl.store(new_potential_ptr + row, new_potential)
    tl.store(rise_ptr + row, new_potential - potential)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        logits_T, valid_T = _moved_log_odds(*row_ptrs, columns_T, num_columns, epsilon)
        x_T = tl.where(valid_T, logits_T + potential, largest)
        mask_T = tl.where(valid_T, keep * (_scaled_sigmoid(x_T, largest) / kept), 0.0)
        tl.store(mask_ptr + first + columns_T, mask_T, columns_T < num_columns)
        tl.store(new_log_odds_ptr + first + columns_T, logits_T + new_potential, columns_T < num_columns)


@triton.jit
def sinkhorn_step_backward_kernel(
    grad_ptr,
    mask_ptr,
    log_odds_ptr,
    rise_ptr,
    keep_ptr,
    grad_scores_ptr,
    grad_keep_ptr,
    num_columns,
    epsilon,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    grad_ptr += row.to(tl.int64) * num_columns
    mask_ptr += row.to(tl.int64) * num_columns
    log_odds_ptr += row.to(tl.int64) * num_columns
    grad_scores_ptr += row.to(tl.int64) * num_columns
    rise = tl.load(rise_ptr + row)
    product_T = tl.zeros([TILE], tl.float32)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        mask_T = tl.load(mask_ptr + columns_T, columns_T < num_columns, 0.0)
        product_T += mask_T * tl.load(grad_ptr + columns_T, columns_T < num_columns, 0.0)
    mean = tl.sum(product_T) / tl.load(keep_ptr + row)
    tl.store(grad_keep_ptr + row, mean)
    for start in range(0, num_columns, TILE):
        columns_T = start + tl.arange(0, TILE)
        mask_T = tl.load(mask_ptr + columns_T, columns_T < num_columns, 0.0)
        grad_T = tl.load(grad_ptr + columns_T, columns_T < num_columns, 0.0)
        drop_T = _sigmoid(rise - tl.load(log_odds_ptr + columns_T, columns_T < num_columns, 0.0))
        grad_scores_T = mask_T * drop_T * (grad_T - mean) / epsilon * 2.0
        tl.store(grad_scores_ptr + columns_T, grad_scores_T, columns_T < num_columns)


def launch_shape(num_columns: int) -> tuple[int, int]:
    """Entries of a tile, a power of 2, and warps: 4 entries a thread, since all wait for each of Newton's sums."""
    tile = min(max(triton.next_power_of_2(num_columns), 64), MAX_TILE)
    return tile, max(tile // 128, 1)


def _launch(kernel: Any, rows_GC: Tensor, *arguments: Tensor | int, epsilon: float) -> None:
    """One program for each row of `rows_GC`."""
    num_rows, num_columns = rows_GC.shape
    tile, num_warps = launch_shape(num_columns)
    kernel[(num_rows,)](*arguments, num_columns, epsilon, TILE=tile, num_warps=num_warps)


def _flags(valid_GC: Tensor) -> Tensor:
    return valid_GC.contiguous().view(uint8)


def exact_mask(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor, epsilon: float, *, max_steps: int) -> Tensor:
    """Launch `exact_mask_kernel`: float32 [G, C], [G], bool [G, C] -> mask [G, C]."""
    mask_GC = scores_GC.new_empty(scores_GC.shape)
    inputs = scores_GC.contiguous(), keep_G.contiguous(), _flags(valid_GC)
    _launch(exact_mask_kernel, scores_GC, *inputs, mask_GC, max_steps, epsilon=epsilon)
    return mask_GC


def exact_mask_backward(grad_GC: Tensor, mask_GC: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Launch `exact_mask_backward_kernel`: float32 [G, C] twice -> gradients of scores [G, C] and counts [G]."""
    outputs = mask_GC.new_empty(mask_GC.shape), mask_GC.new_empty(mask_GC.shape[0])
    inputs = grad_GC.contiguous(), mask_GC.contiguous()
    _launch(exact_mask_backward_kernel, mask_GC, *inputs, *outputs, epsilon=epsilon)
    return outputs


def sinkhorn_step(
    scores_GC: Tensor, keep_G: Tensor, log_odds_GC: Tensor, potential_G: Tensor, valid_GC: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `sinkhorn_step_kernel`: float32 but for `valid_GC` -> mask, log-odds [G, C], potential, rise [G]."""
    mask_GC, new_log_odds_GC = scores_GC.new_empty(scores_GC.shape), scores_GC.new_empty(scores_GC.shape)
    new_potential_G, rise_G = scores_GC.new_empty(scores_GC.shape[0]), scores_GC.new_empty(scores_GC.shape[0])
    outputs = mask_GC, new_log_odds_GC, new_potential_G, rise_G
    inputs = scores_GC.contiguous(), keep_G.contiguous(), log_odds_GC.contiguous(), potential_G.contiguous()
    _launch(sinkhorn_step_kernel, scores_GC, *inputs, _flags(valid_GC), *outputs, epsilon=epsilon)
    return outputs


def sinkhorn_step_backward(
    grad_GC: Tensor, mask_GC: Tensor, log_odds_GC: Tensor, rise_G: Tensor, keep_G: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Launch `sinkhorn_step_backward_kernel`: float32 -> gradients of scores [G, C] and counts [G]."""
    outputs = mask_GC.new_empty(mask_GC.shape), mask_GC.new_empty(mask_GC.shape[0])
    state = log_odds_GC.contiguous(), rise_G.contiguous(), keep_G.contiguous()
    inputs = grad_GC.contiguous(), mask_GC.contiguous(), *state
    _launch(sinkhorn_step_backward_kernel, mask_GC, *inputs, *outputs, epsilon=epsilon)
    return outputs
