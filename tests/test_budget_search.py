"""From limits to widths: what is lost for what is saved, and the loop that corrects the tables by measured files."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from sparsekit.budget import Limit, Metric
from sparsekit.closed_loop import AIM, BAND, MAX_CANDIDATES, NEAR, Measured, meet
from sparsekit.cost import Costs, Counts
from sparsekit.errors import BudgetError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.tradeoff import Curve, damage_curve, spend


def _chain(*widths: int) -> ChannelGraph:
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), (*widths, 10), strict=True):
        layers += [nn.Conv2d(before, after, 1), nn.ReLU()]
    return trace(nn.Sequential(*layers), torch.zeros(2, 3, 4, 4))


class _Stairs:
    """Every group's layer takes as long as its width rounded up to `step`, times what a channel of it takes."""

    def __init__(self, graph: ChannelGraph, per_channel: list[float], step: int = 16) -> None:
        self._sizes, self._per_channel, self._step = Costs(graph).dense, np.array(per_channel), step

    def __call__(self, counts: Counts) -> float:
        return float((np.ceil(counts / self._step) * self._step) @ self._per_channel)

    def along(self, counts: Counts, group: int) -> Curve:
        widths = np.arange(1, self._sizes[group] + 1)
        curve: Curve = np.ceil(widths / self._step) * self._step * self._per_channel[group]
        return curve


def _flat_damages(graph: ChannelGraph, weights: list[float]) -> dict[ChannelGroup, Curve]:
    return {g: damage_curve(torch.ones(g.size), w) for g, w in zip(graph.groups, weights, strict=True)}


def test_costs_along_a_group_are_the_costs_at_each_of_its_widths() -> None:
    graph = _chain(12, 7, 20)
    costs = Costs(graph)
    counts = np.array([9, 5, 20])
    for metric in (Metric.NUM_MACS, Metric.NUM_PARAMS, Metric.CHANNELS):
        for group, size in enumerate(costs.dense.tolist()):
            expected = []
            for width in range(1, size + 1):
                tried = counts.copy()
                tried[group] = width
                expected.append(costs(metric, tried))
            np.testing.assert_allclose(costs[metric].along(counts, group), expected, rtol=1e-9)


def test_damage_is_zero_for_all_channels_and_grows_without_bound() -> None:
    damage = damage_curve(torch.tensor([1.0, 0.0, 5.0, 2.0]))
    assert damage[-1] == 0
    assert (np.diff(damage) <= 0).all()
    assert damage[0] == pytest.approx(math.log(8 / 5))
    np.testing.assert_allclose(damage_curve(torch.zeros(4)), -np.log(np.arange(1, 5) / 4))


def test_cuts_end_at_the_edges_of_plateaus() -> None:
    graph = _chain(64, 64)
    stairs = _Stairs(graph, [1.0, 1.0])
    counts = spend(graph, _flat_damages(graph, [1, 1]), [(stairs, 100.0)], [0, 1], Costs(graph).dense)
    assert counts is not None
    assert counts.tolist() == [48, 48]


def test_the_group_that_matters_less_per_millisecond_gives_more() -> None:
    graph = _chain(64, 64, 64)
    stairs = _Stairs(graph, [1.0, 1.0, 4.0], step=1)
    dense = Costs(graph).dense
    counts = spend(graph, _flat_damages(graph, [1, 2, 1]), [(stairs, 0.25 * stairs(dense))], [0, 1, 2], dense)
    assert counts is not None
    unimportant, important, slow = counts.tolist()
    assert important > unimportant > slow
    # The damage per millisecond of the last channel is the same everywhere, up to whole channels.
    prices = np.array([1 / unimportant, 2 / important, 1 / (4 * slow)])
    assert prices.max() / prices.min() < 1.2


def test_what_the_budget_leaves_is_used_up() -> None:
    graph = _chain(40, 24)
    costs = Costs(graph)
    dense = costs.dense
    limit = 0.5 * costs(Metric.NUM_MACS, dense)
    counts = spend(graph, _flat_damages(graph, [1, 1]), [(costs[Metric.NUM_MACS], limit)], [0, 1], dense)
    assert counts is not None
    assert costs(Metric.NUM_MACS, counts) <= limit
    for group in range(2):
        wider = counts.copy()
        wider[group] += 1
        assert costs(Metric.NUM_MACS, wider) > limit


def test_every_limit_holds_and_pinned_groups_stay() -> None:
    graph = _chain(32, 32, 32)
    costs = Costs(graph)
    start = costs.dense
    start[1] = 20
    limits = [
        (costs[Metric.NUM_MACS], 0.5 * costs(Metric.NUM_MACS, costs.dense)),
        (costs[Metric.NUM_PARAMS], 0.4 * costs(Metric.NUM_PARAMS, costs.dense)),
    ]
    counts = spend(graph, _flat_damages(graph, [1, 1, 1]), limits, [0, 2], start, round_to=4)
    assert counts is not None
    assert counts[1] == 20
    assert (counts % 4 == 0).all()
    assert all(cost(counts) <= limit for cost, limit in limits)


def test_no_cut_reaches_what_lies_below_every_width() -> None:
    graph = _chain(32, 32)
    stairs = _Stairs(graph, [1.0, 1.0])
    assert spend(graph, _flat_damages(graph, [1, 1]), [(stairs, 31.0)], [0, 1], Costs(graph).dense) is None


def _meet(
    graph: ChannelGraph,
    limit: float,
    measured: Callable[[Counts], float],
    free: list[int],
    *,
    per_channel: list[float],
    step: int = 1,
) -> tuple[Counts, list[float], list[PruningPlan]]:
    plans: list[PruningPlan] = []

    def try_out(plan: PruningPlan) -> Measured:
        plans.append(plan)
        counts = np.array([plan.kept.get(group.name, group.size) for group in graph.groups])
        share = measured(counts) / measured(Costs(graph).dense)
        return Measured({Metric.LATENCY_MS: share}, (0.99 * share, 1.01 * share))

    counts, candidates = meet(
        graph,
        [Limit(Metric.LATENCY_MS, limit, relative=True)],
        {Metric.LATENCY_MS: _Stairs(graph, per_channel, step)},
        try_out,
        scores={group: torch.ones(group.size) for group in graph.groups},
        damages=_flat_damages(graph, [1.0] * len(graph.groups)),
        start=Costs(graph).dense,
        free=free,
    )
    return counts, [candidate.measured["latency"] for candidate in candidates], plans


@pytest.mark.parametrize("overhead", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("limit", [0.8, 0.6])
def test_the_loop_ends_well_within_the_band_whatever_the_tables_leave_out(overhead: float, limit: float) -> None:
    graph = _chain(256, 256)
    measured: Callable[[Counts], float] = lambda counts: overhead + 0.5 * counts[0] + 0.2 * counts[1] ** 1.1  # noqa: E731
    counts, shares, plans = _meet(graph, limit, measured, [0, 1], per_channel=[1.0, 1.0])
    assert BAND < AIM - NEAR < AIM + NEAR < 1
    assert abs(shares[-1] / limit - AIM) <= NEAR
    assert len(plans) <= 4
    assert [plans[-1].kept.get(g.name, g.size) for g in graph.groups] == counts.tolist()


def test_where_steps_are_coarser_than_the_band_the_widest_network_within_the_budget_is_taken() -> None:
    graph = _chain(64)
    counts, shares, _ = _meet(graph, 0.7, lambda counts: math.ceil(counts[0] / 16), [0], per_channel=[1.0], step=16)
    assert counts.tolist() == [32]
    assert shares[-1] == 0.5


def test_a_budget_below_the_floor_says_what_the_nearest_takes_and_what_holds_it() -> None:
    graph = _chain(64, 64)
    with pytest.raises(BudgetError, match=r"latency<=0\.2x cannot be met: the nearest network takes 0\.5\d\dx, every"):
        _meet(graph, 0.2, lambda counts: 64.0 + counts[0], [0], per_channel=[1.0, 1.0])


def test_the_loop_gives_up_where_nothing_measured_meets_the_budget() -> None:
    graph = _chain(256)
    tries: list[Counts] = []

    def slower_and_slower(counts: NDArray[np.int64]) -> float:
        tries.append(counts)
        return 100.0 + len(tries)

    with pytest.raises(BudgetError, match="cannot be met"):
        _meet(graph, 0.5, slower_and_slower, [0], per_channel=[1.0])
    assert len(tries) <= 2 * MAX_CANDIDATES
