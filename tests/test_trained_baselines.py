"""The baselines that train: each formula against another way to compute it, and the methods on tasks of a blink."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekit import training
from sparsekit.budget import Budget
from sparsekit.compaction import compact
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.pruner import ChannelSums, channel_norms, is_filter, penalised
from sparsekit.pruners import PRUNERS
from sparsekit.pruners.chipnet import ChipNet, CrispNetwork, crisp_gates, sharpness
from sparsekit.pruners.greg import GReg1, GReg2, Growth, PenalisedNetwork
from sparsekit.pruners.hard_concrete import (
    HardConcrete,
    StochasticNetwork,
    expected_gates,
    open_probability,
    sampled_gates,
)
from sparsekit.pruners.network_slimming import NetworkSlimming, SlimmedNetwork
from sparsekit.pruners.soft_filter import SoftFilter
from sparsekit.surgery import mask
from sparsekit.task import Batch, Record, Schedule, Task
from tests import tiny

BASELINES = ["sfp", "network_slimming", "greg1", "greg2", "chipnet", "l0"]
every_baseline = pytest.mark.parametrize("name", BASELINES)


class Streams(nn.Module):
    """A residual stream with two producers, a depthwise layer, and a layer that nothing normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.expand_norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 1)
        self.hidden, self.head = nn.Linear(6 * 4, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        y = torch.relu(self.expand_norm(self.expand(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(y)))
        x = torch.relu(x + self.project(y))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


@pytest.fixture
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    model = Streams()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 0.5)  # a ReLU lets gradients through where a filter is zero
    return trace(model, torch.zeros(2, 1, 8, 8))


@cache
def digits() -> Task:
    return tiny.task()


def halves(graph: ChannelGraph) -> dict[ChannelGroup, int]:
    return {group: group.size // 2 for group in graph.groups}


class Spy:
    """A training loop that also keeps the network, the task and the records of its last run."""

    network: nn.Module
    task: Task
    records: list[Record]

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        self.network, self.task = model, task
        self.records = training.fit(model, task, schedule, stage=stage, observe=observe)
        return self.records


def spied(task: Task) -> tuple[Task, Spy]:
    spy = Spy()
    return dataclasses.replace(task, fit=spy), spy


def rows_of(graph: ChannelGraph, values_GC: Tensor) -> dict[str, Tensor]:
    return {group.name: row[: group.size] for group, row in zip(graph.groups, values_GC, strict=True)}


# what several share


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_sums_over_filters_are_the_powers_of_their_norms(graph: ChannelGraph, p: float) -> None:
    sums = ChannelSums(graph.model, graph.groups, where=is_filter)
    found = sums(graph.model, p=p)
    assert not found[~sums.valid].any()
    for group, row in zip(graph.groups, found, strict=True):
        torch.testing.assert_close(row[: group.size], channel_norms(graph, p=p)[group].pow(p))


def test_sums_follow_the_slots_positions_wherever_they_lie_in_a_weight() -> None:
    layer = nn.Linear(3, 4)
    slots = [Slot("weight", 0, 4, torch.tensor(index)) for index in ([[3], [0]], [[1, 2]])]
    groups = [ChannelGroup("pair", 2, (slots[0],)), ChannelGroup("single", 1, (slots[1],))]
    found = ChannelSums(layer, groups, where=is_filter)(layer, p=1)
    norms = layer.weight.detach().abs().sum(1)
    torch.testing.assert_close(
        found.detach(), torch.stack([norms[[3, 0]], torch.stack([norms[1] + norms[2], norms[0] * 0])])
    )


def test_a_penalty_reads_the_network_when_the_loss_is_computed() -> None:
    weight, (inputs, targets) = torch.tensor(2.0), next(iter(digits().batches(0)))
    task, logits = penalised(digits(), lambda: weight.square()), torch.zeros(len(inputs), 10)
    plain = digits().loss(logits, targets, 0.1)
    assert task.loss(logits, targets, 0.1) == plain + 4
    weight.fill_(3.0)
    assert task.loss(logits, targets, 0.1) == plain + 9


@every_baseline
def test_a_method_that_trains_says_that_it_needs_data(name: str, graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match=f"{name}: trains the network and needs data; without data choose magnitude"):
        PRUNERS[name]()(graph, Budget.parse("keep=0.5"), None)


@every_baseline
def test_nothing_to_prune_is_an_empty_plan_without_training(name: str, graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = PRUNERS[name]()(graph, Budget.parse("keep=1"), task)
    assert not plan.keep
    assert not plan.weights
    assert not hasattr(spy, "network")


@every_baseline
def test_the_plans_weights_are_the_network_that_was_trained(name: str, graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = PRUNERS[name](epochs=1)(graph, Budget.parse("keep=0.5"), task)
    assert plan.weights.keys() == graph.model.state_dict().keys()
    refilled = mask(graph.model, PruningPlan(weights=plan.weights)).eval()
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(refilled(x), spy.network.eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plan.weights["stem.weight"], graph.model.get_parameter("stem.weight"))


@every_baseline
def test_a_run_that_was_cut_off_ends_with_the_same_plan(name: str, graph: ChannelGraph, tmp_path: Path) -> None:
    def stopping(epoch: int) -> Iterable[Batch]:
        if epoch == 2:
            raise ConnectionAbortedError
        return digits().batches(epoch)

    fast = {"update_every": 3, "choose_by": 0.4, "step": 0.1, "common_step": 0.1}
    known = inspect.signature(PRUNERS[name]).parameters
    options = {option: value for option, value in fast.items() if option in known}
    method, budget = PRUNERS[name](epochs=3, **options), Budget.parse("keep=0.5")
    task = dataclasses.replace(digits(), fit=partial(training.fit, checkpoint_dir=tmp_path))
    with pytest.raises(ConnectionAbortedError):
        method(graph, budget, dataclasses.replace(task, batches=stopping))
    resumed, whole = method(graph, budget, task), method(graph, budget, digits())
    assert all(torch.equal(whole.keep[group], row) for group, row in resumed.keep.items())
    assert all(torch.equal(whole.weights[key], value) for key, value in resumed.weights.items())


@every_baseline
def test_a_network_with_computed_weights_trains_and_compacts(name: str) -> None:
    torch.manual_seed(0)
    model = tiny.network()
    nn.utils.parametrizations.weight_norm(model.get_submodule("conv2"))
    graph = trace(model, digits().example_inputs)
    plan = PRUNERS[name](epochs=1)(graph, Budget.parse("keep=0.5"), digits())
    x = torch.randn(4, 1, 8, 8)
    expected = mask(model, plan).eval()(x)
    torch.testing.assert_close(compact(model, plan, digits().example_inputs).eval()(x), expected, rtol=1e-4, atol=1e-5)


def one_dead_channel(norm: float, *, normalised: bool) -> ChannelGraph:
    """Three channels each see a colour that hints at the class; channel 3, of the given norm, sees one always 0."""
    conv, head = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(64, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 1.0, 0.9, norm]).diag()[..., None, None])
        head.weight.copy_(torch.tensor([[-0.01], [0.01]]).expand(2, 64))
    middle = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()) if normalised else nn.Tanh()
    model = nn.Sequential(conv, middle, nn.Flatten(), head)
    return trace(model, torch.zeros(2, 4, 4, 4))


def three_colours(epoch: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    targets = torch.randint(2, (8, 16), generator=generator)
    hints = torch.randn(8, 16, 3, 1, 1, generator=generator) + (2.0 * targets - 1)[..., None, None, None]
    inputs = torch.cat([hints, torch.zeros(8, 16, 1, 1, 1)], 2).expand(-1, -1, -1, 4, 4)
    return list(zip(inputs, targets, strict=True))


@pytest.mark.parametrize(
    ("method", "norm"),
    [
        (SoftFilter(epochs=3), 0.5),
        (NetworkSlimming(epochs=10, lr=0.05, rho=0.01), 2.0),
        (GReg1(epochs=3), 0.5),
        (GReg2(epochs=10, lr=0.05, update_every=1, common_step=0.01, common_ceiling=10.0, choose_by=1.0), 1.2),
        # Penalties are means over channels: over four of them the defaults would drown what the task says.
        (ChipNet(epochs=20, lr=0.01, reach=20.0, budget_weight=0.3, crispness_weight=0.1), 2.0),
        (HardConcrete(epochs=3), 2.0),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_a_channel_that_sees_nothing_is_dropped(method: Any, norm: float) -> None:
    task = dataclasses.replace(digits(), batches=three_colours, num_batches=8)
    # Of a normalised filter only the direction matters: a penalty shrinks those that the task needs like the others.
    graph = one_dead_channel(norm, normalised=not isinstance(method, GReg2))
    plan = method(graph, Budget.parse("keep=0.75"), task)
    (keep,) = plan.keep.values()
    assert keep.tolist() == [True, True, True, False]


# soft filter pruning


def test_after_each_epoch_but_the_first_the_weakest_filters_are_zero_and_then_regrow(graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    SoftFilter(epochs=1)(graph, Budget.parse("keep=0.5"), task)
    trained = dataclasses.replace(graph, model=spy.network)
    before = {name: value.clone() for name, value in spy.network.state_dict().items()}
    norms = channel_norms(trained)
    list(spy.task.batches(0))
    assert all(torch.equal(value, before[name]) for name, value in spy.network.state_dict().items())
    batches = list(spy.task.batches(1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, digits().batches(1), strict=True))
    weakest = {group.name: row.argsort()[: group.size - group.size // 2] for group, row in norms.items()}
    makers = {"stem": "stem", "project": "stem", "expand": "expand", "hidden": "hidden"}
    for name, value in spy.network.state_dict().items():
        layer, _, leaf = name.partition(".")
        zeroed = leaf == "weight" and layer in makers  # not scales, biases, nor the depthwise layer's filters
        expected = before[name].index_fill(0, weakest[makers[layer]], 0) if zeroed else before[name]
        assert torch.equal(value, expected), name
    training.fit(spy.network, digits(), Schedule(epochs=1, lr=0.001), stage="prune")
    for layer in ("stem", "project", "expand"):
        assert (spy.network.get_parameter(f"{layer}.weight").flatten(1).norm(dim=1) > 0).all(), layer


def test_what_soft_filter_pruning_removes_is_weakest_at_the_end(graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = SoftFilter(epochs=3, lr=0.1)(graph, Budget.parse("keep=0.5"), task)
    norms, first = channel_norms(dataclasses.replace(graph, model=spy.network)), channel_norms(graph)
    for group, keep in plan.keep.items():
        assert norms[group][keep].min() >= norms[group][~keep].max()
    assert any(first[group][keep].min() < first[group][~keep].max() for group, keep in plan.keep.items())


# network slimming


def test_the_slimming_penalty_is_rho_times_the_sum_of_the_scales_with_their_signs_as_gradient(
    graph: ChannelGraph,
) -> None:
    network = SlimmedNetwork(graph.model, halves(graph), rho=0.25)
    penalty = network.penalty()
    norms = [module for module in graph.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 3
    torch.testing.assert_close(penalty, torch.stack([0.25 * norm.weight.abs().sum() for norm in norms]).sum())
    penalty.backward()
    for norm in norms:
        assert norm.weight.grad is not None
        torch.testing.assert_close(norm.weight.grad, 0.25 * norm.weight.detach().sign())
    others = [value for name, value in graph.model.named_parameters() if "norm.weight" not in name]
    assert all(value.grad is None for value in others)


def test_only_scales_of_channels_that_may_go_are_penalised(graph: ChannelGraph) -> None:
    stem = next(group for group in graph.groups if group.name == "stem")
    network = SlimmedNetwork(graph.model, {stem: 3}, rho=1.0)
    torch.testing.assert_close(network.penalty(), graph.model.get_parameter("stem_norm.weight").abs().sum())


def test_slimming_ranks_by_the_sum_of_scales_and_by_norms_where_nothing_scales(graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = NetworkSlimming(epochs=1)(graph, Budget.parse("keep=0.5"), task)
    trained = spy.network.get_submodule("network")
    expand, depthwise = (trained.get_parameter(f"{name}_norm.weight").abs() for name in ("expand", "depthwise"))
    norms = channel_norms(dataclasses.replace(graph, model=trained))
    scores = {group.name: norms[group] for group in graph.groups}
    scores |= {"expand": expand + depthwise, "stem": trained.get_parameter("stem_norm.weight").abs()}
    assert {group.name for group in plan.keep} == scores.keys() == {"stem", "expand", "hidden"}
    for group, keep in plan.keep.items():
        assert scores[group.name][keep].min() > scores[group.name][~keep].max()


def test_the_scales_shrink_under_the_penalty(graph: ChannelGraph) -> None:
    sums = []
    for rho in (1e-12, 0.1):
        task, spy = spied(digits())
        NetworkSlimming(epochs=3, rho=rho, lr=0.1)(graph, Budget.parse("keep=0.5"), task)
        sums.append([record["scale_sum"] for record in spy.records])
    assert sums[1][-1] < 0.8 * sums[0][-1]
    assert sums[1] == sorted(sums[1], reverse=True)


def test_slimming_a_network_without_scales_is_refused() -> None:
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), torch.zeros(2, 1, 8, 8))
    with pytest.raises(UsageError, match="network_slimming: no normalisation layer scales the channels to prune"):
        NetworkSlimming()(graph, Budget.parse("keep=0.5"), digits())


# growing regularisation


def penalised_network(graph: ChannelGraph, growth: Growth, *, num_steps: int = 1000) -> PenalisedNetwork:
    return PenalisedNetwork(graph.model, halves(graph), growth, num_steps=num_steps).train()


def lambdas_of(network: PenalisedNetwork, *, num_steps: int) -> list[tuple[float, float]]:
    """Smallest and largest lambda after each training forward."""
    history, x = [], torch.randn(4, 1, 8, 8)
    for _ in range(num_steps):
        network(x)
        lambdas = network.lambdas[network.sums.valid]
        history.append((round(float(lambdas.min()), 6), round(float(lambdas.max()), 6)))
    return history


def test_the_growing_penalty_is_half_lambda_times_the_square_so_that_its_gradient_is_lambda_times_the_weight(
    graph: ChannelGraph,
) -> None:
    network = penalised_network(graph, Growth(1, 0.1, 1.0, 1000.0))
    network.lambdas.copy_(torch.rand(network.lambdas.shape) * network.sums.valid)
    penalty, expected = network.penalty(), torch.tensor(0.0)
    penalty.backward()
    lambdas = rows_of(graph, network.lambdas)
    makers = {
        "stem.weight": lambdas["stem"],
        "project.weight": lambdas["stem"],
        "expand.weight": lambdas["expand"],
        "depthwise.weight": lambdas["expand"],
        "hidden.weight": lambdas["hidden"],
    }
    for name, value in graph.model.named_parameters():
        if name not in makers:
            assert value.grad is None
            continue
        weighted = makers[name].view(-1, *[1] * (value.dim() - 1)) * value.detach()
        expected += (weighted * value.detach()).sum() / 2
        torch.testing.assert_close(value.grad, weighted)
    torch.testing.assert_close(penalty.detach(), expected)


def test_greg_1_lets_lambda_of_the_l1_weakest_grow_every_k_steps_to_its_ceiling(graph: ChannelGraph) -> None:
    network = penalised_network(graph, Growth(3, 0.1, 0.2, 1000.0))
    assert lambdas_of(network, num_steps=11) == [(0, 0)] * 2 + [(0, 0.1)] * 3 + [(0, 0.2)] * 6
    for group, row in zip(graph.groups, network.lambdas, strict=True):
        weakest = channel_norms(graph, p=1)[group].argsort()[: group.size - group.size // 2]
        torch.testing.assert_close(row[: group.size], torch.zeros(group.size).index_fill(0, weakest, 0.2))


def test_lambda_holds_once_kept_and_pruned_have_parted_in_every_group(graph: ChannelGraph) -> None:
    network = penalised_network(graph, Growth(1, 0.1, 1.0, 1000.0))
    assert lambdas_of(network, num_steps=2)[-1] == (0, 0.2)
    going = network.sums.valid & ~network.kept
    with torch.no_grad():
        for group, row in zip(graph.groups[1:], going[1:], strict=True):
            for slot in (slot for slot in group.slots if is_filter(graph.model, slot)):
                graph.model.get_parameter(slot.tensor)[row[: group.size]] *= 1e-6
    assert lambdas_of(network, num_steps=2)[-1] == (0, 0.4), "the first group has not parted"
    with torch.no_grad():
        for name in ("stem.weight", "project.weight"):
            graph.model.get_parameter(name)[going[0, :6]] *= 1e-6
    assert lambdas_of(network, num_steps=3) == [(0, 0.4)] * 3


def test_the_ratio_is_smoothed_by_nine_tenths_per_update(graph: ChannelGraph) -> None:
    network = penalised_network(graph, Growth(1, 0.1, 1.0, 1000.0))
    lambdas_of(network, num_steps=1)
    first = network.ratio.clone()
    weights = channel_norms(graph, p=1)
    for group, ratio, keep in zip(graph.groups, first, network.kept, strict=True):
        kept = keep[: group.size]
        torch.testing.assert_close(ratio, weights[group][kept].mean() / weights[group][~kept].mean())
    with torch.no_grad():
        hidden, kept = graph.model.get_parameter("hidden.weight"), network.kept[2, :5]
        hidden[kept] *= 11
    lambdas_of(network, num_steps=1)
    torch.testing.assert_close(network.ratio, first * torch.tensor([1.0, 1.0, 2.0]))  # .9 + .1 * 11


def test_greg_2_lets_all_lambdas_grow_then_chooses_and_holds_the_kept_below_zero(graph: ChannelGraph) -> None:
    growth = Growth(2, 0.1, 1.0, 1000.0, common_step=0.01, common_ceiling=0.02, choose_by=1.0, kept=-0.001)
    network = penalised_network(graph, growth)
    assert lambdas_of(network, num_steps=5) == [(0, 0)] + [(0.01, 0.01)] * 2 + [(0.02, 0.02)] * 2
    with torch.no_grad():
        graph.model.get_parameter("hidden.weight")[:3] = 1e-3  # the weakest now, whatever they were
    assert lambdas_of(network, num_steps=3) == [(-0.001, 0.12)] * 2 + [(-0.001, 0.22)]
    assert rows_of(graph, network.kept)["hidden"].tolist() == [False, False, False, True, True]
    assert rows_of(graph, network.lambdas)["hidden"].tolist() == pytest.approx([0.22, 0.22, 0.22, -0.001, -0.001])


def test_a_short_run_chooses_at_its_share_even_if_lambda_is_far_from_its_ceiling(graph: ChannelGraph) -> None:
    growth = Growth(1, 0.1, 1.0, 1000.0, common_step=1e-3, common_ceiling=1.0, choose_by=0.4, kept=0.0)
    network = penalised_network(graph, growth, num_steps=10)
    chosen = [network.chosen for _ in range(6) if lambdas_of(network, num_steps=1)]
    assert chosen == [False] * 4 + [True] * 2


def test_penalties_go_on_from_their_state_dict(graph: ChannelGraph) -> None:
    growth = Growth(3, 0.1, 0.2, 1000.0, common_step=0.01, common_ceiling=0.01, choose_by=1.0, kept=-0.001)
    first = penalised_network(graph, growth)
    for num_steps in (2, 5, 4, 6):  # before an update, after the choice, on the way, held
        lambdas_of(first, num_steps=num_steps)
        second = PenalisedNetwork(copy.deepcopy(graph.model), halves(graph), growth, num_steps=1000).train()
        second.load_state_dict(first.state_dict())
        with torch.no_grad():  # choosing once more would choose others
            second.network.get_parameter("hidden.weight").mul_(torch.tensor([[1e3], [1], [1e3], [1], [1e3]]))
        goes_on = copy.deepcopy(first)
        assert lambdas_of(goes_on, num_steps=2) == lambdas_of(second, num_steps=2)
        assert not goes_on.chosen or torch.equal(goes_on.kept, second.kept)


def test_evaluation_leaves_the_penalties_where_they_are(graph: ChannelGraph) -> None:
    network = penalised_network(graph, Growth(1, 0.1, 1.0, 1000.0))
    assert lambdas_of(network.eval(), num_steps=3) == [(0, 0)] * 3


def test_the_records_say_what_lambda_reached_and_how_far_the_channels_parted(graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = GReg1(epochs=4, step=2.0, ceiling=100.0, update_every=2)(graph, Budget.parse("keep=0.5"), task)
    assert [record["penalty_lambda"] for record in spy.records if "epoch" in record] == [4.0, 8.0, 12.0, 16.0]
    ratios = [record["kept_to_pruned"] for record in spy.records if "epoch" in record]
    assert ratios == sorted(ratios)
    norms = channel_norms(dataclasses.replace(graph, model=spy.network.get_submodule("network")), p=1)
    parted = [norms[group][keep].mean() / norms[group][~keep].mean() for group, keep in plan.keep.items()]
    assert ratios[-1] == pytest.approx(float(min(parted)), rel=1e-5)


def test_the_defaults_are_the_papers() -> None:
    assert GReg1().growth() == Growth(10, 1e-4, 1.0, 1000.0)
    assert GReg2().growth() == Growth(10, 1e-4, 1.0, 1000.0, 1e-5, 0.01, 1 / 3, -1e-4)


# ChipNet


def crisp_network(graph: ChannelGraph, **options: Any) -> CrispNetwork:
    return CrispNetwork(graph.model, halves(graph), ChipNet(**options), num_steps=100)


def test_crisp_gates_are_a_smooth_step_over_a_logistic_curve() -> None:
    soft, crisp = crisp_gates(torch.tensor([-4.0, 0.0, 4.0]), beta=2.0, gamma=16.0)
    for zeta, z, gate in zip((-4.0, 0.0, 4.0), soft.tolist(), crisp.tolist(), strict=True):
        expected = 1 / (1 + math.exp(-2.0 * zeta))
        assert z == pytest.approx(expected, rel=1e-5)
        assert gate == pytest.approx(1 - math.exp(-16 * expected) + expected * math.exp(-16), rel=1e-4)


def test_the_curves_sharpen_over_the_run_as_over_the_papers_20_epochs(graph: ChannelGraph) -> None:
    for epoch in range(21):
        beta, gamma, kappa = sharpness(epoch / 20)
        assert beta == pytest.approx(1 + 0.02 * epoch)
        assert gamma == pytest.approx(min(256, 2 * math.sqrt(2) ** epoch))
        assert kappa == pytest.approx(min(60, 10 + 5 * epoch))
    network, x = crisp_network(graph), torch.randn(4, 1, 8, 8)
    network.train()(x)
    first = network.gates()
    assert all(torch.equal(a, b) for a, b in zip(first, crisp_gates(network.zeta, *sharpness(0)[:2]), strict=True))
    for _ in range(50):
        network(x)
    network.eval()(x)
    now = crisp_gates(network.zeta, *sharpness(0.5)[:2])
    assert all(torch.equal(a, b) for a, b in zip(network.gates(), now, strict=True))


def test_the_chipnet_penalty_and_its_gradient_are_the_formulas_group_by_group(graph: ChannelGraph) -> None:
    network = crisp_network(graph)
    torch.manual_seed(0)
    with torch.no_grad():
        network.scaled_zeta.copy_(torch.randn(network.scaled_zeta.shape) / network.scale)
    network.num_done = 31
    (gradient,) = torch.autograd.grad(network.penalty(), network.scaled_zeta)
    zeta = network.zeta.detach().double().requires_grad_()
    beta, gamma, kappa = 1 + 0.02 * 6, 2 * math.sqrt(2) ** 6, 10 + 5 * 6
    budget, gaps = torch.tensor(0.0), []
    for group, row in zip(graph.groups, zeta, strict=True):
        z = 1 / (1 + torch.exp(-beta * row[: group.size]))
        gate = 1 - torch.exp(-gamma * z) + z * math.exp(-gamma)
        volume = (1 / (1 + torch.exp(-kappa * (gate - 0.5)))).mean()
        num_all = sum(group.size for group in graph.groups)
        budget = budget + group.size / num_all * (group.size // 2 / group.size - volume) ** 2
        gaps.append((gate - z) ** 2)
    expected = 30 * budget + 10 * torch.cat(gaps).mean()
    (expected_gradient,) = torch.autograd.grad(expected, zeta)
    torch.testing.assert_close(network.penalty().double(), expected)
    torch.testing.assert_close(gradient.double() / network.scale, expected_gradient, rtol=1e-4, atol=1e-7)


def test_zeta_can_move_as_far_as_its_reach_whatever_the_rate_of_the_weights(graph: ChannelGraph) -> None:
    for lr in (0.1, 0.001):
        network = crisp_network(graph, lr=lr, reach=7.0)
        start = network.zeta.detach().clone()
        schedule = Schedule(epochs=1, lr=lr)
        optimizer = torch.optim.AdamW([network.scaled_zeta], weight_decay=0.0)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = lr * training.lr_factor(step, schedule, num_batches=100)
            network.scaled_zeta.grad = torch.full_like(network.scaled_zeta, -0.5)
            optimizer.step()
        torch.testing.assert_close(network.zeta.detach() - start, torch.full_like(start, 7.0), rtol=0.02, atol=0)


def test_chipnet_ends_near_the_budget_in_every_group(graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    ChipNet(epochs=20)(graph, Budget.parse("keep=0.5"), task)
    assert isinstance(spy.network, CrispNetwork)
    gates = spy.network.gates()[1]
    opened = {name: int((row > 0.5).sum()) for name, row in rows_of(graph, gates).items()}
    for group in graph.groups:
        assert abs(opened[group.name] - group.size // 2) <= 1, opened
    assert spy.records[0]["mask_open"] == 1.0


# hard concrete


def stochastic_network(graph: ChannelGraph, **options: Any) -> StochasticNetwork:
    return StochasticNetwork(graph.model, halves(graph), HardConcrete(**options))


def test_the_expected_l0_norm_is_how_often_sampled_gates_are_open() -> None:
    generator = torch.Generator().manual_seed(0)
    log_alpha, num_draws = torch.tensor([-4.0, -2.0, 0.0, 1.5]), 200_000
    gates = sampled_gates(log_alpha, torch.rand(num_draws, 4, generator=generator))
    assert ((gates >= 0) & (gates <= 1)).all()
    is_open = (gates > 0).float().mean(0)
    # four standard deviations of a mean of that many draws, each at most 1/2 wide
    assert (is_open - open_probability(log_alpha)).abs().max() < 4 * 0.5 / math.sqrt(num_draws)
    assert (gates == 1).float().mean(0)[3] > 0.3


def test_a_sampled_gate_is_the_stretched_and_clipped_concrete_variable() -> None:
    for u, log_alpha in ((0.3, 0.7), (0.9, -1.0), (0.01, 0.0), (0.99, 3.0)):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) * 3 / 2))
        expected = min(1.0, max(0.0, 1.2 * s - 0.1))
        assert float(sampled_gates(torch.tensor(log_alpha), torch.tensor(u))) == pytest.approx(expected, abs=1e-6)


def test_outside_training_the_gates_are_fixed(graph: ChannelGraph) -> None:
    network, x = stochastic_network(graph).eval(), torch.randn(4, 1, 8, 8)
    assert torch.equal(network(x), network(x))
    gates = 1.2 / (1 + torch.exp(-network.log_alpha)) - 0.1
    torch.testing.assert_close(expected_gates(network.log_alpha), gates.clamp(0, 1))
    for module in network.modules():  # so that draws alone can tell two training forwards apart
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    network.train()
    assert not torch.equal(network(x), network(x))


def test_the_l0_penalty_and_its_gradient_are_those_of_the_mean_open_probability(graph: ChannelGraph) -> None:
    network = stochastic_network(graph, penalty_weight=3.0)
    torch.manual_seed(0)
    with torch.no_grad():
        network.scaled_log_alpha.copy_(torch.randn(network.scaled_log_alpha.shape) / network.scale)
    penalty = network.penalty()
    (gradient,) = torch.autograd.grad(penalty, network.scaled_log_alpha)
    num_all = sum(group.size for group in graph.groups)
    total = 0.0
    for row, gradient_row in zip(rows_of(graph, network.log_alpha).values(), gradient / network.scale, strict=True):
        for log_alpha, slope in zip(row.tolist(), gradient_row.tolist(), strict=False):
            p = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - log_alpha))
            total += p
            assert slope == pytest.approx(3 * p * (1 - p) / num_all, rel=1e-4)
    assert float(penalty.detach()) == pytest.approx(3 * total / num_all, rel=1e-5)
    assert not gradient[~network.gated.valid].any()


def test_log_alpha_starts_at_the_droprate_moves_at_its_own_rate_and_can_come_back_from_its_bounds(
    graph: ChannelGraph,
) -> None:
    network = stochastic_network(graph, droprate=0.2, lr=0.01, gate_lr=0.5)
    before = network.log_alpha.detach().clone()
    assert (before - math.log(4)).abs().max() < 0.1
    assert 0 < before.std() < 0.02
    network.log_alpha.sum().backward()
    torch.optim.SGD([network.scaled_log_alpha], lr=0.01).step()
    torch.testing.assert_close(network.log_alpha.detach(), before - 0.5)
    with torch.no_grad():
        network.scaled_log_alpha.fill_(50.0)
    network.train()(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(network.log_alpha.detach(), torch.full_like(before, math.log(100)))
    (gradient,) = torch.autograd.grad(network.penalty(), network.scaled_log_alpha)
    assert (gradient[network.gated.valid] > 0).all()


def test_a_stronger_penalty_closes_more_gates(graph: ChannelGraph) -> None:
    opened = []
    for weight in (0.1, 100.0):
        task, spy = spied(digits())
        HardConcrete(epochs=4, penalty_weight=weight)(graph, Budget.parse("keep=0.5"), task)
        opened.append(spy.records[-1]["mask_open"])
    assert opened[0] > 0.7
    assert opened[1] < 0.4


@pytest.mark.parametrize("method", [ChipNet, HardConcrete])
def test_the_channels_kept_are_those_most_open(method: Callable[..., Any], graph: ChannelGraph) -> None:
    task, spy = spied(digits())
    plan = method(epochs=2)(graph, Budget.parse("keep=0.5"), task)
    assert isinstance(spy.network, CrispNetwork | StochasticNetwork)
    scores_GC = spy.network.zeta if isinstance(spy.network, CrispNetwork) else spy.network.log_alpha
    for keep, row in zip(plan.keep.values(), rows_of(graph, scores_GC).values(), strict=True):
        assert row[keep].min() > row[~keep].max()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (NetworkSlimming, {"rho": 0.0}, "network_slimming: rho must be above 0, got 0"),
        (GReg1, {"update_every": 0}, "greg1: update_every must be above 0, got 0"),
        (GReg2, {"update_every": 0}, "greg2: update_every must be above 0, got 0"),
        (GReg2, {"choose_by": 1.5}, r"greg2: choose_by must be in \[0, 1\], got 1.5"),
        (ChipNet, {"reach": -1.0}, "chipnet: reach must be above 0, got -1"),
        (HardConcrete, {"lr": 0.0}, "l0: lr must be above 0, got 0"),
        (HardConcrete, {"droprate": 1.0}, r"l0: droprate must be in \(0, 1\), got 1"),
    ],
)
def test_impossible_options_are_refused_by_name(
    method: Callable[..., Any], options: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        method(**options)
