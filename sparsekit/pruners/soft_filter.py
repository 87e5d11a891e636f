"""Soft filter pruning: the weakest filters are set to zero after every epoch, and may grow back in the next.

After each epoch every group's channels with the smallest l2 norms lose their filters, in every layer that makes them.
Training goes on without a mask, so that a filter the task needs regrows. What is weakest after the last epoch is
removed.

Two zeros in series get no gradient and could never come back. So what a normalisation scales and shifts by, biases, and
the filters of depthwise and grouped layers, which only pass a channel on, stay as they are. Even so, a filter in front
of a ReLU comes back only where the shift in between is above 0.

Needs task.fit.

Source: He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018,
arXiv:1808.06866. It prunes convolutions one by one, for 200 epochs at a rate of 0.1, or 0.01 from a trained network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.budget import Budget
from sparsekit.graph import ChannelGraph
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan
from sparsekit.pruner import Counts, TrainingOptions, channel_norms, is_filter, trained_plan, trainee
from sparsekit.selection import keep_top
from sparsekit.surgery import tensor_of
from sparsekit.task import Batch, Task


@dataclass(frozen=True)
class SoftFilter(TrainingOptions):
    """Train for `epochs`; how many channels each group keeps comes from the budget beforehand.

    Attributes:
        lr: peak learning rate. Behind BatchNorm in training a filter of zeros gets gradients some 300 times
            (eps^-0.5) as large as others: at the paper's 0.01 it comes back larger than the filters that stayed, and
            the smallest norms mean nothing.
    """

    lr: float = 1e-3

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task.
            BudgetError: the budget lies below what the network can reach.
        """
        network, counts, task = trainee("sfp", graph, budget, task, round_to=self.round_to)
        if not counts:
            return PruningPlan()
        trained = replace(graph, model=network)
        batches = task.batches

        def zero_first(epoch: int) -> Iterable[Batch]:
            # The end of an epoch is the start of the next: there a resumed run sees it too.
            if epoch:
                zero_filters(trained, strongest(trained, counts))
            return batches(epoch)

        task.fit(network, replace(task, batches=zero_first), self.schedule(), stage="prune")
        return trained_plan(network, strongest(trained, counts))


def strongest(graph: ChannelGraph, counts: Counts) -> dict[ChannelGroup, Tensor]:
    """Bool [C] per group, True at the channels whose filters have the largest l2 norms."""
    return dict(keep_top(channel_norms(graph, p=2), counts).keep)


@torch.no_grad()
def zero_filters(graph: ChannelGraph, keep: dict[ChannelGroup, Tensor]) -> None:
    """Set the filters of the channels not kept to zero, in place; those of depthwise and grouped layers stay."""
    for group, kept in keep.items():
        grouped = {slot.tensor.removesuffix("groups") for slot in group.slots if slot.dim == COUNT}
        for slot in group.slots:
            if is_filter(graph.model, slot) and slot.tensor.removesuffix("weight") not in grouped:
                weight = tensor_of(graph.model, slot.tensor)
                weight.index_fill_(slot.dim, slot.index[~kept].flatten().to(weight.device), 0)
