"""Growing regularisation: channels are driven to zero by an l2 penalty that grows while the network trains.

The loss gains lambda/2 times the squared norm of each channel's filters, the weights that make it in all layers of its
group. Every `update_every` steps lambda grows for the channels that will go, until it reaches `ceiling`, or until in
every group the mean |w| of the kept channels is `stop_ratio` times that of the others; then it holds.

GReg-1 chooses what goes at the start, by l1 norm. GReg-2 first lets the penalty grow for all channels, so that those
the task needs stand out, and chooses by l1 norm then; what is kept gets a small negative penalty from there on.

The paper trains at a rate of 0.001 until lambda has grown and for 10,000 steps more (40,000 on ImageNet): some 22,000
steps for GReg-1, 31,000 for GReg-2. Here `epochs` ends the run wherever lambda stands, and the weakest are removed all
the same; the records say what lambda reached and how far kept and pruned channels have parted.

Needs task.fit.

Source: Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, arXiv:2012.09243.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import (
    ChannelSums,
    Counts,
    TrainingOptions,
    is_filter,
    penalised,
    require_positive,
    trained_plan,
    trainee,
)
from sparsekit.task import Record, Task


@dataclass(frozen=True)
class Growth:
    """How lambda moves, and when the choice falls.

    Attributes:
        update_every: training steps between two updates.
        step: what an update adds for the channels that will go.
        ceiling: where growth ends.
        stop_ratio: mean |w| kept over pruned, smoothed by 0.9 per update, at which growth ends.
        common_step: what an update adds for all channels before the choice.
        common_ceiling: lambda at which the choice falls.
        choose_by: share of the run after which it falls at the latest.
        kept: lambda of the kept channels after the choice.
    """

    update_every: int
    step: float
    ceiling: float
    stop_ratio: float
    common_step: float = 0.0
    common_ceiling: float = 0.0
    choose_by: float = 0.0
    kept: float = 0.0


class PenalisedNetwork(nn.Module):
    """A network whose channels carry penalties; each training forward moves them on.

    The penalties' whole state is part of `state_dict`, so that a run can resume.

    Args:
        network: owned and trained from here on.
        counts: how many channels stay of each group.
        growth: how the penalties grow.
        num_steps: training forwards in all.
    """

    def __init__(self, network: nn.Module, counts: Counts, growth: Growth, *, num_steps: int) -> None:
        super().__init__()
        self.network, self.growth, self.groups = network, growth, tuple(counts)
        self.sums = ChannelSums(network, self.groups, where=is_filter)
        self.keep_counts = nn.Buffer(torch.tensor([*counts.values()]))
        self.kept = nn.Buffer(torch.zeros_like(self.sums.valid))
        self.lambdas = nn.Buffer(torch.zeros(self.kept.shape))
        self.ratio = nn.Buffer(torch.zeros(len(counts)))
        self.choose_by = growth.choose_by * num_steps
        self.num_done, self.chosen, self.held = 0, False, False

    def forward(self, *inputs: Any) -> Any:
        if self.training:
            self._advance()
        return self.network(*inputs)

    # Numbers and not buffers: on a GPU, reading one would make every step wait.
    def get_extra_state(self) -> dict[str, int]:
        return {"num_done": self.num_done, "chosen": self.chosen, "held": self.held}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.num_done, self.chosen, self.held = state["num_done"], bool(state["chosen"]), bool(state["held"])

    def penalty(self) -> Tensor:
        """Sum over channels of lambda/2 times the squared norm of their filters."""
        squares_GC: Tensor = self.sums(self.network, p=2)
        return (self.lambdas * squares_GC).sum() / 2

    def top_k(self) -> Tensor:
        """Bool [G, C]: what stays; before the choice, the largest l1 norms."""
        if self.chosen:
            return self.kept
        norms_GC = self._norms().masked_fill(~self.sums.valid, -torch.inf)
        order = norms_GC.argsort(dim=1, descending=True, stable=True)
        among_first = torch.arange(order.shape[1], device=order.device) < self.keep_counts[:, None]
        return torch.zeros_like(self.kept).scatter(1, order, among_first)

    def measure(self) -> Record:
        """Largest lambda, and the smallest ratio over groups of mean |w| kept to pruned."""
        return {"penalty_lambda": float(self.lambdas.max()), "kept_to_pruned": float(self._ratios().min())}

    def plan(self) -> PruningPlan:
        """The choice, and the trained weights."""
        return trained_plan(self.network, dict(zip(self.groups, self.top_k(), strict=True)))

    def _advance(self) -> None:
        """One training step of the penalties."""
        growth = self.growth
        if not self.chosen and self.num_done >= self.choose_by:
            self._choose()
        self.num_done += 1
        if self.num_done % growth.update_every:
            return
        largest = float(self.lambdas.max())
        # Half an update of slack: sums of thousands of small steps are not exact.
        if not self.chosen and largest > growth.common_ceiling - growth.common_step / 2:
            self._choose()
        if self.chosen:
            ratio_G = self._ratios()
            self.ratio.copy_(torch.where(self.ratio > 0, 0.9 * self.ratio + 0.1 * ratio_G, ratio_G))
            parted = float(self.ratio.min()) >= growth.stop_ratio
            self.held = self.held or parted or largest > growth.ceiling - growth.step / 2
        if not self.held:
            step = growth.step if self.chosen else growth.common_step
            self.lambdas.add_(step * (self.sums.valid & ~self.kept))

    def _choose(self) -> None:
        self.kept.copy_(self.top_k())
        self.lambdas.masked_fill_(self.kept, self.growth.kept)
        self.chosen = True

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """l1 norms of the channels' filters, float [G, C]."""
        norms_GC: Tensor = self.sums(self.network, p=1)
        return norms_GC

    def _ratios(self) -> Tensor:
        """Mean |w| of the channels that stay over that of the others, float [G]."""
        norms_GC, kept_GC = self._norms(), self.top_k()
        pruned_GC = self.sums.valid & ~kept_GC
        kept_G = (norms_GC * kept_GC).sum(1) / kept_GC.sum(1)
        pruned_G = (norms_GC * pruned_GC).sum(1) / pruned_GC.sum(1)
        return kept_G / pruned_G.clamp_min(1e-12)


@dataclass(frozen=True)
class GReg1(TrainingOptions):
    """Choose by l1 norm, then drive the rest to zero for `epochs`, and remove it.

    Attributes:
        update_every: training steps between two updates of lambda, >= 1; the paper has 5 on ImageNet.
        step: what an update adds to lambda.
        ceiling: of lambda.
        stop_ratio: mean |w| kept over pruned at which lambda holds.
    """

    name: ClassVar[str] = "greg1"

    update_every: int = 10
    step: float = 1e-4
    ceiling: float = 1.0
    stop_ratio: float = 1000.0

    def __post_init__(self) -> None:
        require_positive(self.name, self, "update_every")

    def growth(self) -> Growth:
        """How the options let lambda move."""
        return Growth(self.update_every, self.step, self.ceiling, self.stop_ratio)

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task.
            BudgetError: the budget lies below what the network can reach.
        """
        copy, counts, task = trainee(self.name, graph, budget, task, round_to=self.round_to)
        if not counts:
            return PruningPlan()
        network = PenalisedNetwork(copy, counts, self.growth(), num_steps=self.epochs * task.num_batches)
        task.fit(network, penalised(task, network.penalty), self.schedule(), stage="prune", observe=network.measure)
        return network.plan()


@dataclass(frozen=True)
class GReg2(GReg1):
    """Let all penalties grow, choose by the l1 norms that this leaves, and go on as GReg-1.

    Attributes:
        common_step: what an update adds to every lambda before the choice.
        common_ceiling: lambda at which the choice falls.
        choose_by: share of the run, in [0, 1], at which it falls at the latest. The paper chooses after a third of
            its 31,000 steps; in a short run lambda would never get there.
        kept_lambda: of the kept channels after the choice; below 0 it takes back a part of the weight decay.
    """

    name: ClassVar[str] = "greg2"

    common_step: float = 1e-5
    common_ceiling: float = 0.01
    choose_by: float = 1 / 3
    kept_lambda: float = -1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.choose_by <= 1:
            raise UsageError(f"{self.name}: choose_by must be in [0, 1], got {self.choose_by:g}")

    def growth(self) -> Growth:
        """How the options let lambda move."""
        return replace(
            super().growth(),
            common_step=self.common_step,
            common_ceiling=self.common_ceiling,
            choose_by=self.choose_by,
            kept=self.kept_lambda,
        )
