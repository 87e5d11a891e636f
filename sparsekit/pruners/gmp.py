"""Gradual magnitude pruning: one training run in which ever more of the smallest weights become zero.

The sparsity follows a cubic, steep at first, when there is much to spare. A weight that is zero once stays zero, and
no gradient reaches it.

Needs task.fit.

Source: Zhu and Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, equation 1.
"""

# W weights of all the tensors concerned, one after the other
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from sparsekit.budget import Budget
from sparsekit.errors import UsageError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import ScheduleOptions, require_positive
from sparsekit.selection import Scope, allocate_weights, keep_top_weights
from sparsekit.sparse import SparseNetwork
from sparsekit.surgery import copied
from sparsekit.task import Record, Task

LAST_END = 0.75  # the final sparsity holds for at least the last quarter of the run


def pruned_share(step: int, *, start: int, update_every: int, num_updates: int) -> float:
    """Which share of the weights that must go are gone after `step` steps: 0 up to `start`, 1 from the last update on.

    It rises every `update_every` steps, as the cubic 1 - (1 - x)^3 of the updates made.

    >>> [pruned_share(step, start=10, update_every=5, num_updates=2) for step in (0, 10, 14, 15, 19, 20, 99)]
    [0.0, 0.0, 0.0, 0.875, 0.875, 1.0, 1.0]
    """
    num_done = min(max(0, step - start) // update_every, num_updates)
    return 1 - (1 - num_done / num_updates) ** 3


class GradualNetwork(nn.Module):
    """A network of which a growing share of the weights is zero; each training forward is a step of the schedule.

    The mask is a buffer and the step part of the `state_dict`, so that a run can resume.

    Args:
        network: owned and trained from here on.
        counts: how many weights stay in each set of tensors, see `allocate_weights`.
        num_steps: training forwards in all.
    """

    def __init__(
        self, network: nn.Module, counts: Mapping[tuple[str, ...], int], *, method: GMP, num_steps: int
    ) -> None:
        super().__init__()
        self.sparse = SparseNetwork(network, [name for names in counts for name in names])
        self.counts = dict(counts)
        self.mask = nn.Buffer(torch.ones(sum(self.sparse.sizes), dtype=torch.bool))
        self.start, self.update_every = round(method.start * num_steps), method.update_every
        # Of a run too short for an update between start and end, all goes at once, one period after the start.
        self.num_updates = max(1, (int(method.end * num_steps) - self.start) // method.update_every)
        self.num_done = 0

    def forward(self, *inputs: Any) -> Any:
        if self.training:
            self._advance()
        return self.sparse(self.mask, *inputs)

    # A number and not a buffer: on a GPU, reading one would make every step wait.
    def get_extra_state(self) -> dict[str, int]:
        return {"num_done": self.num_done}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.num_done = state["num_done"]

    def measure(self) -> Record:
        """The share of zeros among the weights that may be."""
        return {"mask_sparsity": 1 - float(self.mask.float().mean())}

    def plan(self) -> PruningPlan:
        """The mask at the final counts, and the trained weights, on the CPU."""
        self._zero_smallest(1.0)
        nonzero = {name: mask.cpu() for name, mask in self.sparse.shaped(self.mask).items()}
        return PruningPlan(nonzero=nonzero, weights=self.sparse.trained(self.mask))

    def _advance(self) -> None:
        schedule = {"start": self.start, "update_every": self.update_every, "num_updates": self.num_updates}
        share = pruned_share(self.num_done, **schedule)
        if share > (pruned_share(self.num_done - 1, **schedule) if self.num_done else 0.0):
            self._zero_smallest(share)
        self.num_done += 1

    @torch.no_grad()
    def _zero_smallest(self, share: float) -> None:
        """Let `share` of what must go be gone; what is gone stays so."""
        magnitudes = self.sparse.shaped(self.sparse.magnitudes().masked_fill(~self.mask, -1))
        sizes = dict(zip(self.sparse.names, self.sparse.sizes, strict=True))
        counts = {}
        for names, count in self.counts.items():
            size = sum(sizes[name] for name in names)
            counts[names] = size - int(share * (size - count))
        masks = keep_top_weights(magnitudes, counts)
        self.mask.copy_(torch.cat([mask.flatten() for mask in masks.values()]))


@dataclass(frozen=True)
class GMP(ScheduleOptions):
    """Train for `epochs` while the smallest weights become zero, up to the budget; meanwhile and after it train on.

    Attributes:
        start: when the first weights go, as a share of the run, in [0, end).
        end: when the budget is reached, at most 0.75.
        update_every: steps between updates of the mask, at least 1; the paper takes 100 to 1000 in long runs.
        scope: "global" zeroes the smallest weights of all layers together, "layer" the same share of each layer.
    """

    start: float = 0.0
    end: float = LAST_END
    update_every: int = 10
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require_positive("gmp", self, "lr")
        if not 0 <= self.start < self.end <= LAST_END:
            raise UsageError(
                f"gmp: 0 <= start < end <= {LAST_END} must hold, got start = {self.start:g}, end = {self.end:g}"
            )
        if self.update_every < 1:
            raise UsageError(f"gmp: update_every must be at least 1, got {self.update_every}")
        if self.scope not in (scopes := list(get_args(Scope))):
            raise UsageError(f"gmp: unknown scope {self.scope!r}{nearest(self.scope, scopes)}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task; gmp trains, so it needs data.
            BudgetError: the budget is not of single weights, or below one per tensor.
        """
        if task is None:
            raise UsageError("gmp: prunes while it trains and needs data; without data choose magnitude_unstructured")
        counts = allocate_weights(graph, budget, scope=self.scope)
        if not counts:
            return PruningPlan()
        num_steps = self.epochs * task.num_batches
        network = GradualNetwork(copied(graph.model), counts, method=self, num_steps=num_steps)
        task.fit(network, task, self.schedule(), stage="prune", observe=network.measure)
        return network.plan()
