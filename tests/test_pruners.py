"""The contract of every method in PRUNERS: one row in the table, and all of this must hold."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.cost import num_macs, prunable_weights
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import PruningPlan
from sparsekit.pruners import PRUNERS, UNSTRUCTURED
from sparsekit.selection import allocate
from sparsekit.task import Task
from tests import tiny

# How much data a method sees, and groups that fit so small a network.
FAST = {"epochs": 1, "num_batches": 3, "num_images": 24, "pattern": "block:16x8"}
# What of the weights stays: those of one branch's end are a part of them only, and half of that is its least.
NONZERO = {name: 0.7 if name == "residual_subset" else 0.3 for name in UNSTRUCTURED}
every_method = pytest.mark.parametrize("name", PRUNERS)


class Net(nn.Module):
    """A depthwise layer and a residual stream, wide enough that two criteria hardly ever agree by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn3 = nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn4 = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.conv4, self.bn5 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.depthwise(x)))
        x = torch.relu(self.bn3(self.conv2(x)))
        x = torch.relu(x + self.bn5(self.conv4(torch.relu(self.bn4(self.conv3(x))))))
        logits: Tensor = self.head(nn.functional.avg_pool2d(x, 4).flatten(1))
        return logits


@cache
def problem() -> tuple[ChannelGraph, Task]:
    """A random network, its BatchNorms away from their neutral start, and a task for it."""
    task = tiny.task()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Net()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return trace(network, task.example_inputs), task


def budget_of(name: str) -> Budget:
    return Budget.parse(f"nonzero<={NONZERO[name]}x" if name in NONZERO else "macs<=0.4x and conv1=0.5")


def run(name: str, budget: Budget | None = None) -> PruningPlan:
    graph, task = problem()
    known = inspect.signature(PRUNERS[name]).parameters
    pruner = PRUNERS[name](**{option: value for option, value in FAST.items() if option in known})
    return pruner(graph, budget or budget_of(name), task)


@cache
def plan_of(name: str) -> PruningPlan:
    return run(name)


def same(a: PruningPlan, b: PruningPlan) -> bool:
    """Whether two plans say the same in every part, bit for bit."""
    keeps = [{group.name: keep for group, keep in plan.keep.items()} for plan in (a, b)]
    merges = [{group.name: merge for group, merge in plan.merge.items()} for plan in (a, b)]
    parts = [tuple(keeps), tuple(merges), (a.nonzero, b.nonzero), (a.weights, b.weights)]
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) for one, other in parts
    )


@every_method
def test_the_budget_is_met_with_the_counts_that_it_gives_every_method(name: str) -> None:
    graph, _ = problem()
    plan = plan_of(name)
    if plan.keep:
        counts = allocate(graph, budget_of(name))
        assert plan.kept == {group.name: count for group, count in counts.items() if count < group.size}
        assert num_macs(graph, counts) <= 0.4 * num_macs(graph)
    else:
        sizes = {key: weight.numel() for key, weight in prunable_weights(graph).items()}
        num_kept = sum(int(plan.nonzero[key].sum()) if key in plan.nonzero else size for key, size in sizes.items())
        scales = {key for key in plan.nonzero if key.startswith("bn")} if name == "residual_subset" else set()
        assert plan.nonzero.keys() - scales <= sizes.keys()
        whole_groups = name in ("magnitude_pattern", "residual_subset")
        allowed = NONZERO[name] * sum(sizes.values())
        assert (5 / 6 if whole_groups else 1) * allowed - 1 < num_kept <= allowed


@every_method
def test_a_budget_that_keeps_everything_cuts_nothing(name: str) -> None:
    plan = run(name, Budget.parse("nonzero<=1x" if name in UNSTRUCTURED else "keep=1"))
    assert not plan.keep
    assert all(mask.all() for mask in plan.nonzero.values())


@every_method
def test_the_users_model_stays_as_it_is(name: str) -> None:
    graph, _ = problem()
    model = graph.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    run(name)
    assert modes == [module.training for module in model.modules()]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_method
def test_the_plan_repeats_whatever_state_the_random_generator_is_in(name: str) -> None:
    first = plan_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        assert same(run(name), first)


@every_method
def test_the_plan_survives_its_files_and_compacts_with_a_certificate_that_holds(name: str, tmp_path: Path) -> None:
    graph, task = problem()
    plan = plan_of(name)
    plan.save(tmp_path / "plan.json", tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.json", tmp_path / "plan.safetensors")
    assert same(loaded, plan)
    small = compact(graph.model, loaded, task.example_inputs)
    certificate = certify(graph.model, plan, small, task.example_inputs)
    assert certificate.holds, certificate
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (small, graph.model)]
    assert sizes[0] < sizes[1] if plan.keep else sizes[0] == sizes[1]


@pytest.mark.parametrize(("one", "other"), list(combinations(PRUNERS, 2)))
def test_no_two_methods_give_the_same_plan(one: str, other: str) -> None:
    assert not same(plan_of(one), plan_of(other))
