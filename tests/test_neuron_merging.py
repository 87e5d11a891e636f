"""Neuron merging: the authors' numbers, their formulas written out by hand, and where merging loses nothing."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.cost import num_params
from sparsekit.errors import PlanError, UsageError
from sparsekit.factory import load_factory
from sparsekit.graph import ChannelGraph, trace
from sparsekit.ingredients import build_pruner
from sparsekit.models import MODELS
from sparsekit.models.vgg import vgg16
from sparsekit.plan import PruningPlan
from sparsekit.pruners.neuron_merging import NeuronMerging, nonnegative_factors
from sparsekit.recipe import Recipe
from sparsekit.recovery import reestimate_batchnorm
from sparsekit.selection import allocate

ROOT = Path(__file__).parents[1]
GIVEN = ROOT.parent / "shared" / "data"
RECIPES = ROOT / "recipes" / "neuron_merging"
WEIGHTS = "lenet-300-100-fashionmnist.safetensors"


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, every BatchNorm and bias away from its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.5, generator=generator)
    return network.eval()


def weight(network: nn.Module, name: str = "0.weight") -> Tensor:
    return network.get_parameter(name)


def batch_norm(network: nn.Module) -> nn.BatchNorm2d:
    norm = network.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def merged(
    network: nn.Module, x: Tensor, budget: str, pruner: NeuronMerging | None = None
) -> tuple[nn.Module, PruningPlan]:
    graph = trace(network, x)
    plan = (pruner or NeuronMerging())(graph, Budget.parse(budget), None)
    small = compact(network, plan, x)
    assert certify(network, plan, small, x).holds
    return small, plan


def matrix(plan: PruningPlan, name: str) -> tuple[Tensor, Tensor]:
    """The keep mask and the merge matrix of the group of that name."""
    group = next(group for group in plan.keep if group.name == name)
    return plan.keep[group], plan.merge[group]


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    if not (GIVEN / WEIGHTS).exists():
        pytest.skip(f"{WEIGHTS} is not in this checkout's shared data folder")
    network = MODELS["lenet_300_100"]()
    network.load_state_dict(load_file(GIVEN / WEIGHTS))
    return network.eval()


@pytest.fixture(scope="module")
def accuracy_percent() -> Callable[[nn.Module], float]:
    """Of a network on Fashion-MNIST's 10,000 test images, to two decimals."""
    data = torchvision.datasets.FashionMNIST(GIVEN, train=False, download=False)
    images, labels = (data.data[:, None].float() / 255 - 0.5) / 0.5, data.targets

    def measure(network: nn.Module) -> float:
        with torch.no_grad():
            num_right = int((network(images).argmax(1) == labels).sum())
        return round(100 * num_right / len(labels), 2)

    return measure


@pytest.mark.parametrize(
    ("percent", "pruned", "accuracy", "num_merged", "sums"),
    [
        (50, 88.40, 88.69, (31, 18), (165.147, 62.683)),
        (60, 85.17, 86.92, (41, 19), (137.824, 53.629)),
        (70, 71.26, 82.75, (44, 20), (108.955, 44.163)),
        (80, 66.76, 80.02, (55, 20), (85.985, 34.218)),
    ],
)
def test_lenet_gives_the_authors_accuracies_and_matrices(
    lenet: nn.Module,
    accuracy_percent: Callable[[nn.Module], float],
    percent: int,
    pruned: float,
    accuracy: float,
    num_merged: tuple[int, int],
    sums: tuple[float, float],
) -> None:
    recipe = Recipe.from_toml(RECIPES / f"lenet-300-100-p{percent}.toml")
    graph = trace(lenet, torch.zeros(2, 1, 28, 28))
    plan = build_pruner(recipe)(graph, Budget.parse(recipe.budget), None)
    assert [len(keep) - int(keep.sum()) for keep in plan.keep.values()] == [3 * percent, percent]
    for keep, merge, count, total in zip(plan.keep.values(), plan.merge.values(), num_merged, sums, strict=True):
        assert int(merge[~keep].count_nonzero()) == count
        assert float(merge.double().sum()) == pytest.approx(total, abs=1e-3)
    assert accuracy_percent(compact(lenet, PruningPlan(plan.keep))) == pruned
    assert accuracy_percent(compact(lenet, plan)) == accuracy


def test_lenet_at_half_its_units_keeps_the_authors_units_and_folds_to_their_weights(lenet: nn.Module) -> None:
    small, plan = merged(lenet, torch.zeros(2, 1, 28, 28), "keep=0.5", NeuronMerging(threshold=0.45))
    assert matrix(plan, "ip1")[0].nonzero().flatten()[:6].tolist() == [1, 3, 4, 6, 9, 10]
    sums = [float(small.get_parameter(f"{name}.weight").detach().double().abs().sum()) for name in ("ip2", "ip3")]
    assert sums == pytest.approx([724.9575, 149.7442], abs=1e-4)


# The formulas as loops, for one pruned and one kept channel at a time.


def norm_of(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm_of(a) / norm_of(b)


def through(mode: str, norm: nn.BatchNorm2d, ratio: float, pruned: int, kept: int) -> tuple[float, float]:
    """Scale and residue for a pruned and a kept channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma, beta, mean = norm.weight.tolist(), norm.bias.tolist(), norm.running_mean.tolist()
    sigma = [var if mode == "code" else math.sqrt(var + norm.eps) for var in norm.running_var.tolist()]
    p, k = pruned, kept
    if mode == "exact":
        scale = ratio * gamma[p] / gamma[k] * sigma[k] / sigma[p]
        inner = ratio * (mean[k] - sigma[k] * beta[k] / gamma[k]) - mean[p]
        return scale, gamma[p] / sigma[p] * inner + beta[p]
    scale = ratio * gamma[k] / gamma[p] * sigma[p] / sigma[k]
    inner = ratio * (mean[p] - sigma[p] * beta[p] / gamma[p]) - mean[k]
    return scale, gamma[k] / sigma[k] * inner + beta[k]


def by_hand(
    rows: list[list[float]],
    keep: list[bool],
    threshold: float,
    lam: float = 1.0,
    scale_and_residue: Callable[[float, int, int], tuple[float, float]] = lambda ratio, p, k: (ratio, 0.0),
) -> Tensor:
    """The merge matrix, channel by channel."""
    kept = [number for number, stays in enumerate(keep) if stays]
    result = torch.zeros(len(keep), len(kept))
    for channel, row in enumerate(rows):
        if keep[channel]:
            result[channel, kept.index(channel)] = 1
            continue
        found = [scale_and_residue(norm_of(row) / norm_of(rows[k]), channel, k) for k in kept]
        biases = [abs(residue) / scale for scale, residue in found]
        low, high = min(biases), max(biases)
        distances = [
            lam * (1 - cosine(row, rows[k])) + (1 - lam) * (0.0 if high == low else (bias - low) / (high - low))
            for k, bias in zip(kept, biases, strict=True)
        ]
        best = distances.index(min(distances))
        if cosine(row, rows[kept[best]]) >= threshold:
            result[channel, best] = found[best][0]
    return result


def conv_net(seed: int = 0, *, norm: bool = True, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 12, 3, bias=bias), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv2d(12, 4, 3))
    randomised(network, seed)
    return network


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_linear_layers_merge_by_filter_and_bias_together(threshold: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    _, plan = merged(network, torch.randn(3, 6), "keep=0.4", NeuronMerging(threshold=threshold))
    keep, merge = matrix(plan, "0")
    rows = torch.cat([weight(network), weight(network, "0.bias")[:, None]], 1).tolist()
    norms = [sum(map(abs, row)) for row in rows]
    assert keep.nonzero().flatten().tolist() == sorted(sorted(range(20), key=lambda n: norms[n])[-8:])
    # 0 is no threshold at all.
    expected = by_hand(rows, keep.tolist(), threshold or -1.0)
    assert 0 < int(expected[~keep].count_nonzero()) <= 12
    torch.testing.assert_close(merge, expected)


@pytest.mark.parametrize("mode", ["code", "sqrt", "exact"])
@pytest.mark.parametrize(("lam", "threshold"), [(0.85, 0.1), (0.5, 0.0), (0.0, 0.0)])
def test_convolutions_before_batchnorm_merge_by_cosine_and_bias_residue(
    mode: str, lam: float, threshold: float
) -> None:
    network = conv_net()
    _, plan = merged(network, X, "keep=0.4", NeuronMerging(bn_mode=mode, lam=lam, threshold=threshold))
    keep, merge = matrix(plan, "0")
    norm = batch_norm(network)
    rows = weight(network).flatten(1).tolist()
    expected = by_hand(
        rows, keep.tolist(), threshold or -1.0, lam, lambda ratio, p, k: through(mode, norm, ratio, p, k)
    )
    assert int(expected[~keep].count_nonzero()) > 0
    torch.testing.assert_close(merge, expected)


def test_signs_of_gamma_that_differ_give_negative_scales_as_in_the_published_code() -> None:
    network = conv_net()
    with torch.no_grad():
        weight(network, "1.weight")[::2] *= -1
    _, plan = merged(network, X, "keep=0.4", NeuronMerging(threshold=0.0))
    keep, merge = matrix(plan, "0")
    norm = batch_norm(network)
    rows = weight(network).flatten(1).tolist()
    expected = by_hand(rows, keep.tolist(), -1.0, 0.85, lambda ratio, p, k: through("code", norm, ratio, p, k))
    assert float(merge.min()) < 0
    torch.testing.assert_close(merge, expected)


def assert_same_merge(one: nn.Module, other: nn.Module, *, lam: float) -> None:
    pruner = NeuronMerging(lam=lam, threshold=0.0)
    keeps, matrices = zip(*(matrix(merged(net, X, "keep=0.4", pruner)[1], "0") for net in (one, other)), strict=True)
    assert torch.equal(*keeps)
    assert int(matrices[0].count_nonzero()) == len(keeps[0])
    torch.testing.assert_close(*matrices)


def test_a_bias_before_batchnorm_is_a_shift_of_its_mean() -> None:
    network = conv_net(bias=True)
    with torch.no_grad():
        weight(network, "0.bias").copy_(torch.linspace(-2, 2, 12))
    shifted = copy.deepcopy(network)
    with torch.no_grad():
        shifted.get_buffer("1.running_mean").sub_(weight(shifted, "0.bias"))
        weight(shifted, "0.bias").zero_()
    assert_same_merge(network, shifted, lam=0.0)


def test_a_batchnorm_without_gamma_and_beta_has_ones_and_zeros() -> None:
    network = conv_net()
    with torch.no_grad():
        weight(network, "1.weight").fill_(1)
        weight(network, "1.bias").zero_()
    plain = nn.Sequential(network[0], nn.BatchNorm2d(12, affine=False), *network[2:]).eval()
    for name in ("running_mean", "running_var"):
        plain.get_buffer(f"1.{name}").copy_(network.get_buffer(f"1.{name}"))
    assert_same_merge(network, plain, lam=0.5)


# Channel 5 is a tenth of channel 2, and the first to go.


def make_twins(network: nn.Module, names: str, *, scale: float = 0.1) -> None:
    """Let channel 5 of each of these parameters be `scale` times channel 2."""
    with torch.no_grad():
        for name in names.split():
            network.get_parameter(name)[5] = scale * network.get_parameter(name)[2]


POSITIVE: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "linear": lambda: (nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)),
    "conv": lambda: (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)),
    "flatten": lambda: (nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 4)),
    "transposed reader": lambda: (nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.ConvTranspose2d(8, 4, 3)),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_a_unit_that_is_a_multiple_of_another_merges_without_loss_through_relu_and_pooling(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*POSITIVE[name]()).eval()
    make_twins(network, "0.weight 0.bias")
    x = X[:, :, 0, 0] if name == "linear" else X
    small, plan = merged(network, x, "keep=0.875")
    keep, merge = matrix(plan, "0")
    assert keep.tolist() == [number != 5 for number in range(8)]
    assert merge[5].tolist() == [0, 0, pytest.approx(0.1), 0, 0, 0, 0]
    torch.testing.assert_close(small(x), network(x))
    dropped = compact(network, PruningPlan(plan.keep), x)
    assert not torch.allclose(dropped(x), network(x), atol=1e-3)


def test_a_transposed_convolution_merges_along_its_second_dimension() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        weight(network)[:, 5] = 0.1 * weight(network)[:, 2]
        weight(network, "0.bias")[5] = 0.1 * weight(network, "0.bias")[2]
    small, _ = merged(network, X, "keep=0.875")
    torch.testing.assert_close(small(X), network(X))


def test_exact_mode_merges_without_loss_where_batchnorm_leaves_no_residue() -> None:
    network = conv_net()
    norm = batch_norm(network)
    make_twins(network, "0.weight")
    scale, residue = through("exact", norm, 0.1, 5, 2)
    with torch.no_grad():
        norm.bias[5] -= residue
    small, plan = merged(network, X, "keep=0.92", NeuronMerging(bn_mode="exact"))
    keep, merge = matrix(plan, "0")
    assert keep.tolist() == [number != 5 for number in range(len(weight(network)))]
    assert merge[5, 2] == pytest.approx(scale)
    torch.testing.assert_close(small(X), network(X))


class Separable(nn.Module):
    """1x1, depthwise 3x3, 1x1, with BatchNorm or without."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.d, self.bn2 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.a(x)))
        result: Tensor = self.b(torch.relu(self.bn2(self.d(x))))
        return result


def test_a_depthwise_layer_multiplies_the_scale_of_the_layer_before_it() -> None:
    torch.manual_seed(0)
    network = Separable(norm=False).eval()
    make_twins(network, "a.weight", scale=0.5)
    make_twins(network, "d.weight", scale=0.2)
    small, plan = merged(network, X, "keep=0.875")
    assert matrix(plan, "a")[1][5, 2] == pytest.approx(0.1)
    torch.testing.assert_close(small(X), network(X))


def test_a_separable_unit_is_compared_by_the_outer_product_of_its_two_filters() -> None:
    torch.manual_seed(0)
    network = Separable(norm=True)
    randomised(network)
    _, plan = merged(network, X, "keep=0.5", NeuronMerging(threshold=0.0))
    keep, merge = matrix(plan, "a")
    point, depth = network.a.weight.flatten(1), network.d.weight.flatten(1)
    rows = torch.stack([torch.outer(*pair).flatten() for pair in zip(point, depth, strict=True)]).tolist()
    norms = (point.abs().sum(1) * depth.abs().sum(1)).tolist()
    assert keep.nonzero().flatten().tolist() == sorted(sorted(range(8), key=lambda n: norms[n])[-4:])
    torch.testing.assert_close(merge, by_hand(rows, keep.tolist(), -1.0))


TABLE_1: dict[str, type[nn.Module]] = {
    "LeakyReLU": nn.LeakyReLU,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "Tanh": nn.Tanh,
    "SoftSign": nn.Softsign,
    "Hardswish": nn.Hardswish,
}


@pytest.mark.parametrize("name", TABLE_1)
def test_equal_units_merge_without_loss_through_any_activation(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), TABLE_1[name](), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        weight(network)[2] *= 0.1
    make_twins(network, "0.weight 0.bias", scale=1.0)
    small, plan = merged(network, X, "keep=0.875")
    assert int(matrix(plan, "0")[1].sum()) == 8
    torch.testing.assert_close(small(X), network(X))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result: Tensor = self.c(x + torch.relu(self.b(x)))
        return result


class Gated(nn.Module):
    """Squeeze and excitation: what a channel is multiplied with follows from other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.a(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))
        return result


class Ghost(nn.Module):
    """Channels are read before a depthwise layer and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result: Tensor = self.c(torch.cat([x, self.d(x)], 1))
        return result


class Scores(nn.Module):
    """Channels that two activations are multiplied and summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.q(x).flatten(2).transpose(1, 2) @ self.k(x).flatten(2)
        return result


class Standardised(nn.Conv2d):
    """The filter's scale says nothing: it is divided out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt(), self.bias)


def between(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(channels, 4, 1))


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (Residual, "outputs of layers are added up"),
    "gated": (Gated, "not made by one layer"),
    "two depthwise": (
        lambda: between(nn.Conv2d(8, 8, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8)),
        "not made by one layer",
    ),
    "ghost": (Ghost, "more than one row"),
    "glu": (lambda: between(nn.GLU(1), channels=4), "more than one row"),
    "scores": (Scores, "activations are summed over"),
    "two norms": (
        lambda: between(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)),
        "several BatchNorms",
    ),
    "group norm": (lambda: between(nn.GroupNorm(4, 8)), "something other than layers and BatchNorm"),
    "instance norm": (lambda: between(nn.InstanceNorm2d(8)), "something other than layers and BatchNorm"),
    "batch statistics": (
        lambda: between(nn.BatchNorm2d(8, track_running_stats=False)),
        "something other than layers and BatchNorm",
    ),
    "prelu": (lambda: between(nn.PReLU(8)), "something other than layers and BatchNorm"),
    "standardised": (
        lambda: nn.Sequential(Standardised(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        "something other than layers and BatchNorm",
    ),
    "layer norm": (lambda: between(nn.GroupNorm(1, 8)), "normalised anew"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_merged_is_pruned_alone_and_said_once_or_refused_where_strict(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    factory, reason = OBSTACLES[name]
    torch.manual_seed(0)
    network = factory().eval()
    graph = trace(network, X, renormalise=name == "layer norm")
    budget = Budget.parse("keep=0.5")
    with caplog.at_level(logging.WARNING):
        plan = NeuronMerging()(graph, budget, None)
    assert len(plan.keep) == 1
    assert not plan.merge
    assert [reason in record.message for record in caplog.records] == [True]
    assert certify(network, plan, compact(network, plan, X), X).holds
    group = graph.groups[0].name
    with pytest.raises(UsageError, match=rf"group '{group}' cannot be merged: .*{reason}.*'{group}=1' in the budget"):
        NeuronMerging(strict=True)(graph, budget, None)


def test_what_stays_whole_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    network = MODELS["resnet20"]().eval()
    graph = trace(network, torch.zeros(2, 3, 32, 32))
    plan = NeuronMerging(strict=True)(graph, Budget.parse("layer?.*.conv1=0.5"), None)
    assert len(plan.merge) == len(plan.keep) == 9
    assert not caplog.records


@pytest.mark.parametrize("mode", ["code", "sqrt", "exact"])
def test_channels_without_weight_gamma_or_variance_are_neither_merged_nor_merged_into(mode: str) -> None:
    network = conv_net()
    norm = batch_norm(network)
    assert norm.running_var is not None
    with torch.no_grad():
        weight(network)[6:] *= 0.1
        weight(network)[7] = 0
        norm.weight[[0, 8]] = 0
        norm.running_var[1] = 0
        # Kept for its norm, and the nearest of all to channel 9.
        weight(network)[9] = 0.1 * weight(network)[0]
    _, plan = merged(network, X, "keep=0.5", NeuronMerging(bn_mode=mode, threshold=0.0))
    keep, merge = matrix(plan, "0")
    assert keep.tolist() == [True] * 6 + [False] * 6
    assert merge.isfinite().all()
    assert not merge[7:9].any()
    assert not merge[6:, 0].any()
    if mode == "code":
        assert not merge[6:, 1].any()
    assert [int(row.count_nonzero()) for row in merge[[6, 9, 10, 11]]] == [1] * 4


def test_the_only_channel_left_takes_all_that_are_similar_enough() -> None:
    network = conv_net()
    _, plan = merged(network, X, "keep=0.08", NeuronMerging(threshold=0.0))
    keep, merge = matrix(plan, "0")
    assert int(keep.sum()) == 1
    assert bool(merge.all())


@pytest.mark.parametrize("criterion", ["l1", "l2", "l2-gm"])
def test_of_equal_channels_the_later_ones_stay(criterion: str) -> None:
    network = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.init.eye_(weight(network))
    with torch.no_grad():
        weight(network)[3:] = weight(network)[:3]
    _, plan = merged(network, X[:, :, 0, 0], "keep=0.5", NeuronMerging(criterion=criterion))
    assert matrix(plan, "0")[0].tolist() == [False] * 3 + [True] * 3


def test_the_geometric_median_drops_what_lies_in_the_middle_however_large() -> None:
    network = nn.Sequential(nn.Linear(1, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)).eval()
    with torch.no_grad():
        weight(network).copy_(torch.tensor([[9.0], [1.0], [10.0], [19.0], [11.0]]))
    kept = {
        criterion: matrix(merged(network, X[:, :1, 0, 0], "keep=0.4", NeuronMerging(criterion=criterion))[1], "0")[0]
        for criterion in ("l2", "l2-gm")
    }
    assert kept["l2"].nonzero().flatten().tolist() == [3, 4]
    assert kept["l2-gm"].nonzero().flatten().tolist() == [1, 3]


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    network = conv_net()
    with torch.no_grad():
        weight(network)[3] = math.nan
    with pytest.raises(PlanError, match="group '0': scores must be 12 finite numbers"):
        NeuronMerging()(trace(network, X), Budget.parse("keep=0.5"), None)


def test_options_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="unknown criterion 'l3'; valid: l1, l2, l2-gm"):
        NeuronMerging(criterion="l3")
    with pytest.raises(UsageError, match="unknown bn_mode 'exakt'; did you mean exact"):
        NeuronMerging(bn_mode="exakt")
    with pytest.raises(UsageError, match="unknown decomposition 'svd'; valid: mostsim, nmf"):
        NeuronMerging(decomposition="svd")
    with pytest.raises(UsageError, match=r"threshold must be in \[0, 1\], got 1.5"):
        NeuronMerging(threshold=1.5)
    with pytest.raises(UsageError, match=r"lam must be in \[0, 1\], got -1"):
        NeuronMerging(lam=-1)


def test_the_nonnegative_factors_of_a_nonnegative_layer_rebuild_it() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(10, 3, generator=generator), torch.rand(3, 6, generator=generator)
    first, second = nonnegative_factors(left @ right, 3, num_steps=5000)
    assert first.min() >= 0
    assert second.min() >= 0
    torch.testing.assert_close(first @ second, left @ right, rtol=1e-3, atol=1e-3)


def test_the_foil_replaces_a_layer_and_its_readers_by_the_factors_of_its_positive_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)
    ).eval()
    small, plan = merged(network, X, "keep=0.5", NeuronMerging(decomposition="nmf"))
    assert not plan.merge
    rows = [
        torch.cat([weight(network, f"{n}.weight").flatten(1), weight(network, f"{n}.bias")[:, None]], 1).detach()
        for n in (0, 2)
    ]
    factors = [nonnegative_factors(part.double().clamp(min=0), count) for part, count in zip(rows, (4, 3), strict=True)]
    (first, upper), (second, lower) = [(left.float(), right.float()) for left, right in factors]
    torch.testing.assert_close(weight(small).flatten(1), upper[:, :-1])
    torch.testing.assert_close(weight(small, "0.bias"), upper[:, -1])
    filters = torch.einsum("oihw,ik->okhw", lower[:, :-1].view(3, 8, 2, 2), first)
    torch.testing.assert_close(weight(small, "2.weight"), filters)
    blocks = weight(network, "5.weight").view(4, 6, 36)
    torch.testing.assert_close(weight(small, "5.weight"), torch.einsum("ocp,ck->okp", blocks, second).flatten(1))


def test_the_foil_leaves_layers_before_batchnorm_pruned_alone(caplog: pytest.LogCaptureFixture) -> None:
    for network, name in ((conv_net(), "0"), (Separable(norm=False).eval(), "a")):
        graph = trace(network, X)
        plan = NeuronMerging(decomposition="nmf")(graph, Budget.parse("keep=0.5"), None)
        assert list(plan.kept) == [name]
        assert not plan.weights
        assert "BatchNorm or a depthwise layer follows (1)" in caplog.text
        caplog.clear()


ACTIVATIONS = (nn.ReLU, nn.ELU, nn.Hardswish, nn.LeakyReLU, nn.SELU, nn.Softsign, nn.Tanh)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_vgg_merges_whatever_its_activation_and_without_loss_where_channels_repeat(
    activation: type[nn.Module],
) -> None:
    """Filters of a quarter the size, which BatchNorm makes up for: the factor is 1, which every activation lets by."""
    torch.manual_seed(0)
    network = randomised(vgg16(width=4, activation=activation))
    nn.init.normal_(network.get_parameter("classifier.3.weight"))
    modules = list(network.modules())
    assert sum(type(module) is activation for module in modules) == 14
    x = torch.randn(16, 3, 32, 32)
    for conv, norm in itertools.pairwise(modules):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            half = len(conv.weight) // 2
            for tensor, factor in ((conv.weight, 4), (norm.weight, 1), (norm.bias, 1)):
                tensor.data[half:] = tensor.data[:half] / factor
            norm.eps = 0.0
    reestimate_batchnorm(network, x)
    small, plan = merged(network, x, "features.*=0.5", NeuronMerging(bn_mode="exact", strict=True))
    assert len(plan.merge) == 13
    torch.testing.assert_close(small(x), network(x), rtol=1e-3, atol=1e-3)
    assert (compact(network, PruningPlan(plan.keep))(x) - network(x)).abs().max() > 0.1
    _, plan = merged(network, x, "features.*=0.5", NeuronMerging(strict=True))
    assert len(plan.merge) == 13


@pytest.mark.parametrize("path", sorted(RECIPES.glob("vgg16_*-cifar10.toml")), ids=lambda path: path.stem)
def test_recipes_of_other_activations_name_a_network_that_has_it(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    name = path.stem.removeprefix("vgg16_").removesuffix("-cifar10").replace("_", "")
    with torch.device("meta"):
        network = load_factory(str(ROOT / recipe.model))()
    assert sum(type(module).__name__.lower() == name for module in network.modules()) == 14


def load(name: str) -> Recipe:
    return Recipe.from_toml(RECIPES / f"{name}.toml")


def dense_graph(recipe: Recipe) -> ChannelGraph:
    """Of shapes alone, which is all that counts and sizes need."""
    with torch.device("meta"):
        if ".py:" in recipe.model:
            network = load_factory(str(ROOT / recipe.model))()
        elif recipe.model.startswith("torchvision:"):
            network = torchvision.models.get_model(recipe.model.partition(":")[2], weights=None)
        else:
            network = MODELS[recipe.model](num_classes=100 if recipe.data == "cifar100" else 10)
        side = 28 if recipe.model.startswith("lenet") else recipe.image_size or 32
        example = torch.zeros(2, 1 if side == 28 else 3, side, side)
    return trace(network, example)


@pytest.mark.parametrize(
    ("name", "dense", "small"),
    [
        ("vgg16-cifar10-l1", 14_987_722, 5_397_034),
        ("vgg16_tanh-cifar10", 14_987_722, 5_397_034),
        ("vgg16_bn-imagenet-p50", 138_365_992, 85_805_352),
        ("vgg16_bn-imagenet-p60", 138_365_992, 75_128_972),
        ("vgg16_bn-imagenet-p70", 138_365_992, 64_657_907),
        ("resnet34-imagenet-p10", 21_797_672, 19_653_606),
        ("resnet34-imagenet-p20", 21_797_672, 17_538_352),
        ("resnet34-imagenet-p30", 21_797_672, 15_446_144),
        ("mobilenet_v1-cifar10-p40", 3_217_226, 1_431_307),
        ("mobilenet_v1-cifar10-p50", 3_217_226, 1_092_010),
        ("mobilenet_v1-cifar10-p60", 3_217_226, 789_232),
    ],
)
def test_pruned_sizes_are_the_published_ones(name: str, dense: int, small: int) -> None:
    recipe = load(name)
    graph = dense_graph(recipe)
    assert num_params(graph) == dense
    assert num_params(graph, allocate(graph, Budget.parse(recipe.budget))) == small


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("vgg16-cifar10-l2", [32, 64, 128, 128, *[256] * 9, 512]),
        ("vgg16-cifar10-l2-gm", [32, 64, 128, 128, *[256] * 9, 512]),
        ("vgg16-cifar100", [32, 64, 128, 128, 256, 256, 256, 512, 512, 256, 256, 256, 256, 512]),
        ("resnet56-cifar10-p20", [16, *[12] * 9, *[25] * 9, *[51] * 9]),
        ("wrn40_4-cifar10-p20", [16, *[48] * 6, *[100] * 6, *[204] * 6]),
    ],
)
def test_widths_are_the_published_ones(name: str, widths: list[int]) -> None:
    recipe = load(name)
    counts = allocate(dense_graph(recipe), Budget.parse(recipe.budget))
    assert [count for group, count in counts.items() if not group.residual or group.name == "conv1"] == widths


NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_merges_with_the_authors_threshold_and_lambda_and_trains_nothing_after(name: str) -> None:
    recipe = load(name)
    pruner = build_pruner(recipe)
    assert isinstance(pruner, NeuronMerging)
    threshold = {"lenet_300_100": 0.45, "mobilenet_v1": 0.0}.get(recipe.model, 0.1)
    lam = 0.7 if recipe.data == "cifar100" else 0.8 if recipe.model == "wrn40_4" else 0.85
    assert (pruner.threshold, pruner.lam, pruner.bn_mode, pruner.strict) == (threshold, lam, "code", True)
    assert (recipe.epochs, recipe.finetune_epochs) == (0, None)


def test_the_table_beside_the_recipes_lists_each_of_them_once_with_its_own_accuracies() -> None:
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert sorted(name for name, *_ in rows[1:]) == NAMES
    for name, *_, pruned, accuracy in rows[1:]:
        text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
        assert f": {pruned} % " in text or pruned == "-"
        assert f", {accuracy} % merged" in text or accuracy == "-"
