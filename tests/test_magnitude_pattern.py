"""Weights in patterns that kernels skip: whole groups, equally many per block of rows, within the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.cost import num_nonzero, prunable_weights
from sparsekit.errors import BudgetError, UsageError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.kernels.formats import blocks, pack
from sparsekit.pruners.magnitude_pattern import MagnitudePattern


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3),  # too few inputs
        nn.Conv2d(32, 40, 3),  # 40 rows: a block of 16 is half empty
        nn.ReLU(),
        nn.Conv2d(40, 40, 3, groups=40),
        nn.Conv2d(40, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return trace(network.eval(), torch.randn(2, 3, 12, 12))


def matrix(weight: Tensor) -> Tensor:
    """[N, taps * C], the order in which kernels run over a window."""
    return weight.movedim(1, -1).flatten(1)


@pytest.mark.parametrize(("pattern", "share"), [("block:16x8", 0.3), ("block:16x8", 0.6), ("block:32x16", 0.6)])
def test_groups_are_whole_balanced_and_within_the_budget(graph: ChannelGraph, pattern: str, share: float) -> None:
    plan = MagnitudePattern(pattern)(graph, Budget.parse(f"nonzero<={share}x"))
    rows, cols = map(int, pattern.removeprefix("block:").split("x"))
    small = compact(graph.model, plan)
    used, total = num_nonzero(trace(small, torch.randn(2, 3, 12, 12))), num_nonzero(graph)
    assert 0.8 * share * total < used <= share * total
    assert set(plan.nonzero) == {"1.weight", "4.weight", *(["7.weight"] if rows == 16 else [])}
    for name, mask in plan.nonzero.items():
        weight_NK, taps = matrix(graph.model.get_parameter(name)), mask[0, 0].numel()
        packed = pack(weight_NK, matrix(mask), rows=rows, cols=cols, taps=taps)
        assert torch.equal(packed.to_dense(), matrix(small.get_parameter(name)))
        groups_RH = blocks(matrix(mask), rows, cols, taps)
        assert len(set(groups_RH.any(3).any(2).sum(1).tolist())) == 1
        # what a kernel stores holds no zeros but those of the edges
        padded_RH = blocks(torch.ones_like(matrix(mask)), rows, cols, taps)
        assert torch.equal(groups_RH, padded_RH & groups_RH.any(3, keepdim=True).any(2, keepdim=True))


def test_of_every_group_the_strongest_stay(graph: ChannelGraph) -> None:
    plan = MagnitudePattern("block:16x8")(graph, Budget.parse("nonzero<=0.5x"))
    squares = matrix(graph.model.get_parameter("4.weight")).detach().square()
    kept = matrix(plan.nonzero["4.weight"])[0, ::8]
    scores = squares[:16].view(16, -1, 8).sum((0, 2))
    assert kept.tolist() == (scores >= scores.sort(descending=True).values[int(kept.sum()) - 1]).tolist()


def test_two_of_every_four_inputs_stay_the_larger_ones(graph: ChannelGraph) -> None:
    plan = MagnitudePattern("2:4")(graph, Budget.parse("nonzero<=0.6x"))
    assert set(plan.nonzero) == {"1.weight", "4.weight", "7.weight"}
    for name, mask in plan.nonzero.items():
        fours, kept = (matrix(each).reshape(-1, 4) for each in (graph.model.get_parameter(name).detach().abs(), mask))
        assert (kept.sum(1) == 2).all()
        assert (fours.masked_fill(~kept, torch.inf).amin(1) >= fours.masked_fill(kept, 0).amax(1)).all()


def test_the_plan_is_certified_and_a_full_budget_zeroes_nothing(graph: ChannelGraph) -> None:
    assert not MagnitudePattern("2:4")(graph, Budget.parse("nonzero<=1x")).nonzero
    plan = MagnitudePattern("block:16x8")(graph, Budget.parse("nonzero<=0.5x"))
    inputs = (torch.randn(2, 3, 12, 12),)
    assert certify(graph.model, plan, compact(graph.model, plan), inputs).max_relative_error < 1e-9


@pytest.mark.parametrize(
    ("pattern", "budget", "message"),
    [
        ("2:4", "nonzero<=0.4x", "pattern 2:4: 2 of 5 layers, which hold 1,224 weights, do not fit it"),
        ("block:128x64", "nonzero<=0.5x", "5 of 5 layers"),
        ("2:4", "macs<=0.5x", "budget macs<=0.5x: counts channels"),
    ],
)
def test_budgets_out_of_reach_are_named(graph: ChannelGraph, pattern: str, budget: str, message: str) -> None:
    assert len(prunable_weights(graph)) == 5
    with pytest.raises(BudgetError, match=message):
        MagnitudePattern(pattern)(graph, Budget.parse(budget))


@pytest.mark.parametrize("pattern", ["block:100x16", "block:16", "4:8", "row"])
def test_unknown_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=f"pattern '{pattern}': expected 2:4, or block:VxG"):
        MagnitudePattern(pattern)
