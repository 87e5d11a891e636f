"""tidy removes what does nothing, exactly that, and the network computes what it computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves

from sparsekit.errors import TraceError
from sparsekit.survey import Survey, survey
from sparsekit.tidy import tidy
from tests.networks import NETWORKS, make

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
Function = Callable[[Tensor], Tensor]
tidy_module = import_module("sparsekit.tidy")  # `sparsekit.tidy` may as well be the function


def build(network: nn.Module) -> nn.Module:
    """In float64 and eval mode, all parameters and statistics seeded and away from 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in network.double().state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.2
                sign = (
                    1.0
                    if name.endswith("running_var")
                    else torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                )
                tensor.copy_(values * sign)
    return network.eval()


def edit(network: nn.Module, values: dict[str, tuple[Any, float]]) -> None:
    """Parameter or buffer name -> (index, new value)."""
    with torch.no_grad():
        for name, (index, value) in values.items():
            network.state_dict()[name][index] = value


def gone(network: nn.Module, small: nn.Module, name: str, dim: int = 0) -> list[int]:
    """Which positions along `dim` are no longer there, told by their first values, which all differ."""
    before, after = (
        net.state_dict()[name].movedim(dim, 0).flatten(1)[:, 0].tolist()
        if net.state_dict()[name].dim() > 1
        else net.state_dict()[name].tolist()
        for net in (network, small)
    )
    assert len(set(before)) == len(before)
    return [number for number, value in enumerate(before) if value not in after]


def assert_same_function(network: nn.Module, small: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        outputs = [tree_leaves(copy.deepcopy(net)(*inputs)) for net in (network, small)]
    for expected, got in zip(*outputs, strict=True):
        assert expected.shape == got.shape
        assert expected.abs().max() > 0
        assert (expected - got).abs().max() <= 1e-9 * expected.abs().max()


def assert_bit_equal(network: nn.Module, other: nn.Module) -> None:
    a, b = network.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def tidied(network: nn.Module, x: Tensor = X) -> nn.Module:
    """`tidy`, checked against the laws that always hold."""
    before = copy.deepcopy(network)
    small = tidy(network, x)
    assert_bit_equal(before, network)
    assert_same_function(network, small, x)
    assert_same_function(network, small, torch.cat([x, x + 1]))
    assert_bit_equal(tidy(small, x), small)
    return small


class Net(nn.Module):
    """conv a (8) -> `middle` -> 3x3 conv b -> ReLU -> linear: what `b` reads is up to `middle`."""

    def __init__(
        self,
        middle: Function = torch.clone,
        *,
        padding: int = 0,
        bias: bool = True,
        width: int = 8,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.middle = middle
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.b = conv(width, 4, 3, padding=padding, bias=bias)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.middle(self.a(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


POINTWISE: dict[str, Function] = {
    "none": torch.clone,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "in place": lambda x: F.leaky_relu(x, 0.1, inplace=True).mul_(2.0),
    "silu": F.silu,
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "padded maximum pooling": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "resizing": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "permuted": lambda x: torch.tanh(x.permute(0, 2, 3, 1)).contiguous().permute(0, 3, 1, 2),
    "reshaped": lambda x: x.flatten(2).clone().view(*x.shape),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "where": lambda x: torch.where(x > -0.5, x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("middle", POINTWISE.values(), ids=POINTWISE)
def test_channels_read_by_zeros_alone_and_channels_of_empty_filters_go(middle: Function) -> None:
    network = build(Net(middle))
    edit(network, {"b.weight": ((slice(None), [1, 4]), 0.0), "a.weight": ([2, 5], 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == [1, 2, 4, 5]
    assert small.get_parameter("a.weight").shape[0] == small.get_parameter("b.weight").shape[1] == 4


@pytest.mark.parametrize(("padding", "transposed"), [(1, False), (0, True), (1, True)])
@pytest.mark.parametrize(("bias", "expected"), [(-0.75, [3]), (0.0, [3]), (0.75, [])])
def test_where_the_border_differs_only_constants_that_are_zero_go(
    bias: float, expected: list[int], padding: int, transposed: bool
) -> None:
    network = build(Net(F.relu, padding=padding, transposed=transposed))
    edit(network, {"a.weight": (3, 0.0), "a.bias": (3, bias)})
    assert gone(network, tidied(network), "a.bias") == expected


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: x.sum((2, 3), keepdim=True).expand(-1, -1, 8, 8),
        lambda x: F.max_pool2d(F.adaptive_avg_pool2d(x, 1), 2, 1, 1, 2).clamp(-3, 3).expand(-1, -1, 8, 8),
        lambda x: x.view(torch.int64).double().sigmoid(),
        lambda x: x.cumsum(2),
        lambda x: x + torch.rand(8, 1, 1).double() * 0,
    ],
    ids=["padded mean", "divisor", "padding", "sum", "empty window", "other bits", "no rule", "no state"],
)
def test_a_constant_stays_where_it_is_not_known_to_come_out_the_same_everywhere(middle: Function) -> None:
    network = build(Net(lambda x: middle(F.relu(x))))
    edit(network, {"a.weight": ([2, 3], 0.0), "a.bias": (2, 0.5)})
    edit(network, {"a.bias": (3, 0.75)})
    assert gone(network, tidied(network), "a.bias") == []


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("activation", [F.relu, torch.sigmoid, F.relu6, torch.clone])
def test_a_channel_of_gamma_0_is_beta(activation: Function, padding: int) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(activation, padding=padding)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.b(self.middle(self.norm(self.a(x)))).mean((2, 3)))
            return logits

    network = build(Normed())
    edit(network, {"norm.weight": ([1, 6], 0.0), "norm.bias": (1, -0.5)})
    edit(network, {"norm.bias": (6, 0.5)})
    small = tidied(network)
    allowed = {0: [1, 6], 1: [1] if activation in (F.relu, F.relu6) else []}
    assert gone(network, small, "norm.bias") == gone(network, small, "a.bias") == allowed[padding]
    assert_same_function(network.train(), small.train(), X)  # gamma 0 is beta in training too


class Residual(nn.Module):
    """a(x) + b(x), read by c; `both` and `one` are added or concatenated."""

    def __init__(self, *, concatenated: bool = False) -> None:
        super().__init__()
        self.concatenated = concatenated
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(3, 6, 3, padding=1)
        self.c = nn.Conv2d(12 if concatenated else 6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y: Tensor = self.c(F.silu(torch.cat([a, b], 1) if self.concatenated else a + b))
        return y


def test_a_sum_is_constant_only_where_all_its_parts_are() -> None:
    network = build(Residual())
    edit(network, {"a.weight": ([0, 2, 5], 0.0), "b.weight": ([0, 3, 5], 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == gone(network, small, "b.bias") == [0, 5]


def test_concatenated_branches_lose_their_channels_each_by_itself() -> None:
    network = build(Residual(concatenated=True))
    edit(network, {"a.weight": ([0, 2, 5], 0.0), "b.weight": ([0, 3], 0.0), "c.weight": ((slice(None), 10), 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == [0, 2, 5]
    assert gone(network, small, "b.bias") == [0, 3, 4]


class Depthwise(nn.Module):
    def __init__(self, *, padding: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=padding, groups=6)
        self.b = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.depthwise(F.relu(self.a(x)))))
        return y


@pytest.mark.parametrize(("padding", "expected"), [(0, [0, 1, 4, 5]), (1, [0, 4, 5])])
def test_constants_pass_a_depthwise_convolution_where_its_padding_lets_them(padding: int, expected: list[int]) -> None:
    network = build(Depthwise(padding=padding))
    edit(network, {"a.weight": ([0, 1], 0.0), "depthwise.weight": (4, 0.0), "b.weight": ((slice(None), 5), 0.0)})
    edit(network, {"a.bias": (0, -0.5)})
    edit(network, {"a.bias": (1, 0.5)})
    small = tidied(network)
    assert gone(network, small, "depthwise.bias") == gone(network, small, "a.bias") == expected


class SqueezeExcite(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.squeeze = nn.Conv2d(6, 3, 1, bias=bias)
        self.excite = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        y: Tensor = self.b(x * gate)
        return y


def test_a_constant_under_a_gate_that_varies_is_not_one() -> None:
    network = build(SqueezeExcite())
    edit(network, {"a.weight": ([1, 3], 0.0), "a.bias": (1, 0.0), "excite.weight": (3, 0.0)})
    # 1 is zero whatever the gate; 3 is constant, as is its gate; 4 is constant under a gate that varies.
    edit(network, {"a.weight": (4, 0.0)})
    assert gone(network, tidied(network), "excite.bias") == [1, 3]


def test_every_reader_must_have_a_place_for_the_constant() -> None:
    network = build(SqueezeExcite(bias=False))
    edit(network, {"a.weight": ([1, 3], 0.0), "a.bias": (1, 0.0), "excite.weight": (3, 0.0)})
    assert gone(network, tidied(network), "excite.bias") == [1]


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3)
        self.b = nn.Linear(5 * 9, 7)
        self.c = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.gelu(self.b(F.avg_pool2d(torch.sigmoid(self.a(x)), 2).flatten(1))))
        return y


def test_a_linear_layer_after_flatten_takes_up_all_positions_of_a_constant() -> None:
    network = build(Flattened())
    edit(network, {"a.weight": (2, 0.0), "b.weight": ((slice(None), slice(9, 18)), 0.0)})
    edit(network, {"b.weight": (6, 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == [1, 2]
    assert gone(network, small, "c.weight", dim=1) == [6]


class Normed(nn.Module):
    """A reader without bias: the running mean of the norm behind it takes up constants, if it is that norm's alone."""

    def __init__(
        self, *, twice: bool = False, peeked: bool = False, returned: bool = False, batch: bool = False
    ) -> None:
        super().__init__()
        self.twice, self.peeked, self.returned = twice, peeked, returned
        self.a = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3, bias=False)
        self.last = nn.BatchNorm2d(4)
        self.statistics = nn.BatchNorm2d(4, track_running_stats=not batch)
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.b(torch.sigmoid(self.norm(self.a(x))))
        result: Tensor = self.last(y if self.statistics.track_running_stats else self.statistics(y))
        if self.twice:
            result = result + self.last(self.other(x))
        if self.returned:
            return result, y
        return result * y if self.peeked else result


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [0, 4]), ({"twice": True}, [4]), ({"peeked": True}, [4]), ({"returned": True}, [4]), ({"batch": True}, [4])],
)
def test_without_a_bias_the_running_mean_takes_up_constants(options: dict[str, bool], expected: list[int]) -> None:
    network = build(Normed(**options))
    edit(network, {"norm.weight": (0, 0.0), "b.weight": ((slice(None), 4), 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == expected
    assert small.state_dict().keys() == network.state_dict().keys()
    train, cut = copy.deepcopy(network).train(), copy.deepcopy(small).train()
    assert_same_function(train, cut, X)
    shift = network.get_buffer("last.running_mean") - small.get_buffer("last.running_mean")
    train(X), cut(X)
    after = train.get_buffer("last.running_mean") - cut.get_buffer("last.running_mean")
    torch.testing.assert_close(after, shift)  # the batch's own mean moves by the constant as well


class Twice(nn.Module):
    """`shared` reads two branches; so do two layers that share only a weight or only a bias."""

    def __init__(self, tied: str = "") -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.first, self.second = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
        if tied == "module":
            self.second = self.first
        elif tied:
            setattr(self.second, tied, getattr(self.first, tied))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(F.relu(self.a(x))) + 2 * self.second(torch.sigmoid(self.b(x)))
        return y


@pytest.mark.parametrize(("tied", "expected"), [("", [0, 1, 2]), ("module", [2]), ("weight", [2]), ("bias", [2])])
def test_what_several_readers_share_takes_up_a_constant_only_if_it_is_theirs(tied: str, expected: list[int]) -> None:
    network = build(Twice(tied))
    edit(network, {"a.weight": ([0, 1, 2], 0.0), "b.weight": ([0, 1, 2], 0.0), "first.weight": ((slice(None), 2), 0.0)})
    edit(network, {"second.weight": ((slice(None), 2), 0.0)})
    assert gone(network, tidied(network), "a.bias") == expected


def test_a_bias_whose_memory_is_also_another_one_takes_up_nothing() -> None:
    network = build(Twice())
    first, second = (network.get_parameter(f"{name}.bias") for name in ("first", "second"))
    second.data = first.data
    edit(network, {"a.weight": (0, 0.0)})
    small = tidy(network, X)
    assert gone(network, small, "a.bias") == []
    assert_same_function(network, small, X)


def test_a_weight_that_is_read_in_another_way_too_takes_up_nothing() -> None:
    class Doubled(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            logits: Tensor = self.head((self.b(x) + F.conv2d(x, self.b.weight * 2).sigmoid()).mean((2, 3)))
            return logits

    network = build(Doubled())
    edit(network, {"a.weight": ([1, 2], 0.0), "b.weight": ((slice(None), 2), 0.0), "a.bias": (1, 0.5)})
    assert gone(network, tidied(network), "a.bias") == [2]


def test_a_module_called_twice_takes_up_what_is_the_same_constant_in_both_calls() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(F.relu(self.a(x))) * self.b(F.relu(self.a(x.flip(-1))))
            return y

    network = build(Called())
    edit(network, {"a.weight": ([0, 1], 0.0), "a.bias": (0, 0.5)})
    edit(network, {"a.bias": (1, -0.5)})
    assert gone(network, tidied(network), "a.bias") == [0, 1]


def test_grouped_and_plain_products_read_constants_too() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 6, 3, groups=2)
            self.c = nn.Parameter(torch.zeros(6, 5))
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(torch.sigmoid(self.a(x)))).mean((2, 3))
            logits: Tensor = self.head(x @ self.c)
            return logits

    network = build(Grouped())
    # The same position of both convolution groups goes, or none.
    edit(network, {"a.weight": ([1, 5, 6], 0.0), "b.weight": ([0, 3], 0.0), "b.bias": ([0], -0.5)})
    edit(network, {"b.bias": (3, -0.7)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == [1, 5]
    assert gone(network, small, "c") == [0, 3]  # relu(-0.5) is 0: nothing for `c` to take up


def test_what_is_emptied_by_a_cut_goes_as_well_up_to_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *[m for _ in range(4) for m in (nn.Linear(6, 6), nn.Sigmoid())], nn.Linear(6, 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y

    network = build(Chain())
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for name in linears[1:-1]:  # channel 3 reads 3 alone, and nobody but 3 reads 3
            weight = network.get_parameter(f"{name}.weight")
            weight[3, [0, 1, 2, 4, 5]] = 0
            weight[[0, 1, 2, 4, 5], 3] = 0
        network.get_parameter(f"{linears[-1]}.weight")[:, 3] = 0
    small = tidied(network, torch.randn(4, 6).double())
    assert [gone(network, small, f"{name}.bias") for name in linears] == [[3]] * 4 + [[]]
    rounds = []

    def counted(*arguments: Any, **options: Any) -> Survey:
        rounds.append(arguments)
        return survey(*arguments, **options)

    monkeypatch.setattr(tidy_module, "survey", counted)
    tidy(network, torch.randn(4, 6).double())
    assert len(rounds) == 1  # the chain is emptied in one, and nothing zero is left to look at again


def test_a_group_never_loses_its_last_channel() -> None:
    network = build(Net(F.relu))
    edit(network, {"a.weight": (slice(None), 0.0)})
    assert gone(network, tidied(network), "a.bias") == list(range(1, 8))


def test_constants_that_vary_over_positions_stay() -> None:
    class Positional(Net):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 8, 8, 8))
            self.scale = nn.Parameter(torch.zeros(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.middle = lambda y: F.silu(y + self.position + self.scale)
            return super().forward(x)

    network = build(Positional())
    edit(network, {"a.weight": ([2, 6], 0.0), "position": ((0, 6), 0.25)})
    assert gone(network, tidied(network), "a.bias") == [6]


class Unsettled(nn.Module):
    """Forwards in which a channel of an empty filter is no constant."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3)
        self.gain = nn.Parameter(torch.zeros(6, 1, 1))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(6, 1, 1))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "a view is written to":
            y.flatten(2).mul_(x.mean((1, 2, 3)).view(-1, 1, 1))
        elif self.how == "a buffer counts the calls":
            self.calls.add_(1)
            y = y * self.calls
        elif self.how == "compared with data":
            y = torch.where(x.mean(1, keepdim=True) > 0, y, -y)
        elif self.how == "times data":
            y = y * x.mean(1, keepdim=True)
        elif self.how == "noise":
            y = y + torch.rand_like(self.gain)
        elif self.how == "a size from the input's device":
            y = y * torch.ones_like(self.gain, device=y.device)
        elif self.how == "parameters are normalised":
            y = y * F.batch_norm(self.gain[None].expand(2, 6, 2, 1), self.mean, self.var, training=True)[:1, :, :1]
        elif self.how == "normalised by the batch":
            y = F.batch_norm(y, None, None, self.gain.flatten(), training=True)
        z: Tensor = self.b(y)
        return z


UNSETTLED = ["a view is written to", "a buffer counts the calls", "compared with data", "times data", "noise"]


UNSETTLED += ["a size from the input's device", "parameters are normalised", "normalised by the batch"]


@pytest.mark.parametrize("how", UNSETTLED)
def test_what_only_looks_constant_stays(how: str) -> None:
    network = build(Unsettled(how))
    edit(network, {"a.weight": (1, 0.0)})
    before = copy.deepcopy(network)
    small = tidy(network, X)
    assert_bit_equal(before, network)
    assert gone(network, small, "a.bias") == []
    torch.manual_seed(0)
    expected = copy.deepcopy(network)(X)
    torch.manual_seed(0)
    assert torch.equal(expected, small(X))


def test_what_the_forward_computes_from_parameters_is_as_constant_as_they_are() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            gain = self.gain.clone()
            gain.mul_(2.0).exp_()
            logits: Tensor = self.head(self.b(self.a(x) * gain).mean((2, 3)))
            return logits

    network = build(Scaled())
    edit(network, {"a.weight": (4, 0.0)})
    assert gone(network, tidied(network), "a.bias") == [4]


def test_what_is_made_with_weights_from_data_is_not_known() -> None:
    class Modulated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(self.a(x), self.mixer.weight * x.mean(), self.mixer.bias)
            logits: Tensor = self.head(self.b(y).mean((2, 3)))
            return logits

    network = build(Modulated())
    edit(network, {"a.weight": (4, 0.0)})
    small = tidied(network)
    assert gone(network, small, "mixer.bias") == []


def test_a_scaled_product_takes_up_nothing_and_makes_nothing_known() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.addmm(self.b.bias, torch.sigmoid(self.a(x)), self.b.weight.t(), alpha=2, beta=3)
            y: Tensor = self.c(torch.sigmoid(x))
            return y

    network = build(Scaled())
    edit(network, {"a.weight": (2, 0.0), "b.weight": (1, 0.0)})
    small = tidied(network, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double())
    assert gone(network, small, "a.bias") == gone(network, small, "b.bias") == []


def test_channels_whose_number_the_forward_fixes_stay() -> None:
    network = build(Net(lambda x: x.view(-1, 8, 8, 8)))
    edit(network, {"a.weight": (1, 0.0), "b.weight": ((slice(None), 2), 0.0)})
    assert gone(network, tidied(network), "a.bias") == []


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_what_a_parametrised_weight_does_not_read_goes_and_constants_go_into_its_bias(parametrize: Any) -> None:
    network = Net(F.relu)
    parametrize(network.b)
    build(network)
    originals = {name: value.numel() for name, value in network.named_parameters() if "original" in name}
    original = max(originals, key=lambda name: originals[name])
    edit(network, {original: ((slice(None), 3), 0.0), "a.weight": (5, 0.0), "a.bias": (5, 0.5)})
    assert gone(network, tidied(network), "a.bias") == [3, 5]


def test_zeros_of_a_pruning_mask_count() -> None:
    network = build(Net(F.relu))
    mask = torch.ones(4, 8, 3, 3)
    mask[:, [1, 6]] = 0
    prune.custom_from_mask(network.get_submodule("b"), "weight", mask)
    small = tidy(network, X)
    assert gone(network, small, "a.bias") == [1, 6]
    with torch.no_grad():
        torch.testing.assert_close(small(X), network(X), rtol=1e-9, atol=0)


def test_a_weight_that_the_forward_computes_takes_up_nothing_but_may_read_nothing() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(4, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(F.relu(self.a(x)), self.b.weight * self.gain, self.b.bias)
            logits: Tensor = self.head(y.mean((2, 3)))
            return logits

    network = build(Scaled())
    edit(network, {"b.weight": ((slice(None), 3), 0.0), "a.weight": ([4, 5], 0.0), "a.bias": (5, 0.5)})
    edit(network, {"a.bias": (4, -0.5)})
    assert gone(network, tidied(network), "a.bias") == [3]


class Attention(nn.Module):
    """Three heads of four, and an MLP, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.embed = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        x = x + self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits


@pytest.mark.parametrize(
    "zeros",
    [
        {"proj.weight": (slice(None), slice(4, 8))},
        {"qkv.weight": slice(28, 32), "qkv.bias": slice(28, 32)},
    ],
    ids=["nobody reads the head", "the head's values are zero"],
)
def test_heads_and_hidden_channels_that_add_nothing_go(zeros: dict[str, Any]) -> None:
    network = build(Attention())
    edit(network, {name: (index, 0.0) for name, index in zeros.items()} | {"fc1.weight": (7, 0.0)})
    small = tidied(network, torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)).double())
    kept = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    assert torch.equal(small.get_parameter("proj.weight"), network.get_parameter("proj.weight")[:, kept])
    rows = torch.cat([kept, kept + 12, kept + 24])
    assert torch.equal(small.get_parameter("qkv.weight"), network.get_parameter("qkv.weight")[rows])
    assert gone(network, small, "fc1.bias") == [7]
    assert small.num_heads == 2


def test_a_head_that_only_training_runs_still_reads_what_it_read() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 1)
            self.norm = nn.BatchNorm2d(6)
            self.b, self.auxiliary = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.norm(self.a(x)))
            y: Tensor = self.b(x)
            return torch.cat([y, self.auxiliary(x)], 1) if self.training else y

    network = build(Auxiliary())
    edit(network, {"norm.weight": ([0, 2], 0.0), "auxiliary.weight": ((slice(None), 2), 0.0)})
    small = tidied(network)
    assert gone(network, small, "a.bias") == [2]
    assert_same_function(network.train(), small.train(), X)


def plant(network: nn.Module, seed: int) -> None:
    """Unstructured zeros, some of which empty filters and input slices, and zero gammas of every eighth channel."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int) -> Tensor:
        return torch.rand(size, generator=generator) < 1 / 8

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[torch.rand(module.weight.shape, generator=generator) < 0.5] = 0
                module.weight[some(module.weight.shape[0])] = 0
                if module.weight.shape[1] > 1:
                    module.weight[:, some(module.weight.shape[1])] = 0
            elif isinstance(module, nn.BatchNorm2d):
                module.weight[some(module.weight.shape[0])] = 0


def num_values(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *[(name, seed) for name in ("sigmoid", "lenet5", "resnet20", "resnet20_b", "wrn16_2") for seed in range(3)],
        *[(name, 0) for name in ("mobilenet_v1", "mobilenet_v2", "tv_resnet18", "tv_mobilenet_v3", "tv_squeezenet")],
        *[(name, 0) for name in ("tv_densenet121", "tv_googlenet", "lenet_300_100")],
    ],
)
def test_random_zeros_are_tidied_and_the_function_stays(name: str, seed: int) -> None:
    network, x = make(name)
    network, x = network.double(), x.double()
    plant(network, seed)
    small = tidied(network, x)
    assert num_values(small.parameters()) < num_values(network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_network_is_copied_bit_by_bit_and_not_even_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(tidy_module, "survey", refuse)
    network, x = make(name)
    copied = tidy(network, x)
    assert copied is not network
    assert_bit_equal(network, copied)


def test_zeros_that_empty_nothing_change_nothing() -> None:
    network = build(Net())
    edit(network, {"a.weight": ((slice(None), 0), 0.0), "b.weight": ((slice(None), slice(None), 0, 0), 0.0)})
    assert_bit_equal(network, tidy(network, X))


def test_biases_and_statistics_at_their_start_cost_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidy_module, "survey", None)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert_bit_equal(network, tidy(network, X.float()))


def test_a_parameter_times_itself_is_not_taken_for_a_weight() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.root = nn.Parameter(torch.zeros(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.sigmoid(torch.sigmoid(self.a(x)) @ (self.root @ self.root)))
            return y

    network = build(Squared())
    edit(network, {"root": ((slice(None), 1), 0.0)})
    small = tidied(network, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double())
    assert gone(network, small, "a.bias") == []


def test_a_network_keeps_its_mode_and_its_number_format() -> None:
    network = build(Net(F.relu)).float().train()
    edit(network, {"a.weight": (3, 0.0)})
    small = tidy(network, (X.float(),))
    assert small.training
    assert {value.dtype for value in small.parameters()} == {torch.float32}
    torch.testing.assert_close(small(X.float()), network(X.float()))


def test_a_forward_that_fails_is_named() -> None:
    network = build(Net())
    edit(network, {"a.weight": (3, 0.0)})
    with pytest.raises(TraceError, match="forward fails on the example inputs"):
        tidy(network, X[:, :2])
