"""What soft channel counts cost, differentiably, and the whole counts that meet a budget.

Keep ratios are learned against costs: any callable from soft counts, float [G] over all groups of a graph, to a share
of what the dense network costs. `SoftCost` makes one of a graph's cost terms; a latency table would be another.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, A.9.
"""

# G groups of the graph, T terms of a cost, S sizes multiplied in a term, E summands of all sizes
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsekit.budget import Budget, Metric
from sparsekit.cost import Costs, Counts
from sparsekit.errors import BudgetError
from sparsekit.graph import ChannelGraph, CostTerm
from sparsekit.plan import ChannelGroup

# The penalty's c starts here and grows by this factor per step, while the mean excess is above the tolerance. It is the
# mean of some 20 steps: around the limit counts oscillate, the more so the larger c, which must not make it larger.
PENALTY, PENALTY_GROWTH, TOLERANCE, MEMORY = 10.0, 1.02, 0.01, 0.95


class SoftCost(nn.Module):
    """A sum of cost terms as one tensor program: soft counts [G] -> share of the cost at `dense_G`, a scalar.

    >>> layer = CostTerm("layer", 10.0, ({(): 3.0}, {(0,): 1.0, (1,): 2.0}))
    >>> cost = SoftCost([layer], torch.tensor([4, 2]))
    >>> float(cost(torch.tensor([2.0, 1.0])))
    0.5
    """

    def __init__(self, terms: Sequence[CostTerm], dense_G: Tensor) -> None:
        super().__init__()
        self.num_sizes = max(len(term.sizes) for term in terms)
        one: dict[tuple[int, ...], float] = {(): 1.0}
        summands = [
            (row * self.num_sizes + column, groups, per_channel)
            for row, term in enumerate(terms)
            for column, size in enumerate([*term.sizes, *[one] * (self.num_sizes - len(term.sizes))])
            for groups, per_channel in size.items()
        ]
        width = max(len(groups) for _, groups, _ in summands)
        # A product of fewer groups is padded with one more count, which is always 1.
        padded = [[*groups, *[len(dense_G)] * (width - len(groups))] for _, groups, _ in summands]
        self.groups = nn.Buffer(torch.tensor(padded, dtype=torch.int64).view(-1, width), persistent=False)
        self.rows = nn.Buffer(torch.tensor([row for row, *_ in summands]), persistent=False)
        self.per_channel = nn.Buffer(torch.tensor([number for *_, number in summands]), persistent=False)
        scale_T = torch.tensor([term.scale for term in terms], dtype=torch.float64)
        self.scale = nn.Buffer(scale_T, persistent=False)
        self.scale = nn.Buffer((scale_T / self(dense_G.double())).float(), persistent=False)

    def forward(self, counts_G: Tensor) -> Tensor:
        padded = torch.cat([counts_G, counts_G.new_ones(1)])
        products_E = padded[self.groups].prod(1) * self.per_channel
        sizes = products_E.new_zeros(len(self.scale) * self.num_sizes).index_add(0, self.rows, products_E)
        return (self.scale * sizes.view(-1, self.num_sizes).prod(1)).sum()


class LearnedCounts(nn.Module):
    """Soft channel counts that train along with the loss that `penalty` is added to: size * sigmoid(parameter).

    The penalty is c * (share - limit)^2 for the limit exceeded most. c grows with every call in training mode, as long
    as the share is on average further than `TOLERANCE` away.

    Args:
        start: of every group of a graph, in its order, the count it starts from; what is not learned stays there.
        learned: those that train, each of more than one channel; a whole one starts half a channel below its size.
        limits: costs, soft counts of all groups [G] -> share of the dense cost, and the share allowed of each.
        scale: the parameter is the ratios' log-odds divided by this.
    """

    def __init__(
        self,
        start: Mapping[ChannelGroup, int],
        learned: Collection[ChannelGroup],
        limits: Sequence[tuple[Callable[[Tensor], Tensor], float]],
        *,
        scale: float,
    ) -> None:
        super().__init__()
        self.limits, self.scale = limits, scale
        # Costs that hold tensors move with this module.
        self.costs = nn.ModuleList(cost for cost, _ in limits if isinstance(cost, nn.Module))
        self.start = nn.Buffer(torch.tensor([*start.values()], dtype=torch.float32), persistent=False)
        self.sizes = nn.Buffer(torch.tensor([float(group.size) for group in start]), persistent=False)
        self.learned = nn.Buffer(torch.tensor([group in learned for group in start]), persistent=False)
        self.masked = nn.Buffer((self.learned | (self.start < self.sizes)).nonzero().flatten(), persistent=False)
        ratios_G = torch.minimum(self.start, self.sizes - 0.5) / self.sizes
        log_odds_G = torch.logit(ratios_G).masked_fill(~self.learned, 0)
        self.scaled_log_odds = nn.Parameter(log_odds_G / scale)
        self.penalty_weight, self.mean_excess = nn.Buffer(torch.tensor(PENALTY)), nn.Buffer(torch.tensor(0.0))

    def forward(self) -> Tensor:
        """The soft counts of groups that are learned or did not start whole, float [number of them]."""
        if self.training:
            self.mean_excess.lerp_(self.excess().detach(), 1 - MEMORY)
            self.penalty_weight.mul_(torch.where(self.mean_excess.abs() > TOLERANCE, PENALTY_GROWTH, 1.0))
        return self.counts()[self.masked]

    def counts(self) -> Tensor:
        """The soft counts of all groups, float [G]."""
        # Within rounding of 0 or 1 the log-odds of keeping, which the masks ask for, would be infinite.
        ratios_G = torch.sigmoid(self.scale * self.scaled_log_odds).clamp(1e-6, 1 - 1e-6)
        return torch.where(self.learned, self.sizes * ratios_G, self.start)

    def excess(self) -> Tensor:
        """Share of the dense cost above the limit exceeded most; negative where all limits leave room."""
        counts_G = self.counts()
        return torch.stack([cost(counts_G) - limit for cost, limit in self.limits]).amax()

    def penalty(self) -> Tensor:
        """What the loss is raised by, a scalar."""
        return self.penalty_weight * self.excess().square()


def soft_limits(graph: ChannelGraph, budget: Budget) -> list[tuple[SoftCost, float]]:
    """Each limit of `budget` as its cost and the share of the dense cost that it allows.

    Raises:
        BudgetError: there is none, so keep ratios could not be traded against anything.
    """
    if not budget.limits:
        raise BudgetError("budget: gives keep ratios and no limit to learn them by; add one such as macs<=0.5x")
    costs = Costs(graph)
    channels = tuple(CostTerm("channels", 1.0, ({(number,): 1.0},)) for number in range(len(graph.groups)))
    terms = {Metric.NUM_MACS: graph.macs, Metric.NUM_PARAMS: graph.params, Metric.CHANNELS: channels}
    dense_G = torch.tensor(costs.dense)
    dense = {limit: costs(limit.metric, costs.dense) for limit in budget.limits}
    return [(SoftCost(terms[limit.metric], dense_G), limit.resolve(dense[limit]) / dense[limit]) for limit in dense]


def whole_counts(
    ratios: Mapping[ChannelGroup, float],
    graph: ChannelGraph,
    budget: Budget,
    counts: Mapping[ChannelGroup, int],
    *,
    round_to: int = 1,
) -> dict[ChannelGroup, int]:
    """Counts that meet `budget` with no room for one more, as near as they can be to learned keep ratios.

    The ratios move together, by one shift of their log-odds, to where their whole parts just fit; then the groups
    are filled up one step at a time, largest shortfall first, until nothing more fits: at the end the cheap ones.

    Args:
        ratios: learned, in (0, 1); of the groups that may move.
        graph: what is cut.
        budget: its limits must be met.
        counts: of every group; those that may not move keep theirs, and all together they meet the budget.
        round_to: counts are multiples of this, or a group's full size.
    """
    costs = Costs(graph)
    limits = [(limit.metric, limit.resolve(costs(limit.metric, costs.dense))) for limit in budget.limits]
    free = [number for number, group in enumerate(graph.groups) if group in ratios]
    sizes, step = costs.dense[free], np.minimum(round_to, costs.dense[free])
    learned = np.clip([ratios[graph.groups[number]] for number in free], 1e-6, 1 - 1e-6)

    def wanted(shift: float) -> NDArray[np.float64]:
        odds = learned / (1 - learned) * math.exp(shift)
        shares: NDArray[np.float64] = odds / (1 + odds)
        return sizes * shares

    def at(shift: float) -> Counts:
        return np.clip(np.floor(wanted(shift) / round_to + 1e-9).astype(np.int64) * round_to, step, sizes)

    def fits(moved: Counts) -> bool:
        all_counts = costs.counts(counts)
        all_counts[free] = moved
        return all(costs(metric, all_counts) <= limit for metric, limit in limits)

    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    kept, goal = at(low), wanted(low)
    open_groups = {number for number in range(len(free)) if kept[number] < sizes[number]}
    while open_groups:
        number = min(open_groups, key=lambda n: ((kept[n] - goal[n]) / sizes[n], n))
        tried = kept.copy()
        tried[number] = min(sizes[number], tried[number] + round_to)
        # Costs only grow with counts: what does not fit now never will.
        if not fits(tried):
            open_groups.discard(number)
            continue
        kept = tried
        if kept[number] == sizes[number]:
            open_groups.discard(number)
    return dict(counts) | {graph.groups[number]: int(count) for number, count in zip(free, kept, strict=True)}
