"""What soft channel counts cost, differentiably; the whole counts they become are `selection.whole_counts`.

Keep ratios are learned against costs: any callable from soft counts, float [G] over all groups of a graph, to a share
of what the dense network costs. `SoftCost` makes one of a graph's cost terms; a latency table would be another.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, A.9.
"""

# G groups of the graph, T terms of a cost, S sizes multiplied in a term, E summands of all sizes
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget, Metric
from sparsekit.cost import Costs
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
