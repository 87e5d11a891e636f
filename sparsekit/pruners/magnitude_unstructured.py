"""One-shot magnitude pruning of single weights: the largest stay. Needs no data.

Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from sparsekit.budget import Budget
from sparsekit.cost import prunable_weights
from sparsekit.errors import UsageError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.selection import Scope, allocate_weights, keep_top_weights
from sparsekit.task import Task


@dataclass(frozen=True)
class MagnitudeUnstructured:
    """Zero the smallest weights at once.

    Attributes:
        scope: "global" compares the weights of all layers, "layer" zeroes the same share of each layer.
    """

    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.scope not in (scopes := list(get_args(Scope))):
            raise UsageError(f"magnitude_unstructured: unknown scope {self.scope!r}{nearest(self.scope, scopes)}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        counts = allocate_weights(graph, budget, scope=self.scope)
        magnitudes = {name: weight.detach().abs().cpu() for name, weight in prunable_weights(graph).items()}
        return PruningPlan(nonzero=keep_top_weights(magnitudes, counts))
