"""Transportation pruning of single weights: a soft mask on every weight that sums to the budget while training.

A weight's score is its magnitude, and no parameter of its own: the gradient reaches it directly, through the product
with its mask, and through the mask, see `soft_topk.py`. The mask hardens by itself as training goes on.

Needs task.fit.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1 and Table 2.
"""

# W weights of all the tensors concerned, one after the other, S sets that share a budget
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.errors import UsageError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import ScheduleOptions, require_positive
from sparsekit.selection import Scope, allocate_weights, keep_top_weights
from sparsekit.soft_topk import sinkhorn_step
from sparsekit.sparse import SparseNetwork
from sparsekit.surgery import copied
from sparsekit.task import Record, Task


class SoftlySparseNetwork(nn.Module):
    """A network whose weights carry a soft mask.

    Each training forward advances the mask by one step of the solver; in eval mode the last mask stands (all ones
    before the first). Mask and solver state are buffers, so that a run can resume.

    Args:
        network: owned and trained from here on.
        counts: how many weights stay in each set of tensors, see `allocate_weights`.
        epsilon: strength of the entropy.
    """

    def __init__(self, network: nn.Module, counts: Mapping[tuple[str, ...], int], *, epsilon: float) -> None:
        super().__init__()
        self.sparse, self.counts, self.epsilon = SparseNetwork(network, sum(counts, ())), dict(counts), epsilon
        sizes = dict(zip(self.sparse.names, self.sparse.sizes, strict=True))
        self.set_sizes = [sum(sizes[name] for name in names) for names in counts]
        num_weights = sum(self.set_sizes)
        self.keep_counts = nn.Buffer(torch.tensor([*counts.values()]))
        self.log_odds, self.potential = nn.Buffer(torch.zeros(num_weights)), nn.Buffer(torch.zeros(len(counts)))
        self.mask = nn.Buffer(torch.ones(num_weights))
        self.kept = nn.Buffer(self.top_k())

    def forward(self, *inputs: Any) -> Any:
        return self.sparse(self._advance() if self.training else self.mask, *inputs)

    def measure(self) -> Record:
        """Mean m(1 - m), number of weights swapped in since the last call, largest |sum of m - k| / k."""
        kept = self.top_k()
        sums = torch.stack([mask.sum() for mask in self.mask.split(self.set_sizes)])
        record = {
            "mask_hardness": float((self.mask * (1 - self.mask)).mean()),
            "mask_flips": float((kept & ~self.kept).sum()),
            "mask_sum_error": float((sums / self.keep_counts - 1).abs().max()),
        }
        self.kept.copy_(kept)
        return record

    def top_k(self) -> Tensor:
        """Bool [W]: the k weights of each set with the largest mask, or before the first step the largest weights."""
        # The odds order weights as their masks do, and tell apart what float32 masks of 0 and 1 do not.
        ranks = self.log_odds if self.log_odds.any() else self.sparse.magnitudes().detach()
        masks = keep_top_weights(self.sparse.shaped(ranks), self.counts)
        return torch.cat([mask.flatten() for mask in masks.values()])

    def plan(self) -> PruningPlan:
        """The hard top k, and the trained weights with the soft mask folded in, on the CPU.

        With it the plan's network is the one trained, also where a kept weight's mask is not quite 1.
        """
        nonzero = {name: mask.cpu() for name, mask in self.sparse.shaped(self.top_k()).items()}
        return PruningPlan(nonzero=nonzero, weights=self.sparse.trained(self.mask))

    def _advance(self) -> Tensor:
        """This step's soft mask, differentiable in the weights; stores the state for the next step."""
        scores, log_odds = self.sparse.magnitudes().split(self.set_sizes), self.log_odds.split(self.set_sizes)
        masks = []
        # One set at a time: rows of one padded program would take the memory of the largest layer each.
        for number, (scores_C, log_odds_C) in enumerate(zip(scores, log_odds, strict=True)):
            one = slice(number, number + 1)
            mask_1C, new_log_odds, new_potential = sinkhorn_step(
                scores_C[None],
                self.keep_counts[one],
                log_odds_C[None],
                self.potential[one],
                torch.ones_like(scores_C[None], dtype=torch.bool),
                epsilon=self.epsilon,
            )
            log_odds_C.copy_(new_log_odds[0])
            self.potential[one] = new_potential
            masks.append(mask_1C[0])
        mask_W = torch.cat(masks)
        self.mask.copy_(mask_W.detach())
        return mask_W


@dataclass(frozen=True)
class TransportUnstructured(ScheduleOptions):
    """Train weights under soft masks for `epochs`, then keep the k weights with the largest mask.

    Attributes:
        epsilon: strength of the entropy, > 0; larger keeps the masks soft, and the choice open, for longer.
        scope: "global" lets all weights compete for the budget, "layer" those of each layer for the same share; the
            paper does not say which it takes.
    """

    epsilon: float = 0.25
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require_positive("transport_unstructured", self, "epsilon", "lr")
        if self.scope not in (scopes := list(get_args(Scope))):
            raise UsageError(f"transport_unstructured: unknown scope {self.scope!r}{nearest(self.scope, scopes)}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task; the method trains, so it needs data.
            BudgetError: the budget is not of single weights, or below one per tensor.
        """
        if task is None:
            raise UsageError(
                "transport_unstructured: trains its masks and needs data; without data choose magnitude_unstructured"
            )
        counts = allocate_weights(graph, budget, scope=self.scope)
        if not counts:
            return PruningPlan()
        network = SoftlySparseNetwork(copied(graph.model), counts, epsilon=self.epsilon)
        task.fit(network, task, self.schedule(), stage="prune", observe=network.measure)
        return network.plan()
