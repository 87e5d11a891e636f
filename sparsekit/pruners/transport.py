"""Transportation pruning: soft channel masks that always sum to the budget, learned with the weights.

Importance scores and weights train together through the soft top-k of `soft_topk.py`, one mask per channel group,
which sums to the number of channels kept and hardens by itself as training goes on.

The mask gates every place that reads a channel, see `gates.py`.

Needs task.fit.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sparsekit.budget import Budget
from sparsekit.errors import UsageError, nearest
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import channel_norms
from sparsekit.selection import allocate
from sparsekit.soft_topk import exact_mask, initial_plan, sinkhorn_step
from sparsekit.task import Record, Schedule, Task

Solver = Literal["sinkhorn", "exact"]


class MaskedNetwork(nn.Module):
    """A network whose gates are a trained soft mask.

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
        self.gated, self.method = GatedNetwork(network, tuple(groups)), method
        scores, counts = zip(*groups.values(), strict=True)
        # The loop has one learning rate. Training s / c in place of s is training s at c * c times that rate.
        self.scale = math.sqrt(method.score_lr / method.lr)
        padded = pad_sequence([row.detach() for row in scores], batch_first=True)
        self.scaled_scores = nn.Parameter(padded / self.scale)
        self.keep_counts = nn.Buffer(torch.tensor(counts))
        log_plan, potential = initial_plan(self.gated.valid, epsilon=method.epsilon)
        self.log_plan, self.potential = nn.Buffer(log_plan), nn.Buffer(potential)
        self.mask = nn.Buffer(self.gated.valid.float())
        self.kept = nn.Buffer(self.top_k())

    def forward(self, *inputs: Any) -> Any:
        return self.gated(self._advance() if self.training else self.mask, *inputs)

    @property
    def scores(self) -> Tensor:
        """Importance of every channel, float [G, C], 0 at padding."""
        return self.scale * self.scaled_scores

    def measure(self) -> Record:
        """Mean m(1 - m), number of channels swapped in since the last call, largest |sum of m - k|."""
        kept = self.top_k()
        record = {
            "mask_hardness": float((self.mask * (1 - self.mask))[self.gated.valid].mean()),
            "mask_flips": float((kept & ~self.kept).sum()),
            "mask_sum_error": float((self.mask.sum(1) - self.keep_counts).abs().max()),
        }
        self.kept.copy_(kept)
        return record

    def top_k(self) -> Tensor:
        """Bool [G, C]: each group's k channels of largest mask; equal masks are ranked by their scores."""
        valid = self.gated.valid
        by_score = self.scores.detach().argsort(dim=1, descending=True, stable=True)
        mask_GC = self.mask.masked_fill(~valid, -torch.inf).gather(1, by_score)
        order = by_score.gather(1, mask_GC.argsort(dim=1, descending=True, stable=True))
        among_first = torch.arange(order.shape[1], device=order.device) < self.keep_counts[:, None]
        return torch.zeros_like(valid).scatter(1, order, among_first)

    def plan(self) -> PruningPlan:
        """The hard top k, and the trained weights with the soft mask folded in, on the CPU.

        With it the plan's network is the one trained, also where a kept channel's mask is not quite 1.
        """
        kept, network = zip(self.gated.groups, self.top_k().cpu(), strict=True), self.gated.network
        weights = dict(network.named_parameters()) | dict(network.named_buffers())
        weights |= self.gated.weights(self.mask)
        return PruningPlan(
            keep={group: row[: group.size] for group, row in kept},
            weights={name: value.detach().cpu() for name, value in weights.items()},
        )

    def _advance(self) -> Tensor:
        """This step's soft mask, differentiable in the scores; stores the state for the next step."""
        epsilon, valid = self.method.epsilon, self.gated.valid
        if self.method.solver == "exact":
            mask_GC = exact_mask(self.scores, self.keep_counts, valid, epsilon=epsilon)
        else:
            mask_GC, log_plan, potential = sinkhorn_step(
                self.scores, self.keep_counts, self.log_plan, self.potential, valid, epsilon=epsilon
            )
            self.log_plan.copy_(log_plan)
            self.potential.copy_(potential)
        self.mask.copy_(mask_GC.detach())
        return mask_GC


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
        network = MaskedNetwork(deepcopy(graph.model), pruned, method=self)
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
