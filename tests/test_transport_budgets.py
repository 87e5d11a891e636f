"""Transportation pruning under budgets over the whole network: one mask for all groups, and learned keep ratios."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sparsekit import training
from sparsekit.budget import Budget, Metric
from sparsekit.compaction import certify, compact
from sparsekit.cost import Costs, num_macs
from sparsekit.errors import BudgetError, UsageError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup
from sparsekit.pruner import channel_norms, penalised
from sparsekit.pruners.transport import MaskedNetwork, Transport
from sparsekit.selection import allocate, whole_counts
from sparsekit.soft_cost import TOLERANCE, LearnedCounts, soft_limits
from sparsekit.soft_topk import Solver
from sparsekit.task import Record, Schedule, Task
from tests.networks import make
from tests.test_transport import TASK, Branches, fit, half


@cache
def traced(name: str) -> ChannelGraph:
    network, x = make(name)
    return trace(network, x)


@pytest.fixture
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    return trace(Branches(), torch.randn(2, 3, 6, 6))


def total(graph: ChannelGraph, metric: Metric, counts: dict[ChannelGroup, int]) -> float:
    costs = Costs(graph)
    return costs(metric, costs.counts(counts))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "tv_densenet121", "tv_resnext50"])
@pytest.mark.parametrize("metric", ["macs", "params", "channels"])
def test_soft_costs_of_whole_counts_are_the_costs(name: str, metric: str) -> None:
    graph, generator = traced(name), torch.Generator().manual_seed(0)
    ((cost, allowed),) = soft_limits(graph, Budget.parse(f"{metric}<=0.4x"))
    assert allowed == pytest.approx(0.4)
    for _ in range(3):
        counts = [int(torch.randint(1, g.size + 1, (), generator=generator)) for g in graph.groups]
        dense = total(graph, Metric(metric), {})
        expected = total(graph, Metric(metric), dict(zip(graph.groups, counts, strict=True))) / dense
        assert float(cost(torch.tensor(counts).float())) == pytest.approx(expected, rel=1e-5)


def test_soft_costs_have_the_right_gradient() -> None:
    graph = traced("mobilenet_v2")
    ((cost, _),) = soft_limits(graph, Budget.parse("macs<=0.5x"))
    counts = torch.tensor([g.size / 3 for g in graph.groups], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cost.double(), (counts,))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "tv_densenet121"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("text", ["macs<=0.5x", "params<=0.3x", "channels<=0.6x", "macs<=0.4x and params<=0.4x"])
def test_learned_ratios_become_counts_that_meet_the_budget_with_no_room_for_one_more(
    name: str, round_to: int, text: str
) -> None:
    graph, budget = traced(name), Budget.parse(text)
    start = allocate(graph, budget, round_to=round_to)
    generator = torch.Generator().manual_seed(0)
    free = [group for group, count in start.items() if count < group.size]
    ratios = {group: float(torch.rand((), generator=generator)) for group in free}
    counts = whole_counts(ratios, graph, budget, start, round_to=round_to)
    limits = [(limit.metric, limit.resolve(total(graph, limit.metric, {}))) for limit in budget.limits]
    assert all(total(graph, metric, counts) <= limit for metric, limit in limits)
    for group, count in counts.items():
        assert 1 <= count <= group.size
        assert count % round_to == 0 or count == group.size
        if group not in ratios:
            assert count == start[group]
        elif count < group.size:
            more = counts | {group: min(group.size, count + round_to)}
            assert any(total(graph, metric, more) > limit for metric, limit in limits), group


def test_counts_stay_within_one_channel_of_ratios_that_meet_the_budget_already() -> None:
    """The ratios are made to cost exactly the limit, so that nothing is left to the rounding but the rounding."""
    graph = traced("resnet20")
    free = {group: 0.3 + 0.5 * (number % 2) for number, group in enumerate(graph.groups) if not group.residual}
    ((cost, _),) = soft_limits(graph, Budget.parse("macs<=0.5x"))
    share = float(cost(torch.tensor([free.get(group, 1.0) * group.size for group in graph.groups])))
    budget = Budget.parse(f"macs<={share:.6f}x")
    counts = whole_counts(free, graph, budget, {group: group.size for group in graph.groups} | dict.fromkeys(free, 1))
    assert {round(counts[group] - free[group] * group.size) for group in free} <= {-1, 0, 1}


def learned_network(graph: ChannelGraph, text: str, **options: object) -> MaskedNetwork:
    budget, method = Budget.parse(text), Transport(ratios="learned", **options)  # type: ignore[arg-type]
    start = allocate(graph, budget)
    learned = LearnedCounts(start, graph.groups, soft_limits(graph, budget), scale=method.score_scale)
    norms = channel_norms(graph)
    groups = {group: (norms[group], start[group]) for group in graph.groups}
    return MaskedNetwork(deepcopy(graph.model), groups, method=method, learned=learned)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_the_loss_reaches_the_keep_ratios_and_the_masks_sum_to_them_at_every_step(
    graph: ChannelGraph, solver: Solver
) -> None:
    network = learned_network(graph, "macs<=0.5x", solver=solver, epsilon=0.5, lr=0.1)
    learned = network.learned
    assert learned is not None
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    seen = []
    for inputs, targets in TASK.batches(0):
        counts = learned().detach()
        loss = nn.functional.cross_entropy(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        gradient = learned.scaled_log_odds.grad
        assert gradient is not None
        assert gradient.abs().min() > 0
        optimizer.step()
        torch.testing.assert_close(network.masks.mask.sum(1), counts)
        seen.append(counts)
    assert not torch.allclose(seen[0], seen[-1])


def test_the_gradient_of_the_keep_ratios_is_that_of_finite_differences(graph: ChannelGraph) -> None:
    network = learned_network(graph, "macs<=0.5x", epsilon=1.0).double().train()
    learned = network.learned
    assert learned is not None
    direction = torch.randn(network.masks.mask.shape, dtype=torch.float64)
    state = deepcopy(network.masks.state_dict())

    def score(log_odds: Tensor) -> Tensor:
        network.masks.load_state_dict(state)
        counts = learned.sizes * torch.sigmoid(learned.scale * log_odds)
        total: Tensor = (network.masks(counts) * direction).sum()
        return total

    assert torch.autograd.gradcheck(score, (learned.scaled_log_odds,))


def train(graph: ChannelGraph, text: str, **options: object) -> tuple[dict[ChannelGroup, int], list[Record]]:
    """Counts and history of a plan with learned ratios that holds its certificate."""
    history: list[Record] = []

    def recorded(
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        history.extend(training.fit(model, task, schedule, stage=stage, observe=observe))
        return history

    method = Transport(ratios="learned", epsilon=1.0, **options)  # type: ignore[arg-type]
    plan = method(graph, Budget.parse(text), replace(TASK, fit=recorded))
    assert certify(graph.model, plan, compact(graph.model, plan), TASK.example_inputs).holds
    return {group: plan.kept.get(group.name, group.size) for group in graph.groups}, history


def test_learned_keep_ratios_stay_near_the_budget_and_end_on_it(graph: ChannelGraph) -> None:
    counts, history = train(graph, "macs<=0.5x", epochs=20)
    settled = [record for record in history if record["step"] > 8]  # whole counts to start from are a little off
    assert all(abs(record["mask_cost_excess"]) <= TOLERANCE for record in settled)
    assert all(record["mask_sum_error"] < 1e-5 for record in history)
    assert num_macs(graph, counts) <= 0.5 * num_macs(graph)
    for group, count in counts.items():
        if count < group.size:
            assert num_macs(graph, counts | {group: count + 1}) > 0.5 * num_macs(graph)


def test_the_penalty_grows_until_the_cost_is_near_the_limit_and_then_no_more(graph: ChannelGraph) -> None:
    network = learned_network(graph, "macs<=0.5x")
    learned = network.learned
    assert learned is not None
    ((cost, _),) = learned.limits
    learned.limits = [(cost, float(cost(learned.counts().detach())))]
    start, weights = learned.scaled_log_odds.detach().clone(), []
    for shift in (0.0, 1.0, 0.0):  # on the budget, far above it, and back
        learned.scaled_log_odds.data.copy_(start + shift)
        assert (float(learned.excess().detach()) > TOLERANCE) == bool(shift)
        for _ in range(200):
            learned()
        settled = float(learned.penalty_weight)
        learned()
        weights += [settled, float(learned.penalty_weight)]
    assert weights[0] == weights[1] == 10
    assert weights[1] < weights[2] < weights[3] < weights[4] == weights[5]


def test_of_several_limits_the_one_exceeded_most_counts(graph: ChannelGraph) -> None:
    (macs, _), (params, _) = soft_limits(graph, Budget.parse("macs<=0.5x and params<=0.5x"))
    learned = LearnedCounts(half(graph), graph.groups, [(macs, 0.1), (params, 0.9)], scale=1.0)
    counts = learned.counts()
    assert macs(counts) - 0.1 > 0 > params(counts) - 0.9
    assert torch.equal(learned.excess(), macs(counts) - 0.1)


def test_a_layer_that_the_task_needs_less_is_cut_more() -> None:
    """Two branches of equal cost; the loss reads only one of them."""

    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.head, self.other = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.used(x))) + 0.001 * self.other(torch.relu(self.unused(x)))
            return out.mean((2, 3))

    torch.manual_seed(0)
    graph = trace(TwoBranches(), torch.randn(2, 3, 6, 6))
    counts, _ = train(graph, "macs<=0.5x", epochs=20, score_lr=1.0)
    used, unused = counts.values()
    assert used > unused


def test_groups_that_a_pattern_names_keep_what_it_says_while_the_others_learn(graph: ChannelGraph) -> None:
    counts, history = train(graph, "macs<=0.5x and left=0.5", epochs=10)
    assert {group.name: count for group, count in counts.items()}["left"] == 3
    assert all(record["mask_sum_error"] < 1e-5 for record in history)


def test_learned_ratios_go_on_from_their_state_dict(graph: ChannelGraph) -> None:
    first, second = (learned_network(graph, "macs<=0.4x") for _ in range(2))
    task = {network: penalised(TASK, network.penalty) for network in (first, second)}
    schedule = Schedule(epochs=1, lr=0.1)
    fit(first, task[first], schedule, stage="prune", observe=first.measure)
    second.load_state_dict(first.state_dict())
    for network in (first, second):
        fit(network, task[network], schedule, stage="prune", observe=network.measure)
    state, other = first.state_dict(), second.state_dict()
    assert "learned.penalty_weight" in state
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_weight_decay_never_pulls_keep_ratios_to_one_half(graph: ChannelGraph) -> None:
    network = learned_network(graph, "macs<=0.2x", weight_decay=0.1)
    assert network.learned is not None
    before = network.learned.scaled_log_odds.detach().clone()
    network.learned.penalty_weight.zero_()
    network.penalty().backward()
    torch.optim.SGD(network.parameters(), lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(network.learned.scaled_log_odds.detach(), before)


def test_any_function_of_soft_counts_can_be_the_cost(graph: ChannelGraph) -> None:
    """As a latency table would be: here steps of 4 channels, read off in between."""
    table = torch.tensor([0.0, 0.5, 1.0])  # share of the time at 0, 4 and 8 channels of the first group

    def latency(counts: Tensor) -> Tensor:
        left = (counts[0] / 4).floor().long().clamp(0, 1)
        part = counts[0] / 4 - left
        return (1 - part) * table[left] + part * table[left + 1]

    start = {group: group.size // 2 for group in graph.groups}
    learned = LearnedCounts(start, [graph.groups[0]], [(latency, 0.8)], scale=1.0)
    optimizer = torch.optim.SGD(learned.parameters(), 0.1)
    for _ in range(200):
        learned()
        optimizer.zero_grad()
        learned.penalty().backward()
        optimizer.step()
    assert float(learned.counts()[0].detach()) == pytest.approx(0.8 * 8, abs=0.1)


def network_of(graph: ChannelGraph, text: str, **options: object) -> tuple[MaskedNetwork, int]:
    """The network that global pruning trains, caught before training, and how many channels its mask keeps."""
    caught: list[nn.Module] = []

    def catch(
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        caught.append(model)
        return []

    budget = Budget.parse(text)
    Transport(scope="global", **options)(graph, budget, replace(TASK, fit=catch))  # type: ignore[arg-type]
    (network,) = caught
    assert isinstance(network, MaskedNetwork)
    return network, sum(count for group, count in allocate(graph, budget).items() if count < group.size)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_one_mask_over_all_groups_sums_to_the_budget_at_every_step(graph: ChannelGraph, solver: Solver) -> None:
    network, count = network_of(graph, "channels<=0.5x", solver=solver)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for inputs, targets in TASK.batches(0):
        loss = nn.functional.cross_entropy(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(network.masks.mask.sum()) == pytest.approx(count, rel=1e-5)
        assert not network.masks.mask[~network.masks.valid].any()
    assert int(network.masks.top_k(network.masks.keep_counts).sum()) == count


def test_global_scores_start_at_their_groups_mean(graph: ChannelGraph) -> None:
    network, _ = network_of(graph, "channels<=0.5x")
    for row, group in enumerate(network.gated.groups):
        norms = channel_norms(graph)[group]
        torch.testing.assert_close(network.masks.scores.detach()[row, : group.size], norms / norms.mean())


def test_every_group_keeps_its_best_channel_however_low_it_ranks(graph: ChannelGraph) -> None:
    network, count = network_of(graph, "channels<=0.5x")
    masks = network.masks
    masks.mask.copy_(torch.rand(masks.mask.shape) * masks.valid)
    masks.mask[1].mul_(1e-6)
    kept = masks.top_k(masks.keep_counts)
    assert int(kept.sum()) == count
    assert kept[1].nonzero().flatten().tolist() == [int(masks.mask[1].argmax())]


def test_a_global_plan_meets_the_channel_budget_and_shares_channels_out_by_importance(graph: ChannelGraph) -> None:
    plan = Transport(scope="global", epochs=2)(graph, Budget.parse("channels<=0.5x"), TASK)
    given = allocate(graph, Budget.parse("channels<=0.5x"))
    counts = {group: plan.kept.get(group.name, group.size) for group in graph.groups}
    assert sum(counts.values()) == sum(given.values())
    assert counts != given
    assert all(count >= 1 for count in counts.values())
    assert certify(graph.model, plan, compact(graph.model, plan), TASK.example_inputs).holds


@pytest.mark.parametrize(
    "text", ["macs<=0.5x", "keep=0.5", "channels<=0.5x and left=0.5", "channels<=0.5x and macs<=0.5x"]
)
def test_a_global_mask_takes_a_limit_on_channels_and_nothing_else(graph: ChannelGraph, text: str) -> None:
    with pytest.raises(BudgetError, match="scope 'global' takes a limit on channels alone"):
        Transport(scope="global")(graph, Budget.parse(text), TASK)


def test_options_that_contradict_each_other_are_refused(graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match="'global' already shares channels out"):
        Transport(scope="global", ratios="learned")
    with pytest.raises(UsageError, match="'global' cannot round widths"):
        Transport(scope="global", round_to=8)
    with pytest.raises(BudgetError, match="no limit to learn them by"):
        Transport(ratios="learned")(graph, Budget.parse("keep=0.5"), TASK)
