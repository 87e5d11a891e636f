"""Network slimming: an l1 penalty on the scales of normalisation layers decides which channels fade.

The loss gains rho times the sum of |gamma|, over the normalisation layers whose scales belong to the channels that may
go. After training each group keeps its channels with the largest |gamma|. A channel that several layers scale, in a
residual stream or with a depthwise convolution, scores the sum of its |gamma|: what the penalty is on. A group that no
layer scales is ranked by the l2 norms of its filters.

Needs task.fit.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv:1708.06519.
It trains from scratch with gamma starting at 0.5, for 160 epochs at a rate of 0.1, with rho 1e-4 (VGG) or 1e-5 (ResNet,
DenseNet), and ranks the scales of all layers together; here the budget says how many of each group stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import COUNT, PruningPlan, Slot
from sparsekit.pruner import (
    ChannelSums,
    Counts,
    TrainingOptions,
    channel_norms,
    penalised,
    require_positive,
    trained_plan,
    trainee,
)
from sparsekit.selection import keep_top
from sparsekit.task import Record, Task

_NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class SlimmedNetwork(nn.Module):
    """A network that knows the scales of its channels.

    Args:
        network: owned and trained from here on.
        counts: the groups whose scales count.
        rho: strength of the penalty.
    """

    def __init__(self, network: nn.Module, counts: Counts, *, rho: float) -> None:
        super().__init__()
        self.network, self.rho = network, rho
        self.sums = ChannelSums(network, tuple(counts), where=is_scale)

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def scales(self) -> Tensor:
        """Sum of |gamma| over the layers that scale each channel, float [G, C]; 0 where none does."""
        scales_GC: Tensor = self.sums(self.network, p=1)
        return scales_GC

    def penalty(self) -> Tensor:
        """rho times the sum of |gamma|."""
        return self.rho * self.scales().sum()

    def measure(self) -> Record:
        """Sum of |gamma|."""
        return {"scale_sum": float(self.scales().detach().sum())}


@dataclass(frozen=True)
class NetworkSlimming(TrainingOptions):
    """Train under the penalty for `epochs`, then keep each group's largest scales.

    Attributes:
        rho: strength of the penalty, > 0. In a few epochs the paper's 1e-4 moves the scales little.
    """

    rho: float = 1e-4

    def __post_init__(self) -> None:
        require_positive("network_slimming", self, "rho")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task, or no normalisation layer scales any of the channels that may go.
            BudgetError: the budget lies below what the network can reach.
        """
        copy, counts, task = trainee("network_slimming", graph, budget, task, round_to=self.round_to)
        if not counts:
            return PruningPlan()
        network = SlimmedNetwork(copy, counts, rho=self.rho)
        if not network.sums.weights:
            raise UsageError("network_slimming: no normalisation layer scales the channels to prune; choose sfp")
        task.fit(network, penalised(task, network.penalty), self.schedule(), stage="prune", observe=network.measure)
        scores = channel_norms(replace(graph, model=copy), p=2)
        for group, scales_C in zip(counts, network.scales().detach().cpu(), strict=True):
            if any(is_scale(copy, slot) for slot in group.slots):
                scores[group] = scales_C[: group.size]
        return trained_plan(copy, keep_top(scores, counts).keep)


def is_scale(network: nn.Module, slot: Slot) -> bool:
    """Whether the slot lies in the weight of a normalisation layer."""
    path, _, leaf = slot.tensor.rpartition(".")
    if slot.read or slot.dim == COUNT or leaf != "weight":
        return False
    return isinstance(network.get_submodule(path), _NORMALISATIONS)
