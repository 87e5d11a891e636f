"""Soft top-k: masks that sum to k, as entropic transport of n scores to "drop" and "keep".

Scores carry mass 1/n each to the targets 0 and 1, which take (n - k)/n and k/n; moving score s to target t costs
(s - t)^2, and entropy of strength epsilon makes the plan differentiable. The mask is n times the plan's keep column.
All groups of a network are solved in one padded tensor program. With two targets a row of the plan is all said by
its log-odds, log(keep / drop), which is what is carried from step to step; and the exact plan is a scalar root find.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
# R rows of N entries: the groups, or one that holds them all
from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

Solver = Literal["sinkhorn", "exact"]

NEWTON_STEPS = 32  # converged to float64 rounding in every case tried: n = 900, epsilon 0.002 to 10


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

    Returns:
        mask [G, C] whose rows sum to the keep counts, and the new log_odds and potential.

    >>> scores, valid = torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[True, True, True]])
    >>> log_odds, potential = torch.zeros(1, 3), torch.zeros(1)
    >>> mask, *_ = sinkhorn_step(scores, torch.tensor([1]), log_odds, potential, valid, epsilon=1.0)
    >>> [round(m, 3) for m in mask[0].tolist()]
    [0.237, 0.462, 0.301]
    """
    scores_GC = scores_GC.to(torch.promote_types(scores_GC.dtype, torch.float32))
    keep_G = keep_counts_G.to(scores_GC.dtype)
    target_G = (keep_G / (valid_GC.sum(1) - keep_G)).log()
    # The costs of the two targets differ by s^2 - (s - 1)^2; each row of the plan is a pair, so its odds are all of it.
    logits_GC = log_odds_GC + (2 * scores_GC - 1) / epsilon
    for _ in range(inner_steps):
        log_keep_GC, log_drop_GC = (
            logsigmoid(sign * (logits_GC + potential_G[:, None])).masked_fill(~valid_GC, -torch.inf) for sign in (1, -1)
        )
        potential_G = potential_G + target_G - torch.logsumexp(log_keep_GC, 1) + torch.logsumexp(log_drop_GC, 1)
    # k q / sum q written as a softmax: the same number, and the sum is k to the last digit
    mask_GC = keep_G[:, None] * torch.softmax(log_keep_GC, 1)
    return mask_GC, (logits_GC + potential_G[:, None]).detach(), potential_G.detach()


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
    logits_GC = ((2 * scores_GC - 1) / epsilon).masked_fill(~valid_GC, -torch.inf)
    mask_GC: Tensor = _SigmoidWithSum.apply(logits_GC, keep_counts_G.to(logits_GC.dtype), valid_GC)
    return mask_GC


def hard_top_k(mask_GC: Tensor, scores_GC: Tensor, keep_counts_G: Tensor, valid_GC: Tensor) -> Tensor:
    """Bool [G, C]: each row's k largest mask entries; equal ones are ranked by score, then by position.

    >>> mask, scores = torch.tensor([[0.5, 0.5, 1.0]]), torch.tensor([[0.1, 0.2, 0.0]])
    >>> hard_top_k(mask, scores, torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[False, True, True]]
    """
    by_score_GC = scores_GC.argsort(dim=1, descending=True, stable=True)
    ranked_GC = mask_GC.masked_fill(~valid_GC, -torch.inf).gather(1, by_score_GC)
    order_GC = by_score_GC.gather(1, ranked_GC.argsort(dim=1, descending=True, stable=True))
    among_first_GC = torch.arange(order_GC.shape[1], device=order_GC.device) < keep_counts_G[:, None]
    return torch.zeros_like(valid_GC).scatter(1, order_GC, among_first_GC)


class SoftMasks(nn.Module):
    """Scores that are trained through the soft masks that they give, with the solver's state.

    In training mode each call is one step of the solver; in eval mode the last mask stands (all ones before the
    first). All is part of `state_dict`, so that a run can resume.

    Args:
        scores_GC: initial scores, 0 at padding.
        keep_counts_G: channels to keep.
        valid_GC: bool, False at padding.
        solver: "sinkhorn" for `sinkhorn_step`, "exact" for `exact_mask`.
        epsilon: strength of the entropy.
        inner_steps: see `sinkhorn_step`.
        plan_every: calls per proximal step; between them the mask follows the scores from the same last plan.
        logodds_clip: bound on the log-odds that are carried on.
        shared: the groups form one row and share the sum of their counts.
        scale: the parameter is the scores divided by this.
    """

    def __init__(
        self,
        scores_GC: Tensor,
        keep_counts_G: Tensor,
        valid_GC: Tensor,
        *,
        solver: Solver = "sinkhorn",
        epsilon: float,
        inner_steps: int = 1,
        plan_every: int = 1,
        logodds_clip: float = math.inf,
        shared: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.solver, self.epsilon, self.inner_steps, self.plan_every = solver, epsilon, inner_steps, plan_every
        self.logodds_clip, self.shared, self.scale = logodds_clip, shared, scale
        self.scaled_scores = nn.Parameter(scores_GC / scale)
        self.valid, self.keep_counts = nn.Buffer(valid_GC, persistent=False), nn.Buffer(keep_counts_G.float())
        self.num_steps, self.log_odds = nn.Buffer(torch.tensor(0)), nn.Buffer(torch.zeros_like(scores_GC))
        self.potential = nn.Buffer(torch.zeros_like(self.row_counts(self.keep_counts)))
        self.mask = nn.Buffer(valid_GC.float())

    def forward(self, keep_counts_G: Tensor) -> Tensor:
        """The mask, float [G, C], differentiable in scores and counts; it sums to the counts."""
        if not self.training:
            return self.mask
        counts_R, valid_RN = self.row_counts(keep_counts_G.clone()), self.rows(self.valid)  # the buffer may change
        scores_RN, log_odds_RN = self.rows(self.scores), self.rows(self.log_odds)
        if self.solver == "exact":
            mask_RN = exact_mask(scores_RN, counts_R, valid_RN, epsilon=self.epsilon)
        else:
            state = log_odds_RN, self.potential
            mask_RN, new_RN, potential_R = sinkhorn_step(
                scores_RN, counts_R, *state, valid_RN, epsilon=self.epsilon, inner_steps=self.inner_steps
            )
            self.num_steps.add_(1)
            new_RN = new_RN.clamp(-self.logodds_clip, self.logodds_clip)
            log_odds_RN.copy_(torch.where(self.num_steps % self.plan_every == 0, new_RN, log_odds_RN))
            self.potential.copy_(potential_R)
        mask_GC = mask_RN.view_as(self.mask)
        self.mask.copy_(mask_GC.detach())
        self.keep_counts.copy_(keep_counts_G.detach())
        return mask_GC

    @property
    def scores(self) -> Tensor:
        """Importance of every channel, float [G, C], 0 at padding."""
        return self.scale * self.scaled_scores

    def top_k(self, keep_counts_G: Tensor) -> Tensor:
        """Bool [G, C]: the channels of largest mask, counts rounded; equal masks are ranked by their scores.

        Groups that share a count first keep the best channel of each.
        """
        counts_G, scores_GC = keep_counts_G.round().clamp_min(1), self.scores.detach()
        best_GC = hard_top_k(self.mask, scores_GC, torch.ones_like(counts_G), self.valid)
        ranked_RN, scores_RN = self.rows(self.mask.masked_fill(best_GC, torch.inf)), self.rows(scores_GC)
        kept_RN = hard_top_k(ranked_RN, scores_RN, self.row_counts(counts_G), self.rows(self.valid))
        return kept_RN.view_as(self.valid)

    def rows(self, value_GC: Tensor) -> Tensor:
        """As the solver sees them: [G, C], or [1, G * C] where the groups share one count."""
        return value_GC.view(1, -1) if self.shared else value_GC

    def row_counts(self, counts_G: Tensor) -> Tensor:
        """The counts of `rows`: [G] or [1]."""
        return counts_G.sum(0, keepdim=True) if self.shared else counts_G


class _SigmoidWithSum(torch.autograd.Function):
    """sigmoid(logits + d) with d such that each row sums to its count, by bracketed Newton on d."""

    @staticmethod
    def forward(ctx: Any, logits_GC: Tensor, keep_G: Tensor, valid_GC: Tensor) -> Tensor:
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
    def backward(ctx: Any, grad_GC: Tensor) -> tuple[Tensor, Tensor, None]:
        (mask_GC,) = ctx.saved_tensors
        slope_GC = mask_GC * (1 - mask_GC)
        total_G1 = slope_GC.sum(1, keepdim=True).clamp_min(torch.finfo(slope_GC.dtype).tiny)
        mean_G1 = (slope_GC * grad_GC).sum(1, keepdim=True) / total_G1  # what d gives back to keep the sum
        return slope_GC * (grad_GC - mean_G1), mean_G1.squeeze(1), None
