"""Taylor pruning: keep the channels whose removal changes the loss most, to first order.

Every channel has a gate z = 1 on all that reads it, see `gates.py`, which behind a ReLU equals the paper's gate after
BatchNorm. Its score is (dL/dz z)^2 of a mini-batch's mean loss, averaged over mini-batches, in eval mode and one shot.
The paper removes 100 channels at a time while the network trains and smooths the scores over these steps; here
training follows in fine-tuning, as for every one-shot method.

Needs task.batches and task.loss.

Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from torch import Tensor

from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import squared_gradients
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import copied
from sparsekit.task import Task


@dataclass(frozen=True)
class Taylor:
    """One-shot, per group.

    Attributes:
        num_batches: mini-batches to average over; where one epoch has fewer, the next follows.
        round_to: widths are multiples of this.
    """

    num_batches: int = 30
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise UsageError(f"taylor: num_batches must be at least 1, got {self.num_batches}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`.

        Raises:
            UsageError: no task; gradients need data.
            BudgetError: the budget lies below what the network can reach.
        """
        if task is None:
            raise UsageError("taylor: measures gradients and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        pruned = [group for group, count in counts.items() if count < group.size]
        if not pruned:
            return PruningPlan()
        return keep_top(taylor_scores(graph, pruned, task, num_batches=self.num_batches), counts)


def taylor_scores(
    graph: ChannelGraph, groups: Sequence[ChannelGroup], task: Task, *, num_batches: int
) -> dict[ChannelGroup, Tensor]:
    """The squared gradient of a mini-batch's loss in each gate, averaged over `num_batches`: float64 [C] per group."""
    gated = GatedNetwork(bake_all(copied(graph.model)).eval(), groups)
    batches = chain.from_iterable(map(task.batches, range(num_batches)))  # at most as many epochs as batches
    squares_GC = squared_gradients(gated, gated.valid, task, islice(batches, num_batches))
    return {group: row[: group.size] for group, row in zip(groups, squares_GC, strict=True)}
