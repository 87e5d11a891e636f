"""Group Fisher pruning: keep the channels whose removal raises the loss most for the MACs it saves.

Every channel has one gate on all that reads it, shared by all layers of its group, see `gates.py`. The rise of the
loss is, to second order, half the Fisher information of the gate: the square of the gradient of each image's own loss,
averaged over images. (Squaring a batch's mean gradient, as in first-order Taylor, lets images of opposite signs
cancel.) It is divided by the MACs that the network saves without the channel, so that scores of groups compare. The
paper removes one channel at a time while the network trains; here it is one shot, training follows in fine-tuning.

Needs task.batches and task.loss.

Source: Liu et al. 2021, "Group Fisher Pruning for Practical Network Compression", arXiv:2108.00708.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.cost import num_macs
from sparsekit.errors import UsageError
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import first_images, squared_gradients
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import copied
from sparsekit.task import Task


@dataclass(frozen=True)
class Fisher:
    """One-shot, per group.

    Attributes:
        num_images: images to average over, at most one epoch; each is a forward and a backward pass of its own.
        round_to: widths are multiples of this.
    """

    num_images: int = 256
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UsageError(f"fisher: num_images must be at least 1, got {self.num_images}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`.

        Raises:
            UsageError: no task; gradients need data.
            BudgetError: the budget lies below what the network can reach.
        """
        if task is None:
            raise UsageError("fisher: measures gradients and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        pruned = [group for group, count in counts.items() if count < group.size]
        if not pruned:
            return PruningPlan()
        return keep_top(fisher_scores(graph, pruned, task, num_images=self.num_images), counts)


def fisher_scores(
    graph: ChannelGraph, groups: Sequence[ChannelGroup], task: Task, *, num_images: int
) -> dict[ChannelGroup, Tensor]:
    """The mean over images of the squared gradient in each gate, per MAC saved: float64 [C] per group."""
    gated = GatedNetwork(bake_all(copied(graph.model)).eval(), groups)
    pairs = chain.from_iterable(zip(*batch, strict=True) for batch in first_images(task, num_images))
    singles = ((image[None], target[None]) for image, target in pairs)
    squares_GC = squared_gradients(gated, gated.valid, task, singles)
    rows = zip(groups, squares_GC, strict=True)
    return {group: row[: group.size] / _num_macs_saved(graph, group) for group, row in rows}


def _num_macs_saved(graph: ChannelGraph, group: ChannelGroup) -> int:
    """MACs of one example that go with one channel; 1 where only training computes it, of which no MACs are counted."""
    return max(1, num_macs(graph) - num_macs(graph, {group: group.size - 1}))
