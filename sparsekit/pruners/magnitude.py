"""Magnitude pruning: keep the channels whose filters have the largest norm. Needs no data.

Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import channel_norms
from sparsekit.selection import select
from sparsekit.task import Task

_NORMS = {"l1": 1.0, "l2": 2.0}


@dataclass(frozen=True)
class Magnitude:
    """One-shot, per group.

    Attributes:
        norm: "l1" or "l2".
        round_to: widths are multiples of this.
    """

    norm: str = "l1"
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise UsageError(f"magnitude: norm must be one of {', '.join(_NORMS)}, got {self.norm!r}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        scores = channel_norms(graph, p=_NORMS[self.norm])
        return select(scores, graph, budget, round_to=self.round_to)
