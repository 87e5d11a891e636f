"""The soft top-k solved exactly, and one step of Sinkhorn towards it: all rows in one launch, and one for the gradient.

The plan that moves n scores to "drop" and "keep" at least cost, softened by entropy, gives each score the odds
exp((2 s - 1) / epsilon + d), with the d of its row at which the mask sums to k. So the exact mask is a scalar root
find, and its gradient a closed form; a step of Sinkhorn is a correction of d, and its mask a softmax.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1.
"""

# G rows, C entries of the widest; narrower rows are padded and marked in valid_GC
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparsekit.kernels.dispatch import runs_triton

NEWTON_STEPS = 32  # converged to float64 rounding in every case tried: n = 900, epsilon 0.002 to 10
# A row is one program's, on one multiprocessor, at 16 exponentials a clock: from about here on torch's 15 or so
# launches, which fill the device, take a Sinkhorn step in less time (by arithmetic for an H100; no timing yet).
MAX_COLUMNS = 2**17


def sinkhorn_step(
    scores_GC: Tensor,
    keep_counts_G: Tensor,
    log_odds_GC: Tensor,
    potential_G: Tensor,
    valid_GC: Tensor,
    *,
    epsilon: float,
    inner_steps: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """One proximal step of Sinkhorn's algorithm: the soft mask and the state for the next step.

    Each step sharpens the plan: after l steps with still scores the entropy's strength is epsilon / l. Mask
    entries may exceed 1 before the plan has settled. Gradients reach scores and counts, never the state.

    Args:
        scores_GC: importance, any float dtype (computed in float32 at least); higher is kept.
        keep_counts_G: channels to keep, 0 < k < the group's size; need not be whole.
        log_odds_GC: the last plan, as log(keep / drop) of each channel. Start from zeros, the uniform plan.
        potential_G: last dual potential of "keep" less that of "drop", divided by epsilon. Start from zeros.
        valid_GC: bool, False at padding, which takes and gives nothing.
        epsilon: strength of the entropy, > 0; larger explores longer.
        inner_steps: Sinkhorn iterations of this one proximal step, >= 1; the gradient goes through all of them.
            One has a kernel on the GPU, more run in plain torch.

    Returns:
        mask [G, C] whose rows sum to the keep counts, and the new log_odds and potential.

    >>> scores, valid = torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[True, True, True]])
    >>> log_odds, potential = torch.zeros(1, 3), torch.zeros(1)
    >>> mask, *_ = sinkhorn_step(scores, torch.tensor([1]), log_odds, potential, valid, epsilon=1.0)
    >>> [round(m, 3) for m in mask[0].tolist()]
    [0.237, 0.462, 0.301]
    """
    scores_GC = scores_GC.to(torch.promote_types(scores_GC.dtype, torch.float32))
    keep_G, log_odds_GC, potential_G = (x.to(scores_GC.dtype) for x in (keep_counts_G, log_odds_GC, potential_G))
    if inner_steps == 1:
        mask_GC, log_odds_GC, potential_G, _ = _sinkhorn_step(
            scores_GC, keep_G, log_odds_GC, potential_G, valid_GC, epsilon
        )
    else:
        mask_GC, log_odds_GC, potential_G = _sinkhorn(
            scores_GC, keep_G, log_odds_GC, potential_G, valid_GC, epsilon, inner_steps
        )
    return mask_GC, log_odds_GC.detach(), potential_G.detach()


def exact_mask(scores_GC: Tensor, keep_counts_G: Tensor, valid_GC: Tensor, *, epsilon: float) -> Tensor:
    """The solved soft mask: m = sigmoid((2 s - 1)/epsilon + d), with the d at which the row sums to k.

    Sinkhorn needs hundreds of iterations to reach it when epsilon is small.

    Arguments as for `sinkhorn_step`; here k may also be the group's size, where the mask is all ones.

    Returns:
        mask [G, C] in [0, 1], 0 at padding, differentiable once in scores and counts.

    >>> scores, valid = torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[True, True, True]])
    >>> [round(m, 3) for m in exact_mask(scores, torch.tensor([1]), valid, epsilon=0.1)[0].tolist()]
    [0.0, 0.993, 0.007]
    """
    scores_GC = scores_GC.to(torch.promote_types(scores_GC.dtype, torch.float32))
    mask_GC: Tensor = _soft_topk(scores_GC, keep_counts_G.to(scores_GC.dtype), valid_GC, epsilon)
    return mask_GC


def _has_kernel(values_GC: Tensor) -> bool:
    """Whether Triton's body takes these rows: it computes in float32, one program per row."""
    return runs_triton(values_GC) and values_GC.dtype == torch.float32 and values_GC.shape[1] <= MAX_COLUMNS


def _sinkhorn(
    scores_GC: Tensor,
    keep_G: Tensor,
    log_odds_GC: Tensor,
    potential_G: Tensor,
    valid_GC: Tensor,
    epsilon: float,
    num_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_step` in plain torch."""
    target_G = (keep_G / (valid_GC.sum(1) - keep_G)).log()
    # The costs of the two targets differ by s^2 - (s - 1)^2; each row of the plan is a pair, so its odds are all of it.
    logits_GC = log_odds_GC + (2 * scores_GC - 1) / epsilon
    for _ in range(num_steps):
        log_keep_GC, log_drop_GC = (
            logsigmoid(sign * (logits_GC + potential_G[:, None])).masked_fill(~valid_GC, -torch.inf) for sign in (1, -1)
        )
        potential_G = potential_G + target_G - torch.logsumexp(log_keep_GC, 1) + torch.logsumexp(log_drop_GC, 1)
    # k q / sum q written as a softmax: the same number, and the sum is k to the last digit
    mask_GC = keep_G[:, None] * torch.softmax(log_keep_GC, 1)
    return mask_GC, logits_GC + potential_G[:, None], potential_G


def _sum_by_newton(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor, epsilon: float) -> Tensor:
    """`exact_mask` in plain torch: bracketed Newton on d."""
    logits_GC = ((2 * scores_GC - 1) / epsilon).masked_fill(~valid_GC, -torch.inf)
    num_G = valid_GC.sum(1).to(logits_GC.dtype)
    target_G = torch.logit(keep_G / num_G, eps=1e-6)  # the clamp only matters to full rows, set below
    low_G = target_G - logits_GC.amax(1)
    high_G = target_G - logits_GC.masked_fill(~valid_GC, torch.inf).amin(1)
    shift_G = (low_G + high_G) / 2
    for _ in range(NEWTON_STEPS):
        mask_GC = torch.sigmoid(logits_GC + shift_G[:, None])
        excess_G = mask_GC.sum(1) - keep_G
        slope_G = (mask_GC * (1 - mask_GC)).sum(1)
        low_G = torch.where(excess_G < 0, shift_G, low_G)
        high_G = torch.where(excess_G < 0, high_G, shift_G)
        newton_G = shift_G - excess_G / slope_G  # no slope, no step inside: bisect
        inside_G = (low_G <= newton_G) & (newton_G <= high_G)
        shift_G = torch.where(inside_G, newton_G, (low_G + high_G) / 2)
    mask_GC = torch.sigmoid(logits_GC + shift_G[:, None])
    return torch.where((keep_G == num_G)[:, None], valid_GC.to(mask_GC.dtype), mask_GC)


@torch.library.custom_op("sparsekit::soft_topk", mutates_args=())
def _soft_topk(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor, epsilon: float) -> Tensor:
    if _has_kernel(scores_GC):
        from sparsekit.kernels.triton import soft_topk as on_gpu

        return on_gpu.exact_mask(scores_GC, keep_G, valid_GC, epsilon, max_steps=NEWTON_STEPS)
    return _sum_by_newton(scores_GC, keep_G, valid_GC, epsilon)


@torch.library.custom_op("sparsekit::soft_topk_backward", mutates_args=())
def _soft_topk_backward(grad_GC: Tensor, mask_GC: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradients of scores and counts: d gives back the mean of what its row gets, so that the sum stays."""
    if _has_kernel(mask_GC):
        from sparsekit.kernels.triton import soft_topk as on_gpu

        return on_gpu.exact_mask_backward(grad_GC, mask_GC, epsilon)
    slope_GC = mask_GC * (1 - mask_GC)
    total_G1 = slope_GC.sum(1, keepdim=True).clamp_min(torch.finfo(slope_GC.dtype).tiny)
    mean_G1 = (slope_GC * grad_GC).sum(1, keepdim=True) / total_G1
    return slope_GC * (grad_GC - mean_G1) / epsilon * 2, mean_G1.squeeze(1)


@torch.library.custom_op("sparsekit::sinkhorn_step", mutates_args=())
def _sinkhorn_step(
    scores_GC: Tensor, keep_G: Tensor, log_odds_GC: Tensor, potential_G: Tensor, valid_GC: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, log-odds, potential, and by how much the potential rose: the mask was made before it did."""
    if _has_kernel(scores_GC):
        from sparsekit.kernels.triton import soft_topk as on_gpu

        return on_gpu.sinkhorn_step(scores_GC, keep_G, log_odds_GC, potential_G, valid_GC, epsilon)
    state = log_odds_GC, potential_G
    mask_GC, new_GC, new_G = _sinkhorn(scores_GC, keep_G, *state, valid_GC, epsilon, num_steps=1)
    return mask_GC, new_GC, new_G, new_G - potential_G


@torch.library.custom_op("sparsekit::sinkhorn_step_backward", mutates_args=())
def _sinkhorn_step_backward(
    grad_GC: Tensor, mask_GC: Tensor, log_odds_GC: Tensor, rise_G: Tensor, keep_G: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Gradients of scores and counts, through mask = k softmax(logsigmoid(log_odds - rise))."""
    if _has_kernel(mask_GC):
        from sparsekit.kernels.triton import soft_topk as on_gpu

        return on_gpu.sinkhorn_step_backward(grad_GC, mask_GC, log_odds_GC, rise_G, keep_G, epsilon)
    mean_G = (mask_GC * grad_GC).sum(1) / keep_G
    drop_GC = torch.sigmoid(rise_G[:, None] - log_odds_GC)
    return mask_GC * drop_GC * (grad_GC - mean_G[:, None]) / epsilon * 2, mean_G


@_soft_topk.register_fake
def _(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor, epsilon: float) -> Tensor:
    return scores_GC.new_empty(scores_GC.shape)


@_soft_topk_backward.register_fake
def _(grad_GC: Tensor, mask_GC: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return mask_GC.new_empty(mask_GC.shape), mask_GC.new_empty(mask_GC.shape[0])


@_sinkhorn_step.register_fake
def _(
    scores_GC: Tensor, keep_G: Tensor, log_odds_GC: Tensor, potential_G: Tensor, valid_GC: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask_GC, new_log_odds_GC = scores_GC.new_empty(scores_GC.shape), scores_GC.new_empty(scores_GC.shape)
    return mask_GC, new_log_odds_GC, scores_GC.new_empty(scores_GC.shape[0]), scores_GC.new_empty(scores_GC.shape[0])


@_sinkhorn_step_backward.register_fake
def _(
    grad_GC: Tensor, mask_GC: Tensor, log_odds_GC: Tensor, rise_G: Tensor, keep_G: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return mask_GC.new_empty(mask_GC.shape), mask_GC.new_empty(mask_GC.shape[0])


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.epsilon = inputs[-1]


def _soft_topk_gradient(ctx: Any, grad_GC: Tensor) -> tuple[Tensor | None, ...]:
    return *_soft_topk_backward(grad_GC, *ctx.saved_tensors, ctx.epsilon), None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    mask_GC, log_odds_GC, potential_G, rise_G = output
    ctx.mark_non_differentiable(log_odds_GC, potential_G, rise_G)
    ctx.set_materialize_grads(False)  # else three launches to fill zeros that nobody reads
    ctx.save_for_backward(mask_GC, log_odds_GC, rise_G, inputs[1])
    ctx.epsilon = inputs[-1]


def _sinkhorn_step_gradient(ctx: Any, grad_GC: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_GC is None:
        return (None,) * 6
    return *_sinkhorn_step_backward(grad_GC, *ctx.saved_tensors, ctx.epsilon), None, None, None, None


_soft_topk.register_autograd(_soft_topk_gradient, setup_context=_save_mask)
_sinkhorn_step.register_autograd(_sinkhorn_step_gradient, setup_context=_save_step)
