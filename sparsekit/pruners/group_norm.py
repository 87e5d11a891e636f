"""Group norm: keep the channels whose coupled weights, makers and readers together, are largest. Needs no data.

A channel's score is the sum of the squares of every weight that goes when it goes: the filters that make it, the
slices of the next layers that read it, the scales of the normalisations between; biases and running statistics do
not count. It is divided by the mean over the group, so that scores of groups compare whatever their layers' sizes.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, with the normalisation of its
library, Torch-Pruning 1.6, which leaves the filters of depthwise layers out; here they count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.budget import Budget
from sparsekit.graph import ChannelGraph
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan
from sparsekit.pruner import slot_rows
from sparsekit.selection import select
from sparsekit.task import Task


@dataclass(frozen=True)
class GroupNorm:
    """One-shot, per group.

    Attributes:
        round_to: widths are multiples of this.
    """

    round_to: int = 1

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        return select(group_norms(graph), graph, budget, round_to=self.round_to)


def group_norms(graph: ChannelGraph) -> dict[ChannelGroup, Tensor]:
    """Each channel's sum of squared weights over its group's mean, float32 [C] per group."""
    buffers = {name for name, _ in graph.model.named_buffers()}
    norms = {}
    for group in graph.groups:
        total = torch.zeros(group.size)
        for slot in group.slots:
            if slot.dim != COUNT and slot.tensor not in buffers and not slot.tensor.endswith("bias"):
                total += slot_rows(graph.model, slot).square().sum(1)
        norms[group] = total / total.mean().clamp(min=torch.finfo().tiny)
    return norms
