"""A recorded program computes what its network does, in both modes, and survives plain files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from sparsekit.compaction import compact
from sparsekit.coupling import Labels
from sparsekit.errors import DataError, PlanError, UsageError
from sparsekit.export import export_onnx
from sparsekit.living import Living
from sparsekit.plan import PruningPlan
from sparsekit.program import Program
from sparsekit.record import Recording, record
from sparsekit.replay import as_program
from sparsekit.rewriting import rewrite


def whole(recordings: list[Recording]) -> tuple[list[dict[int, Labels]], NDArray[np.bool_]]:
    """Nothing is cut."""
    return [{} for _ in recordings], np.ones(0, dtype=bool)


def replayed(model: nn.Module, *inputs: Any) -> Program:
    return as_program(model, copy.deepcopy(model), inputs, whole)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (_torchvision("resnet18"), (2, 3, 32, 32)),
    "googlenet": (_torchvision("googlenet", init_weights=False), (2, 3, 96, 96)),  # auxiliary heads in training
    "mobilenet_v3": (_torchvision("mobilenet_v3_small"), (1, 3, 32, 32)),  # dropout
    "shufflenet": (_torchvision("shufflenet_v2_x0_5"), (1, 3, 32, 32)),
    "vit": (lambda: VisionTransformer(16, 4, 2, 3, 24, 48, dropout=0.1, attention_dropout=0.1), (2, 3, 16, 16)),
    "swin": (lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=10), (1, 3, 48, 48)),
    "convnext": (_torchvision("convnext_tiny"), (2, 3, 32, 32)),  # stochastic depth
    "lraspp": (_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None), (1, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_with_nothing_cut_the_program_is_the_model_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = NETWORKS[name]
    model = factory().train()
    if isinstance(model, VisionTransformer):
        nn.init.normal_(model.get_parameter("heads.head.weight"))  # zero as it comes
    x, other = torch.randn(shape), torch.randn(3, *shape[1:])
    program = replayed(model, x)
    assert program.training
    assert list(program.state_dict()) == list(model.state_dict())
    assert_bit_equal(model, program, other, seed=1)  # dropout draws the same, statistics move the same
    assert_bit_equal(model.eval(), program.eval(), x)
    assert_bit_equal(model, program, other)


def assert_bit_equal(model: nn.Module, program: nn.Module, *inputs: Any, seed: int = 0) -> None:
    outputs = []
    for network in (model, program):
        torch.manual_seed(seed)
        outputs.append(network(*inputs))
    expected, got = ([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] for output in outputs)
    assert len(expected) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert float(expected[0].detach().abs().max()) > 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), program.state_dict().values(), strict=True)
    )


def test_gradients_are_those_of_the_model_and_reach_every_parameter() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 2, 3, 24, 48).train()
    x = torch.randn(2, 3, 16, 16)
    program = replayed(model, x)
    for network in (model, program):
        nn.init.ones_(network.get_parameter("heads.head.weight"))
        network(x).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in program.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(grads[name], parameter.grad)


class Lambda(nn.Module):
    """A function as a network, with a parameter of shape [3] and a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
X3 = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def test_numbers_that_grow_with_the_batch_do_so_in_the_program() -> None:
    def forward(self: Lambda, x: Tensor) -> Any:
        size = x.shape[0]
        rows = self.fc(x).reshape(size * 3, 2) + torch.zeros(size * 3, 2)
        return rows.t().reshape(2, size, 3).sum(0)[: 2 * size]

    model = Lambda(forward).eval()
    program = replayed(model, X)
    for x in (X, X3, X[:1]):
        assert_bit_equal(model, program, x)


def test_a_batch_size_written_as_a_number_is_the_only_one_the_program_takes() -> None:
    model = Lambda(lambda self, x: self.fc(x).view(2, 3, 2)).eval()
    program = replayed(model, X)
    assert_bit_equal(model, program, X)
    with pytest.raises(UsageError, match=re.escape("takes input 0 of shape [2, 6], got [3, 6]")):
        program(X3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, X), "takes 1 input tensors, got 2"),
        ((X[:, :5],), "takes input 0 of shape [batch, 6], got [2, 5]"),
        ((X[0],), "takes input 0 of shape [batch, 6], got [6]"),
    ],
)
def test_inputs_that_were_not_recorded_are_named(inputs: tuple[Tensor, ...], message: str) -> None:
    program = replayed(Lambda(lambda self, x: self.fc(x)), X)
    with pytest.raises(UsageError, match=re.escape(message)):
        program(*inputs)


class Pair(NamedTuple):
    left: Any
    right: Any


def test_nested_inputs_and_the_structure_of_the_output_are_kept() -> None:
    class Result:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def forward(self: Lambda, xs: list[Tensor], more: dict[str, Tensor]) -> Any:
        y = self.fc(xs[0]) + xs[1] * more["m"]
        return {"a": Pair(y, [y + 1, None]), "b": (Result(y * 2), 3)}

    program = replayed(Lambda(forward), [X, X], {"m": X})
    output = program([X3, X3], {"m": X3})
    assert list(output) == ["a", "b"]
    assert type(output["a"]).__name__ == "Pair"
    left, (right, none) = output["a"].left, output["a"].right
    assert torch.equal(left + 1, right)
    assert none is None
    assert torch.equal(output["b"][0]["x"], left * 2)
    assert output["b"][1] == 3


def test_constants_are_kept_with_their_values_and_made_anew_in_every_pass() -> None:
    grid = torch.arange(6.0)

    def forward(self: Lambda, x: Tensor) -> Any:
        bias = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        bias += grid
        return self.fc(x) + bias

    model = Lambda(forward).eval()
    program = replayed(model, X)
    constants = {name: value for name, value in program.state_dict().items() if "constant" in name}
    assert [value.tolist() for value in constants.values()] == [[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]]
    for _ in range(2):
        assert torch.equal(program(X3), model(X3))


def test_ties_frozen_parameters_and_the_model_itself_stay_as_they_were() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    net = Lambda(lambda self, x: self.parts["b"](self.parts["a"](x).relu()))
    net.parts = model
    net.parts["b"].weight = net.parts["a"].weight
    net.parts["a"].bias.requires_grad_(False)
    before, training = copy.deepcopy(net.state_dict()), net.training
    program = replayed(net, X)
    assert program.get_parameter("parts.b.weight") is program.get_parameter("parts.a.weight")
    again = Program.from_json(program.to_json(), program.state_dict())
    for one in (program, again):
        assert one.get_parameter("parts.b.weight") is one.get_parameter("parts.a.weight")
        assert not one.get_parameter("parts.a.bias").requires_grad
        assert [name for name, _ in one.named_parameters()] == [name for name, _ in net.named_parameters()]
    program(X).sum().backward()
    assert net.training == training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_program_follows_its_dtype_where_the_forward_does_and_not_where_it_names_one() -> None:
    def forward(self: Lambda, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        position = torch.arange(6, dtype=y.dtype, device=y.device) / 7
        return y + position, (y * 1e3).to(torch.float32), F.softmax(y, -1, dtype=torch.float32)

    model = Lambda(forward).eval()
    program = replayed(model, X)
    assert_bit_equal(model, program, X3)
    wide = copy.deepcopy(program).double()
    assert_bit_equal(copy.deepcopy(model).double(), wide, X3.double())
    assert [leaf.dtype for leaf in wide(X3.double())] == [torch.float64, torch.float32, torch.float32]
    assert "cpu" not in json.dumps(program.to_json())


def test_limits_of_dtypes_and_complex_dtypes_follow_the_parameters() -> None:
    def forward(self: Lambda, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        masked = y.masked_fill(y > 0, torch.finfo(y.dtype).min)
        return F.rms_norm(y, (6,)), masked, torch.fft.fft(y, dim=1).real

    model = Lambda(forward).eval()
    program = replayed(model, X)
    again = Program.from_json(json.loads(json.dumps(program.to_json())), program.state_dict())
    for one in (program, again):
        assert_bit_equal(model, one, X3)
        assert_bit_equal(copy.deepcopy(model).double(), copy.deepcopy(one).double(), X3.double())


def test_what_ran_without_grad_does_so_in_the_program() -> None:
    class Running(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(y.mean(0), 0.5)
            return y - y.detach() * self.mean

    model = Running()
    program = replayed(model, X)
    for _ in range(2):
        for network in (model, program):
            network(X).sum().backward()
    assert_bit_equal(model, program, X3)
    torch.testing.assert_close(program.get_parameter("fc.weight").grad, model.fc.weight.grad, rtol=0, atol=0)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


@pytest.mark.parametrize(
    ("training_only", "reason"),
    [
        (lambda x: Straight.apply(x), "tests/test_program.py:[0-9]+: Straight has a backward of its own"),
        (lambda x: x.view(-1, 7), "the forward fails on the example inputs: .*invalid"),
        (lambda x: x * x.mean().item(), "tests/test_program.py:[0-9]+, aten::_local_scalar_dense: the forward"),
    ],
)
def test_where_only_training_cannot_be_recorded_eval_runs_and_training_says_why(
    training_only: Callable[[Tensor], Tensor], reason: str
) -> None:
    model = Lambda(lambda self, x: training_only(self.fc(x)) if self.training else self.fc(x)).eval()
    program = replayed(model, X)
    assert not program.training
    again = Program.from_json(json.loads(json.dumps(program.to_json())), program.state_dict())
    for one in (program, again):
        assert_bit_equal(model, one, X3)
        with pytest.raises(PlanError, match=f"^the program runs in eval mode only: {reason}"):
            one.train()(X)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: x[x > 0], "aten::index"),
        (lambda x: x * int(x.argmax()), "aten::_local_scalar_dense"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: torchvision.ops.nms(x[:, :4].abs().cumsum(1), x[:, 5], 0.5), "torchvision::nms"),
    ],
)
def test_a_forward_that_follows_values_is_refused_by_line_and_op(function: Callable[[Tensor], Tensor], op: str) -> None:
    model = Lambda(lambda self, x: function(self.fc(x)))
    with pytest.raises(PlanError, match=f"^t[^:]*.py:[0-9]+, {op}: the forward follows values"):
        replayed(model, X)


def test_a_table_picked_by_a_buffer_of_indices_is_not_following_values() -> None:
    class Table(nn.Module):
        index: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4))
            self.register_buffer("index", torch.tensor([0, 3, 1, 1, 2, 0]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table[self.index] + torch.ones(6)  # a CPU tensor: recorded on real values

    model = Table().eval()
    program = replayed(model, X)
    assert torch.equal(program(X3), model(X3))
    assert torch.equal(program.state_dict()["index"], model.index)  # a file must hold what the steps read


@pytest.mark.parametrize(
    ("middle", "num_recordings"),
    [(nn.Dropout(0.0), 3), (nn.ReLU(), 3), (nn.Dropout(0.1), 4), (nn.BatchNorm1d(8), 4)],
    ids=["no dropout", "relu", "dropout", "batch norm"],
)
def test_training_mode_is_recorded_in_full_only_where_it_differs(
    middle: nn.Module, num_recordings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Recording] = []

    def counting(*args: Any) -> Recording:
        recorded.append(record(*args))
        return recorded[-1]

    monkeypatch.setattr("sparsekit.takes.record", counting)
    model, x = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 2)), torch.randn(1, 4)
    program = compact(model, PruningPlan(), x, as_="graph").train()
    assert len(recorded) == num_recordings
    batch = torch.randn(5, 4)
    torch.manual_seed(0)
    expected = model.train()(batch)
    torch.manual_seed(0)
    assert torch.equal(program(batch), expected)


def test_a_forward_that_fails_carries_the_users_own_error() -> None:
    with pytest.raises(PlanError, match="the forward fails on the example inputs: mine") as caught:
        replayed(Lambda(lambda self, x: (_ for _ in ()).throw(ValueError("mine"))), X)
    assert isinstance(caught.value.__cause__, ValueError)


def _attention(self: Lambda, x: Tensor) -> Tensor:
    q = self.fc(x).view(-1, 1, 1, 6).expand(-1, 3, 5, 6) * torch.arange(5, device=x.device).view(5, 1)
    mask = torch.full((5, 5), float("-inf"), device=x.device).triu(1)
    return F.scaled_dot_product_attention(q, q, q * 2, attn_mask=mask).flatten(1)


def test_a_program_survives_json_and_safetensors() -> None:
    model = Lambda(_attention)
    program = replayed(model, X).eval()
    document = json.dumps(program.to_json(), allow_nan=False)
    again = Program.from_json(json.loads(document), load(save(program.state_dict())))
    assert_bit_equal(program, again, X3)
    assert_bit_equal(program.train(), again.train(), X3)
    assert again.to_json() == program.to_json()


def test_new_tensors_are_made_where_the_parameters_are() -> None:
    program = replayed(Lambda(_attention), X).to("meta")
    assert program(X3.to("meta")).is_meta
    assert program.train()(X3.to("meta")).is_meta


def test_attention_is_one_step_with_the_dense_scale() -> None:
    program = replayed(Lambda(_attention), X)
    (step,) = (row for row in program.to_json()["eval"]["steps"] if "attention" in row["op"])
    assert step["op"] == "aten.scaled_dot_product_attention.default"
    assert step["args"]["scale"] == pytest.approx(6**-0.5, rel=1e-15)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(document: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            document = document[int(key) if isinstance(document, list) else key]
        document[int(last) if isinstance(document, list) else last] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _set("format", "other"),
        _set("version", 2),
        _set("eval/steps/0/op", "os.system.default"),
        _set("eval/steps/0/op", "aten.from_file.default"),
        _set("eval/steps/0/op", "aten.no_such_op.default"),
        _set("eval/steps/0/op", "aten.__class__.mro"),
        _set("eval/steps/0/op", 3),
        _set("eval/steps/0/args", {}),
        _set("eval/steps/0/args/self", {"tensor": 99}),
        _set("eval/steps/0/args/other", 1),
        _set("eval/steps/0/args/self", {"dtype": "load"}),
        _set("eval/steps/0/args/self", {"pickle": "x"}),
        _set("eval/steps", 5),
        _set("eval/returned", {"tensor": 99}),
        _set("eval/returned", {"structure": "a b", "keys": ["x"], "items": [1]}),
        _set("eval/returned", {"structure": "dict", "keys": ["x"], "items": []}),
        _set("eval/states", {"nothing": 1}),
        _set("eval/shapes", []),
        _set("train", None),
        _set("parameters", {"fc.weight": "gone"}),
        _set("buffers", ["forward"]),
        lambda document: document.pop("eval"),
    ],
)
def test_a_damaged_document_is_a_data_error_in_one_line(damage: Callable[[dict[str, Any]], None]) -> None:
    program = replayed(Lambda(lambda self, x: self.fc(x)), X)
    document = json.loads(json.dumps(program.to_json()))
    state = program.state_dict()
    damage(document)
    if document["buffers"]:
        state["forward"] = X  # no tensor is missing, the name is taken
    with pytest.raises(
        DataError, match=r"^(damaged program: |not a sparsekit program|program: tensor 'gone')"
    ) as caught:
        Program.from_json(document, state)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_missing_or_left_over_are_named() -> None:
    program = replayed(Lambda(lambda self, x: self.fc(x)), X)
    state = program.state_dict()
    with pytest.raises(DataError, match="tensor 'more' is not one of its own"):
        Program.from_json(program.to_json(), state | {"more": X})
    state.pop("fc.bias")
    with pytest.raises(DataError, match=r"tensor 'fc\.bias' is missing"):
        Program.from_json(program.to_json(), state)


def test_a_program_exports_with_a_dynamic_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 1, 3, 24, 48, num_classes=5)
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    x = torch.randn(1, 3, 16, 16)
    file = export_onnx(replayed(model, x), (x,), tmp_path / "model.onnx")
    assert file.max_relative_error < 1e-4


# ---- sizes rewritten -------------------------------------------------------------------------------------------------

HEADS = np.array([[0], [1], [2]])  # three atoms
DIMS = np.array([[3], [4], [5], [6]])  # four more
PACKED = np.array([[h, d] for h in range(3) for d in range(3, 7)])  # 12 positions: heads x head dims
CHANNELS = np.arange(7, 15)[:, None]  # eight more
ALIVE = np.array([1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
EVEN = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=bool)  # two of each four channels
FIRST = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)  # the first four channels

Case = tuple[Callable[[Tensor], Any], tuple[int, ...], tuple[Any, ...], list[tuple[Any, ...]], NDArray[np.bool_]]
N = None
SIZES: dict[str, Case] = {
    "split a packed dimension": (lambda x: x.view(2, 3, 4), (2, 12), (N, PACKED), [(N, HEADS, DIMS)], ALIVE),
    "merge it": (lambda x: x.reshape(2, 12), (2, 3, 4), (N, HEADS, DIMS), [(N, PACKED)], ALIVE),
    "leave one to be inferred": (lambda x: x.view(2, -1, 4), (2, 12), (N, PACKED), [(N, HEADS, DIMS)], ALIVE),
    "expand": (lambda x: x.expand(5, -1, 4), (3, 1), (HEADS, N), [(N, HEADS, DIMS)], ALIVE),
    "repeat": (
        lambda x: x.repeat(1, 2),
        (2, 3),
        (N, HEADS),
        [(N, np.concatenate([HEADS, HEADS]))],
        ALIVE,
    ),
    "new zeros": (lambda x: x.new_zeros(2, 3), (2, 3), (N, HEADS), [(N, HEADS)], ALIVE),
    "slice": (lambda x: x[:, 1:6], (2, 8), (N, CHANNELS), [(N, CHANNELS[1:6])], ALIVE),
    "slice from the end": (lambda x: x[:, -5:], (2, 8), (N, CHANNELS), [(N, CHANNELS[-5:])], ALIVE),
    "every second": (lambda x: x[:, ::2], (2, 8), (N, CHANNELS), [(N, CHANNELS[::2])], ALIVE),
    "select": (lambda x: x[:, 2], (2, 3), (N, HEADS), [(N,)], ALIVE),
    "split": (
        lambda x: x.split(3, 1),
        (2, 8),
        (N, CHANNELS),
        [(N, CHANNELS[:3]), (N, CHANNELS[3:6]), (N, CHANNELS[6:])],
        ALIVE,
    ),
    "chunk": (lambda x: x.chunk(2, 1), (2, 8), (N, CHANNELS), [(N, CHANNELS[:4]), (N, CHANNELS[4:])], ALIVE),
    "another dimension": (lambda x: x.split(1, 0), (2, 8), (N, CHANNELS), [(N, CHANNELS)] * 2, ALIVE),
    "squeeze": (lambda x: x.squeeze(), (1, 2, 8), (N, N, CHANNELS), [(N, CHANNELS)], ALIVE),
    "pad": (
        lambda x: F.pad(x, (1, 2, 0, 3)),
        (2, 3, 5),
        (N, HEADS, N),
        [(N, np.concatenate([HEADS, CHANNELS[:3]]), N)],
        ALIVE,
    ),
    "crop": (lambda x: F.pad(x, (-1, -3)), (2, 8), (N, CHANNELS), [(N, CHANNELS[1:5])], ALIVE),
    "group norm, whole groups": (
        lambda x: F.group_norm(x, 2),
        (2, 8, 3),
        (N, CHANNELS, N),
        [(N, CHANNELS, N)],
        FIRST,
    ),
    "pooling": (lambda x: F.max_pool2d(x, 2), (2, 8, 4, 4), (N, CHANNELS, N, N), [(N, CHANNELS, N, N)] * 2, ALIVE),
    "resizing": (
        lambda x: F.interpolate(x, size=(5, 6), mode="nearest"),
        (2, 8, 3, 3),
        (N, CHANNELS, N, N),
        [(N, CHANNELS, N, N)],
        ALIVE,
    ),
    "rolling another dimension": (
        lambda x: x.roll((1, 2), (2, 3)),
        (2, 8, 4, 4),
        (N, CHANNELS, N, N),
        [(N, CHANNELS, N, N)],
        ALIVE,
    ),
    "shuffle whole groups": (
        lambda x: F.channel_shuffle(x, 2),
        (1, 8, 2, 2),
        (N, CHANNELS, N, N),
        [(N, CHANNELS.reshape(2, 4).T.reshape(8, 1), N, N)],
        FIRST,
    ),
    "mean over another": (lambda x: x.mean((0, 2)), (2, 8, 4), (N, CHANNELS, N), [(CHANNELS,)], ALIVE),
    "clamp": (lambda x: x.clamp(-1, 2), (2, 8), (N, CHANNELS), [(N, CHANNELS)], ALIVE),
    "variance": (lambda x: x.var(0, correction=1), (3, 8), (N, CHANNELS), [(CHANNELS,)], ALIVE),
    "power": (lambda x: x**2 * 3, (2, 8), (N, CHANNELS), [(N, CHANNELS)], ALIVE),
}


def cut(x: Tensor, labels: tuple[Any, ...], alive: NDArray[np.bool_]) -> Tensor:
    for dim, label in enumerate(labels):
        if label is not None:
            x = x.index_select(dim, torch.from_numpy(alive[label].all(1).nonzero()[0]))
    return x


@pytest.mark.parametrize("name", SIZES)
def test_an_op_with_its_sizes_rewritten_does_to_what_is_left_what_it_did_to_all(name: str) -> None:
    function, shape, given, made, alive = SIZES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    recording = record(Lambda(lambda self, x: function(x)), (x,))
    assert recording.error is None
    assert not all(alive[label].all() for label in given if label is not None)
    labels: dict[int, Labels] = {recording.inputs[0].index: given}
    for op in recording.ops:
        labels |= {ref.index: row for ref, row in zip(op.outputs, made, strict=False)}
    tensors = {recording.inputs[0].index: cut(x, given, alive)}
    for op in recording.ops:
        new = rewrite(op, Living(labels, alive))
        ref = new.tensors[0]
        result = new.func(**{key: tensors[ref.index] if value is ref else value for key, value in new.args.items()})
        tensors |= zip(
            (out.index for out in op.outputs), [result] if isinstance(result, Tensor) else result, strict=True
        )
    expected = function(x)
    for ref, dense, row in zip(
        recording.outputs, [expected] if isinstance(expected, Tensor) else expected, made, strict=False
    ):
        torch.testing.assert_close(tensors[ref.index], cut(dense, row, alive), rtol=0, atol=0)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...], tuple[Any, ...], tuple[Any, ...], str]] = {
    "a position that is gone": (lambda x: x[:, 1], (2, 3), (N, HEADS), (N,), "position 1, which it selects, is cut"),
    "a stride that is none": (lambda x: x[:, ::3], (2, 8), (N, CHANNELS), (N, CHANNELS[::3]), "strided slice"),
    "sizes that do not fit": (lambda x: x.view(4, 6), (2, 12), (N, PACKED), (N, N), "cannot become"),
    "positions by number": (lambda x: x[:, torch.tensor([0, 2])], (2, 3), (N, HEADS), (N, N), "by number"),
    "rolling": (lambda x: x.roll(1, 1), (2, 3), (N, HEADS), (N, HEADS), "dimension 1, which is cut"),
    "cumulative sums": (lambda x: x.cumsum(1), (2, 3), (N, HEADS), (N, HEADS), "dimension 1, which is cut"),
    "pooling over it": (
        lambda x: F.avg_pool2d(x, 2),
        (2, 5, 4, 8),
        (N, N, N, CHANNELS),
        (N, N, N, N),
        "a dimension that is cut",
    ),
    "strides": (lambda x: x.as_strided((2, 2), (8, 1)), (2, 8), (N, CHANNELS), (N, N), "may number what is cut"),
    "diagonals": (lambda x: x.diagonal(1), (3, 8), (HEADS, CHANNELS), (N,), "may number what is cut"),
    "halves cut apart": (lambda x: F.glu(x, 1), (2, 8), (N, CHANNELS), (N, CHANNELS[:4]), "halves"),
    "uneven groups": (lambda x: F.group_norm(x, 4), (2, 8), (N, CHANNELS), (N, CHANNELS), "different numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_op_that_numbers_what_is_cut_is_refused_by_line_and_name(name: str) -> None:
    function, shape, given, made, reason = REFUSED[name]
    recording = record(Lambda(lambda self, x: function(x)), (torch.randn(shape),))
    labels: dict[int, Labels] = {recording.inputs[0].index: given}
    labels |= {ref.index: made for ref in recording.ops[-1].outputs[:1]}
    *before, last = recording.ops
    for op in before:
        rewrite(op, Living(labels, ALIVE))
    with pytest.raises(PlanError, match=r"^tests/test_program\.py:[0-9]+, aten::[a-z_0-9]+: .*" + re.escape(reason)):
        rewrite(last, Living(labels, ALIVE))


@pytest.mark.parametrize(("alive", "num_groups", "inner"), [(FIRST, 1, slice(0, 4)), (EVEN, 2, slice(1, 3))])
def test_grouped_convolutions_lose_whole_groups_or_positions_inside_them(
    alive: NDArray[np.bool_], num_groups: int, inner: slice
) -> None:
    x, weight = torch.randn(1, 8, 5), torch.randn(8, 4, 3)
    recording = record(Lambda(lambda self, x, weight: F.conv1d(x, weight, groups=2)), (x, weight))
    (op,) = recording.ops
    ref, weight_ref, out = op.args["input"], op.args["weight"], op.outputs[0]
    within = None if alive is FIRST else CHANNELS[:4]  # both groups keep the same two of four
    labels: dict[int, Labels] = {
        ref.index: (N, CHANNELS, N),
        weight_ref.index: (CHANNELS, within, N),
        out.index: (N, CHANNELS, N),
    }
    new = rewrite(op, Living(labels, alive))
    assert new.args["groups"] == num_groups
    small = F.conv1d(cut(x, labels[ref.index], alive), cut(weight, labels[weight_ref.index], alive), groups=num_groups)
    masked = x * torch.from_numpy(alive[CHANNELS].astype(np.float32))
    expected = F.conv1d(masked, weight, groups=2)
    torch.testing.assert_close(small, cut(expected, labels[out.index], alive))


@pytest.mark.parametrize(
    ("function", "alive", "expected"),
    [
        (lambda x: F.group_norm(x, 2), EVEN, {"N": 5, "C": 4, "HxW": 2, "group": 2}),
        (lambda x: F.group_norm(x, 2), FIRST, {"N": 5, "C": 4, "HxW": 2, "group": 1}),
        (lambda x: F.layer_norm(x, (8, 2)), ALIVE, {"normalized_shape": [5, 2]}),
    ],
)
def test_normalisations_run_over_what_is_left(
    function: Callable[[Tensor], Tensor], alive: NDArray[np.bool_], expected: dict[str, Any]
) -> None:
    recording = record(Lambda(lambda self, x: function(x)), (torch.randn(5, 8, 2),))
    (op,) = recording.ops
    labels: dict[int, Labels] = {ref.index: (N, CHANNELS, N) for ref in (recording.inputs[0], op.outputs[0])}
    new = rewrite(op, Living(labels, alive))
    assert {name: new.args[name] for name in expected} == expected


def test_a_network_with_literal_sizes_is_cut_exactly() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 12)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.a(x).view(len(x), 3, 4)
            out: Tensor = self.b(F.pad(heads.sum(1), (0, 0)))
            return out

    def living(recordings: list[Recording]) -> tuple[list[dict[int, Labels]], NDArray[np.bool_]]:
        by_size = {12: PACKED, 3: HEADS, 4: DIMS}
        return [
            {
                ref.index: tuple(by_size.get(size) for size in ref.shape)
                for op in recording.ops
                for ref in (*op.tensors, *op.outputs)
            }
            for recording in recordings
        ], ALIVE

    torch.manual_seed(0)
    model = Literal().double().eval()
    small = copy.deepcopy(model)
    for parameter, labels in ((small.a.weight, (PACKED, N)), (small.a.bias, (PACKED,)), (small.b.weight, (N, DIMS))):
        parameter.data = cut(parameter.data, labels, ALIVE)
    x = torch.randn(7, 5, dtype=torch.float64)
    program = as_program(model, small, (x,), living)
    assert program.get_parameter("a.weight").shape == (6, 5)
    masked = copy.deepcopy(model)
    masked.a.weight.data[~ALIVE[PACKED].all(1)] = 0
    masked.a.bias.data[~ALIVE[PACKED].all(1)] = 0
    for size in (7, 2):
        torch.testing.assert_close(program(x[:size]), masked(x[:size]), rtol=1e-12, atol=0)
    program.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in program.parameters())


def test_tensors_of_another_shape_than_the_steps_need_are_named() -> None:
    model = Lambda(lambda self, x: self.fc(x))
    small = copy.deepcopy(model)
    small.fc.weight.data = small.fc.weight.data[:4]
    with pytest.raises(PlanError, match=re.escape("'fc.weight': [4, 6] are left, the recorded ops need [6, 6]")):
        as_program(model, small, (X,), whole)


class Einsum(nn.Module):
    """Contracts by einsum, which leaves out dimensions of size 1, and reshapes with -1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.reshape(x.shape[0], 6, -1).transpose(1, 2)
        return torch.einsum("bnc,bmc,cd->bnd", x, x, self.b)


def test_what_one_example_hides_is_learnt_from_two() -> None:
    torch.manual_seed(0)
    network = Einsum().eval()
    program = compact(network, PruningPlan(), torch.randn(1, 3, 4, 4), as_="graph")
    for batch_size in (1, 2, 5):
        x = torch.randn(batch_size, 3, 4, 4)
        torch.testing.assert_close(program(x), network(x))
