"""What tracing finds, and what it refuses: nothing is ever guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.compaction import certify, compact
from sparsekit.cost import num_macs
from sparsekit.errors import PlanError, TraceError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.program import Program
from sparsekit.record import on_meta, record
from sparsekit.selection import keep_top
from tests.networks import make


class Net(nn.Module):
    """conv a (8) -> `middle` -> conv b; subclasses say what happens in between."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.clone, *, width: int = 8) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(width, 4, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.function(x)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.middle(self.a(x)))


def groups(graph: ChannelGraph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups}


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def assert_cuts_exactly(graph: ChannelGraph, x: Tensor = X) -> None:
    """Dropping scattered channels of every group leaves the function of the masked network."""
    generator = torch.Generator().manual_seed(3)
    scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
    plan = keep_top(scores, {group: max(1, group.size // 3) for group in graph.groups})
    assert certify(graph.model, plan, compact(graph.model, plan), (x,)).holds


def test_a_chain_has_a_group_per_inner_layer_and_none_for_the_output() -> None:
    graph = trace(Net(), X)
    assert groups(graph) == {"a": 8}
    places = {(slot.tensor, slot.dim, slot.read) for slot in graph.groups[0].slots}
    assert places == {("a.weight", 0, False), ("a.bias", 0, False), ("b.weight", 1, True)}
    assert graph.refusals == ()
    assert num_macs(graph) == 8 * 8 * (9 * 3 * 8 + 8 * 4)


def test_an_op_without_a_rule_freezes_only_what_it_touches_and_is_named() -> None:
    class Sorted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(4, 6, 1)
            self.d = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = torch.cumsum(self.a(x), dim=1)
            return self.d(self.c(self.b(x)))

    graph = trace(Sorted(), X)
    assert groups(graph) == {"b": 4, "c": 6}
    (refusal,) = graph.refusals
    assert (refusal.op, refusal.reason) == ("cumsum", "no rule for aten::cumsum")
    assert refusal.source.startswith("tests/test_graph.py:")
    locked = 8 * 8 * (9 * 3 * 8 + 8 * 4)
    assert refusal.macs_share == pytest.approx(locked / num_macs(graph))
    assert graph.uncounted == ("cumsum",)
    assert_cuts_exactly(graph)


@pytest.mark.parametrize("width", [100, 200, 300])
def test_the_share_that_a_refusal_locks_does_not_depend_on_how_many_channels_it_holds(width: int) -> None:
    network = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 4))
    (refusal,) = trace(network, torch.zeros(2, 4)).refusals
    assert (refusal.module, refusal.op, refusal.macs_share) == ("1", "native_layer_norm", 1.0)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: x[:, [0, 1, 2, 3, 4, 5, 6, 7]], "index picks channels by their numbers"),
        (lambda x: x * torch.arange(8.0).view(1, 8, 1, 1), "meets a tensor whose channels are fixed"),
        (lambda x: x - x.mean(1, keepdim=True), "mean runs over the channels; renormalise=True offers them"),
        (lambda x: x.softmax(1), "softmax normalises over the channels; renormalise=True offers them"),
        (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 1).permute(0, 3, 1, 2), "avg_pool2d runs over the channels"),
        (
            lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
            "LayerNorm normalises over the channels; renormalise=True offers them",
        ),
    ],
)
def test_what_cannot_be_cut_is_kept_with_its_reason(middle: Callable[[Tensor], Tensor], reason: str) -> None:
    graph = trace(Net(middle), X)
    assert groups(graph) == {}
    assert any(reason in refusal.reason for refusal in graph.refusals), graph.refusals


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.view(2, 8, 8, 8),
        lambda x: x.reshape(2, 8, 64).transpose(1, 2).reshape(2, 64, 8).permute(0, 2, 1).view(2, 8, 8, 8),
        lambda x: x * x.shape[1],
        lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))[:, 2:10],
    ],
)
def test_channels_whose_number_the_forward_fixes_are_marked_with_its_line(middle: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Net(middle), X)
    assert groups(graph) == {"a": 8}
    assert graph.groups[0].fixed_by.startswith("tests/test_graph.py:")


def test_a_size_that_the_forward_takes_from_other_channels_fixes_both_and_nothing_between() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.stem, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 4)
            self.bias = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, self.num_heads))
            self.register_buffer("where", torch.rand(5, 5, 2))

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            attended = (q @ k.transpose(-2, -1) + self.bias(self.where).permute(2, 0, 1)).softmax(-1) @ v
            return self.proj(attended.transpose(1, 2).reshape(b, n, c))

    x = torch.randn(2, 5, 3)
    graph = trace(Attention().eval(), x)
    assert groups(graph) == {"stem": 8, "qkv": 2, "qkv#2": 4, "bias.0": 12}
    fixed = {group.name: group.fixed_by.partition(": ")[2] for group in graph.groups if group.fixed_by}
    assert fixed == dict.fromkeys(["stem", "qkv", "qkv#2"], "the forward takes a size here from other channels")
    plan = keep_top({g: torch.rand(g.size) for g in graph.groups}, {g: g.size // 2 for g in graph.groups})
    assert certify(graph.model, plan, compact(graph.model, plan, x), x).holds


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.view(x.size(0), -1, 8, 8),
        lambda x: x.flatten(2).view(*x.shape),
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
        lambda x: F.leaky_relu(x, 0.2) + x.clone().add_(1.0),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: F.adaptive_avg_pool2d(x, 1).expand(-1, -1, 8, 8),
    ],
)
def test_what_only_moves_or_bends_channels_is_cut_exactly(middle: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Net(middle), X)
    assert groups(graph) == {"a": 8}, graph.refusals
    assert_cuts_exactly(graph)


def test_concatenated_layers_stay_groups_of_their_own() -> None:
    class Cat(Net):
        def __init__(self) -> None:
            super().__init__(width=13)
            self.c = nn.Conv2d(3, 5, 1)
            self.norm = nn.BatchNorm2d(13)

        def forward(self, x: Tensor) -> Any:
            return self.b(self.norm(torch.cat([self.a(x), self.c(x)], dim=1)))

    graph = trace(Cat().eval(), X)
    assert groups(graph) == {"a": 8, "c": 5}
    c = graph.groups[1]
    assert next(s.index for s in c.slots if s.tensor == "norm.weight").flatten().tolist() == [8, 9, 10, 11, 12]
    assert_cuts_exactly(graph)


def test_flattened_channels_own_every_pixel_of_the_linear_layer() -> None:
    network, x = make("sigmoid")
    graph = trace(network, x)
    head = next(slot for slot in graph.groups[1].slots if slot.tensor == "head.weight")
    assert head.read
    assert head.index.shape == (6, 16)
    assert head.index[1].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("num_conv_groups", "size", "groups_after"),
    [(8, 8, 3), (4, 4, 2), (2, 4, 2)],  # depthwise; whole groups of 2; 4 positions inside each of 2 groups
)
def test_grouped_convolutions_are_cut_where_most_channels_can_be_chosen(
    num_conv_groups: int, size: int, groups_after: int
) -> None:
    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Conv2d(8, 8, 3, padding=1, groups=num_conv_groups)

        def middle(self, x: Tensor) -> Tensor:
            return torch.relu(self.g(x))

    torch.manual_seed(0)
    graph = trace(Grouped(), X)
    assert groups(graph)["a"] == size
    plan = keep_top(
        {g: torch.arange(float(g.size)) for g in graph.groups},
        {g: min(g.size, groups_after if g.name == "a" else g.size) for g in graph.groups},
    )
    small = compact(graph.model, plan)
    inner, first = small.get_submodule("g"), small.get_submodule("a")
    assert inner.groups == (groups_after if num_conv_groups >= 4 else num_conv_groups)
    assert inner.in_channels == first.out_channels
    assert certify(graph.model, plan, small, (X,)).holds
    assert_cuts_exactly(graph)


def test_a_grouped_convolution_whose_groups_are_a_literal_is_cut_in_a_program() -> None:
    class Functional(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

        def middle(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1, groups=8)

    graph = trace(Functional(), X)
    assert groups(graph) == {"a": 8}
    assert "groups is not an attribute" in graph.groups[0].fixed_by
    plan = keep_top({graph.groups[0]: torch.arange(8.0)}, {graph.groups[0]: 3})
    small = compact(graph.model, plan, X)
    assert isinstance(small, Program)
    assert certify(graph.model, plan, small, X).holds
    with pytest.raises(PlanError, match=r"group 'a': tests/test_graph.py:\d+, aten::convolution: .*as_='graph'"):
        compact(graph.model, plan, X, as_="module")
    with pytest.raises(PlanError, match="needs example_inputs"):
        compact(graph.model, plan)


def test_option_a_shortcuts_carry_their_channels_through_the_padding() -> None:
    network, x = make("resnet20")
    graph = trace(network, x)
    inner = {f"layer{stage}.{block}.conv1": 16 * 2 ** (stage - 1) for stage in (1, 2, 3) for block in range(3)}
    assert groups(graph) == inner | {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    assert graph.refusals == ()
    by_name = {group.name: group for group in graph.groups}
    last = next(slot for slot in by_name["conv1"].slots if slot.tensor == "linear.weight")
    assert last.index.flatten().tolist() == list(range(24, 40))  # 16 of 64, in the middle
    assert not by_name["conv1"].fixed_by
    assert "pads a fixed number of channels" in by_name["layer3.0.conv2"].fixed_by


def test_heads_that_run_only_in_training_are_cut_with_their_trunk() -> None:
    class Aux(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.b(x), self.aux(x)) if self.training else self.b(x)

    graph = trace(Aux().eval(), X)
    assert ("aux.weight", 1) in {(slot.tensor, slot.dim) for slot in graph.groups[0].slots}
    plan = keep_top({graph.groups[0]: torch.arange(8.0)}, {graph.groups[0]: 3})
    assert [leaf.shape[1] for leaf in compact(graph.model, plan).train()(X)] == [4, 2]
    assert num_macs(graph) == num_macs(trace(Net(), X))


def test_a_shared_layer_stays_shared_after_cutting() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Conv2d(8, 8, 1)

        def middle(self, x: Tensor) -> Tensor:
            return torch.relu(self.twin(self.twin(x)))

    torch.manual_seed(0)
    graph = trace(Shared(), X)
    assert groups(graph) == {"a": 8}
    assert_cuts_exactly(graph)


def test_a_network_that_fails_says_so_with_its_own_error() -> None:
    with pytest.raises(
        TraceError,
        match=r"forward fails on the example inputs: RuntimeError: Given groups=1, weight of size \[8, 3, 3, 3\]",
    ):
        trace(Net(), torch.zeros(2, 5, 8, 8))


def test_recording_runs_nothing_and_leaves_no_hook_behind() -> None:
    network = Net()
    before = len(torch.nn.modules.module._global_forward_hooks)
    recording = record(on_meta(network), (X,))
    assert [op.name for op in recording.ops] == ["convolution", "clone", "convolution"]
    assert [op.module for op in recording.ops] == ["a", "", "b"]
    assert recording.ops[0].outputs[0] is not recording.ops[1].outputs[0]
    assert len(torch.nn.modules.module._global_forward_hooks) == before
