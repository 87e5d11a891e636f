"""Column-subset selection against subsets that were tried one by one, and channels that are known mixtures."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.errors import UsageError
from sparsekit.graph import trace
from sparsekit.plan import PruningPlan
from sparsekit.pruners.column_subset import ColumnSubset, best_subset, rebuilding
from sparsekit.task import Task
from tests import tiny


def loss(moment: Tensor, metric: Tensor, keep: Tensor) -> float:
    """|(X - X_S A) W|^2 for the best A, from scratch."""
    left = torch.eye(len(moment), dtype=moment.dtype) - rebuilding_by_hand(moment, keep)
    return float(torch.trace(metric @ left @ moment @ left.T))


def rebuilding_by_hand(moment: Tensor, keep: Tensor) -> Tensor:
    """[C, C], zero where a column's channel is gone."""
    whole = torch.zeros_like(moment)
    whole[:, keep] = moment[:, keep] @ torch.linalg.inv(moment[keep][:, keep])
    return whole


def problem(size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    w = torch.randn(size, 3, generator=generator).double()
    return x.double().T @ x.double(), w @ w.T


@pytest.mark.parametrize("seed", range(5))
def test_every_elimination_drops_the_channel_whose_loss_after_repair_is_least(seed: int) -> None:
    moment, metric = problem(6, seed=seed)
    keep = torch.ones(6, dtype=torch.bool)
    for count in range(5, 0, -1):
        losses = torch.full((6,), torch.inf)
        for channel in keep.nonzero().flatten():
            without = keep.clone()
            without[channel] = False
            losses[channel] = loss(moment, metric, without)
        keep[losses.argmin()] = False
        assert torch.equal(best_subset(moment, metric, count), keep), count


def test_elimination_beats_most_subsets() -> None:
    """Greedy is not optimal: of the 70 subsets of 4 in 8 it mostly finds the best and always a good one."""
    places = []
    for seed in range(20):
        moment, metric = problem(8, seed=seed)
        masks = [torch.isin(torch.arange(8), torch.tensor(chosen)) for chosen in combinations(range(8), 4)]
        own = loss(moment, metric, best_subset(moment, metric, 4))
        places.append(sum(loss(moment, metric, mask) < own * (1 - 1e-9) for mask in masks))
    assert places.count(0) > 10
    assert max(places) < 14


def test_channels_are_rebuilt_by_least_squares() -> None:
    moment, _ = problem(6, seed=0)
    keep = torch.tensor([True, False, True, True, False, False])
    expected = rebuilding_by_hand(moment, keep)[:, keep]
    torch.testing.assert_close(rebuilding(moment, keep), expected)
    assert torch.equal(rebuilding(moment, keep)[keep], torch.eye(3).double())


class Twins(nn.Module):
    """Eight channels of which the loud half is a mixture of the quiet one, read by two layers."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.make = nn.Conv2d(4, 8, 1, bias=False)
        self.read = nn.Linear(8 * 16, 5) if flat else nn.Conv2d(8, 6, 3, padding=1)
        self.also = nn.Conv2d(8, 6, 1)
        with torch.no_grad():
            self.make.weight[4:] = 10 * torch.einsum("ok,kihw->oihw", torch.randn(4, 4), self.make.weight[:4])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.make(x)
        return self.read(x.flatten(1) if isinstance(self.read, nn.Linear) else x), self.also(x)


def images_task(images: Tensor) -> Task:
    return replace(
        tiny.task(), example_inputs=(images[:2],), batches=lambda epoch: [(images, torch.zeros(len(images)))]
    )


@pytest.mark.parametrize("flat", [False, True])
def test_a_network_with_redundant_channels_loses_nothing(flat: bool) -> None:
    torch.manual_seed(0)
    network, images = Twins(flat=flat).double(), torch.randn(32, 4, 4, 4, dtype=torch.float64)
    graph, task = trace(network, images[:2]), images_task(images)
    budget = Budget.parse("make=0.5")
    plan = ColumnSubset(ridge=1e-9)(graph, budget, task)
    assert plan.kept == {"make": 4}
    small = compact(network, plan)
    assert certify(network, plan, small, images[:2]).holds
    for got, expected in zip(small(images), network(images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    bare = ColumnSubset(ridge=1e-9, repair=False)(graph, budget, task)
    assert not bare.merge
    assert torch.equal(*[next(iter(chosen.keep.values())) for chosen in (plan, bare)])
    assert (compact(network, bare)(images)[1] - network(images)[1]).abs().max() > 0.1


def test_a_channel_that_no_reader_uses_goes_first_however_loud() -> None:
    torch.manual_seed(0)
    make, read = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2)
    network = nn.Sequential(make, nn.ReLU(), read, nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        make.weight[[1, 4]] *= 100
        read.weight[:, 1] = 0  # channel 1 of the first conv group, channel 4 of the second
    images = torch.randn(16, 3, 5, 5)
    graph = trace(network, images[:2])
    (group,) = [group for group in graph.groups if group.name == "0"]
    (keep,) = ColumnSubset()(graph, Budget.parse("0=0.67"), images_task(images)).keep.values()
    assert group.size in (3, 6)
    expected = torch.ones(group.size, dtype=torch.bool)
    expected[1::3] = False
    assert torch.equal(keep, expected)


def test_a_channel_that_any_reader_needs_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            with torch.no_grad():
                self.first.weight[:, 1:] = 0
                self.second.weight[:, :2] = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.make(x)
            return self.first(x), self.second(x)

    torch.manual_seed(0)
    network, images = Two(), torch.randn(64, 4)
    (keep,) = ColumnSubset()(trace(network, images[:2]), Budget.parse("make=0.75"), images_task(images)).keep.values()
    assert keep.tolist() == [True, False, True, True]


def test_statistics_come_from_the_first_images_in_eval_mode_without_labels_and_the_network_stays() -> None:
    class Secret:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("a label was read")

    torch.manual_seed(0)
    network = tiny.network().train()
    secret: Any = Secret()
    task = replace(tiny.task(), batches=lambda epoch: ((inputs, secret) for inputs, _ in tiny.task().batches(epoch)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    graph, budget = trace(network, task.example_inputs), Budget.parse("conv1=0.5")
    plan = ColumnSubset(num_images=20)(graph, budget, task)
    images = torch.cat([inputs for inputs, _ in tiny.task().batches(0)])
    same = ColumnSubset()(graph, budget, images_task(images[:20]))
    assert_alike(plan, same)
    assert_alike(plan, ColumnSubset(num_images=20)(trace(copy.deepcopy(network).eval(), images[:2]), budget, task))
    other = ColumnSubset()(graph, budget, images_task(images[20:40]))
    assert not torch.allclose(next(iter(plan.merge.values())), next(iter(other.merge.values())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training


def assert_alike(a: PruningPlan, b: PruningPlan) -> None:
    for one, other in ((a.keep, b.keep), (a.merge, b.merge)):
        torch.testing.assert_close([*one.values()], [*other.values()], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused_in_words() -> None:
    network, images = tiny.network(), tiny.task().example_inputs[0]
    graph = trace(network, images)
    with pytest.raises(UsageError, match="column_subset: looks at activations and needs data"):
        ColumnSubset()(graph, Budget.parse("keep=0.5"), None)
    with pytest.raises(UsageError, match=r"num_images must be at least 1 and ridge above 0, got 0, 0.001"):
        ColumnSubset(num_images=0)
    assert not ColumnSubset()(graph, Budget.parse("keep=1"), tiny.task()).keep


def test_channels_that_no_layer_reads_are_named() -> None:
    class Raw(nn.Module):
        """Reads with a product of batches of matrices, not with one matrix for all."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 6), nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nc,co->no", self.make(x), self.read)

    network, images = Raw(), torch.randn(8, 3)
    with pytest.raises(UsageError, match="column_subset: no layer that runs reads group 'make'"):
        ColumnSubset()(trace(network, images), Budget.parse("make=0.5"), images_task(images))


def test_attention_is_read_where_no_module_is_called() -> None:
    """Each head's values are read by the weights of the output projection, a parameter that is used as a tensor."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(x, x, x)[0].mean(1))
            return out

    torch.manual_seed(0)
    network, images = Attention().eval(), torch.randn(40, 5, 8)
    with torch.no_grad():  # what the second head makes is half of what the first one does
        weight, bias = network.inner.in_proj_weight, network.inner.in_proj_bias
        for part in (0, 8):
            weight[part + 4 : part + 8], bias[part + 4 : part + 8] = weight[part : part + 4], bias[part : part + 4]
        weight[20:24], bias[20:24] = weight[16:20] / 2, bias[16:20] / 2
    graph = trace(network, images[:2])
    (heads,) = (group for group in graph.groups if group.size == 2)
    plan = ColumnSubset(ridge=1e-9)(graph, Budget.parse(f"{heads.name}=0.5"), images_task(images))
    torch.testing.assert_close(plan.merge[heads][~plan.keep[heads]], torch.full((1, 1), 0.5), rtol=1e-3, atol=0)
    small = compact(network, plan, images[:2])
    torch.testing.assert_close(small(images), network(images), rtol=1e-3, atol=1e-4)
