"""FPGM: drop the channels whose filters lie nearest to all others of their group. Needs no data.

A channel's score is the sum of the l2 distances from its filter to every other filter of the group. The least of
them lie around the geometric median, and what they compute the others can replace, however large their norm. A
channel's filter is all the weights that make it, over all layers that share it. The paper selects anew after each
epoch of a training; this is its criterion in one shot.

Source: He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
arXiv:1811.00250.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.budget import Budget
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import filters
from sparsekit.selection import select
from sparsekit.task import Task


@dataclass(frozen=True)
class FPGM:
    """One-shot, per group.

    Attributes:
        round_to: widths are multiples of this.
    """

    round_to: int = 1

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        return select(filter_distances(graph), graph, budget, round_to=self.round_to)


def filter_distances(graph: ChannelGraph) -> dict[ChannelGroup, Tensor]:
    """The sum of the distances from each channel's filter to all others of its group, float64 [C] per group."""
    distances = {}
    for group in graph.groups:
        rows_CD = torch.cat([torch.empty(group.size, 0), *filters(graph.model, group)], 1)
        # cdist subtracts squared norms: in float32 filters that are twins would seem 1e-3 of their norm apart
        distances[group] = torch.cdist(rows_CD.double(), rows_CD.double()).sum(1)
    return distances
