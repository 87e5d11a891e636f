"""Recovery without labels, each step against the same numbers computed another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.compaction import compact
from sparsekit.errors import QualityError, UsageError
from sparsekit.graph import trace
from sparsekit.plan import PruningPlan
from sparsekit.recovery import agreement, recover, reestimate_batchnorm, repair_bias, unlabelled
from sparsekit.recovery.distillation import distill
from sparsekit.recovery.layers import Layer, batch_norms_of, layers_of
from sparsekit.recovery.least_squares import NormalEquations, reconstruct
from sparsekit.recovery.lockstep import recorded, visit
from sparsekit.recovery.receptive_fields import (
    as_matrices,
    num_features,
    num_outputs,
    num_positions,
    rows,
    write_matrices,
)
from sparsekit.recovery.synthesis import synthesise_inputs
from sparsekit.recovery.units import Unit, units
from tests import tiny

assert_recovered = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # float64, a ridge of 1e-9


class Stream(nn.Module):
    """A residual stream of 6 channels, strides, conv groups, a depthwise layer, and a head over all its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.expand_norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(6 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.expand_norm(self.expand(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(y)))
        x = F.max_pool2d(x, 2) + self.project(y)
        x = x + self.grouped(x)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def network_and_images(num_images: int = 24) -> tuple[nn.Module, Tensor]:
    """In float64, in training mode, its statistics away from their neutral start; images with a spatial structure."""
    torch.manual_seed(0)
    network = Stream().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = F.avg_pool2d(torch.randn(num_images, 3, 8, 8, dtype=torch.float64), 3, 1) * 3
    reestimate_batchnorm(network, images)
    return network, images


def halved(network: nn.Module, images: Tensor, names: tuple[str, ...] = ("expand",)) -> tuple[nn.Module, PruningPlan]:
    """Every second channel of the named groups cut away."""
    groups = [group for group in trace(network, images[:2]).groups if group.name in names]
    plan = PruningPlan({group: torch.arange(group.size) % 2 == 0 for group in groups})
    return compact(network, plan), plan


def units_of(dense: nn.Module, small: nn.Module, plan: PruningPlan, images: Tensor) -> list[Unit]:
    return units(recorded(dense, images[:2]), recorded(small, images[:2]), plan)


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


# --- Passes in lockstep


def test_a_weight_that_is_changed_at_a_stop_counts_for_every_batch() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid(), nn.Linear(1, 1, bias=False))
    batches = [torch.ones(1, 1), torch.full((2, 1), 2.0), torch.full((1, 1), 3.0)]
    program = recorded(network, batches[0])
    first, second = layers_of(program)
    stops = [(first.step, first.input), (second.step, second.input), (second.end, second.output)]
    seen = []
    for number, runs in enumerate(visit(program, batches, [moment for moment, _ in stops])):
        if number < 2:
            nn.init.constant_(network.get_submodule(("0", "2")[number]).get_parameter("weight"), number + 2.0)
        seen.append([run.tensors[stops[number][1]].flatten() for run in runs])
    torch.testing.assert_close(seen[0], [batch.flatten() for batch in batches])
    torch.testing.assert_close(seen[1], [(2 * batch).sigmoid().flatten() for batch in batches])
    torch.testing.assert_close(seen[2], [3 * (2 * batch).sigmoid().flatten() for batch in batches])


def test_a_recording_has_the_networks_own_tensors_and_a_program_is_its_own_recording() -> None:
    network, images = network_and_images()
    program = recorded(network, images[:2])
    ours = dict(program.named_parameters()) | dict(program.named_buffers())
    theirs = dict(network.named_parameters()) | dict(network.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is value for name, value in theirs.items())
    assert recorded(program, images[:2]) is program


# --- Layers in recordings


def test_layers_are_found_by_their_products_with_biases_norms_and_streams() -> None:
    class Many(nn.Module):
        """One layer of each kind, among things that are none."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.blur = nn.Buffer(torch.rand(4, 1, 3, 3))
            self.rows, self.plain, self.idle = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.matrix, self.shift = nn.Parameter(torch.rand(4, 5)), nn.Parameter(torch.rand(5))
            self.table, self.twice, self.scaled = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 4)
            self.scale, self.last = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(4, 4))
            self.norm_twice = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(torch.relu_(self.norm(self.conv(x))), self.blur, padding=1, groups=4)
            y = x.movedim(1, -1)  # not contiguous, where torch adds the bias behind the product
            self.idle(y)
            y = y + self.rows(y)
            y = y + self.plain(y).roll(1, 2).flip(0)  # flipping is none of the moves that are followed
            z = y @ self.matrix + self.shift
            z = self.twice(self.twice(z)) + self.table(torch.ones(1, 2))
            z = F.linear(z, self.scale * self.scaled.weight, self.scaled.bias).flatten(0, 2)
            z = torch.addmm(z, z, self.last, beta=2).view(-1, 6, 4)
            out: Tensor = self.norm_twice(self.norm_twice(z))
            return out

    program = recorded(Many(), torch.randn(2, 3, 6, 6))
    found = {layer.name: layer for layer in layers_of(program)}
    assert list(found) == ["conv", "rows", "plain", "matrix", "twice", "scaled"]
    assert {name: layer.bias for name, layer in found.items()} == {
        **{"conv": None, "rows": "rows.bias", "plain": None, "matrix": "shift", "twice": "twice.bias"},
        "scaled": "scaled.bias",
    }
    assert [name for name, layer in found.items() if not layer.is_plain] == ["twice", "scaled"]
    assert [name for name, layer in found.items() if layer.inputs_first] == ["matrix"]
    assert [name for name, layer in found.items() if layer.norm] == ["conv"]
    assert [name for name, layer in found.items() if layer.stream] == ["rows"]
    assert [norm.name for norm in batch_norms_of(program)] == ["norm"]


def test_a_batch_norm_over_the_positions_of_a_linear_layer_is_not_its_own() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.linear(x.mT))
            return out

    (layer,) = layers_of(recorded(Positions(), torch.randn(2, 4, 4)))
    assert layer.bias == "linear.bias"
    assert layer.norm is None


# --- Layers as matrices


class Product(nn.Module):
    """A linear layer whose weight is not turned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ self.weight + self.bias
        return out


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...] | None]] = {
    "padded": (nn.Conv2d(4, 6, 3, padding=1), (5, 7)),
    "strided and dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), dilation=(1, 2), padding=(2, 1)), (9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (5, 5)),
    "reflected": (nn.Conv2d(4, 2, 5, padding=2, padding_mode="reflect"), (6, 5)),
    "series": (nn.Conv1d(4, 3, 4, stride=2, padding=1), (11,)),
    "volume": (nn.Conv3d(4, 3, 2, padding=1), (3, 4, 2)),
    "transposed": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (4, 5)),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=1, groups=2, dilation=(1, 2)),
        (4, 3),
    ),
    "transposed series": (nn.ConvTranspose1d(4, 2, 3), (5,)),
    "linear": (nn.Linear(4, 3), None),
    "inputs first": (Product(), None),
}


def alone(module: nn.Module, x: Tensor) -> tuple[Layer, Tensor, Tensor]:
    """A module's only layer, its input and its output."""
    program = recorded(module, x)
    (layer,) = layers_of(program)
    (read,) = next(visit(program, [x], [layer.step]))
    (made,) = next(visit(program, [x], [layer.end]))
    return layer, read.tensors[layer.input], made.tensors[layer.output].detach()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_receptive_fields_times_its_matrix(name: str) -> None:
    torch.manual_seed(0)
    sizes = LAYERS[name][1]
    module: Any = copy.deepcopy(LAYERS[name][0]).double()
    layer, x, y = alone(module, torch.randn(3, *((5, 2, 4) if sizes is None else (4, *sizes)), dtype=torch.float64))
    chosen_NP = torch.randint(num_positions(layer, y, 3), (3, 4))
    read_GRF, made_GRO = rows(layer, module.weight, x, y, chosen_NP)
    product_GRO = read_GRF @ as_matrices(layer, module.weight)
    if module.bias is not None:
        product_GRO = product_GRO + module.bias.detach().view(len(made_GRO), 1, -1)
    assert made_GRO.abs().max() > 0.1
    torch.testing.assert_close(product_GRO, made_GRO)
    assert num_outputs(layer, module.weight) == len(made_GRO) * made_GRO.shape[2]
    assert num_features(layer, module.weight) == read_GRF.shape[2]
    before, matrices = module.weight.detach().clone(), as_matrices(layer, module.weight).clone()
    nn.init.zeros_(module.weight)
    write_matrices(layer, module.weight, matrices)
    assert torch.equal(module.weight, before)


def test_rows_are_the_patches_that_unfold_makes() -> None:
    module, images = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 6, 6)
    layer, x, y = alone(module, images)
    (read_RF,), (made_RO,) = rows(layer, module.weight, x, y, torch.arange(9).expand(2, -1))
    assert torch.equal(read_RF, F.unfold(images, 3, stride=2, padding=1).mT.flatten(0, 1))
    assert torch.equal(made_RO, y.flatten(2).mT.flatten(0, 1))


# --- Normal equations


@pytest.mark.parametrize("intercept", [True, False])
def test_normal_equations_give_the_least_squares_solution_in_any_number_of_parts(intercept: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 60, 5, dtype=torch.float64) + 1, torch.randn(2, 60, 3, dtype=torch.float64) - 2
    equations = NormalEquations.of(x[:, :7], y[:, :7]) + NormalEquations.of(x[:, 7:], y[:, 7:])
    weight, constant = equations.solve(torch.zeros(2, 5, 3), ridge=1e-12, intercept=intercept)
    for group in range(2):
        inputs = torch.cat([x[group], torch.ones(60, 1)], 1) if intercept else x[group]
        expected = torch.linalg.lstsq(inputs.double(), y[group]).solution
        torch.testing.assert_close(weight[group], expected[:5], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(constant[group], expected[5] if intercept else torch.zeros(3).double())


def test_ridge_draws_to_the_weight_before_and_dead_inputs_keep_theirs() -> None:
    x = torch.zeros(1, 10, 2)
    x[0, :, 0] = torch.arange(10.0)
    before = torch.tensor([[[7.0], [5.0]]])
    for ridge, expected in ((1e-9, 3.0), (1e9, 7.0)):
        weight, _ = NormalEquations.of(x, 3 * x[..., :1]).solve(before, ridge=ridge, intercept=True)
        torch.testing.assert_close(weight.flatten(), torch.tensor([expected, 5.0]).double(), rtol=1e-5, atol=0)
    weight, _ = NormalEquations.of(0 * x, x[..., :1]).solve(before, ridge=1e-3, intercept=True)
    assert weight.flatten().tolist() == [7, 5]


# --- Reconstruction


def redundant(network: nn.Module, name: str, norm: str | None) -> None:
    """Make every odd channel of a layer a mixture of the even ones, behind a BatchNorm that does nothing."""
    layer: Any = network.get_submodule(name)
    mixture = torch.rand(layer.out_channels // 2, layer.out_channels // 2, dtype=torch.float64) / 4
    with torch.no_grad():
        layer.weight[1::2] = torch.einsum("ok,k...->o...", mixture, layer.weight[::2])
        if norm:
            module: Any = network.get_submodule(norm)
            module.eps = 0.0
            for value, names in ((0.0, ("bias", "running_mean")), (1.0, ("weight", "running_var"))):
                for tensor in names:
                    getattr(module, tensor).fill_(value)


class Chain(nn.Module):
    """Three layers without a nonlinearity between them, so that mixtures stay mixtures."""

    def __init__(self, reader: nn.Module, norm: bool) -> None:
        super().__init__()
        self.make, self.make_norm = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.read, self.last = reader, nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make_norm(self.make(x))
        last = isinstance(self.read, nn.Linear)  # it wants channels last
        x = self.read(x.movedim(1, -1)).movedim(-1, 1) if last else self.read(x)
        out: Tensor = self.last(torch.relu(x))
        return out


READERS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "without a bias": lambda: nn.Conv2d(8, 6, 3, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2),
    "linear": lambda: nn.Linear(8, 6),
}


@pytest.mark.parametrize("norm", [True, False], ids=["norm between", "no norm"])
@pytest.mark.parametrize("reader", READERS)
def test_least_squares_recover_all_where_what_was_dropped_is_a_mixture_of_what_stays(reader: str, norm: bool) -> None:
    torch.manual_seed(0)
    network, images = Chain(READERS[reader](), norm).double().eval(), torch.randn(16, 2, 8, 8, dtype=torch.float64)
    redundant(network, "make", "make_norm" if norm else None)
    small, plan = halved(network, images, ("make",))
    assert small.get_submodule("make").get_parameter("weight").shape[0] == 4
    assert (small(images) - network(images)).abs().max() > 0.05
    done = reconstruct(network, small, plan, images, ridge=1e-9)
    assert done == ["make", "read", "last"]
    assert_recovered(small(images), network(images))


def test_a_grouped_reader_is_refitted_within_its_conv_groups() -> None:
    torch.manual_seed(0)
    network = Chain(nn.Conv2d(8, 6, 3, groups=2), norm=False).double().eval()
    images = torch.randn(16, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for odd in (1, 3, 5, 7):  # a mixture within its own conv group
            even = [0, 2] if odd < 4 else [4, 6]
            network.make.weight[odd] = network.make.weight[even].mean(0)
    small, plan = halved(network, images, ("make",))
    assert small.get_submodule("read").groups == 2
    reconstruct(network, small, plan, images, ridge=1e-9)
    assert_recovered(small(images), network(images))


def test_a_layer_gets_the_least_squares_fit_on_the_inputs_of_the_network_repaired_so_far() -> None:
    network, images = network_and_images()
    small, plan = halved(network, images)
    reconstruct(network, small, plan, images, ridge=1e-12)
    seen: dict[str, list[Tensor]] = {"small": [], "dense": []}
    for key, model in (("small", small), ("dense", network)):
        layer = model.get_submodule("head")
        layer.register_forward_hook(lambda _, args, output, key=key: seen[key].extend([args[0], output]))
        model.eval()(images)
    inputs = torch.cat([seen["small"][0], torch.ones(len(images), 1)], 1).double()
    expected = torch.linalg.lstsq(inputs, seen["dense"][1], driver="gelsd").solution
    torch.testing.assert_close(inputs @ expected, seen["small"][1], rtol=1e-4, atol=1e-4)


def test_what_the_stream_has_lost_is_made_up_for_by_the_next_layer_that_adds_to_it() -> None:
    """Both branches see the same inputs; the second can repair what the first was cut short of, and does."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.BatchNorm1d(4)
            self.second = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.narrow(self.wide(x))
            out: Tensor = y + self.norm(self.second(x))
            return out

    torch.manual_seed(0)
    network, x = Branches().double(), torch.randn(64, 4, dtype=torch.float64)
    reestimate_batchnorm(network, x)
    nn.init.uniform_(network.norm.weight, 0.5, 2.0)
    (group,) = [group for group in trace(network, x[:2]).groups if group.name == "wide"]
    keep = torch.arange(8) < 1  # of rank 1, where 4 are needed
    plan = PruningPlan({group: keep})
    small = compact(network, plan)
    (unit,) = [unit for unit in units_of(network, small, plan, x) if unit.name == "second"]
    assert unit.small.stream
    reconstruct(network, small, plan, x, ridge=1e-12)
    assert_recovered(small.eval()(x), network.eval()(x))


@pytest.mark.parametrize("step", [reconstruct, repair_bias])
def test_batches_of_any_size_repair_alike(step: Any) -> None:
    network, images = network_and_images(23)
    results = []
    for batch_size in (23, 8, 1):
        small, plan = halved(network, images, ("stem", "expand"))
        options = {"max_positions": 100} if step is reconstruct else {}
        step(network, small, plan, images, batch_size=batch_size, **options)
        results.append(state(small))
    pruned, _ = halved(network, images, ("stem", "expand"))
    assert any(not torch.equal(value, results[0][name]) for name, value in state(pruned).items())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-8)


def test_reconstruction_brings_every_structure_closer_and_leaves_the_dense_network_and_all_modes_alone() -> None:
    network, images = network_and_images()
    network.get_submodule("stem").eval()
    before, dense_modes = state(network), modes(network)
    small, plan = halved(network, images, ("stem", "expand"))
    small_modes = modes(small)

    def error() -> float:
        small_twin, dense_twin = copy.deepcopy(small).eval(), copy.deepcopy(network).eval()
        return float((small_twin(images) - dense_twin(images)).detach().square().mean())

    pruned = error()
    reestimate_batchnorm(small, images[:5])
    done = reconstruct(network, small, plan, images)
    assert done == ["stem", "expand", "depthwise", "project", "grouped", "head"]
    assert error() < pruned / 4
    for unit in units_of(network, small, plan, images)[:3]:
        for name in ("weight", "bias", "running_var"):
            ours, theirs = (getattr(model.get_submodule(f"{unit.name}_norm"), name) for model in (small, network))
            assert torch.equal(ours, theirs[unit.kept]), "a BatchNorm is to see what it was trained for"
    assert (modes(network), modes(small)) == (dense_modes, small_modes)
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())


def test_layers_that_are_too_wide_shared_or_meant_to_have_zeros_stay_as_they_are() -> None:
    network, images = network_and_images()
    assert "head" not in reconstruct(network, copy.deepcopy(network), PruningPlan(), images, max_features=53)
    zeros = PruningPlan(nonzero={"project.weight": torch.rand(6, 8, 1, 1) > 0.5})
    assert "project" not in reconstruct(network, compact(network, zeros), zeros, images)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    tied[1].weight = tied[0].weight
    assert reconstruct(tied, copy.deepcopy(tied), PruningPlan(), torch.randn(8, 3)) == ["2"]
    twice = nn.Sequential(tied[2], nn.Linear(2, 3), tied[2])
    assert reconstruct(twice, copy.deepcopy(twice), PruningPlan(), torch.randn(8, 3)) == ["1"]


def test_a_ridge_of_zero_is_refused() -> None:
    network, images = network_and_images()
    with pytest.raises(UsageError, match="ridge must be above 0, got 0"):
        reconstruct(network, network, PruningPlan(), images, ridge=0.0)


# --- BatchNorm re-estimation


@pytest.mark.parametrize("batch_size", [24, 7])
def test_reestimated_statistics_are_those_of_all_images_and_modes_stay(batch_size: int) -> None:
    network, images = network_and_images()
    network.get_submodule("expand_norm").eval()
    small, _ = halved(network, images)
    before = modes(small)
    assert reestimate_batchnorm(small, images, batch_size=batch_size) == ["stem_norm", "expand_norm", "depthwise_norm"]
    assert modes(small) == before
    assert len(set(before)) == 2
    x = images
    small.eval()
    for layer, norm in (("stem", "stem_norm"), ("expand", "expand_norm"), ("depthwise", "depthwise_norm")):
        x = small.get_submodule(layer)(x)
        module = small.get_submodule(norm)
        torch.testing.assert_close(module.get_buffer("running_mean"), x.mean((0, 2, 3)))
        torch.testing.assert_close(module.get_buffer("running_var"), x.transpose(0, 1).flatten(1).var(1))
        x = torch.relu(module(x))


# --- Bias repair


def test_repaired_outputs_have_the_dense_means_through_the_whole_network() -> None:
    network, images = network_and_images()
    small, plan = halved(network, images, ("stem", "expand"))
    names = ["stem_norm", "expand_norm", "depthwise_norm", "project", "grouped", "head"]

    def means(model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        twin = copy.deepcopy(model).eval()
        for name in names:

            def note(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                found[name] = output.detach().transpose(0, 1).flatten(1).mean(1)

            twin.get_submodule(name).register_forward_hook(note)
        twin(images)
        return found

    expected = means(network)
    for unit in units_of(network, small, plan, images):
        end = unit.small.norm.name if unit.small.norm else unit.name
        expected[end] = expected[end][unit.kept]
    assert any((value - expected[name]).abs().max() > 0.01 for name, value in means(small).items())
    weights = {name: value for name, value in state(small).items() if name.endswith(".weight")}
    assert repair_bias(network, small, plan, images) == ["stem", "expand", "depthwise", "project", "grouped", "head"]
    torch.testing.assert_close(means(small), expected)
    assert all(torch.equal(state(small)[name], value) for name, value in weights.items())


def test_units_may_end_in_another_order_than_they_begin() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm_a, self.norm_b = nn.Linear(3, 3), nn.Linear(3, 2), *map(nn.BatchNorm1d, (3, 2))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            b = self.norm_b(b)
            return torch.cat([self.norm_a(a), b], 1)

    torch.manual_seed(0)
    network, x = Late().eval(), torch.randn(20, 3)
    small = copy.deepcopy(network)
    for name in ("a", "b"):
        nn.init.normal_(small.get_submodule(name).get_parameter("bias"))
    assert repair_bias(network, small, PruningPlan(), x) == ["b", "a"]
    torch.testing.assert_close(small(x), network(x))


# --- Inputs without data


def test_synthetic_inputs_show_the_batch_norms_what_they_remember_and_repeat() -> None:
    network, images = network_and_images()
    network = network.float()

    def mismatch(inputs: Tensor, statistic: str) -> float:
        twin = copy.deepcopy(network)
        names = [f"{norm}.{statistic}" for norm in reestimate_batchnorm(twin, inputs)]
        return sum(float((twin.get_buffer(name) - network.get_buffer(name)).square().mean()) for name in names)

    before, flags = state(network), modes(network)
    found = synthesise_inputs(network, images[:1].float(), num_images=20, batch_size=12)
    assert found.shape == (20, 3, 6, 6)
    for statistic in ("running_mean", "running_var"):
        assert mismatch(found, statistic) < mismatch(torch.randn_like(found), statistic) / 4
    assert torch.equal(found, synthesise_inputs(network, images[:1].float(), num_images=20, batch_size=12))
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())
    assert modes(network) == flags
    assert all(parameter.grad is None for parameter in network.parameters())


def test_without_batch_norm_nothing_can_be_synthesised() -> None:
    with pytest.raises(UsageError, match="no BatchNorm statistics to match; recovery needs images"):
        synthesise_inputs(nn.Linear(2, 2), torch.zeros(1, 2))


# --- Distillation


def test_distillation_brings_the_outputs_together_and_repeats() -> None:
    network, images = network_and_images()
    network, images = network.float(), images.float()
    small, _ = halved(network, images)
    start = copy.deepcopy(small)

    def divergence(model: nn.Module) -> float:
        own, other = (twin.eval()(images).log_softmax(1) for twin in (copy.deepcopy(model), copy.deepcopy(network)))
        return F.kl_div(own, other, reduction="batchmean", log_target=True).item()

    before, flags, dense = divergence(start), modes(small), state(network)
    history = distill(network, small, images, num_epochs=20, batch_size=8, lr=0.005)
    assert [row["epoch"] for row in history] == list(range(1, 21))
    assert history[-1]["lr"] < history[0]["lr"] / 100
    assert divergence(small) < before / 2
    assert modes(small) == flags
    for name, buffer in small.named_buffers():
        assert torch.equal(buffer, start.get_buffer(name)), "statistics are kept"
    assert all(torch.equal(value, dense[name]) for name, value in state(network).items())
    again = copy.deepcopy(start)
    distill(network, again, images, num_epochs=20, batch_size=8, lr=0.005)
    assert all(torch.equal(value, state(small)[name]) for name, value in state(again).items())


def test_blocks_of_equal_shape_are_compared_and_others_are_not() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    small = nn.Sequential(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 3)), nn.Linear(3, 2))
    images = torch.randn(16, 3)

    def distance() -> float:
        return float((small[:2](images) - network[:2](images)).detach().square().mean())

    before = distance()
    distill(network, small, images, num_epochs=30, lr=0.01)
    assert distance() < before / 2


def test_distillation_on_a_recorded_program_and_a_loss_that_is_no_number() -> None:
    network, images = network_and_images()
    network, images = network.float().eval(), images.float()
    program = compact(network, PruningPlan(), images[:2], as_="graph")
    with torch.no_grad():
        program.get_parameter("head.weight").mul_(torch.randn(4, 54))

    def error() -> float:
        return float((program(images) - network(images)).detach().square().mean())

    before = error()
    (pruned, distilled) = recover(network, program, PruningPlan(), images, steps=["distill"], evaluate=lambda _: 0.0)
    assert (pruned.step, distilled.step) == ("pruned", "distill")
    assert error() < before
    distill(network, program, images, lr=0.003)
    assert error() < before / 2
    with pytest.raises(QualityError, match="the loss became nan"):
        distill(network, copy.deepcopy(network), images * math.nan)
    with pytest.raises(UsageError, match="nothing to do with 0 images and 40 epochs"):
        distill(network, copy.deepcopy(network), images[:0])


# --- All together


def test_steps_run_in_order_and_the_best_state_stays() -> None:
    network, images = network_and_images(40)
    small, plan = halved(network, images)
    scores, states = iter([0.5, 0.7, 0.6, 0.9, 0.8]), []

    def evaluate(model: nn.Module) -> float:
        states.append(state(model))
        return next(scores)

    seen: list[str] = []
    records = recover(
        *(network, small, plan, images),
        steps=["bn", "bias", "lsq", "bn"],
        evaluate=evaluate,
        progress=lambda stage, done, total, record: seen.append(stage),
    )
    assert [(record.step, record.score) for record in records] == [
        *(("pruned", 0.5), ("bn", 0.7), ("bias", 0.6), ("lsq", 0.9), ("bn", 0.8))
    ]
    assert all(record.finished for record in records)
    assert list(dict.fromkeys(seen)) == ["recover bn", "recover bias", "recover lsq"]
    assert all(torch.equal(value, states[3][name]) for name, value in state(small).items())
    # What bias repair had made worse was taken back before least squares began.
    twin, _ = halved(network, images)
    twin.load_state_dict(states[1])
    reconstruct(network, twin, plan, images)
    assert all(torch.equal(value, states[3][name]) for name, value in state(twin).items())


def test_a_budget_stops_within_a_step_and_what_was_reached_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("sparsekit.recovery.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    network, images = network_and_images()
    small, plan = halved(network, images)
    norms = ["stem_norm", "expand_norm", "depthwise_norm"]
    for norm in norms:
        module = small.get_submodule(norm)
        assert isinstance(module, nn.BatchNorm2d)
        module.reset_running_stats()
    before = state(small)
    scores = iter([0.1, 0.2])
    records = recover(network, small, plan, images, steps=["bn", "lsq"], budget_s=3, evaluate=lambda _: next(scores))
    assert [(record.step, record.finished) for record in records] == [("pruned", True), ("bn", False)]
    changed = {name for name, value in state(small).items() if not torch.equal(value, before[name])}
    assert changed == {f"{norm}.running_{which}" for norm in norms[:2] for which in ("mean", "var")}


def test_without_a_score_agreement_on_images_held_out_decides() -> None:
    network, images = network_and_images(64)
    small, plan = halved(network, images, ("stem", "expand"))
    held_out = images[torch.arange(64) % 8 == 0]
    records = recover(network, small, plan, images)
    assert [record.step for record in records] == ["pruned", "bn", "bias", "lsq"]
    best = max(record.score for record in records)
    assert agreement(network, small, held_out) == best > records[0].score
    (small, _), (twin, _) = halved(network, images), halved(network, images)
    for model in (small, twin):
        model.get_submodule("stem_norm").get_buffer("running_var").fill_(100)
    recover(network, small, plan, images, steps=["bn"])
    reestimate_batchnorm(twin, images[torch.arange(64) % 8 != 0])
    torch.testing.assert_close(state(small), state(twin))
    p, q = (twin.eval()(images).softmax(1) for twin in (network, small))
    assert agreement(network, small, images, batch_size=7) == pytest.approx(1 - (p - q).abs().sum(1).mean().item() / 2)
    assert agreement(network, network, images) == pytest.approx(1)


def test_unknown_steps_and_too_few_images_are_refused() -> None:
    network, images = network_and_images()
    with pytest.raises(UsageError, match="unknown step 'lsqq'; did you mean lsq"):
        recover(network, network, PruningPlan(), images, steps=["lsqq"])
    with pytest.raises(UsageError, match="at least 4 images, got 3"):
        recover(network, network, PruningPlan(), images[:3])


class Secret:
    """Labels that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("a label was read")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a label was read")


def test_labels_are_never_read() -> None:
    def batches(epoch: int) -> Iterator[Any]:
        for inputs, _ in tiny.task().batches(epoch):
            yield inputs, Secret()

    task = replace(tiny.task(), batches=batches)
    images = unlabelled(task, 40)
    assert torch.equal(images, torch.cat([inputs for inputs, _ in tiny.task().batches(0)])[:40])
    torch.manual_seed(0)
    network = tiny.network().eval()
    small, plan = halved(network, images, ("conv1",))
    records = recover(network, small, plan, images, steps=["bn", "bias", "lsq", "distill"])
    assert len(records) == 5
