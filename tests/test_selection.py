"""Budgets as users write them, counts as papers round them."""

from __future__ import annotations

import pytest
import torch
import torchvision

from sparsekit.budget import Budget
from sparsekit.cost import num_macs, num_params
from sparsekit.errors import BudgetError, PlanError
from sparsekit.graph import trace
from sparsekit.models import MODELS
from sparsekit.selection import allocate, keep_top, kept_count
from tests.networks import make


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("flops<=0.5x", "unknown metric 'flops'; valid: channels, latency, macs, nonzero, params, size"),
        ("mac<=0.5x", "unknown metric 'mac'; did you mean macs"),
        ("macs<=1.5x", r"a ratio must be in \(0, 1\], got 1.5"),
        ("macs<=0x", "a ratio must be in"),
        ("macs<=0", "the limit must be above 0"),
        ("macs<=fast", "'fast' is no limit"),
        ("macs<=50%", "'50%' is no limit"),
        ("keep=half", "'half' is no number"),
        ("layer1.*=0", "a ratio must be in"),
        ("macs 0.5x", "expected METRIC<=LIMIT or PATTERN=KEEP_RATIO"),
    ],
)
def test_a_malformed_budget_is_refused_by_the_word_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_absolute_limits_take_units() -> None:
    values = [limit.value for limit in Budget.parse("macs<=1.5G and params<=120K, channels<=300").limits]
    assert values == [1.5e9, 120e3, 300]


@pytest.mark.parametrize(
    ("pruned", "kept"),
    [(0.5, [8, 16, 32]), (0.7, [4, 9, 19]), (0.9, [1, 3, 6]), (0.925, [1, 2, 4]), (0.95, [1, 1, 3])],
)
def test_keep_ratios_round_as_the_published_widths_do(pruned: float, kept: list[int]) -> None:
    assert [kept_count(size, 1 - pruned) for size in (16, 32, 64)] == kept


@pytest.mark.parametrize(
    ("pruned", "speedup", "reduction"), [(0.5, 1.993, 49.82), (0.7, 3.593, 70.58), (0.9, 11.58, 90.45)]
)
def test_resnet56_reaches_the_published_speedups(pruned: float, speedup: float, reduction: float) -> None:
    graph = trace(MODELS["resnet56"]().eval(), torch.zeros(1, 3, 32, 32))
    counts = allocate(graph, Budget.parse(f"*=1 and layer*.conv1={1 - pruned}"))
    assert num_macs(graph) / num_macs(graph, counts) == pytest.approx(speedup, rel=3e-4)
    assert 100 * (1 - num_params(graph, counts) / num_params(graph)) == pytest.approx(reduction, abs=0.01)


def test_resnet50_reaches_the_published_speedup() -> None:
    network = torchvision.models.resnet50(weights=None).eval()
    graph = trace(network, torch.zeros(1, 3, 224, 224))
    assert (num_macs(graph), num_params(graph)) == (4_089_184_256, 25_557_032)
    counts = allocate(graph, Budget.parse("*=1 and layer[123].*.conv[12]=0.32 and layer4.*.conv[12]=0.5"))
    assert num_macs(graph) / num_macs(graph, counts) == pytest.approx(3.063, abs=5e-4)


def test_exactly_the_asked_number_stays_even_when_all_scores_tie() -> None:
    network, x = make("sigmoid")
    graph = trace(network, x)
    plan = keep_top({group: torch.zeros(group.size) for group in graph.groups}, {graph.groups[0]: 3})
    assert plan.keep[graph.groups[0]].nonzero().flatten().tolist() == [0, 1, 2]


def test_scores_that_are_no_numbers_are_refused() -> None:
    network, x = make("sigmoid")
    group = trace(network, x).groups[0]
    with pytest.raises(PlanError, match=r"group 'a': scores must be 8 finite numbers"):
        keep_top({group: torch.full((8,), float("nan"))}, {group: 3})
