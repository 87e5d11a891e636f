"""Soft top-k: masks that sum to k, as entropic transport of n scores to "drop" and "keep".

Scores carry mass 1/n each to the targets 0 and 1, which take (n - k)/n and k/n; moving score s to target t costs
(s - t)^2, and entropy of strength epsilon makes the plan differentiable. The mask is n times the plan's keep column.
All groups of a network are solved in one padded tensor program, on a GPU in one launch. With two targets a row of the
plan is all said by its log-odds, log(keep / drop), which is what is carried from step to step; and the exact plan is a
scalar root find.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
# R rows of N entries: the groups, or one that holds them all
from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.kernels.soft_topk import exact_mask as exact_mask
from sparsekit.kernels.soft_topk import sinkhorn_step as sinkhorn_step

Solver = Literal["sinkhorn", "exact"]


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
