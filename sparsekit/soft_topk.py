"""Soft top-k: masks that sum to k, as entropic transport of n scores to "drop" and "keep".

Scores carry mass 1/n each to the targets 0 and 1, which take (n - k)/n and k/n; moving score s to target t costs
(s - t)^2, and entropy of strength epsilon makes the plan differentiable. The mask is n times the plan's keep column.
All groups of a network are solved in one padded tensor program.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1; with two targets the exact plan is
a scalar root find.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NEWTON_STEPS = 32  # converged to float64 rounding in every case tried: n = 900, epsilon 0.002 to 10


def initial_plan(valid_GC: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """The uniform transport plan to start from: float32 (log_plan [G, C, 2], potential [G, 2]).

    >>> log_plan, potential = initial_plan(torch.tensor([[True, True]]), epsilon=0.5)
    >>> log_plan.exp().tolist(), potential.tolist()
    ([[[0.5, 0.5], [0.5, 0.5]]], [[2.0, 2.0]])
    """
    log_plan_GC = -valid_GC.sum(1, keepdim=True).log().expand(valid_GC.shape)
    return torch.stack([log_plan_GC, log_plan_GC], -1), log_plan_GC.new_full((len(valid_GC), 2), 1 / epsilon)


def sinkhorn_step(
    scores_GC: Tensor,
    keep_counts_G: Tensor,
    log_plan_GC2: Tensor,
    potential_G2: Tensor,
    valid_GC: Tensor,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One proximal Sinkhorn step, in logarithms: the soft mask and the state for the next step.

    Each step sharpens the plan: after l steps with still scores the entropy's strength is epsilon / l. Mask
    entries may exceed 1 before the plan has settled. Gradients reach the scores, never the state.

    Args:
        scores_GC: importance, any float dtype (computed in float32 at least); higher is kept.
        keep_counts_G: channels to keep, 0 < k < the group's size.
        log_plan_GC2: logarithm of the last plan; column 1 is "keep". Start from `initial_plan`.
        potential_G2: last dual potential of the two targets, divided by epsilon.
        valid_GC: bool, False at padding, which takes and gives nothing.
        epsilon: strength of the entropy, > 0; larger explores longer.

    Returns:
        mask [G, C] whose rows sum to the keep counts, and the new log_plan and potential.

    >>> scores, valid = torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[True, True, True]])
    >>> state = initial_plan(valid, epsilon=1.0)
    >>> mask, *_ = sinkhorn_step(scores, torch.tensor([1]), *state, valid, epsilon=1.0)
    >>> [round(m, 3) for m in mask[0].tolist()]
    [0.237, 0.462, 0.301]
    """
    scores_GC = scores_GC.to(torch.promote_types(scores_GC.dtype, torch.float32))
    keep_G = keep_counts_G.to(scores_GC.dtype)
    num_G = valid_GC.sum(1).to(scores_GC.dtype)
    cost_GC2 = torch.stack([scores_GC.square(), (scores_GC - 1).square()], -1)
    log_kernel_GC2 = log_plan_GC2 - cost_GC2 / epsilon
    row_GC = -num_G.log()[:, None] - torch.logsumexp(log_kernel_GC2 + potential_G2[:, None], -1)
    log_share_GC2 = (log_kernel_GC2 + row_GC[..., None]).masked_fill(~valid_GC[..., None], -torch.inf)
    log_target_G2 = torch.stack([num_G - keep_G, keep_G], -1).log() - num_G.log()[:, None]
    new_potential_G2 = log_target_G2 - torch.logsumexp(log_share_GC2, 1)
    new_log_plan_GC2 = (log_share_GC2 + new_potential_G2[:, None]).masked_fill(~valid_GC[..., None], 0)
    # n * exp(log_plan) written as a softmax: the same number, and the sum is k to the last digit
    mask_GC = keep_G[:, None] * torch.softmax(log_share_GC2[..., 1], 1)
    return mask_GC, new_log_plan_GC2.detach(), new_potential_G2.detach()


def exact_mask(scores_GC: Tensor, keep_counts_G: Tensor, valid_GC: Tensor, *, epsilon: float) -> Tensor:
    """The solved soft mask: m = sigmoid((2 s - 1)/epsilon + d), with the d at which the row sums to k.

    Sinkhorn needs hundreds of iterations to reach it when epsilon is small.

    Arguments as for `sinkhorn_step`; here k may also be the group's size, where the mask is all ones.

    Returns:
        mask [G, C] in [0, 1], 0 at padding, differentiable once in the scores.

    >>> scores, valid = torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[True, True, True]])
    >>> [round(m, 3) for m in exact_mask(scores, torch.tensor([1]), valid, epsilon=0.1)[0].tolist()]
    [0.0, 0.993, 0.007]
    """
    scores_GC = scores_GC.to(torch.promote_types(scores_GC.dtype, torch.float32))
    logits_GC = ((2 * scores_GC - 1) / epsilon).masked_fill(~valid_GC, -torch.inf)
    mask_GC: Tensor = _SigmoidWithSum.apply(logits_GC, keep_counts_G, valid_GC)
    return mask_GC


class _SigmoidWithSum(torch.autograd.Function):
    """sigmoid(logits + d) with d such that each row sums to its count, by bracketed Newton on d."""

    @staticmethod
    def forward(ctx: Any, logits_GC: Tensor, keep_counts_G: Tensor, valid_GC: Tensor) -> Tensor:
        keep_G = keep_counts_G.to(logits_GC.dtype)
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
        mask_GC = torch.where((keep_G == num_G)[:, None], valid_GC.to(mask_GC.dtype), mask_GC)
        ctx.save_for_backward(mask_GC)
        return mask_GC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GC: Tensor) -> tuple[Tensor, None, None]:
        (mask_GC,) = ctx.saved_tensors
        slope_GC = mask_GC * (1 - mask_GC)
        total_G1 = slope_GC.sum(1, keepdim=True).clamp_min(torch.finfo(slope_GC.dtype).tiny)
        mean_G1 = (slope_GC * grad_GC).sum(1, keepdim=True) / total_G1  # what d gives back to keep the sum
        return slope_GC * (grad_GC - mean_G1), None, None
