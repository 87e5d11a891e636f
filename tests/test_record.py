"""What a recording says of a forward pass: its ops, tensors, modules and lines, and why it stopped."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.errors import TraceError
from sparsekit.record import MetaKernels, Recording, check_inputs, on_meta, record
from tests.test_formulas import LAYOUTS

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Lambda(nn.Module):
    """A function as a network, with a parameter of shape [3]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.arange(1.0, 4.0))

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.scale, *inputs)


def recorded(function: Callable[..., Any], *inputs: Any) -> Recording:
    return record(on_meta(Lambda(function)), inputs)


def names(recording: Recording) -> list[str]:
    return [op.name for op in recording.ops]


def test_an_op_names_its_overload_arguments_tensors_module_and_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU())
    recording = record(on_meta(model), (X,))
    assert recording.error is None
    conv, relu = recording.ops
    assert (conv.name, conv.module, relu.name, relu.module) == ("convolution", "0", "relu", "1")
    assert conv.func is torch.ops.aten.convolution.default
    assert conv.args["input"] == recording.inputs[0]
    assert conv.args["weight"] == recording.states["0.weight"]
    assert (conv.args["groups"], conv.args["output_padding"]) == (3, [0, 0])
    assert conv.attributes["groups"] == 3
    assert conv.source.startswith("tests/test_record.py:")
    assert conv.tensors == (recording.inputs[0], recording.states["0.weight"], recording.states["0.bias"])
    assert relu.outputs == recording.outputs
    assert recording.outputs[0].shape == (2, 6, 6, 6)


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny", "densenet121", "mobilenet_v3_small"])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_on_meta_are_those_of_the_real_network(name: str, training: bool) -> None:
    model = torchvision.models.get_model(name).train(training)
    x = torch.randn(2, 3, 64, 64)
    on_shapes, real = record(on_meta(model), (x,)), record(model, (x,))

    def row(op: Any) -> Any:
        # The statistics that batch norm keeps for backward depend on the device.
        outputs = op.outputs[:1] if op.name == "native_batch_norm" else op.outputs
        return op.name, op.module, op.source, [ref.shape for ref in op.tensors], [ref.shape for ref in outputs]

    assert [row(op) for op in on_shapes.ops] == [row(op) for op in real.ops]
    assert len(real.ops) > 50


ATEN = torch.ops.aten
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "gelu": (ATEN.gelu.default, (), {}),
    "gt": (ATEN.gt.Scalar, (0.5,), {}),
    "clone": (ATEN.clone.default, (), {}),
    "contiguous": (ATEN.clone.default, (), {"memory_format": torch.contiguous_format}),
    "to channels last": (ATEN.clone.default, (), {"memory_format": torch.channels_last}),
    "half": (ATEN._to_copy.default, (), {"dtype": torch.float16}),
    "softmax": (ATEN._softmax.default, (-1, False), {}),
    "softmax of all masked": (ATEN._safe_softmax.default, (1,), {}),
    "softmax in float64": (ATEN._safe_softmax.default, (1, torch.float64), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_an_op_worked_out_once_has_the_layout_that_torch_gives_it(call: str, layout: str) -> None:
    func, rest, named = CALLS[call]
    kernels = MetaKernels()
    for size in (2, 2, 5):  # one that is remembered, and one of another shape
        x = LAYOUTS[layout](torch.empty(size, 3, 8, 8, device="meta"))
        got, expected = kernels(func, (x, *rest), named), func(x, *rest, **named)
        assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_a_normalisation_of_the_wrong_size_fails_on_meta_too() -> None:
    for layer in (nn.BatchNorm2d(4), nn.LayerNorm(9)):
        recording = record(on_meta(layer), (X,))
        assert isinstance(recording.error, RuntimeError)
    recording = record(on_meta(nn.Linear(7, 2)), (X,))
    assert "same reduction dim" in str(recording.error)
    recording = recorded(lambda scale, x: torch.cat([x, x[:, :, :5]], 1), X)
    assert isinstance(recording.error, RuntimeError)


@pytest.mark.parametrize(
    "forward",
    [
        lambda scale, x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device)[:, None, None],
        lambda scale, x: x * torch.as_tensor([[1.0, 2.0, 3.0]], dtype=torch.float32, device=x.device)[0, :, None, None],
        lambda scale, x: x[:, [2, 1, 0]],
        lambda scale, x: x[[[1, 0]][0]],
        lambda scale, x: x[:, [True, False, True]],
    ],
)
def test_numbers_in_the_forward_keep_their_values_on_meta(forward: Callable[..., Tensor]) -> None:
    on_shapes, real = recorded(forward, X), record(Lambda(forward), (X,))
    assert on_shapes.error is None
    values, expected = ([*recording.constants.values()] for recording in (on_shapes, real))
    torch.testing.assert_close(values, expected)
    assert [name for name in names(on_shapes) if name != "_to_copy"] == names(real)
    assert [ref.shape for ref in on_shapes.outputs] == [ref.shape for ref in real.outputs]
    assert {op.source.partition(":")[0] for op in on_shapes.ops} == {"tests/test_record.py"}
    assert torch.tensor(0.0, device="meta").is_meta
    assert "__getitem__" not in vars(Tensor)


def test_what_an_index_may_hold_beside_numbers_is_left_as_it_is() -> None:
    recording = recorded(lambda scale, x: x[[]].sum() + x[..., 0, [[0, 1], [1, 0]]].sum() + x[0, None].sum(), X)
    assert recording.error is None


def test_the_op_that_stopped_the_pass_is_named_with_its_arguments() -> None:
    recording = recorded(lambda scale, x: (x * 2).view(5, -1), X)
    assert isinstance(recording.error, RuntimeError)
    assert names(recording) == ["mul"]
    assert recording.failed is not None
    assert (recording.failed.name, recording.failed.args["size"], recording.failed.outputs) == ("view", [5, -1], ())
    assert recording.failed.tensors == recording.ops[0].outputs


def test_a_pass_that_stops_in_python_names_no_op_even_after_one_failed() -> None:
    def forward(scale: Tensor, x: Tensor) -> Tensor:
        try:
            x.view(5, -1)
        except RuntimeError:
            raise KeyError("mine") from None
        return x

    recording = recorded(forward, X)
    assert isinstance(recording.error, KeyError)
    assert recording.failed is None


def test_constants_are_what_no_state_input_or_op_explains() -> None:
    grid = torch.tensor([0.0, 1.0, 2.0])

    def forward(scale: Tensor, x: Tensor) -> Tensor:
        return x * scale.data[:, None, None] + torch.tensor([1.0, 2.0, 3.0])[:, None, None] + grid[:, None, None]

    recording = record(Lambda(forward), (X,))
    assert [value.tolist() for value in recording.constants.values()] == [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]
    read = {ref.index for op in recording.ops for ref in op.tensors}
    assert set(recording.constants) <= read
    assert recording.states["scale"].index in read  # `.data` is the same tensor under another object


def test_a_tensor_that_changes_its_shape_in_place_stays_the_same_tensor() -> None:
    recording = recorded(lambda scale, x: torch.relu(x).unsqueeze_(1), X)
    relu, unsqueeze = recording.ops
    assert relu.outputs[0].index == unsqueeze.outputs[0].index
    assert relu.outputs[0].shape == (2, 3, 8, 8)
    assert recording.outputs[0].shape == (2, 1, 3, 8, 8)


def test_a_dead_tensor_is_never_mistaken_for_a_new_one() -> None:
    def forward(scale: Tensor, x: Tensor) -> Tensor:
        for _ in range(50):
            x = x * scale[:, None, None]
        return x

    recording = record(Lambda(forward), (X,))
    made = [ref.index for op in recording.ops for ref in op.outputs]
    assert len(set(made)) == len(made) == 150


def test_nested_inputs_and_outputs_are_flattened_and_their_structure_is_kept() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    class Result:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def forward(scale: Tensor, images: list[Tensor], masks: dict[str, Tensor]) -> Any:
        return {"a": Pair(images[0] + 1, images[1]), "b": Result(masks["m"] * 2), "c": [None, 3]}

    images, masks = [X, X[:1]], {"m": X[0]}
    recording = recorded(forward, images, masks)
    assert [ref.shape for ref in recording.inputs] == [(2, 3, 8, 8), (1, 3, 8, 8), (3, 8, 8)]
    first, second = (op.outputs[0] for op in recording.ops)
    returned = recording.returned
    assert (returned["a"].left, returned["a"].right) == (first, recording.inputs[1])
    assert (returned["b"], returned["c"]) == ({"x": second}, [None, 3])
    assert recording.outputs == (first, recording.inputs[1], second)


def test_attention_is_seen_in_parts_that_name_the_call() -> None:
    q = torch.randn(2, 3, 5, 4)
    for model in (on_meta(Lambda(attend)), Lambda(attend)):
        recording = record(model, (q,))
        calls = {id(op.inside): op.inside for op in recording.ops if op.inside is not None}
        (call,) = calls.values()
        assert call.func is torch.ops.aten.scaled_dot_product_attention.default
        assert (call.args["query"], call.args["is_causal"], call.args["scale"]) == (recording.inputs[0], True, None)
        assert recording.ops[-1].inside is None
        assert recording.ops[-1].args["self"] == call.output


def attend(scale: Tensor, q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2


def test_attention_is_untouched_after_recording() -> None:
    recorded(attend, torch.randn(2, 3, 5, 4))
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("module", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_fused_encoder_layers_show_their_parts_in_any_mode(module: type[nn.Module], mode: Any) -> None:
    layer = module(12, 3, batch_first=True).eval()
    inputs = (torch.randn(2, 5, 12),) * (3 if module is nn.MultiheadAttention else 1)
    with mode():
        recording = record(on_meta(layer), inputs)
    assert recording.error is None
    assert "addmm" in names(recording)
    assert not any("_native_multi_head" in name or "encoder_layer_fwd" in name for name in names(recording))
    assert torch.backends.mha.get_fastpath_enabled()


def test_neither_the_model_nor_the_example_inputs_change() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))
    x = X.clone()
    record(model, (x,))
    assert torch.equal(x, X)
    assert not model._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_copy_on_meta_has_the_same_states_modules_and_ties_and_no_storage() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)])
    model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    twin = on_meta(model)
    assert isinstance(twin, nn.ModuleList)
    assert all(tensor.is_meta for tensor in twin.state_dict().values())
    assert {name: value.shape for name, value in twin.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert twin[2].weight is twin[0].weight
    twin[1]._forward_hooks[0] = lambda *_: None
    assert not model[1]._forward_hooks
    assert not twin[0]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_networks_with_tensors_made_by_hooks_can_be_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = torch.nn.utils.weight_norm(nn.Linear(3, 4))
    recording = record(on_meta(model), (torch.randn(2, 3),))
    assert recording.error is None
    assert {"weight_g", "weight_v", "bias"} == set(recording.states)
    assert not recording.constants


def test_a_forward_that_differentiates_is_named() -> None:
    def forward(scale: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad((scale.exp() * scale).sum(), scale)[0]

    recording = record(Lambda(forward), (X,))
    assert isinstance(recording.error, TraceError)
    assert "differentiates" in str(recording.error)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_no_module_with_a_forward_in_python_is_named() -> None:
    layer = nn.Linear(3, 2)
    exported = torch.export.export(layer, (torch.randn(1, 3),))
    scripted = torch.jit.script(layer)
    for model, named in (
        (exported, "the model is a ExportedProgram"),
        (scripted, "the model is a RecursiveScriptModule"),
        (nn.Sequential(nn.ReLU(), scripted), "module '1' is a RecursiveScriptModule"),
        (len, "the model is a builtin_function"),
    ):
        with pytest.raises(TraceError, match=f"^{named}.*expected an nn.Module with a forward in Python"):
            check_inputs(cast(nn.Module, model), (torch.randn(1, 3),))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        out: Tensor = self.fc(x) + weight * self.fc(y)
        return out


Y = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((Y,), "forward takes 2 to 3 inputs (x, y, weight), got 1"),
        ((Y, Y, 1.0, 2.0), "forward takes 2 to 3 inputs (x, y, weight), got 4"),
        ((Y, Y.to("meta")), "example input 1 is on meta, the model on cpu"),
        ((Y.double(), Y), "example input 0 is float64, the model's parameters float32"),
        (([Y, Y.half()], Y), "example input 0[1] is float16, the model's parameters float32"),
        (({"a": Y.half()}, Y), "example input 0['a'] is float16, the model's parameters float32"),
    ],
)
def test_example_inputs_that_cannot_be_right_are_named_in_one_line(inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TraceError, match=f"^{re.escape(message)}$"):
        check_inputs(Two(), inputs)


def test_integers_any_dtype_of_a_mixed_model_and_optional_inputs_are_fine() -> None:
    model = Two()
    check_inputs(model, (torch.ones(2, 3, dtype=torch.long), Y))
    check_inputs(model, (Y, Y, 2.0))
    model.fc.weight = nn.Parameter(model.fc.weight.double())
    check_inputs(model, (Y.double(), Y))
    check_inputs(nn.ReLU(), (Y.half(),))


def test_a_forward_with_required_keywords_is_named() -> None:
    class Keyword(nn.Module):
        def forward(self, x: Tensor, *, mode: str) -> Tensor:
            return x

    with pytest.raises(TraceError, match="missing a required argument: 'mode'"):
        check_inputs(Keyword(), (Y,))
