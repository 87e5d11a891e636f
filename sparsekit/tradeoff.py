"""How many channels each group keeps when what counts is importance per cost saved, not one ratio for all.

A group that keeps a share s of its importance lets a share s of its signal through, and layers follow one another: the
damage is -weight * log(s), which grows without bound as s goes to 0, so that no layer starves. From the dense network
down, the group is cut next that loses least for what it saves, to the width where it does: on a staircase of latency
against width that is the edge of a plateau, since a step that saves nothing is never worth its damage.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.cost import Counts
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup

Curve = NDArray[np.float64]


class CostOfCounts(Protocol):
    """What a network costs by how many channels each of its groups keeps."""

    def __call__(self, counts: Counts, /) -> float:
        """The cost when group g keeps `counts[g]` channels."""

    def along(self, counts: Counts, group: int, /) -> Curve:
        """[size of the group], what the layers at `group` cost by its width, from 1, the others as in `counts`."""


Limits = Sequence[tuple[CostOfCounts, float]]


def damage_curve(scores_C: Tensor, weight: float = 1.0) -> Curve:
    """[C], -weight * log(share of the scores' sum that the best 1, 2, ... C channels hold).

    Args:
        scores_C: how important each channel is, not negative; all 0 counts as all the same.
        weight: of the group among the others.

    >>> damage_curve(Tensor([1.0, 3.0]), weight=2.0).round(3).tolist()
    [0.575, 0.0]
    """
    scores = np.sort(scores_C.double().numpy())[::-1]
    shares = np.cumsum(scores if scores.sum() > 0 else np.ones_like(scores))
    shares = np.maximum(shares / shares[-1], 1e-12)
    curve: Curve = np.maximum(0.0, -weight * np.log(shares)) + 0.0  # no -0.0
    return curve


def spend(
    graph: ChannelGraph,
    damages: Mapping[ChannelGroup, Curve],
    limits: Limits,
    free: Collection[int],
    start: Counts,
    *,
    round_to: int = 1,
) -> Counts | None:
    """Channels to keep per group so that every limit holds with little damage; None where no cut can reach it.

    Args:
        graph: whose groups are cut.
        damages: by width, of the groups that are free.
        limits: costs and what each may be.
        free: positions of the groups that may be cut.
        start: channels to begin with.
        round_to: widths are multiples of this, or as in `start`.
    """
    counts, moves = start.copy(), _Moves(graph, damages, free, start, round_to)
    while True:
        excess = [cost(counts) / limit for cost, limit in limits]
        worst = int(np.argmax(excess)) if limits else 0
        if not limits or excess[worst] <= 1:
            return _refill(counts, moves, limits)
        move = moves.best(counts, worst, limits[worst][0])
        if move is None:
            return None
        counts[move[0]] = move[1]
        moves.forget(move[0])


def _refill(counts: Counts, moves: _Moves, limits: Limits) -> Counts:
    """Widen groups while every limit still holds, the most damage undone first: what the last cut saved too much."""
    while True:
        gains = sorted(
            ((gain, group, width) for group in moves.free for gain, width in moves.wider(counts, group)), reverse=True
        )
        for _, group, width in gains:
            tried = counts.copy()
            tried[group] = width
            if all(cost(tried) <= limit for cost, limit in limits):
                counts = tried
                break
        else:
            return counts


class _Moves:
    """The best cut of each group, kept until a cut nearby changes what it saves."""

    def __init__(
        self,
        graph: ChannelGraph,
        damages: Mapping[ChannelGroup, Curve],
        free: Collection[int],
        start: Counts,
        round_to: int,
    ) -> None:
        self.free = sorted(free)
        self._damage = {number: damages[graph.groups[number]] for number in self.free}
        self._widths = {number: _widths(int(start[number]), round_to) for number in self.free}
        self._neighbours = _neighbours(graph)
        self._known: dict[tuple[int, int], tuple[float, int] | None] = {}

    def best(self, counts: Counts, which: int, cost: CostOfCounts) -> tuple[int, int] | None:
        """The group to cut and its new width."""
        found = []
        for number in self.free:
            if (number, which) not in self._known:
                self._known[number, which] = self._cut(counts, number, cost)
            move = self._known[number, which]
            if move is not None:
                found.append((*move, number))
        if not found:
            return None
        _, width, number = min(found)
        return number, width

    def _cut(self, counts: Counts, number: int, cost: CostOfCounts) -> tuple[float, int] | None:
        """Damage per cost saved, and the width, of the group's best cut; None where nothing saves anything."""
        widths = self._widths[number]
        widths = widths[widths < counts[number]]
        if not len(widths):
            return None
        curve, damage = cost.along(counts, number), self._damage[number]
        saved = curve[counts[number] - 1] - curve[widths - 1]
        lost = damage[widths - 1] - damage[counts[number] - 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(saved > 0, lost / saved, np.inf)
        cheapest = int(price.argmin())
        return (float(price[cheapest]), int(widths[cheapest])) if math.isfinite(price[cheapest]) else None

    def wider(self, counts: Counts, number: int) -> list[tuple[float, int]]:
        """The next widths up and the damage that each undoes."""
        widths, damage = self._widths[number], self._damage[number]
        wider = widths[widths > counts[number]][:8]
        return [(float(damage[counts[number] - 1] - damage[width - 1]), int(width)) for width in wider]

    def forget(self, number: int) -> None:
        """What was known of the group that has just been cut, and of those that share a layer with it."""
        self._known = {key: move for key, move in self._known.items() if key[0] not in self._neighbours[number]}


def _neighbours(graph: ChannelGraph) -> list[set[int]]:
    """Of each group those that share a layer with it, and itself."""
    found = [{number} for number in range(len(graph.groups))]
    for term in (*graph.macs, *graph.params, *graph.timed):
        together = {number for size in term.sizes for product in size for number in product}
        for number in together:
            found[number] |= together
    return found


def _widths(size: int, round_to: int) -> NDArray[np.int64]:
    """Ascending: multiples of `round_to`, at most some 128 of them, and the size itself."""
    step = 2 ** max(0, math.floor(math.log2(size / 64)))
    step = math.lcm(step, round_to)
    return np.array([*range(step, size, step), size], dtype=np.int64)
