"""group_linear in plain torch, and as an operator that torch can differentiate, export and compile."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import GroupSparse, pack
from sparsekit.kernels.group_linear import group_linear
from sparsekit.kernels.masks import group_mask

SHAPES = [(5, 32, 48), (7, 20, 21), (1, 1, 1), (0, 16, 8)]


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, GroupSparse, Tensor, Tensor]:
    """x, weight, bias and residual; the weight's first row block keeps other groups than its second."""
    num_samples, num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator, dtype=dtype)
        for size in ((num_samples, num_in), (num_out, num_in), (num_out,), (num_samples, num_out))
    )
    mask = group_mask(weight.abs(), rows=16, cols=8, density=0.5, balanced=False)
    return x, pack(weight, mask, rows=16, cols=8, step=16), bias, residual


def op_arguments(act: str, *, grad: bool) -> tuple[Any, ...]:
    x, packed, bias, residual = draw((5, 20, 24), torch.float32)
    tensors = [t.requires_grad_(grad) for t in (x, packed.values, bias, residual)]
    return (*tensors[:2], packed.gidx, packed.ptr, packed.order, *tensors[2:], act, 20, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, self.packed, bias, _ = draw((1, 20, 24), torch.float32)
        self.values, self.bias = nn.Parameter(self.packed.values), nn.Parameter(bias)
        self.gidx, self.ptr, self.order = map(nn.Buffer, (self.packed.gidx, self.packed.ptr, self.packed.order))

    def forward(self, x: Tensor) -> Tensor:
        weight = GroupSparse(self.values, self.gidx, self.ptr, self.order, (20, 24))
        return group_linear(x, weight, self.bias, act="silu") + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_is_the_linear_layer_of_the_masked_weight(shape: tuple[int, int, int], act: str) -> None:
    x, packed, bias, residual = draw(shape)
    dense = linear(x, packed.to_dense(), bias)
    torch.testing.assert_close(group_linear(x, packed, bias, act=act), ACTIVATIONS[act](dense))
    torch.testing.assert_close(group_linear(x, packed, bias, residual, act=act), ACTIVATIONS[act](dense + residual))


def test_the_activation_comes_last_in_a_case_done_by_hand() -> None:
    weight = pack(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), rows=16, cols=8)
    y = group_linear(
        torch.tensor([[3.0, 4.0]]), weight, torch.tensor([-20.0, 1.0]), torch.tensor([[5.0, 9.0]]), act="relu"
    )
    assert y.tolist() == [[0.0, 6.0]]


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    x, packed, bias, residual = draw((6, 20, 24), torch.bfloat16)
    y = group_linear(x, packed, bias, residual, act="gelu")
    z = linear(x.double(), packed.to_dense().double(), bias.double()) + residual.double()
    torch.testing.assert_close(y, ACTIVATIONS["gelu"](z).bfloat16(), rtol=2**-8, atol=1e-6)


def test_a_1x1_convolution_of_a_channels_last_image_is_a_group_linear_of_its_view() -> None:
    _, packed, bias, _ = draw((1, 20, 24))
    image = torch.randn(2, 24, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    image = image.contiguous(memory_format=torch.channels_last)
    y = group_linear(image.permute(0, 2, 3, 1), packed, bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, conv2d(image, packed.to_dense()[:, :, None, None], bias))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_are_those_of_the_masked_dense_layer(act: str) -> None:
    x, packed, bias, residual = draw((5, 20, 24))
    inputs = [t.requires_grad_() for t in (x, packed.values, bias, residual)]

    def layer(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        weight = replace(packed, values=values)
        return group_linear(x, weight, bias, residual, act=act)

    upstream = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sparse = torch.autograd.grad(layer(*inputs), inputs, upstream)
    dense = ACTIVATIONS[act](linear(x, packed.to_dense(), bias) + residual)
    for grad, truth in zip(sparse, torch.autograd.grad(dense, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, truth)


def test_gradients_pass_gradcheck_where_no_group_is_repeated() -> None:
    x, _, bias, residual = draw((3, 16, 16))
    packed = pack(
        torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), rows=16, cols=8, step=8
    )
    values = packed.values.requires_grad_()

    def layer(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        weight = replace(packed, values=values)
        return group_linear(x, weight, bias, residual, act="silu")

    inputs = (x.requires_grad_(), values, bias.requires_grad_(), residual.requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)


def test_repeated_groups_and_padding_never_get_a_gradient() -> None:
    x, packed, *_ = draw((5, 20, 21))
    values = packed.values.requires_grad_()
    (grad,) = torch.autograd.grad(group_linear(x, packed).sum(), values)
    changed = replace(packed, values=grad)
    assert torch.equal(pack(changed.to_dense(), rows=16, cols=8, step=16).values, grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_operator_keeps_torchs_contract(act: str) -> None:
    operator = torch.ops.sparsekit.group_linear.default
    torch.library.opcheck(operator, op_arguments(act, grad=True))
    x, values, gidx, ptr, order, *_ = op_arguments(act, grad=False)
    torch.library.opcheck(operator, (x, values, gidx, ptr, order, None, None, act, 20, 8))


def test_an_exported_layer_takes_any_batch_after_being_saved() -> None:
    layer = Layer()
    program = torch.export.export(layer, (torch.randn(4, 24),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


def test_a_compiled_layer_is_one_graph_and_trains() -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for num_samples in (4, 9):
        x = torch.randn(num_samples, 24, generator=torch.Generator().manual_seed(0))
        (truth,) = torch.autograd.grad(layer(x).sum(), layer.values)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), layer.values)[0], truth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "tanh"}, "act 'tanh': must be one of none, relu, gelu, silu"),
        ({"x": torch.zeros(5, 23)}, r"x: must end in 24 inputs like the weight, got \[5, 23\]"),
        ({"x": torch.zeros(5, 24).half()}, r"x: must be torch\.float32 like the weight, got torch\.float16"),
        ({"bias": torch.zeros(19)}, r"bias: must be \[20\], got \[19\]"),
        ({"residual": torch.zeros(4, 20)}, r"residual: must be \[5, 20\] like the output, got \[4, 20\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    x, weight, *_ = draw((5, 20, 24), torch.float32)
    with pytest.raises(KernelError, match=message):
        group_linear(**{"x": x, "weight": weight, **changes})
