"""Branches that write some groups of 16 channels of their stream: found in the forward, exact, accelerated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from sparsekit.acceleration import accelerate
from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.cost import num_nonzero, prunable_weights
from sparsekit.errors import BudgetError, PlanError, UsageError
from sparsekit.graph import trace
from sparsekit.kernels import modules
from sparsekit.models.resnet import CifarResNet
from sparsekit.models.wide_resnet import WideResNet
from sparsekit.plan import PruningPlan
from sparsekit.pruners.residual_subset import ResidualSubset, branches, clustered, kept_importance
from sparsekit.recovery.lockstep import recorded
from sparsekit.sparse import ZerosStay
from sparsekit.task import Task
from tests import tiny

WHOLE = Budget.parse("nonzero<=1x")
# Streams of 64 and 128 channels; layer2.0 has a convolution in its shortcut.
BRANCHES = [f"layer1.{number}.conv2" for number in range(3)] + ["layer2.1.conv2", "layer2.2.conv2"]


def images(num: int = 2, *, size: int = 8) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(num))


def task_of(x: Tensor) -> Task:
    return dataclasses.replace(tiny.task(), example_inputs=(x,))


def trained(network: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorms as after training, away from their neutral start."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.2, 2)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return trained(CifarResNet(14, width=64, num_stages=2, projection=True))


def plan_of(network: nn.Module, density: float, *, reorder: bool = True) -> PruningPlan:
    graph = trace(network, images())
    return ResidualSubset(density=density, reorder=reorder)(graph, WHOLE, task_of(images()))


def order_of(network: nn.Module, plan: PruningPlan, name: str) -> Tensor:
    """Which channel came to each position, told by the rows of a layer that writes them."""
    old = network.get_parameter(name).detach()
    return torch.stack([(old == row).flatten(1).all(1).nonzero().squeeze() for row in plan.weights[name]])


def folded(network: nn.Module, name: str) -> Tensor:
    """A branch's filters with the BatchNorm behind them in them, [C, D]."""
    path = name.replace("conv", "bn")
    gamma, variance = network.get_parameter(f"{path}.weight"), network.get_buffer(f"{path}.running_var")
    filters = network.get_parameter(f"{name}.weight").flatten(1)
    return (filters * (gamma / (variance + 1e-5).sqrt())[:, None]).detach()


# -- which branches


class Residual(nn.Module):
    """A stem, one block whose pieces may be replaced, and a head."""

    def __init__(self, *, last: nn.Module | None = None, channels: int = 64) -> None:
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 16, 1)
        self.last = last or nn.Conv2d(16, channels, 3, padding=1)
        self.head = nn.Linear(channels, 5)

    def branch(self, stream: Tensor) -> Tensor:
        out: Tensor = self.last(relu(self.reduce(stream)))
        return out

    def forward(self, x: Tensor) -> Any:
        stream = relu(self.stem(x))
        return self.head(relu(stream + self.branch(stream)).mean((2, 3)))


class InPlace(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = self.stem(x).relu_()
        out = self.branch(stream)
        out += stream
        return self.head(out.relu_().mean((2, 3)))


class Negative(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = self.stem(x)
        return self.head(relu(stream + self.branch(stream)).mean((2, 3)))


class Linear(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = relu(self.stem(x))
        return self.head((stream + self.branch(stream)).mean((2, 3)))


class ReadLater(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = relu(self.stem(x))
        return self.head((relu(stream + self.branch(stream)) + stream).mean((2, 3)))


class Returned(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = relu(self.stem(x))
        return self.head(relu(stream + self.branch(stream)).mean((2, 3))), stream


class SumReadTwice(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = relu(self.stem(x))
        total = stream + self.branch(stream)
        return self.head((relu(total) + total).mean((2, 3)))


class Scaled(Residual):
    def branch(self, stream: Tensor) -> Tensor:
        out = super().branch(stream)
        return out * out.mean((2, 3), keepdim=True).sigmoid()


class ReadsItself(Residual):
    def branch(self, stream: Tensor) -> Tensor:
        out: Tensor = self.last(stream)
        return out


class Pooled(Residual):
    def forward(self, x: Tensor) -> Any:
        stream = avg_pool2d(relu(self.stem(x)), 2)
        return self.head(relu(stream + self.branch(stream)).mean((2, 3)))


def _normed(*, affine: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64, affine=affine))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: CifarResNet(14, width=64, num_stages=2, projection=True), BRANCHES),
        (Residual, ["last"]),
        (InPlace, ["last"]),
        (lambda: Residual(last=_normed()), ["last.0"]),
        (lambda: Residual(last=_normed(affine=False)), ["last.0"]),
        (lambda: Residual(last=nn.Conv2d(16, 64, 1, groups=2)), []),
        (lambda: ReadsItself(last=nn.Conv2d(64, 64, 3, padding=1)), []),
        *((make, []) for make in (Negative, Linear, ReadLater, Returned, SumReadTwice, Scaled, Pooled)),
        (lambda: WideResNet(10, 4), []),  # no ReLU behind the sum
    ],
)
def test_branches_are_convolutions_added_between_two_relus(make: Callable[[], nn.Module], expected: list[str]) -> None:
    assert [layer.name for layer in branches(recorded(make().eval(), images()))] == expected


def test_every_branch_that_is_found_can_run_in_place_and_no_other() -> None:
    for make in (Residual, InPlace, Negative, ReadLater, Returned, SumReadTwice, Scaled, Pooled):
        network = make().eval()
        with torch.no_grad():
            for name in ("last.weight", "last.bias"):
                network.get_parameter(name)[32:] = 0
        found = bool(branches(recorded(network, images())))
        fast = accelerate(network, (images(),), backend="sparse")
        assert found == any(isinstance(module, modules.ResidualSubset) for module in fast.modules()), make


def test_streams_that_are_a_part_of_wider_ones_or_fill_no_groups_stay_whole() -> None:
    padded = trained(CifarResNet(14, width=32, num_stages=2))  # shortcuts that fill up with zeros
    plan = plan_of(padded, 0.5)
    assert {name for name in plan.nonzero if "conv" in name} == {f"layer1.{number}.conv2.weight" for number in range(3)}
    with pytest.raises(BudgetError, match="no branch of this network ends in a convolution that is added to a stream"):
        plan_of(Residual(channels=40), 0.5)


def test_channels_whose_numbers_matter_stay_in_their_order() -> None:
    class Numbers(Residual):
        def forward(self, x: Tensor) -> Any:
            stream = relu(self.stem(x))
            features = relu(stream + self.branch(stream)).mean((2, 3))
            return self.head(features), features.argmax(1)

    graph = trace(Numbers().eval(), images(), renormalise=True)
    assert any(group.residual for group in graph.groups)
    with pytest.raises(BudgetError, match="no branch of this network"):
        ResidualSubset(density=0.5)(graph, WHOLE, task_of(images()))


# -- what the plan says


@pytest.mark.parametrize("reorder", [True, False])
def test_the_small_network_is_the_dense_one_without_some_channels_of_its_branches(
    network: nn.Module, reorder: bool
) -> None:
    plan = plan_of(network, 0.5, reorder=reorder)
    small = compact(network, plan).double()
    reference = compact(network, PruningPlan()).double()
    for name in BRANCHES:
        dropped = ~plan.nonzero[f"{name}.weight"].flatten(1).any(1)
        if reorder:
            writer = "conv1.weight" if name.startswith("layer1") else "layer2.0.conv2.weight"
            order = order_of(network, plan, writer)
            assert sorted(order.tolist()) == list(range(len(order)))
            assert not torch.equal(order, torch.arange(len(order)))
            dropped = torch.zeros_like(dropped).index_copy(0, order, dropped)
        norm = reference.get_submodule(name.replace("conv", "bn"))
        norm.register_forward_hook(lambda _, __, out, gone=dropped: out.masked_fill(gone[:, None, None], 0))
    x = images(3).double()
    torch.testing.assert_close(small(x), reference(x), rtol=1e-12, atol=1e-12)
    assert (small(x) - network.double()(x)).abs().max() > 1e-3
    network.float()


def test_each_branch_keeps_its_strongest_groups_and_only_whole_ones(network: nn.Module) -> None:
    plan = plan_of(network, 0.25, reorder=False)
    for name in BRANCHES:
        mask = plan.nonzero[f"{name}.weight"].flatten(1)
        groups = mask.view(-1, 16 * mask.shape[1])
        assert torch.equal(groups.any(1), groups.all(1))
        strongest = folded(network, name).square().sum(1).view(-1, 16).sum(1).topk(len(groups) // 4).indices
        assert sorted(strongest.tolist()) == groups.all(1).nonzero().flatten().tolist()
    assert plan.nonzero.keys() == {
        f"{name.replace('conv', layer)}.{leaf}"
        for name in BRANCHES
        for layer, leaf in (("conv", "weight"), ("bn", "weight"), ("bn", "bias"))
    }


def test_order_lets_branches_keep_more_and_the_files_hold_it(network: nn.Module, tmp_path: Path) -> None:
    kept = []
    for reorder in (False, True):
        plan = plan_of(network, 0.5, reorder=reorder)
        plan.save(tmp_path / "plan.json", tmp_path / "plan.safetensors")
        small = compact(network, PruningPlan.load(tmp_path / "plan.json", tmp_path / "plan.safetensors"))
        assert certify(network, plan, small, images()).holds
        kept.append(sum(float(folded(small, name).square().sum()) for name in BRANCHES))
    assert kept[1] > 1.1 * kept[0]


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_accelerate_runs_every_pruned_branch_in_place(network: nn.Module, density: float) -> None:
    small, x = compact(network, plan_of(network, density)), images(4)
    fast = accelerate(small, (x,), backend="sparse")
    found = {
        name.rpartition(".")[0]: module
        for name, module in fast.named_modules()
        if isinstance(module, modules.ResidualSubset)
    }
    assert list(found) == BRANCHES
    for module in found.values():
        assert len(module.out_groups) == density * module.num_out / 16
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


def test_resnet50_has_twelve_branches_and_all_run_in_place() -> None:
    torch.manual_seed(0)
    network, x = trained(torchvision.models.resnet50(weights=None)), images(size=64)
    plan = ResidualSubset()(trace(network, x), Budget.parse("nonzero<=0.92x"), task_of(x))
    small = compact(network, plan)
    fast = accelerate(small, (x,), backend="sparse")
    found = [module for module in fast.modules() if isinstance(module, modules.ResidualSubset)]
    assert [module.num_out for module in found] == [256] * 2 + [512] * 3 + [1024] * 5 + [2048] * 2
    shares = [16 * len(module.out_groups) / module.num_out for module in found]
    assert max(shares) - min(shares) < 1 / 16
    torch.testing.assert_close(fast(x), small(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: _normed(affine=False), lambda: nn.Conv2d(16, 64, 1), _normed])
def test_what_a_branch_leaves_out_stays_exactly_zero_in_training(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = trained(Residual(last=make()))
    plan = plan_of(network, 0.5)
    small = compact(network, plan).train()
    network_with_zeros = ZerosStay(small, plan.nonzero)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        network_with_zeros(images(4 + step)).square().sum().backward()
        optimizer.step()
    out = small.eval().get_submodule("last")(torch.randn(2, 16, 8, 8))
    (weight,) = (mask for mask in plan.nonzero.values() if mask.dim() == 4)
    gone = ~weight.flatten(1).any(1)
    assert int(gone.sum()) == 32
    assert not out[:, gone].any()
    assert out[:, ~gone].flatten(2).any(2).all()


# -- how much is kept


@pytest.mark.parametrize("limit", [0.95, 0.85, 0.75])
def test_the_largest_share_that_meets_the_budget_is_taken(network: nn.Module, limit: float) -> None:
    graph = trace(network, images())
    plan = ResidualSubset()(graph, Budget.parse(f"nonzero<={limit}x"), task_of(images()))
    small, total = compact(network, plan), num_nonzero(graph)
    assert num_nonzero(trace(small, images())) <= limit * total
    kept = {name: float(mask.float().mean()) for name, mask in plan.nonzero.items() if mask.dim() == 4}
    sizes = {name: weight.numel() for name, weight in prunable_weights(graph).items()}
    streams = {name: 4 if name.startswith("layer1") else 8 for name in kept}  # groups
    shares = [number / 8 for number in range(1, 9)]
    (share,) = {
        share for share in shares if all(int(share * streams[name]) / streams[name] == kept[name] for name in kept)
    }
    wider = {name: int((share + 1 / 8) * num) / num for name, num in streams.items()}
    assert sum(size * wider.get(name, 1.0) for name, size in sizes.items()) > limit * total


def test_the_density_is_a_ceiling_and_the_budget_may_leave_less(network: nn.Module) -> None:
    graph, task = trace(network, images()), task_of(images())
    both = [ResidualSubset(density=density)(graph, Budget.parse("nonzero<=0.85x"), task) for density in (0.25, 1.0)]
    kept = [sum(int(mask.sum()) for mask in plan.nonzero.values()) for plan in both]
    assert kept[0] < kept[1]
    least = ResidualSubset(density=1e-6)(graph, WHOLE, task)
    assert {int(mask.flatten(1).any(1).sum()) for name, mask in least.nonzero.items() if "conv" in name} == {16}


def test_impossible_wishes_are_named(network: nn.Module) -> None:
    graph, task = trace(network, images()), task_of(images())
    with pytest.raises(BudgetError, match=r"below the floor of .* 5 residual branches are down to 16 channels each"):
        ResidualSubset()(graph, Budget.parse("nonzero<=0.3x"), task)
    with pytest.raises(BudgetError, match="counts channels"):
        ResidualSubset()(graph, Budget.parse("macs<=0.5x"), task)
    with pytest.raises(UsageError, match="needs a task, whose example inputs"):
        ResidualSubset()(graph, Budget.parse("nonzero<=0.9x"), None)
    for density in (0.0, 1.5):
        with pytest.raises(UsageError, match=r"density must lie in \(0, 1\]"):
            ResidualSubset(density=density)
    broken = trained(Residual())
    nn.init.constant_(broken.get_parameter("last.weight"), torch.nan)
    with pytest.raises(PlanError, match=r"last\.weight: filters and BatchNorms must be finite"):
        plan_of(broken, 0.5)


# -- clustering


def test_shuffled_groups_are_found_again() -> None:
    torch.manual_seed(0)
    needs_BG = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1]]).double()
    importance_BC = needs_BG.repeat_interleave(16, 1)[:, torch.randperm(128)]
    assert kept_importance(importance_BC, 4) < 0.7 * 3 * 64
    assert kept_importance(importance_BC[:, clustered(importance_BC, 4)], 4) == 3 * 64


@pytest.mark.parametrize(("num_branches", "num_channels", "least"), [(2, 256, 0.99), (5, 512, 0.98), (8, 64, 0.8)])
def test_almost_as_much_is_kept_as_if_channels_were_free(num_branches: int, num_channels: int, least: float) -> None:
    generator = torch.Generator().manual_seed(0)
    importance_BC = torch.randn(num_branches, num_channels, generator=generator).double().exp()
    order_C = clustered(importance_BC, num_channels // 32)
    assert torch.equal(order_C.sort().values, torch.arange(num_channels))
    kept = kept_importance(importance_BC[:, order_C], num_channels // 32)
    free = float(importance_BC.topk(num_channels // 2, 1).values.sum())
    assert kept_importance(importance_BC, num_channels // 32) < 0.8 * free
    assert least * free < kept <= free


def test_no_order_is_worse_than_none() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        importance_BC = torch.randn(3, 64, generator=generator).double().square()
        for num_kept in (1, 2, 3, 4):
            kept = kept_importance(importance_BC[:, clustered(importance_BC, num_kept)], num_kept)
            assert kept >= kept_importance(importance_BC, num_kept)
