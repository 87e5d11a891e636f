"""Random pruning: the control that every method must beat. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsekit.budget import Budget
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.selection import select
from sparsekit.task import Task


@dataclass(frozen=True)
class Random:
    """Keep channels drawn uniformly; the same seed draws the same channels.

    Attributes:
        seed: of the draw.
        round_to: widths are multiples of this.
    """

    seed: int = 0
    round_to: int = 1

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        generator = torch.Generator().manual_seed(self.seed)
        scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
        return select(scores, graph, budget, round_to=self.round_to)
