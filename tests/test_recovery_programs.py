"""Recovery of networks that no module alone can tell of: recorded programs, attention, weights used as tensors."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from sparsekit import artifact, fitting
from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.data import image_task
from sparsekit.errors import PlanError
from sparsekit.graph import trace
from sparsekit.images import load_images
from sparsekit.models.resnet import CifarResNet
from sparsekit.pipeline import compress
from sparsekit.plan import PruningPlan
from sparsekit.program import Program
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe
from sparsekit.recovery import recover, reestimate_batchnorm, repair_bias, unlabelled
from sparsekit.recovery.layers import layers_of
from sparsekit.recovery.least_squares import reconstruct
from sparsekit.recovery.lockstep import recorded
from tests import patterns, tiny


def halved(network: nn.Module, x: Tensor) -> tuple[nn.Module, PruningPlan]:
    """Every second channel cut of all groups that are neither on a residual stream nor normalised together."""
    groups = [group for group in trace(network, x[:2]).groups if group.exact and not group.residual]
    plan = PruningPlan({group: torch.arange(group.size) % 2 == 0 for group in groups})
    small = compact(network, plan, x[:2])
    assert certify(network, plan, small, x[:2]).holds
    return small, plan


@torch.no_grad()
def output(network: nn.Module, x: Tensor) -> Tensor:
    leaves: list[Tensor] = tree_leaves(network(x.clone()))
    return torch.cat([leaf.flatten() for leaf in leaves])


def error(small: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Mean squared, relative to how the dense outputs vary."""
    expected = output(dense, x)
    return float((output(small, x) - expected).square().mean() / expected.var())


# What each has that others have not: weights that are no module's to multiply with, layouts, positions, products.
NAMES = (
    *("MultiheadAttention", "VisionTransformer", "ShiftedWindows", "PackedSdpa", "GroupedKvSdpa", "LSTM"),
    *("SliceAssigned", "ChannelShuffle", "TransposedGrouped", "RoiAlign", "StandardizedWeight", "CalledTwice"),
)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_where_nothing_was_cut_and_all_comes_closer_where_half_was(name: str) -> None:
    network, (example,) = patterns.make(name)
    network = network.double()
    x, unseen = torch.randn(2, 48, *example.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = copy.deepcopy(network)
    assert reconstruct(network, same, PruningPlan(), x, ridge=1e-6)
    assert repair_bias(network, same, PruningPlan(), x)
    torch.testing.assert_close(output(same, x), output(network, x), rtol=1e-8, atol=1e-8)
    small, plan = halved(network, x)
    pruned = error(small, network, unseen)
    reconstruct(network, small, plan, x)
    assert error(small, network, unseen) < 0.7 * pruned


def photos(num_images: int, seed: int = 0) -> Tensor:
    """Noise with a spatial structure, [N, 3, 16, 16]."""
    return F.avg_pool2d(torch.randn(num_images, 3, 18, 18, generator=torch.Generator().manual_seed(seed)), 3, 1) * 3


def vit() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(network.get_parameter("heads.head.weight"))  # it starts at zero
    return network.eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.SwinTransformer([2, 2], 16, [2, 1], [2, 4], [4, 4], num_classes=5)
    return network.eval()


TRANSFORMERS = {
    "vit": (vit, "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"),
    "swin": (swin, "features.1.1.attn.qkv"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_layer_of_a_transformer_is_repaired_attention_too(name: str) -> None:
    factory, inside = TRANSFORMERS[name]
    network, x = factory(), photos(128)
    small, plan = halved(network, x)
    assert isinstance(small, Program)
    pruned = error(small, network, photos(64, seed=1))
    done = reconstruct(network, small, plan, x)
    num_weights = sum(parameter.dim() in (2, 4) for name, parameter in network.named_parameters() if "bias" not in name)
    assert len(done) == num_weights
    assert inside in done
    repaired = error(small, network, photos(64, seed=1))
    assert repaired < pruned / 3
    again, _ = halved(network, x)
    records = recover(network, again, plan, x, steps=["bn", "bias", "lsq"])
    assert records[-1].score == max(record.score for record in records) > records[0].score


def test_a_program_and_a_module_of_the_same_network_are_repaired_alike() -> None:
    torch.manual_seed(0)
    network, x = CifarResNet(8, width=4).eval(), photos(16)
    reestimate_batchnorm(network, x)
    groups = [group for group in trace(network, x[:2]).groups if not group.residual]
    plan = PruningPlan({group: torch.arange(group.size) % 2 == 0 for group in groups})
    module, program = compact(network, plan), compact(network, plan, x[:2], as_="graph")
    for step in (partial(repair_bias, network), partial(reconstruct, network)):
        assert step(module, plan, x) == step(program, plan, x)
    assert reestimate_batchnorm(module, x) == reestimate_batchnorm(program, x)
    ours, theirs = dict(program.state_dict()), module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert error(module, network, x) < error(compact(network, plan), network, x) / 2


# Where positions are cropped the layer also has to return what nobody reads, where nothing is lost.
@pytest.mark.parametrize(("moved", "allowed"), [("not", 1e-12), ("about", 1e-12), ("and cropped", 1e-3)])
def test_what_the_stream_has_lost_is_found_again_through_all_that_moves_it(moved: str, allowed: float) -> None:
    class Branches(nn.Module):
        """Position by position, `second` can repair what `narrow` was cut short of."""

        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.second = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.narrow(self.wide(x))
            if moved == "not":
                z = self.second(x)
            elif moved == "about":
                z = self.second(x.roll(1, 1).reshape(-1, 2, 3, 4).transpose(1, 2))[:, :3]  # all three
                z = z.transpose(1, 2).contiguous().permute(0, 3, 1, 2).reshape(-1, 4, 6).permute(0, 2, 1)
                z = z.roll(-1, 1).unsqueeze(1).squeeze(1)
            else:
                z = self.second(F.pad(x, [0, 0, 0, 2]))[:, :6]
            out: Tensor = z + y
            return out

    torch.manual_seed(0)
    network, x = Branches().double().eval(), torch.randn(16, 6, 4, dtype=torch.float64)
    (group,) = [group for group in trace(network, x[:2]).groups if group.name == "wide"]
    plan = PruningPlan({group: torch.arange(8) < 1})  # of rank 1, where 4 are needed
    small = compact(network, plan)
    assert error(small, network, x) > 0.1
    reconstruct(network, small, plan, x, ridge=1e-12)
    assert error(small, network, x) < allowed


class OneForAll(nn.Module):
    """A layer that runs once for all images together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) * self.b(x.mean(0, keepdim=True)[:, :2])[:, :1]
        return out


class Broadcast(nn.Module):
    """One output is added to many values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        out: Tensor = y + self.b(x.mean(1, keepdim=True))
        return out


@pytest.mark.parametrize("factory", [OneForAll, Broadcast])
def test_nothing_moves_where_rows_are_not_those_of_images_or_sums_are_broadcast(factory: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = factory().double(), torch.randn(8, 6, 4, dtype=torch.float64)
    same = copy.deepcopy(network)
    assert reconstruct(network, same, PruningPlan(), x, ridge=1e-9) == ["a", "b"]
    torch.testing.assert_close(output(same, x), output(network, x))


def test_what_is_added_in_another_measure_is_no_stream() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            out: Tensor = torch.add(y, self.b(y), alpha=2)
            return out

    _, second = layers_of(recorded(Doubled(), torch.randn(2, 4)))
    assert second.stream is None


@pytest.mark.parametrize("changed", ["stream", "output"])
def test_a_sum_with_what_is_changed_on_the_way_is_no_stream(changed: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.b(y)
            torch.relu_(y if changed == "stream" else z)
            out: Tensor = y + z
            return out

    first, second = layers_of(recorded(Changed(), torch.randn(2, 4)))
    assert (first.stream, second.stream) == (None, None)


def test_a_forward_of_one_batch_size_alone_is_refused_in_words() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.reshape(2, 3))
            return out

    with pytest.raises(PlanError, match=r"one input and any batch size, this one is recorded at \[2\]"):
        reestimate_batchnorm(Fixed(), torch.randn(2, 3))


def test_a_repaired_program_exports_saves_and_loads_as_the_same_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "measure_latency", tiny.quick_latency)
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=10).eval()
    network.conv_proj = nn.Conv2d(1, 16, 4, 4)
    nn.init.normal_(network.get_parameter("heads.head.weight"))
    task = image_task(load_images("digits"), limit=64, batch_size=16)
    recipe = Recipe(
        method="column_subset", budget="keep=0.5", recover="lsq", num_images=64, epochs=0, allow_slower=True
    )
    result = compress(network, recipe, task)
    assert isinstance(result.model, Program)
    assert result.report.certificate["holds"]
    x = unlabelled(task, 64)
    assert error(result.model, network, x) < error(compact(network, result.plan, x[:2]), network, x)
    folder = result.save(tmp_path / "out")
    assert torch.equal(output(artifact.load(folder), x), output(result.model, x))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (exported,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported).flatten(), output(result.model, x), rtol=1e-4, atol=1e-4)


class Mlp(nn.Module):
    """Attention whose forward writes the number of heads, and an MLP behind it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.activation, self.down = nn.Linear(8, 12), activation, nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        out: Tensor = x + self.down(self.activation(self.up(x)))
        return out


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.Hardswish()], ids=str)
def test_a_merge_matrix_folds_into_a_program_as_into_a_module(activation: nn.Module) -> None:
    torch.manual_seed(0)
    network, x = Mlp(activation).eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        for parameter in network.up.parameters():
            parameter[7] = 0.1 * parameter[4]  # the first to go
    plan = PRUNERS["neuron_merging"](threshold=0.0)(trace(network, x), Budget.parse("keep=0.5, up=0.92"), None)
    ((group, merge),) = plan.merge.items()  # attention is pruned alone
    assert (group.name, merge[7].nonzero().flatten().tolist()) == ("up", [4])
    small = compact(network, plan, x)
    assert isinstance(small, Program)
    assert certify(network, plan, small, x).holds
    merged = PruningPlan({group: plan.keep[group]}, plan.merge)
    module, program = compact(network, merged), compact(network, merged, x, as_="graph")
    torch.testing.assert_close(output(program, x), output(module, x))
    dropped = error(compact(network, PruningPlan(merged.keep)), network, x)
    assert dropped > 1e-6
    exact = isinstance(activation, nn.ReLU | nn.LeakyReLU)  # those alone let a positive factor through
    assert error(program, network, x) < (1e-12 if exact else dropped)
