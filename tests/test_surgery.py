"""Copies and cuts of modules that keep more than parameters: caches, computed weights, references to each other."""

from __future__ import annotations

import copy
from typing import NoReturn, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from sparsekit.compaction import certify, compact
from sparsekit.copying import copy_module
from sparsekit.graph import trace
from sparsekit.plan import PruningPlan
from sparsekit.selection import keep_top

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Cached(nn.Module):
    """Keeps what it computed from a parameter, until training begins, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.bias = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        result: Tensor = self.b(torch.relu(self.a(x) + self.cache["bias"]))
        return result


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_module_keeps_from_an_earlier_pass_is_not_cut_stale(grad: bool) -> None:
    torch.manual_seed(0)
    network = Cached().eval()
    with torch.set_grad_enabled(grad):
        network(X)
    graph = trace(network, X)
    plan = keep_top({group: torch.rand(group.size) for group in graph.groups}, {graph.groups[0]: 3})
    small = compact(network, plan)
    assert certify(network, plan, small, X).holds
    assert list(network.cache) == ["bias"]
    assert network.cache["bias"].shape == (1, 8, 1, 1)


def computing(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for number in (0, 2):
        if kind == "spectral":
            parametrizations.spectral_norm(network[number])
        elif kind == "spectral hook":
            spectral_norm(network[number])
        elif kind == "weight":
            parametrizations.weight_norm(network[number])
        else:
            prune.random_unstructured(network[number], "weight", 0.5)
    return network


@pytest.mark.parametrize("kind", ["spectral", "spectral hook", "weight", "pruned"])
def test_computed_weights_are_cut_as_they_are_and_the_model_keeps_computing_its_own(kind: str) -> None:
    network = computing(kind)
    network(X)  # leaves an activation behind where a hook makes the weight
    network.eval()
    before, output = sorted(network.state_dict()), network(X)
    graph = trace(network, X)
    plan = keep_top({group: torch.arange(8.0) for group in graph.groups}, {graph.groups[0]: 3})
    small = compact(network, plan)
    assert small.get_parameter("0.weight").shape == (3, 3, 3, 3)
    assert certify(network, plan, small, X).holds
    assert sorted(network.state_dict()) == before
    torch.testing.assert_close(network(X), output)
    assert sorted(compact(network, PruningPlan()).state_dict()) == before


class Tangled(nn.Module):
    """Modules that refer to each other, share a parameter and hold odd things."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.order = [self.b, self.a]
        self.again = self.run
        self.names = {"a", "b"}
        self.rnn = nn.GRU(4, 4)
        self.register_buffer("odd", torch.arange(8.0)[::2])

    def run(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        result: Tensor = self.rnn(x)[0] * self.get_buffer("odd")
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x)


def test_a_copy_is_a_deep_copy() -> None:
    network = Tangled()
    twin = copy_module(network, {})
    assert isinstance(twin, Tangled)
    reference = copy.deepcopy(network)
    x = torch.randn(3, 4)
    torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
    assert twin.b.weight is twin.a.weight is not network.a.weight
    assert twin.order == [twin.b, twin.a]
    assert twin.names is not network.names
    with torch.no_grad():
        twin.a.weight.fill_(0)
    torch.testing.assert_close(network(x), reference(x), rtol=0, atol=0)
    assert not torch.equal(twin(x), network(x))
    replaced = copy_module(network, {id(network.a.weight): nn.Parameter(torch.ones(4, 4))})
    assert isinstance(replaced, Tangled)
    assert replaced.b.weight.sum() == 16


def test_a_part_that_copies_itself_is_copied_after_its_own_parts() -> None:
    compiled = cast(nn.Module, torch.compile(_part(), backend=_never_compiles))
    small = _halved(nn.Sequential(compiled))
    assert type(small.get_submodule("0")) is type(compiled)


def test_a_part_compiled_in_place_is_copied_as_it_was_written() -> None:
    model = nn.Sequential(_part())
    model[0].compile(backend=_never_compiles)
    assert _halved(model)(X).shape == (2, 2, 8, 8)


def _part() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def _never_compiles(*_: object) -> NoReturn:
    raise AssertionError("nothing is compiled to record a pass")


def _halved(model: nn.Module) -> nn.Module:
    (group,) = trace(model.eval(), X).groups
    small = compact(model, keep_top({group: torch.rand(4)}, {group: 2}))
    assert [list(parameter.shape) for parameter in small.parameters()] == [[2, 3, 1, 1], [2], [2, 2, 1, 1], [2]]
    return small
