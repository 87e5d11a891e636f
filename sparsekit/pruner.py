"""What a pruning method is: a callable from graph, budget and task to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sparsekit.budget import Budget
from sparsekit.graph import ChannelGraph
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan
from sparsekit.surgery import tensor_of
from sparsekit.task import Task

Scores = Mapping[ChannelGroup, Tensor]  # float [C] per group, higher is kept


class Pruner(Protocol):
    """A method with its options set; data-free ones accept `task=None`."""

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan: ...


def channel_norms(graph: ChannelGraph, *, p: float = 2.0) -> dict[ChannelGroup, Tensor]:
    """The p-norm of each channel's filters: the weights that make it, over all layers that share it.

    Biases and normalisation vectors do not count. Float32 [C] per group, on the CPU.
    """
    norms = {}
    for group in graph.groups:
        total = torch.zeros(group.size)
        for slot in group.slots:
            weight = None if slot.dim == COUNT or slot.read else tensor_of(graph.model, slot.tensor)
            if weight is None or weight.dim() < 2:
                continue
            rows = weight.detach().float().cpu().movedim(slot.dim, 0)[slot.index]
            total += rows.abs().pow(p).flatten(1).sum(1)
        norms[group] = total.pow(1 / p)
    return norms
