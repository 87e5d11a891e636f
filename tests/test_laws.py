"""The laws of plans and their two interpreters, over networks of every structure."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.cost import num_macs, num_params
from sparsekit.errors import BudgetError, PlanError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruners import PRUNERS
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import mask
from tests.networks import NETWORKS, make

DATA_FREE = ["magnitude", "random", "fpgm", "group_norm", "neuron_merging"]


@cache
def traced(name: str) -> tuple[ChannelGraph, Tensor]:
    network, x = make(name)
    return trace(network, x), x


def random_plan(graph: ChannelGraph, *, merge: bool = False) -> PruningPlan:
    generator = torch.Generator().manual_seed(1)
    scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
    plan = keep_top(scores, {group: max(1, group.size // 2) for group in graph.groups})
    if not merge:
        return plan
    matrices = {}
    for group, keep in plan.keep.items():
        matrix = torch.randn(group.size, int(keep.sum()), generator=generator) / 8
        matrix[keep] = torch.eye(int(keep.sum()))
        matrices[group] = matrix
    return PruningPlan(plan.keep, matrices)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", NETWORKS)
def test_mask_and_compact_agree_and_the_input_model_is_untouched(name: str) -> None:
    graph, x = traced(name)
    before, modes = snapshot(graph.model), [m.training for m in graph.model.modules()]
    plan = random_plan(graph)
    assert plan.keep
    small = compact(graph.model, plan, x)
    certificate = certify(graph.model, plan, small, (x,))
    assert certificate.holds, certificate
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in graph.model.parameters())
    assert_equal(before, snapshot(graph.model))
    assert modes == [m.training for m in graph.model.modules()]


@pytest.mark.parametrize("name", ["sigmoid", "lenet5", "vgg16", "tv_densenet121", "tv_mobilenet_v3"])
def test_mask_and_compact_agree_when_kept_channels_rebuild_the_dropped(name: str) -> None:
    graph, x = traced(name)
    plan = random_plan(graph, merge=True)
    small = compact(graph.model, plan, x)
    assert certify(graph.model, plan, small, (x,)).holds
    dropped = PruningPlan(plan.keep)
    difference = certify(graph.model, dropped, small, (x,)).max_relative_error
    assert difference > 1e-3, "the merge matrix changed nothing"


def test_merging_a_duplicated_channel_into_its_twin_loses_nothing() -> None:
    network, x = make("sigmoid")
    with torch.no_grad():
        for name in ("a.weight", "a.bias"):
            network.get_parameter(name)[5] = network.get_parameter(name)[2]
    group = next(group for group in trace(network, x).groups if group.name == "a")
    keep = torch.tensor([True] * 8)
    keep[5] = False
    merge = torch.eye(8)[:, keep]
    merge[5, 2] = 1.0
    small = compact(network, PruningPlan({group: keep}, {group: merge}))
    torch.testing.assert_close(small(x), network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_plan_gives_a_bit_equal_copy(name: str) -> None:
    graph, x = traced(name)
    small = compact(graph.model, PruningPlan())
    assert_equal(snapshot(small), snapshot(graph.model))
    assert torch.equal(small(x), graph.model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_predicted_from_counts_are_those_of_the_network_that_was_cut(name: str) -> None:
    graph, x = traced(name)
    plan = random_plan(graph)
    kept = {group: int(keep.sum()) for group, keep in plan.keep.items()}
    small = compact(graph.model, plan, x)
    again = trace(small, x)
    assert num_macs(again) == num_macs(graph, kept) < num_macs(graph)
    assert num_params(graph, kept) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", ["resnet20", "tv_densenet121", "tv_resnext50"])
def test_a_plan_survives_its_files_and_applies_without_tracing(name: str, tmp_path: Path) -> None:
    graph, x = traced(name)
    plan = random_plan(graph, merge=True)
    first = next(iter(dict(graph.model.named_parameters())))
    weight = graph.model.get_parameter(first).detach()
    full = PruningPlan(plan.keep, plan.merge, {first: weight > 0}, {first: weight * 2})
    full.save(tmp_path / "plan.json", tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.json", tmp_path / "plan.safetensors")
    assert_equal(snapshot(compact(graph.model, loaded, x)), snapshot(compact(graph.model, full, x)))
    assert_equal(snapshot(mask(graph.model, loaded)), snapshot(mask(graph.model, full)))


def test_tensors_without_pruning_keep_their_zeros_and_replacements() -> None:
    network, _ = make("sigmoid")
    weight = torch.randn_like(network.get_parameter("a.weight"))
    zeros = torch.rand_like(weight) > 0.5
    plan = PruningPlan(nonzero={"a.weight": zeros}, weights={"a.weight": weight})
    for interpreter in (mask, compact):
        assert torch.equal(interpreter(network, plan).get_parameter("a.weight"), weight * zeros)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("name", ["resnet20", "tv_densenet121", "tv_resnext50", "mobilenet_v2"])
@pytest.mark.parametrize("budget", ["macs<=0.5x", "params<=0.3x", "channels<=0.7x"])
def test_a_budget_is_met_and_nothing_more_would_fit(name: str, method: str, budget: str) -> None:
    graph, x = traced(name)
    parsed = Budget.parse(budget)
    plan = PRUNERS[method]()(graph, parsed, None)
    small = compact(graph.model, plan, x)
    kept = {group: int(keep.sum()) for group, keep in plan.keep.items()}

    def cost(counts: dict[ChannelGroup, int]) -> float:
        if "macs" in budget:
            return num_macs(graph, counts)
        if "params" in budget:
            return num_params(graph, counts)
        return sum(counts.get(group, group.size) for group in graph.groups)

    limit = parsed.limits[0].resolve(cost({}))
    assert cost(kept) <= limit
    for group, count in kept.items():
        assert cost(kept | {group: count + 1}) > limit, group
    assert certify(graph.model, plan, small, (x,)).holds


def test_two_methods_and_two_norms_choose_different_channels() -> None:
    graph, _ = traced("resnet20")
    budget = Budget.parse("macs<=0.5x")
    plans = [PRUNERS["magnitude"](norm="l1"), PRUNERS["magnitude"](norm="l2"), PRUNERS["random"]()]
    chosen = [torch.cat([*plan(graph, budget, None).keep.values()]) for plan in plans]
    assert not any(torch.equal(a, b) for a, b in [(chosen[0], chosen[1]), (chosen[0], chosen[2])])


class Scaled(nn.Module):
    """Two outputs: the input, and the input times `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * self.factor


@pytest.mark.parametrize(("factor", "other"), [(1e-12, 2e-12), (1.0, float("nan")), (0.0, 1e-30)])
def test_a_certificate_sees_a_wrong_output_beside_a_right_one(factor: float, other: float) -> None:
    x = torch.ones(2, 3)
    assert certify(Scaled(factor), PruningPlan(), Scaled(factor), (x,)).holds
    assert not certify(Scaled(factor), PruningPlan(), Scaled(other), (x,)).holds


class WritesRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.zeros(2, 3)  # of the default type, which must be that of x
        rows[torch.tensor([1, 0])] = x
        return rows


def test_a_forward_that_makes_tensors_of_the_default_type_is_certified() -> None:
    assert certify(WritesRows(), PruningPlan(), WritesRows(), torch.ones(2, 3)).holds
    assert torch.get_default_dtype() is torch.float32


def test_outputs_without_elements_certify_nothing() -> None:
    network = nn.Flatten()
    certificate = certify(network, PruningPlan(), network, torch.zeros(2, 0))
    assert not certificate.holds
    assert certificate.max_abs_output == 0


def test_a_plan_for_another_network_is_refused_by_name() -> None:
    graph, _ = traced("resnet20")
    other, _ = make("sigmoid")
    with pytest.raises(PlanError, match=r"group '.*': the model has no '.*'"):
        compact(other, random_plan(graph), torch.zeros(2, 3, 8, 8))
    for width in (4, 64):
        resized = copy.deepcopy(graph.model)
        resized.set_submodule("layer1.0.conv1", nn.Conv2d(16, width, 3))
        with pytest.raises(PlanError, match=rf"layer1.0.conv1.weight dim 0: expected 16, .* got {width}"):
            mask(resized, random_plan(graph))


def test_masks_of_the_wrong_kind_are_refused_by_name() -> None:
    group = traced("sigmoid")[0].groups[0]
    with pytest.raises(PlanError, match=r"group 'a': keep must be bool \[8\], got torch.float32 \[8\]"):
        PruningPlan({group: torch.ones(8)})
    with pytest.raises(PlanError, match="drops all 8 channels"):
        PruningPlan({group: torch.zeros(8, dtype=torch.bool)})
    with pytest.raises(PlanError, match="merge must map every kept channel to itself"):
        PruningPlan({group: torch.ones(8, dtype=torch.bool)}, {group: torch.zeros(8, 8)})
    with pytest.raises(PlanError, match="'nowhere': the model has no such parameter"):
        compact(traced("sigmoid")[0].model, PruningPlan(weights={"nowhere": torch.zeros(1)}))


def test_a_budget_below_the_floor_names_the_floor() -> None:
    graph, _ = traced("resnet20")
    with pytest.raises(BudgetError, match=r"macs<=[\d,]+ is below the floor of [\d,]+ \(0\.\d+x"):
        allocate(graph, Budget.parse("macs<=0.0001x"))


def test_keep_patterns_pin_their_layers_and_the_rest_meets_the_budget() -> None:
    graph, _ = traced("resnet20")
    counts = allocate(graph, Budget.parse("macs<=0.6x and layer1.*=0.25 and layer2.0.conv1=1"))
    by_name = {group.name: count for group, count in counts.items()}
    assert {by_name[f"layer1.{block}.conv1"] for block in range(3)} == {4}
    assert by_name["layer2.0.conv1"] == 32
    assert num_macs(graph, counts) <= 0.6 * num_macs(graph)
    with pytest.raises(BudgetError, match=r"no channel group matches 'layer9.\*'"):
        allocate(graph, Budget.parse("layer9.*=0.5"))


@pytest.mark.parametrize("round_to", [4, 16])
def test_rounded_widths_are_multiples_and_still_meet_the_budget(round_to: int) -> None:
    graph, _ = traced("tv_resnet18")
    counts = allocate(graph, Budget.parse("macs<=0.4x"), round_to=round_to)
    assert all(count % round_to == 0 or count == group.size for group, count in counts.items())
    assert 0.3 * num_macs(graph) < num_macs(graph, counts) <= 0.4 * num_macs(graph)
