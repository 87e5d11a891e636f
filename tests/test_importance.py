"""Methods that score channels without training: each score against the same number computed another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sparsekit import training
from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup
from sparsekit.pruner import Pruner
from sparsekit.pruners.fisher import Fisher, fisher_scores
from sparsekit.pruners.fpgm import FPGM, filter_distances
from sparsekit.pruners.group_norm import group_norms
from sparsekit.pruners.hrank import HRank, map_ranks
from sparsekit.pruners.taylor import Taylor, taylor_scores
from sparsekit.task import Batch, Task
from tests.networks import make


class Stream(nn.Module):
    """A residual stream of 6 channels, flattened at its end, and a branch of 8 through a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.expand_norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.expand_norm(self.expand(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(y)))
        x = torch.relu(x + self.project(y))
        logits: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return logits


NUM_INPUTS = {"expand": 6, "project": 8, "head": 6}  # channels that each reader of a group sees
READERS = {"stem": ("expand", "head"), "expand": ("project",)}


def batches(epoch: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    inputs = torch.randn(3, 5, 3, 6, 6, generator=generator)
    return [(x.sign() * x.square(), torch.randint(4, (5,), generator=generator)) for x in inputs]


TASK = Task(
    example_inputs=(torch.zeros(2, 3, 6, 6),),
    batches=batches,
    num_batches=3,
    loss=lambda output, targets, smoothing: F.cross_entropy(output, targets, label_smoothing=smoothing),
    evaluate=lambda model: 0.0,
    fit=training.fit,
)
DOUBLE_TASK = replace(TASK, batches=lambda epoch: [(x.double(), y) for x, y in batches(epoch)])


@pytest.fixture
def graph() -> ChannelGraph:
    """In training mode, with statistics that differ from any batch's: scores must come from eval mode."""
    torch.manual_seed(0)
    network = Stream()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = torch.randn_like(module.weight), torch.rand_like(module.weight)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return trace(network.train(), torch.zeros(2, 3, 6, 6))


def by_name(scores: dict[ChannelGroup, Tensor]) -> dict[str, Tensor]:
    return {group.name: score for group, score in scores.items()}


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach()


# --- FPGM


def test_fpgm_drops_the_filter_in_the_middle_however_large_its_norm() -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 1, 1))
    filters = torch.tensor([0.0, 1.0, 4.0, 10.0, 30.0])
    weight(network, "0.weight").copy_(filters.view(5, 1, 1, 1))
    graph = trace(network, torch.zeros(2, 1, 4, 4))
    (distances,) = filter_distances(graph).values()
    assert distances.tolist() == [45, 42, 39, 45, 105]
    (keep,) = FPGM()(graph, Budget.parse("keep=0.8")).keep.values()
    assert keep.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("network", "group", "makers"),
    [
        ("resnet20_b", "conv1", ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]),
        ("mobilenet_v2", "layers.1.conv1", ["layers.1.conv1", "layers.1.conv2"]),
    ],
    ids=["residual stream", "depthwise"],
)
def test_fpgm_measures_whole_filters_over_all_layers_that_share_the_channel(
    network: str, group: str, makers: list[str]
) -> None:
    model, x = make(network)
    distances = by_name(filter_distances(trace(model, x)))[group]
    rows = torch.cat([weight(model, f"{maker}.weight").flatten(1).double() for maker in makers], 1)
    expected = torch.stack([sum(((row - other).norm() for other in rows), torch.zeros(())) for row in rows])
    torch.testing.assert_close(distances, expected)


def test_fpgm_sees_that_twins_are_no_distance_apart() -> None:
    network = nn.Sequential(nn.Conv2d(64, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 1, 1))
    weight(network, "0.weight").copy_(torch.randn(1, 64, 3, 3).expand(32, -1, -1, -1))
    (distances,) = filter_distances(trace(network, torch.zeros(2, 64, 4, 4))).values()
    assert distances.max() < 1e-4 * weight(network, "0.weight")[0].norm()


# --- group norm


def test_group_norm_sums_the_squares_of_all_that_goes_with_a_channel_over_the_groups_mean(graph: ChannelGraph) -> None:
    model = graph.model
    made = {
        "stem": ["stem.weight", "stem_norm.weight", "project.weight"],
        "expand": ["expand.weight", "expand_norm.weight", "depthwise.weight", "depthwise_norm.weight"],
    }
    scores = by_name(group_norms(graph))
    for group, readers in READERS.items():
        size = len(scores[group])
        rows = [weight(model, name).reshape(size, -1) for name in made[group]]
        for reader in readers:
            taken = weight(model, f"{reader}.weight")
            rows.append(taken.reshape(len(taken), size, -1).transpose(0, 1).reshape(size, -1))
        total = torch.cat(rows, 1).square().sum(1)
        torch.testing.assert_close(scores[group], total / total.mean())


def test_group_norm_of_a_dead_group_is_zero() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    (scores,) = group_norms(trace(network, torch.zeros(2, 1, 4, 4))).values()
    assert scores.tolist() == [0, 0, 0, 0]


# --- HRank


@contextmanager
def read_maps(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What each reader is given while the context is open, [N, C, H, W] in the layout of its channels."""
    maps: dict[str, list[Tensor]] = {name: [] for name in NUM_INPUTS}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            side = 3 if name == "head" else 6
            maps[name].append(inputs[0].reshape(len(inputs[0]), NUM_INPUTS[name], side, side))

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in maps]
    yield maps
    for handle in handles:
        handle.remove()


def test_hrank_averages_the_ranks_of_what_the_readers_see_over_the_first_images(graph: ChannelGraph) -> None:
    num_images = 8  # one batch of five, and three images of the next
    scores = by_name(map_ranks(graph, graph.groups, TASK, num_images=num_images))
    network = copy.deepcopy(graph.model).eval()
    images = torch.cat([inputs for inputs, _ in batches(0)])[:num_images]
    with read_maps(network) as maps:
        for image in images:
            network(image[None])
    for group, readers in READERS.items():
        ranks = [
            [float(torch.linalg.matrix_rank(channel)) for channel in seen[0]] for name in readers for seen in maps[name]
        ]
        expected = torch.tensor(ranks, dtype=torch.float64).mean(0)
        assert len(ranks) == num_images * len(readers)
        assert expected.max() - expected.min() > 0.5, "all ranks alike would show nothing"
        torch.testing.assert_close(scores[group], expected)


def only_images(images: Tensor) -> Task:
    return replace(TASK, batches=lambda epoch: [(images, torch.zeros(len(images)))])


def of_rank(rank: int, *shape: int) -> Tensor:
    """Random matrices of exactly this rank, [*shape]."""
    left, right = torch.randn(*shape[:-1], rank), torch.randn(*shape[:-2], rank, shape[-1])
    return left @ right


def test_hrank_keeps_the_channels_of_highest_rank_and_not_the_loudest() -> None:
    torch.manual_seed(0)
    images = torch.stack([100 * of_rank(1, 3, 7, 5), of_rank(4, 3, 7, 5), torch.zeros(3, 7, 5), of_rank(2, 3, 7, 5)], 1)
    network = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Identity(), nn.Conv2d(4, 2, 1))
    weight(network, "0.weight").copy_(torch.eye(4)[..., None, None])
    graph, task = trace(network, images), only_images(images)
    (ranks,) = map_ranks(graph, graph.groups, task, num_images=3).values()
    assert ranks.tolist() == [1, 4, 0, 2]
    (keep,) = HRank()(graph, Budget.parse("keep=0.5"), task).keep.values()
    assert keep.tolist() == [False, True, False, True]


def test_hrank_ranks_every_map_of_a_channel_that_each_conv_group_reads() -> None:
    torch.manual_seed(0)
    ranks = [1, 2, 3, 4, 5, 6]
    images = torch.stack([of_rank(rank, 2, 7, 7) for rank in ranks], 1)
    network = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 1, 1))
    weight(network, "0.weight").copy_(torch.eye(6)[..., None, None])
    graph = trace(network, images)
    group = next(group for group in graph.groups if group.name == "0")
    assert group.size == 3
    (scores,) = map_ranks(graph, [group], only_images(images), num_images=2).values()
    assert scores.tolist() == [(1 + 4) / 2, (2 + 5) / 2, (3 + 6) / 2]


def test_hrank_of_one_pixel_is_whether_it_is_zero() -> None:
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    weight(network, "0.weight").copy_(torch.eye(3))
    images = torch.tensor([[1.0, -1.0, 5.0], [2.0, -1.0, -5.0]])
    graph = trace(network, images)
    (scores,) = map_ranks(graph, graph.groups, only_images(images), num_images=2).values()
    assert scores.tolist() == [1, 0, 0.5]


def test_hrank_folds_tokens_into_an_almost_square_map() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    weight(network, "0.weight").copy_(torch.eye(2))
    images = torch.stack([torch.arange(1.0, 13).expand(3, 12), torch.rand(3, 12)], 2)  # 12 tokens: 3 x 4
    graph = trace(network, images)
    (scores,) = map_ranks(graph, graph.groups, only_images(images), num_images=3).values()
    assert scores.tolist() == [2, 3]


class Unread(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.b.weight)


def test_hrank_names_the_group_that_it_cannot_see() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=r"hrank: no layer that runs reads group 'a'.*'a=1' in the budget"):
        HRank()(trace(Unread(), x), Budget.parse("keep=0.5"), only_images(x))


# --- Taylor and Fisher


def differences(network: nn.Module, group: str, inputs: Tensor, targets: Tensor) -> Tensor:
    """dL/dz of each channel of `group` at z = 1, by central differences of the activations its readers see."""
    size, step = NUM_INPUTS[READERS[group][0]], 1e-5
    gradient = torch.zeros(size, dtype=torch.float64)
    for channel in range(size):
        losses = []
        for z in (1 + step, 1 - step):

            def scale(layer: nn.Module, given: tuple[Tensor], z: float = z, channel: int = channel) -> Tensor:
                maps = given[0].detach().clone().unflatten(1, (size, -1))
                maps[:, channel] *= z
                scaled: Tensor = maps.view_as(given[0])
                return scaled

            handles = [network.get_submodule(name).register_forward_pre_hook(scale) for name in READERS[group]]
            losses.append(F.cross_entropy(network(inputs), targets).detach())
            for handle in handles:
                handle.remove()
        gradient[channel] = (losses[0] - losses[1]) / (2 * step)
    return gradient


def in_double(graph: ChannelGraph) -> ChannelGraph:
    return replace(graph, model=copy.deepcopy(graph.model).double())


def test_taylor_is_the_mean_over_batches_of_the_squared_slope_of_the_batchs_loss(graph: ChannelGraph) -> None:
    scores = by_name(taylor_scores(in_double(graph), graph.groups, DOUBLE_TASK, num_batches=2))
    network = copy.deepcopy(graph.model).double().eval()
    for group, score in scores.items():
        slopes = [differences(network, group, x, y).square() for x, y in DOUBLE_TASK.batches(0)]
        torch.testing.assert_close(score, torch.stack([*slopes][:2]).mean(0), rtol=1e-6, atol=1e-12)


def test_taylor_goes_on_to_the_next_epoch_where_one_has_too_few_batches(graph: ChannelGraph) -> None:
    both = replace(TASK, batches=lambda epoch: [*batches(0), *batches(1)])
    scores, expected = (taylor_scores(graph, graph.groups, task, num_batches=5) for task in (TASK, both))
    for group in graph.groups:
        assert torch.equal(scores[group], expected[group])


# With a channel go the MACs of its slices: of stem, expand, project and head; of expand, depthwise and project.
NUM_MACS_SAVED = {"stem": 27 * 36 + 8 * 36 + 8 * 36 + 36, "expand": 6 * 36 + 9 * 36 + 6 * 36}


def test_fisher_is_the_mean_over_images_of_each_ones_squared_slope_per_mac_saved(graph: ChannelGraph) -> None:
    num_images = 7
    scores = by_name(fisher_scores(in_double(graph), graph.groups, DOUBLE_TASK, num_images=num_images))
    network = copy.deepcopy(graph.model).double().eval()
    images = [(x[None], y[None]) for batch in DOUBLE_TASK.batches(0) for x, y in zip(*batch, strict=True)]
    for group, score in scores.items():
        slopes = [differences(network, group, x, y).square() for x, y in images[:num_images]]
        expected = torch.stack(slopes).mean(0) / NUM_MACS_SAVED[group]
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-14)


class Reparametrised(nn.Module):
    """`Stream` with a computed weight and a second output, as networks with auxiliary heads have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        parametrizations.weight_norm(self.network.get_submodule("project"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(x), "other": x}


@pytest.mark.parametrize(
    "score",
    [
        lambda graph: taylor_scores(graph, graph.groups, TASK, num_batches=2),
        lambda graph: fisher_scores(graph, graph.groups, TASK, num_images=6),
        lambda graph: map_ranks(graph, graph.groups, TASK, num_images=6),
    ],
    ids=["taylor", "fisher", "hrank"],
)
def test_computed_weights_and_further_outputs_change_no_score(
    graph: ChannelGraph, score: Callable[[ChannelGraph], dict[ChannelGroup, Tensor]]
) -> None:
    outer = trace(Reparametrised(graph.model), torch.zeros(2, 3, 6, 6))
    expected = by_name(score(graph))
    for group, values in score(outer).items():
        torch.testing.assert_close(values, expected[group.name.removeprefix("network.")], rtol=1e-4, atol=1e-12)


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.auxiliary = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_fisher_of_channels_that_only_training_computes_is_zero() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3)
    graph = trace(Auxiliary(), images)
    task = replace(TASK, batches=lambda epoch: [(images, torch.arange(4) % 2)])
    scores = by_name(fisher_scores(graph, graph.groups, task, num_images=4))
    assert scores["auxiliary.0"].tolist() == [0] * 5
    assert scores["body"].max() > 0


# --- all of them


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (HRank(), "hrank: ranks feature maps and needs data"),
        (Taylor(), "taylor: measures gradients and needs data"),
        (Fisher(), "fisher: measures gradients and needs data"),
    ],
    ids=["hrank", "taylor", "fisher"],
)
def test_what_needs_data_says_so(graph: ChannelGraph, pruner: Pruner, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pruner(graph, Budget.parse("keep=0.5"), None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HRank(num_images=0), "hrank: num_images must be at least 1, got 0"),
        (lambda: Taylor(num_batches=0), "taylor: num_batches must be at least 1, got 0"),
        (lambda: Fisher(num_images=-1), "fisher: num_images must be at least 1, got -1"),
    ],
    ids=["hrank", "taylor", "fisher"],
)
def test_impossible_options_are_refused_by_name(build: Callable[[], Pruner], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
