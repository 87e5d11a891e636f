"""A budget of milliseconds or bytes: plan, export, measure the file, correct, until it lies in the band.

Tables of layer times say which of two plans is faster long before they say how fast either is in a whole network: what
lies between the layers, and what the runtime fuses, is in no table. So the plan is made for a share of the tables' sum,
and that share is corrected by what the exported file takes: the next one lies on the line through the two candidates
around the budget. Only channel counts matter to both, so that all this happens before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparsekit.budget import Limit, Metric
from sparsekit.cost import Costs, Counts
from sparsekit.errors import BudgetError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.selection import keep_top
from sparsekit.tradeoff import CostOfCounts, Curve, spend

BAND = 0.95  # a file is done between this share of the budget and the budget
# Where in the band, and how near: a file took up to 1.5 % more when timed again (`benchmarks.repeated_runs`), and one
# over its budget fails its user, while one that leaves a little of it does not.
AIM, NEAR = 0.97, 0.0125
MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Candidate:
    """One small network that was exported and measured.

    Attributes:
        kept: channels by group name, of groups that lose some.
        predicted: by metric, the share of the dense network's cost that the tables gave.
        measured: by metric, the share of the dense file's cost.
        interval: 95 % of the measured share of latency, where that is a limit.
        macs_ratio: of the dense network's.
        in_band: every limit holds, and one of them to 5 %.
    """

    kept: Mapping[str, int]
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    interval: Sequence[float] | None
    macs_ratio: float
    in_band: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Measured:
    """What a candidate's file showed: by metric its share of the dense file's cost; see `Candidate.interval`."""

    shares: Mapping[Metric, float]
    interval: tuple[float, float] | None = None


def meet(
    graph: ChannelGraph,
    limits: Sequence[Limit],
    costs: Mapping[Metric, CostOfCounts],
    try_out: Callable[[PruningPlan], Measured],
    *,
    scores: Mapping[ChannelGroup, Tensor],
    damages: Mapping[ChannelGroup, Curve],
    start: Counts,
    free: Collection[int],
    round_to: int = 1,
) -> tuple[Counts, list[Candidate]]:
    """Channel counts whose exported file meets all limits, and every candidate that was measured on the way.

    Args:
        graph: of the network to cut.
        limits: measured ones relative to the dense file, others absolute, see `cost.absolute`.
        costs: of every limit's metric; for measured ones what says how it grows with the counts.
        try_out: cuts, exports and measures a plan.
        scores: which channels a candidate keeps; any choice of as many takes as long.
        damages: of groups that are free, see `tradeoff`.
        start: counts to begin with: all channels but those of groups that a keep ratio names.
        free: positions of groups that may be cut.
        round_to: widths are multiples of this.

    Raises:
        BudgetError: no cut meets the limits; it names the floor and what holds it there.
    """
    found = _Search(graph, limits, costs, start)
    narrowest = start.copy()
    narrowest[list(free)] = np.minimum(start[list(free)], round_to)
    for _ in range(MAX_CANDIDATES):
        counts = spend(graph, damages, found.planned_limits(), free, start, round_to=round_to)
        counts = narrowest if counts is None else counts
        if any((counts == other).all() for other in found.counts):
            break  # widths come in steps: nothing lies between what was tried
        found.add(counts, try_out(keep_top(scores, dict(zip(graph.groups, counts.tolist(), strict=True)))))
        if abs(found.tightest(found.measured[-1]) - AIM) <= NEAR:
            break
    best = found.best()
    if best is None:
        raise BudgetError(_floor(found, narrowest, free))
    return found.counts[best], found.candidates


class _Search:
    """The candidates so far, and the shares of the tables' sums to plan for next."""

    def __init__(
        self, graph: ChannelGraph, limits: Sequence[Limit], costs: Mapping[Metric, CostOfCounts], start: Counts
    ) -> None:
        self.graph, self.start = graph, start
        self.counts: list[Counts] = []
        self.measured: list[Mapping[Metric, float]] = []
        self.candidates: list[Candidate] = []
        self._dense = Costs(graph).dense
        self._costs = costs
        self.shares = {limit.metric: limit.value for limit in limits if limit.relative}
        self._fixed = [(costs[limit.metric], limit.value) for limit in limits if not limit.relative]

    def predicted(self, metric: Metric, counts: Counts) -> float:
        """The share of the dense network's cost by the tables."""
        return self._costs[metric](counts) / self._costs[metric](self._dense)

    def planned_limits(self) -> list[tuple[CostOfCounts, float]]:
        """What to plan for: costs and limits."""
        planned = [
            (self._costs[metric], self._next_share(metric, AIM * share) * self._costs[metric](self._dense))
            for metric, share in self.shares.items()
        ]
        return [*self._fixed, *planned]

    def _next_share(self, metric: Metric, aim: float) -> float:
        """The predicted share whose file should take `aim` of the dense one."""
        points = [
            (self.predicted(metric, counts), measured[metric])
            for counts, measured in zip(self.counts, self.measured, strict=True)
        ]
        points.append((1.0, 1.0))
        above = min((point for point in points if point[1] >= aim), key=lambda point: point[1], default=None)
        below = max((point for point in points if point[1] < aim), key=lambda point: point[1], default=None)
        if above and below and above[0] > below[0]:
            (x1, y1), (x2, y2) = below, above
            return x1 + (x2 - x1) * (aim - y1) / (y2 - y1)
        x, y = min(points, key=lambda point: abs(point[1] - aim))
        return min(1.0, x * aim / y)

    def add(self, counts: Counts, measured: Measured) -> None:
        """Note what a candidate took."""
        self.counts.append(counts)
        self.measured.append(measured.shares)
        sizes = zip(self.graph.groups, counts.tolist(), strict=True)
        costs = Costs(self.graph)
        self.candidates.append(
            Candidate(
                kept={group.name: count for group, count in sizes if count < group.size},
                predicted={metric.value: self.predicted(metric, counts) for metric in self.shares},
                measured={metric.value: share for metric, share in measured.shares.items()},
                interval=measured.interval,
                macs_ratio=costs(Metric.NUM_MACS, counts) / costs(Metric.NUM_MACS, costs.dense),
                in_band=BAND <= self.tightest(measured.shares) <= 1,
            )
        )

    def tightest(self, measured: Mapping[Metric, float]) -> float:
        return max(measured[metric] / share for metric, share in self.shares.items())

    def best(self) -> int | None:
        """The position of the candidate nearest to the aim; None where all exceed the budget."""
        used = {number: self.tightest(measured) for number, measured in enumerate(self.measured)}
        within = {number: share for number, share in used.items() if share <= 1}
        return min(within, key=lambda number: abs(within[number] - AIM)) if within else None


def _floor(found: _Search, narrowest: Counts, free: Collection[int]) -> str:
    """The nearest that was measured, and what keeps it from being faster."""
    nearest = min(found.measured, key=found.tightest)
    parts = [
        f"{metric.value}<={share:.3g}x cannot be met: the nearest network takes {nearest[metric]:.3f}x"
        for metric, share in found.shares.items()
        if nearest[metric] > share
    ]
    is_floor = (found.counts[found.measured.index(nearest)] == narrowest).all()
    held = [", every group at its least" if is_floor else f", of {len(found.counts)} that were measured"]
    whole = [group.name for number, group in enumerate(found.graph.groups) if number not in free]
    if whole:
        held.append(f"; {len(whole)} groups stay whole (first: {whole[0]})")
    held += [f"; {row.module} is locked ({row.reason})" for row in found.graph.refusals[:1]]
    return f"budget {' and '.join(parts)}{''.join(held)}"
