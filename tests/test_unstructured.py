"""Single weights: budgets, exact counts, zeros that stay zero through training, cutting, files and export."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit import fitting
from sparsekit.artifact import FILES, Artifact, load
from sparsekit.budget import Budget
from sparsekit.compaction import compact
from sparsekit.cost import absolute, num_nonzero, prunable_weights
from sparsekit.errors import BudgetError, PlanError, UsageError
from sparsekit.export import OnnxFile, export_onnx
from sparsekit.graph import ChannelGraph, trace
from sparsekit.latency import LatencyComparison
from sparsekit.pipeline import compress
from sparsekit.plan import PruningPlan
from sparsekit.pruners import PRUNERS, UNSTRUCTURED
from sparsekit.pruners.gmp import GMP, GradualNetwork, pruned_share
from sparsekit.pruners.magnitude_unstructured import MagnitudeUnstructured
from sparsekit.pruners.transport_unstructured import SoftlySparseNetwork, TransportUnstructured
from sparsekit.recipe import Recipe
from sparsekit.report import Report
from sparsekit.selection import Scope, allocate_weights, keep_top_weights
from sparsekit.soft_topk import sinkhorn_step
from sparsekit.sparse import SparseNetwork, ZerosStay
from sparsekit.surgery import mask
from sparsekit.task import Batch, Record, Schedule, Task
from sparsekit.tidy import tidy
from sparsekit.training import fit
from tests import tiny

SCOPES: list[Scope] = ["global", "layer"]
METHODS = sorted(UNSTRUCTURED - {"magnitude_pattern", "residual_subset"})  # which zero groups of weights
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NUM_WEIGHTS = 8 * 9 + 16 * 8 * 9 + 10 * 16  # tiny.Net: two convolutions and the head
BUDGET = Budget.parse("nonzero<=0.1x")


def network() -> tiny.Net:
    torch.manual_seed(0)
    return tiny.Net()


def sparse_network() -> tiny.Net:
    """Every third weight of each layer is zero."""
    net = network()
    for name in ("conv1.weight", "conv2.weight", "head.weight"):
        with torch.no_grad():
            net.get_parameter(name).view(-1)[::3] = 0
    return net


@pytest.fixture
def graph() -> ChannelGraph:
    return trace(network(), X)


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.task()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def num_kept(plan: PruningPlan) -> int:
    return sum(int(keep.sum()) for keep in plan.nonzero.values())


# What counts


class Attention(nn.Module):
    """What is a layer's weight and what is not; the head's product is the network's own, not its module's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        x = x + self.attention(x, x, x)[0] * self.scale.T
        return nn.functional.linear(x.mean(1), self.head.weight, self.head.bias)


def test_weights_count_and_biases_norms_and_position_embeddings_do_not() -> None:
    names = set(prunable_weights(trace(Attention(), X)))
    assert names == {
        "patches.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }


def test_a_fraction_is_of_the_dense_networks_weights_whatever_is_zero_by_now(graph: ChannelGraph) -> None:
    assert sum(weight.numel() for weight in prunable_weights(graph).values()) == num_nonzero(graph) == NUM_WEIGHTS
    (limit,) = absolute(BUDGET, trace(sparse_network(), X)).limits
    assert limit.value == pytest.approx(0.1 * NUM_WEIGHTS)
    assert num_nonzero(trace(sparse_network(), X)) == NUM_WEIGHTS - 24 - 384 - 54


# Who stays


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", ["nonzero<=0.1x", "nonzero<=3", "nonzero<=1.383K", "nonzero<=0.99x"])
def test_counts_add_up_to_the_budget_and_layers_keep_the_same_share(
    budget: str, scope: Scope, graph: ChannelGraph
) -> None:
    parsed = Budget.parse(budget)
    counts = allocate_weights(graph, parsed, scope=scope)
    sizes = {name: weight.numel() for name, weight in prunable_weights(graph).items()}
    whole = sizes.keys() - {name for names in counts for name in names}
    total = sum(counts.values()) + sum(sizes[name] for name in whole)
    assert total == int(parsed.limits[0].resolve(NUM_WEIGHTS))
    if scope == "global":
        assert list(counts) == [tuple(sizes)]
        return
    shares = {names[0]: count for names, count in counts.items()} | {name: sizes[name] for name in whole}
    for name, count in shares.items():
        assert 1 <= count <= sizes[name]
        assert abs(count - total / NUM_WEIGHTS * sizes[name]) < 2  # one by rounding, one kept whatever the budget


@pytest.mark.parametrize("scope", SCOPES)
def test_a_budget_that_leaves_everything_leaves_an_empty_plan(scope: Scope, graph: ChannelGraph, task: Task) -> None:
    for pruner in (GMP(scope=scope), MagnitudeUnstructured(scope), TransportUnstructured(scope=scope)):
        plan = pruner(graph, Budget.parse("nonzero<=1x"), task)
        assert not plan.nonzero
        assert not plan.weights


@pytest.mark.parametrize("count", [3, 4, 20, 59, 60])
def test_the_highest_scores_stay_ties_by_position_and_every_tensor_keeps_one(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    sizes = {"a": (4, 5), "b": (2, 3, 5), "c": (10,)}
    scores = {
        name: torch.randint(4, size, generator=generator).float() + 10 * (name == "b") for name, size in sizes.items()
    }
    (names,) = counts = {tuple(sizes): count}
    keep = keep_top_weights(scores, counts)
    assert {name: tuple(mask.shape) for name, mask in keep.items()} == sizes
    flat = [(float(score), name, at) for name in names for at, score in enumerate(scores[name].flatten())]
    firsts = {(name, int(scores[name].flatten().argmax())) for name in names}
    order = sorted(flat, key=lambda row: ((row[1], row[2]) not in firsts, -row[0]))  # stable: ties by position
    expected = {(name, at) for _, name, at in order[:count]}
    assert {(name, at) for name in names for at in keep[name].flatten().nonzero().flatten().tolist()} == expected


def test_scores_that_are_no_numbers_are_refused_by_name() -> None:
    scores = {"layer.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(PlanError, match=r"layer\.weight: scores must be finite numbers"):
        keep_top_weights(scores, {("layer.weight",): 1})


def test_one_shot_magnitude_keeps_the_largest_weights_of_the_network_or_of_each_layer(graph: ChannelGraph) -> None:
    weights = {name: weight.detach().abs() for name, weight in prunable_weights(graph).items()}
    nonzero = MagnitudeUnstructured()(graph, Budget.parse("nonzero<=0.3x")).nonzero
    kept = torch.cat([weights[name][keep] for name, keep in nonzero.items()])
    gone = torch.cat([weights[name][~keep] for name, keep in nonzero.items()])
    assert len(kept) == int(0.3 * NUM_WEIGHTS)
    assert kept.min() >= gone.max()
    layerwise = MagnitudeUnstructured("layer")(graph, BUDGET).nonzero
    # 1 + 135/1381 of the other 71, 1151 and 159: 7.94, 113.52 and 16.54, whose two largest rests are rounded up
    shares = {name: int(keep.sum()) for name, keep in layerwise.items()}
    assert shares == {"conv1.weight": 8, "conv2.weight": 113, "head.weight": 17}
    assert all(weights[name][keep].min() >= weights[name][~keep].max() for name, keep in layerwise.items())


def test_a_weight_that_two_layers_share_counts_and_is_zeroed_once() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    plan = MagnitudeUnstructured()(trace(net, torch.randn(2, 6)), Budget.parse("nonzero<=0.5x"))
    assert plan.nonzero.keys() == {"0.weight"}
    assert num_kept(plan) == 18
    sparse = mask(net, plan)
    assert sparse.get_parameter("0.weight") is sparse.get_parameter("2.weight")
    scaled = SparseNetwork(net, plan.nonzero)
    factors = plan.nonzero["0.weight"].flatten()
    x = torch.randn(3, 6)
    assert torch.equal(scaled(factors, x), sparse(x))


# The contract of the three


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_keeps_exactly_the_budget_and_leaves_the_model_alone(
    method: str, scope: Scope, graph: ChannelGraph, task: Task
) -> None:
    before, modes = state(graph.model), [module.training for module in graph.model.modules()]
    options = {} if method == "magnitude_unstructured" else {"epochs": 2}
    plan, again = (PRUNERS[method](scope=scope, **options)(graph, BUDGET, task) for _ in range(2))
    assert plan.nonzero.keys() == prunable_weights(graph).keys()
    assert num_kept(plan) == NUM_WEIGHTS // 10
    assert not plan.keep
    pruned = mask(graph.model, plan)
    assert num_nonzero(trace(pruned, X)) == num_kept(plan)
    assert_equal(before, state(graph.model))
    assert modes == [module.training for module in graph.model.modules()]
    assert all(parameter.grad is None for parameter in graph.model.parameters())
    assert_equal(state(pruned), state(mask(graph.model, again)))
    values = [*plan.nonzero.values(), *plan.weights.values()]
    assert not any(value.requires_grad or value.device.type != "cpu" for value in values)


def test_no_two_methods_and_no_two_scopes_choose_the_same_weights(graph: ChannelGraph, task: Task) -> None:
    plans = [PRUNERS[method](scope=scope)(graph, BUDGET, task) for method in METHODS for scope in SCOPES]
    chosen = [torch.cat([keep.flatten() for keep in plan.nonzero.values()]) for plan in plans]
    assert not any(torch.equal(left, right) for i, left in enumerate(chosen) for right in chosen[:i])


# Gradual magnitude pruning


def test_the_sparsity_follows_the_published_cubic() -> None:
    final, start, delta, num_updates = 0.9, 7, 4, 10
    for step in range(60):
        share = pruned_share(step, start=start, update_every=delta, num_updates=num_updates)
        at = min(max(step - start, 0) // delta * delta, num_updates * delta)  # the last update before this step
        initial = 0.0
        assert final * share == pytest.approx(final + (initial - final) * (1 - at / (num_updates * delta)) ** 3)


def gradual(num_steps: int = 40, *, scope: Scope = "global", **options: Any) -> GradualNetwork:
    net = network()
    counts = allocate_weights(trace(net, X), BUDGET, scope=scope)
    return GradualNetwork(net, counts, method=GMP(scope=scope, **options), num_steps=num_steps)


@pytest.mark.parametrize("scope", SCOPES)
def test_masks_only_shrink_and_the_last_quarter_of_the_run_has_the_final_sparsity(scope: Scope) -> None:
    gmp = gradual(40, scope=scope, start=0.25, update_every=5)
    optimizer = torch.optim.SGD(gmp.parameters(), 0.1, momentum=0.9)
    masks = [gmp.mask.clone()]
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gmp.train()(X), torch.arange(4)).backward()
        optimizer.step()
        masks.append(gmp.mask.clone())
    counts = [int(kept.sum()) for kept in masks]
    assert not any((later & ~earlier).any() for earlier, later in pairwise(masks))
    assert [step for step in range(40) if counts[step + 1] < counts[step]] == [15, 20, 25, 30]
    assert counts[31:] == [NUM_WEIGHTS // 10] * 10
    assert set(counts[:16]) == {NUM_WEIGHTS}
    assert num_kept(gmp.plan()) == NUM_WEIGHTS // 10
    assert torch.equal(gmp.mask, masks[-1])


def test_no_gradient_reaches_a_masked_weight() -> None:
    gmp = gradual(40, update_every=5)
    while gmp.num_done < 20:
        gmp.train()(X)
    gmp(X).square().mean().backward()
    for name, kept in gmp.sparse.shaped(gmp.mask).items():
        gradient = gmp.sparse.network.get_parameter(name).grad
        assert gradient is not None
        assert not gradient[~kept].any()
        assert gradient[kept].any()


def test_a_gradual_run_goes_on_from_its_state() -> None:
    first, second = (gradual(8, update_every=2) for _ in range(2))

    def train(gmp: GradualNetwork, num_steps: int) -> None:
        for _ in range(num_steps):
            gmp.train()(X).square().mean().backward()
            torch.optim.SGD(gmp.parameters(), 0.1).step()
            gmp.zero_grad()

    train(first, 3)
    second.load_state_dict(first.state_dict())
    for gmp in (first, second):
        train(gmp, 3)
    assert first.num_done == second.num_done == 6
    assert 0 < first.measure()["mask_sparsity"] < 1
    assert_equal(state(first), state(second))


@pytest.mark.parametrize("method", ["gmp", "transport_unstructured"])
def test_a_killed_run_resumes_to_the_same_plan(method: str, graph: ChannelGraph, task: Task, tmp_path: Path) -> None:
    def killed(task: Task, at_epoch: int) -> Task:
        def batches(epoch: int) -> Iterator[Batch]:
            if epoch == at_epoch:
                raise KeyboardInterrupt
            yield from task.batches(epoch)

        return dataclasses.replace(task, batches=batches)

    def saving(*parts: Any, **options: Any) -> list[Record]:
        return fit(*parts, **options, checkpoint_dir=tmp_path)

    pruner = PRUNERS[method](epochs=3)
    whole = pruner(graph, BUDGET, task)
    with pytest.raises(KeyboardInterrupt):
        pruner(graph, BUDGET, dataclasses.replace(killed(task, 2), fit=saving))
    resumed = pruner(graph, BUDGET, dataclasses.replace(task, fit=saving))
    assert_equal(dict(resumed.nonzero), dict(whole.nonzero))
    assert_equal(dict(resumed.weights), dict(whole.weights))


def test_a_run_without_a_single_update_is_pruned_all_the_same(graph: ChannelGraph, task: Task) -> None:
    assert num_kept(GMP(epochs=1, update_every=1000)(graph, BUDGET, task)) == NUM_WEIGHTS // 10
    assert num_kept(GMP(epochs=0)(graph, BUDGET, task)) == NUM_WEIGHTS // 10


# Transport


def softly(scope: Scope, *, epsilon: float = 0.25, budget: Budget = BUDGET) -> SoftlySparseNetwork:
    net = network()
    return SoftlySparseNetwork(net, allocate_weights(trace(net, X), budget, scope=scope), epsilon=epsilon).double()


@pytest.mark.parametrize("scope", SCOPES)
def test_masks_sum_to_the_budget_at_every_step_and_each_set_is_a_problem_of_its_own(scope: Scope) -> None:
    soft = softly(scope)
    starts = {
        names: torch.cat([soft.sparse.network.get_parameter(name).flatten() for name in names]).abs().detach()
        for names in soft.counts
    }
    for _ in range(6):
        soft.train()(X.double())  # without an optimizer's step: the scores stay
        assert soft.measure()["mask_sum_error"] < 1e-9
    for (names, count), mask_C in zip(soft.counts.items(), soft.mask.split(soft.set_sizes), strict=True):
        odds, potential = torch.zeros(1, len(mask_C)).double(), torch.zeros(1).double()
        for _ in range(6):
            expected, odds, potential = sinkhorn_step(
                starts[names][None],
                torch.tensor([count]),
                odds,
                potential,
                torch.ones(1, len(mask_C), dtype=torch.bool),
                epsilon=0.25,
            )
        assert torch.allclose(mask_C, expected[0], rtol=1e-12)


def test_the_gradient_reaches_a_weight_directly_and_through_its_magnitude() -> None:
    """Against finite differences of the loss as a function of the weights, mask included."""
    soft = softly("layer", epsilon=0.5, budget=Budget.parse("nonzero<=0.5x"))
    for _ in range(2):
        soft.train()(X.double())
    before, weight = copy.deepcopy(soft.state_dict()), soft.sparse.network.get_parameter("head.weight")
    target = torch.randn(4, 10, dtype=torch.float64)

    def loss(start: dict[str, Tensor]) -> Tensor:
        soft.load_state_dict(start)
        output: Tensor = soft.train()(X.double())
        return (output * target).sum()

    (gradient,) = torch.autograd.grad(loss(before), weight)
    factors = soft.sparse.shaped(soft.mask)
    held = functional_call(
        soft.sparse.network,
        {name: soft.sparse.network.get_parameter(name) * m for name, m in factors.items()},
        X.double(),
    )
    (direct,) = torch.autograd.grad((held * target).sum(), weight)
    for place in ((0, 0), (3, 7), (9, 15)):
        values = []
        for shift in (1e-6, -1e-6):
            moved = {name: value.clone() for name, value in before.items()}
            moved["sparse.network.head.weight"][place] += shift
            values.append(float(loss(moved).detach()))
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
        assert abs(float(gradient[place] - direct[place])) > 1e-3 * abs(float(gradient[place]))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_plans_weights_are_the_network_that_was_trained(scope: Scope, graph: ChannelGraph, task: Task) -> None:
    def check(network: GradualNetwork | SoftlySparseNetwork) -> None:
        fit(network, task, Schedule(epochs=1, lr=0.05), stage="prune")
        refilled = mask(graph.model, PruningPlan(weights=network.plan().weights)).eval()
        assert torch.allclose(refilled(X), network.eval()(X), atol=1e-6)
        name = "bn1.running_var"
        assert torch.equal(refilled.get_buffer(name), network.sparse.network.get_buffer(name))

    counts = allocate_weights(graph, BUDGET, scope=scope)
    soft = SoftlySparseNetwork(network(), counts, epsilon=10.0)  # still soft, so that folding matters
    check(soft)
    assert soft.measure()["mask_hardness"] > 0.02
    check(gradual(4, scope=scope, update_every=1))


def test_masks_harden_by_themselves(graph: ChannelGraph, task: Task) -> None:
    hardness: list[float] = []

    def noting(*parts: Any, **options: Any) -> list[Record]:
        hardness.extend(record["mask_hardness"] for record in fit(*parts, **options))
        return []

    TransportUnstructured(epochs=8, epsilon=0.05)(graph, BUDGET, dataclasses.replace(task, fit=noting))
    assert hardness[-1] < 0.3 * max(hardness)


def test_the_weights_kept_are_those_with_the_largest_mask() -> None:
    soft = softly("layer")
    strongest = torch.cat([part.abs().flatten() for part in soft.sparse.magnitudes().split(soft.set_sizes)])
    for kept, scores, count in zip(
        soft.kept.split(soft.set_sizes), strongest.split(soft.set_sizes), soft.counts.values(), strict=True
    ):
        assert scores[kept].min() >= scores.topk(count).values.min()
    for _ in range(5):
        soft.train()(X.double())
        with torch.no_grad():
            for name in soft.sparse.names:
                soft.sparse.network.get_parameter(name).copy_(torch.rand_like(soft.sparse.network.get_parameter(name)))
    for kept, masks in zip(soft.top_k().split(soft.set_sizes), soft.mask.split(soft.set_sizes), strict=True):
        assert masks[kept].min() >= masks[~kept].max()


# Zeros stay


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_exactly_zero_through_momentum_and_weight_decay(optimizer: str, task: Task) -> None:
    net = sparse_network()
    before = state(net)
    schedule = Schedule(epochs=3, lr=0.1 if optimizer == "sgd" else 0.01, optimizer=optimizer, weight_decay=0.1)
    fit(ZerosStay(net, ["conv1.weight", "head.weight"]), task, schedule, stage="finetune")
    for name in ("conv1.weight", "head.weight"):
        weight = net.get_parameter(name)
        assert torch.equal(weight == 0, before[name] == 0)
        assert (weight[weight != 0] != before[name][weight != 0]).all()
    assert net.conv2.weight.all()  # nobody asked for these
    assert not torch.equal(net.bn1.bias, before["bn1.bias"])


def test_a_network_whose_zeros_stay_computes_the_same() -> None:
    net = sparse_network().eval()
    assert torch.equal(ZerosStay(net, ["conv1.weight"])(X), net(X))


def test_a_half_precision_network_keeps_its_dtype() -> None:
    net = network().bfloat16()
    sparse = SparseNetwork(net, ["conv2.weight"])
    assert sparse(torch.rand(16 * 8 * 9), X.bfloat16()).dtype == torch.bfloat16


# The whole house


def half_used() -> tiny.Net:
    """Channels 0 to 2 are read by weights so small that they are the first to become zero."""
    net = network().eval()
    with torch.no_grad():
        net.conv2.weight[:, :3] *= 1e-3
        net.bn1.bias.normal_()
    return net


RECIPE = Recipe(method="magnitude_unstructured", budget="nonzero<=0.3x", epochs=2, weight_decay=0.01, finetune_lr=0.05)


class Once:
    """Exports and times for real the first time; the same results again where only the weights differ."""

    def __init__(self) -> None:
        self.files: list[tuple[OnnxFile, bytes]] = []
        self.timed: list[LatencyComparison] = []

    def export(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> OnnxFile:
        if len(self.files) < 2:
            file = export_onnx(model, inputs, path)
            self.files.append((file, path.read_bytes()))
        file, content = self.files[path.name == "model.onnx"]
        path.write_bytes(content)
        return dataclasses.replace(file, path=path)

    def measure(self, paths: Any, **options: Any) -> LatencyComparison:
        if not self.timed:
            self.timed.append(tiny.quick_latency(paths, **options))
        return self.timed[0]


@pytest.fixture(scope="module")
def once() -> Iterator[Once]:
    once = Once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "export_onnx", once.export)
        patch.setattr(fitting, "measure_latency", once.measure)
        yield once


@pytest.fixture(scope="module")
def artifact(task: Task, once: Once) -> Artifact:
    assert not once.files
    return compress(half_used(), RECIPE, task)


def test_zeros_that_empty_a_channel_compact_losslessly() -> None:
    net = half_used()
    sparse = compact(net, MagnitudeUnstructured()(trace(net, X), Budget.parse("nonzero<=0.3x")))
    small = tidy(sparse, X)
    assert isinstance(small, tiny.Net)
    assert small.conv1.weight.shape[0] == small.conv2.weight.shape[1] == 5
    assert torch.allclose(small(X), sparse(X), atol=1e-6)
    assert not torch.allclose(sparse(X), net(X), atol=1e-2)


def test_emptied_channels_are_cut_and_certified(artifact: Artifact) -> None:
    assert isinstance(artifact.model, tiny.Net)
    assert [plan.kept for plan in artifact.after] == [{"conv1": 5}]
    assert artifact.model.conv1.weight.shape[0] == artifact.model.conv2.weight.shape[1] == 5
    assert artifact.report.certificate["holds"]
    assert artifact.report.certificate["groups"] == {"conv1": True}
    widths = [(width.layer, width.dense, width.kept) for width in artifact.report.widths]
    assert widths == [("conv1", 8, 5), ("conv2", 16, 16)]


def test_zeros_outlive_fine_tuning_and_the_report_counts_what_is_left(artifact: Artifact) -> None:
    assert "finetune" in artifact.report.history
    names = ("conv1.weight", "conv2.weight", "head.weight")
    cut = artifact.after[0].keep
    (channels,) = cut.values()
    wanted = {
        "conv1.weight": artifact.plan.nonzero["conv1.weight"][channels],
        "conv2.weight": artifact.plan.nonzero["conv2.weight"][:, channels],
        "head.weight": artifact.plan.nonzero["head.weight"],
    }
    trained = {name: artifact.model.get_parameter(name) for name in names}
    assert all(torch.equal(trained[name] != 0, wanted[name]) for name in names)
    left = sum(int(kept.sum()) for kept in wanted.values())
    assert (artifact.report.dense.num_nonzero, artifact.report.compact.num_nonzero) == (NUM_WEIGHTS, left)
    assert left <= 0.3 * NUM_WEIGHTS
    assert artifact.report.ratio["num_nonzero"] == left / NUM_WEIGHTS


def test_the_table_the_headline_and_the_page_say_how_many_weights_are_left(artifact: Artifact) -> None:
    report = artifact.report
    share = f"{report.ratio['num_nonzero']:.2f}x"
    assert report.headline.startswith(f"{share} the nonzero weights, ")
    (row,) = (row for row in report.rows() if row[0] == "nonzero weights")
    assert [text for text, _ in row[1:]][:2] == ["1,384", str(report.compact.num_nonzero)]
    html = report.html()
    assert "nonzero weights" in html
    assert Report.from_json(json.loads(json.dumps(report.to_json()))).to_json() == report.to_json()


def test_the_artifact_gives_the_sparse_network_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {*FILES, "emptied-0.json"}
    small = load(folder, tiny.Net)
    assert_equal(state(small), state(artifact.model))
    assert torch.equal(small(X), artifact.model(X))


def test_the_onnx_file_has_the_zeros(artifact: Artifact) -> None:
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(artifact.onnx).graph.initializer}
    weights = [tensor for tensor in tensors.values() if tensor.ndim > 1 and tensor.dtype == "float32"]
    assert sum(int((weight != 0).sum()) for weight in weights) == artifact.report.compact.num_nonzero


@pytest.mark.parametrize("method", ["gmp", "transport_unstructured"])
def test_methods_that_train_go_through_the_house(method: str, artifact: Artifact, task: Task, tmp_path: Path) -> None:
    made = compress(half_used(), dataclasses.replace(RECIPE, method=method, epochs=1), task)
    assert list(made.report.history) == ["prune", "finetune"]
    assert made.report.compact.num_nonzero is not None
    assert made.report.compact.num_nonzero <= num_kept(made.plan) == int(0.3 * NUM_WEIGHTS)
    assert torch.equal(load(made.save(tmp_path / "out"), tiny.Net)(X), made.model(X))


def test_a_method_that_cuts_channels_says_nothing_of_nonzero_weights(artifact: Artifact, task: Task) -> None:
    recipe = dataclasses.replace(RECIPE, method="magnitude", budget="macs<=0.5x", allow_slower=True)
    report = compress(network(), recipe, task).report
    assert report.dense.num_nonzero is report.compact.num_nonzero is report.ratio["num_nonzero"] is None
    assert not any(label == "nonzero weights" for label, *_ in report.rows())
    assert "nonzero weights" not in report.headline


# What is refused


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        (
            "magnitude",
            "nonzero<=0.1x",
            r"budget nonzero<=0\.1x: counts single weights, .* removes channels; .* like gmp",
        ),
        ("gmp", "macs<=0.5x", r"budget macs<=0\.5x: counts channels, .* zeroes single weights; use .* nonzero<=0\.1x"),
        ("gmp", "nonzero<=0.1x and conv1=0.5", r"budget conv1=0\.5: counts channels"),
        ("gmp", "nonzero<=2", r"budget nonzero<=2 is below the floor of 3 \(0\.0022x of the dense network\)"),
        ("gmp", "nonzeros<=0.1x", "unknown metric 'nonzeros'; did you mean nonzero"),
    ],
)
def test_a_budget_of_the_wrong_kind_fails_before_any_training(
    method: str, budget: str, message: str, task: Task
) -> None:
    asked: list[str] = []

    def asking(*_: Any, stage: str, **__: Any) -> list[Record]:
        asked.append(stage)
        return []

    recipe = dataclasses.replace(RECIPE, method=method, budget=budget)
    with pytest.raises(BudgetError, match=message) as caught:
        compress(network(), recipe, dataclasses.replace(task, fit=asking))
    assert "\n" not in str(caught.value)
    assert asked == []


@pytest.mark.parametrize("method", sorted(PRUNERS.keys() - UNSTRUCTURED))
def test_every_other_method_refuses_a_budget_of_single_weights(method: str, graph: ChannelGraph, task: Task) -> None:
    with pytest.raises(BudgetError, match="counts single weights"):
        PRUNERS[method]()(graph, BUDGET, task)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GMP(end=0.8), r"gmp: 0 <= start < end <= 0\.75 must hold, got start = 0, end = 0\.8"),
        (lambda: GMP(start=0.5, end=0.5), "gmp: 0 <= start < end"),
        (lambda: GMP(update_every=0), "gmp: update_every must be at least 1, got 0"),
        (lambda: GMP(lr=0), "gmp: lr must be above 0, got 0"),
        (lambda: GMP(scope="layers"), "gmp: unknown scope 'layers'; did you mean layer"),  # type: ignore[arg-type]
        (lambda: MagnitudeUnstructured("all"), "magnitude_unstructured: unknown scope 'all'"),  # type: ignore[arg-type]
        (lambda: TransportUnstructured(epsilon=0), "transport_unstructured: epsilon must be above 0, got 0"),
        (lambda: TransportUnstructured(scope="x"), "transport_unstructured: unknown scope 'x'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_options_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("method", ["gmp", "transport_unstructured"])
def test_methods_that_train_say_that_they_need_data(method: str, graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match=f"{method}: .* needs data; without data choose magnitude_unstructured"):
        PRUNERS[method]()(graph, BUDGET, None)
