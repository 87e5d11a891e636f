"""Transportation pruning: soft channel masks that always sum to the budget, learned with the weights.

Keeping k of n channels is a transport problem: n importance scores carry mass 1/n each to the targets 0
("drop") and 1 ("keep"), which take (n - k)/n and k/n; moving score s to target t costs (s - t)^2. Entropy of
strength epsilon makes the plan differentiable, so scores train by gradient descent and the mask, n times the
plan's keep column, hardens by itself as training goes on.

The mask scales every place that reads a channel (the `read` slots), not the filters that make it: followed by
train-mode BatchNorm, a scaled filter is the same filter. Behind a ReLU this equals the gate after BatchNorm.

Needs task.fit.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from sparsekit.budget import Budget
from sparsekit.errors import UsageError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import channel_norms
from sparsekit.selection import allocate
from sparsekit.task import Record, Schedule, Task

Solver = Literal["sinkhorn", "exact"]
Positions = dict[tuple[str, int], Tensor]  # (weight, dim) -> int64, one entry per position along dim
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


class GatedNetwork(nn.Module):
    """`network` in which what every channel contributes to its readers is scaled by a trained soft mask.

    Each training forward advances the mask by one step of the solver; in eval mode the last mask stands (all
    ones before the first). Scores, mask and solver state are part of `state_dict`, so that a run can resume.

    Args:
        network: owned and trained from here on.
        groups: per pruned group its initial scores, float [C], and how many channels it keeps, 0 < k < C.
    """

    def __init__(
        self, network: nn.Module, groups: Mapping[ChannelGroup, tuple[Tensor, int]], *, method: Transport
    ) -> None:
        super().__init__()
        self.network, self.groups, self.method = network, tuple(groups), method
        scores, counts = zip(*groups.values(), strict=True)
        # The loop has one learning rate. Training s / c in place of s is training s at c * c times that rate.
        self.scale = math.sqrt(method.score_lr / method.lr)
        padded = pad_sequence([row.detach() for row in scores], batch_first=True)
        self.scaled_scores = nn.Parameter(padded / self.scale)
        width = padded.shape[1]
        self.valid = nn.Buffer(torch.arange(width) < torch.tensor([[group.size] for group in groups]))
        self.keep_counts = nn.Buffer(torch.tensor(counts))
        log_plan, potential = initial_plan(self.valid, epsilon=method.epsilon)
        self.log_plan, self.potential = nn.Buffer(log_plan), nn.Buffer(potential)
        self.mask = nn.Buffer(self.valid.float())
        self.kept = nn.Buffer(self.top_k())
        positions = _factor_positions(network, self.groups, width)
        self.reads = {read: len(where) for read, where in positions.items()}
        self.positions = nn.Buffer(torch.cat([*positions.values()]), persistent=False)

    def forward(self, *inputs: Any) -> Any:
        mask_GC = self._advance() if self.training else self.mask
        return functional_call(self.network, self.gated_weights(mask_GC), inputs)

    def gated_weights(self, mask_GC: Tensor) -> dict[str, Tensor]:
        """Name -> weight, for every weight that reads a masked channel, with that channel's slices scaled."""
        flat = torch.cat([mask_GC.flatten(), mask_GC.new_ones(1)])
        factors = torch.split(flat.index_select(0, self.positions), [*self.reads.values()])
        weights: dict[str, Tensor] = {}
        for (name, dim), factor in zip(self.reads, factors, strict=True):
            weight = weights[name] if name in weights else self.network.get_parameter(name)
            shape = [-1 if axis == dim else 1 for axis in range(weight.dim())]
            weights[name] = weight * factor.to(weight.dtype).view(shape)
        return weights

    @property
    def scores(self) -> Tensor:
        """Importance of every channel, float [G, C], 0 at padding."""
        return self.scale * self.scaled_scores

    def measure(self) -> Record:
        """Mean m(1 - m), number of channels swapped in since the last call, largest |sum of m - k|."""
        kept = self.top_k()
        record = {
            "mask_hardness": float((self.mask * (1 - self.mask))[self.valid].mean()),
            "mask_flips": float((kept & ~self.kept).sum()),
            "mask_sum_error": float((self.mask.sum(1) - self.keep_counts).abs().max()),
        }
        self.kept.copy_(kept)
        return record

    def top_k(self) -> Tensor:
        """Bool [G, C]: each group's k channels of largest mask; equal masks are ranked by their scores."""
        by_score = self.scores.detach().argsort(dim=1, descending=True, stable=True)
        mask_GC = self.mask.masked_fill(~self.valid, -torch.inf).gather(1, by_score)
        order = by_score.gather(1, mask_GC.argsort(dim=1, descending=True, stable=True))
        among_first = torch.arange(order.shape[1], device=order.device) < self.keep_counts[:, None]
        return torch.zeros_like(self.valid).scatter(1, order, among_first)

    def plan(self) -> PruningPlan:
        """The hard top k, and the trained weights with the soft mask folded in, on the CPU.

        With it the plan's network is the one trained, also where a kept channel's mask is not quite 1.
        """
        kept = zip(self.groups, self.top_k().cpu(), strict=True)
        weights = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        weights |= self.gated_weights(self.mask)
        return PruningPlan(
            keep={group: row[: group.size] for group, row in kept},
            weights={name: value.detach().cpu() for name, value in weights.items()},
        )

    def _advance(self) -> Tensor:
        """This step's soft mask, differentiable in the scores; stores the state for the next step."""
        epsilon = self.method.epsilon
        if self.method.solver == "exact":
            mask_GC = exact_mask(self.scores, self.keep_counts, self.valid, epsilon=epsilon)
        else:
            mask_GC, log_plan, potential = sinkhorn_step(
                self.scores, self.keep_counts, self.log_plan, self.potential, self.valid, epsilon=epsilon
            )
            self.log_plan.copy_(log_plan)
            self.potential.copy_(potential)
        self.mask.copy_(mask_GC.detach())
        return mask_GC


def _factor_positions(network: nn.Module, groups: Sequence[ChannelGroup], width: int) -> Positions:
    """Where in the flat [G * width] mask each position along a read dim finds its factor.

    Positions that belong to no group find the constant 1 behind the mask's end.
    """
    positions: Positions = {}
    for row, group in enumerate(groups):
        entries_C = row * width + torch.arange(group.size)
        for slot in group.slots:
            if slot.read:
                size = network.get_parameter(slot.tensor).shape[slot.dim]
                unmasked = torch.full((size,), len(groups) * width)
                positions.setdefault((slot.tensor, slot.dim), unmasked)[slot.index] = entries_C[:, None]
    return positions


@dataclass(frozen=True)
class Transport:
    """Train soft masks and weights together for `epochs`, then keep each group's k largest mask entries.

    How many channels each group keeps comes from the budget beforehand; training decides which. SGD with a
    cosine schedule moves weights and scores, weight decay included; scores start as the l2 norms of the filters.
    The paper trains both at 0.1 for 120 epochs. A few epochs at that rate forget what a trained network knows
    before they relearn it, so the weights' default is lower; the scores need the speed to explore.

    Attributes:
        epsilon: strength of the entropy, > 0; larger keeps the masks soft, and the choice open, for longer.
        solver: "sinkhorn", one proximal step per batch, hardens by itself; "exact" solves each batch's masks
            fully and stays as soft as epsilon says: choose it small, say 0.05.
        score_lr: peak learning rate of the scores, > 0.
        lr: peak learning rate of the weights, > 0.
        round_to: widths are multiples of this, or a group's full size.
    """

    epsilon: float = 0.25
    solver: Solver = "sinkhorn"
    score_lr: float = 0.1
    epochs: int = 10
    lr: float = 0.01
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    precision: str = "auto"
    seed: int = 0
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("epsilon", "score_lr", "lr"):
            if getattr(self, name) <= 0:
                raise UsageError(f"transport: {name} must be above 0, got {getattr(self, name):g}")
        if self.solver not in (solvers := list(get_args(Solver))):
            raise UsageError(f"transport: unknown solver {self.solver!r}{nearest(self.solver, solvers)}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task; transport trains, so it needs data.
            BudgetError: the budget lies below what the network can reach.
        """
        if task is None:
            raise UsageError("transport: trains its masks and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        norms = channel_norms(graph, p=2)
        pruned = {group: (norms[group], count) for group, count in counts.items() if count < group.size}
        if not pruned:
            return PruningPlan()
        network = GatedNetwork(deepcopy(graph.model), pruned, method=self)
        schedule = Schedule(
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            seed=self.seed,
        )
        task.fit(network, task, schedule, stage="prune", observe=network.measure)
        return network.plan()
