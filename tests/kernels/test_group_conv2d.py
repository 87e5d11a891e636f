"""`group_conv2d` on the CPU, and as an op that torch's tools take."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from sparsekit.errors import KernelError
from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.group_conv2d import Window, group_conv2d, pack_conv2d
from sparsekit.kernels.group_conv_transpose2d import group_conv_transpose2d, pack_phases
from tests.kernels.convs import CONVS, Conv, exact, masked_weight, random_images, rounded

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Conv(2, 16, 5, 4, 24, 3, stride=2, padding=(1, 1), rows=16)

Index = tuple[Tensor, Tensor, Tensor]


class Layer(nn.Module):
    """A packed convolution as a module, to export and to compile."""

    def __init__(self, conv: Conv, packed: GroupSparse) -> None:
        super().__init__()
        self.conv = conv
        self.values, self.gidx = nn.Parameter(packed.values), nn.Buffer(packed.gidx)
        self.ptr, self.order = nn.Buffer(packed.ptr), nn.Buffer(packed.order)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.conv, x, self.values, (self.gidx, self.ptr, self.order)) * 2


def apply(
    conv: Conv, x: Tensor, values: Tensor, index: Index, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    window = conv.window
    return group_conv2d(
        x, values, *index, bias, residual, n_out=conv.num_out, kernel_size=window.kernel_size, stride=window.stride,
        padding=conv.padding, dilation=window.dilation, act=conv.act,
    )  # fmt: skip


def index(packed: GroupSparse) -> Index:
    return packed.gidx, packed.ptr, packed.order


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_it_is_the_masked_convolution(conv: Conv, dtype: torch.dtype) -> None:
    weight, packed = masked_weight(conv)
    packed, weight = rounded(packed, weight, dtype)
    x = random_images(conv.images, conv.channels, conv.height, conv.width).to(dtype)
    size = conv.images, conv.num_out, *conv.window.out_size(conv.height, conv.width)
    residual, bias = random_images(*size, seed=1).to(dtype), random_images(1, conv.num_out, 1, 1).flatten()
    out = apply(conv, x, packed.values, index(packed), bias, residual)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = exact(conv, x, weight, bias, residual)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "silu"])
def test_its_gradients_are_those_of_the_masked_convolution(act: str) -> None:
    conv = replace(SMALL, act=act, padding=(0, 1, -1, 2))
    _, packed = masked_weight(conv)
    size = conv.images, conv.num_out, *conv.window.out_size(conv.height, conv.width)
    x, residual = (random_images(*of).double().requires_grad_() for of in ((2, 16, 5, 4), size))
    values, bias = (
        packed.values.double().requires_grad_(),
        random_images(1, 24, 1, 1).flatten().double().requires_grad_(),
    )

    def run(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        # What fills a step up is no weight, and has no gradient
        kept = values * (packed.values != 0)
        return apply(conv, x, kept, index(packed), bias, residual)

    assert torch.autograd.gradcheck(run, (x, values, bias, residual), fast_mode=True)


def test_only_asked_gradients_are_computed() -> None:
    _, packed = masked_weight(SMALL)
    x = random_images(2, 16, 5, 4).requires_grad_()
    apply(SMALL, x, packed.values, index(packed)).sum().backward()
    assert x.grad is not None
    assert packed.values.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_opcheck(act: str) -> None:
    conv = replace(SMALL, act=act)
    _, packed = masked_weight(conv)
    x, bias = random_images(2, 16, 5, 4).requires_grad_(), random_images(1, 24, 1, 1).flatten().requires_grad_()
    window = conv.window
    sizes = [list(size) for size in (window.kernel_size, window.stride, window.padding, window.dilation)]
    values = packed.values.requires_grad_()
    results = torch.library.opcheck(
        torch.ops.sparsekit.group_conv2d.default, (x, values, *index(packed), bias, None, 24, *sizes, act)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_it_exports_for_any_batch() -> None:
    _, packed = masked_weight(SMALL)
    layer = Layer(SMALL, packed)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(layer, (random_images(4, 16, 5, 4),), dynamic_shapes=batch)
    x = random_images(3, 16, 5, 4, seed=1)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_it_compiles_into_one_graph_with_its_backward() -> None:
    _, packed = masked_weight(SMALL)
    layer, x = Layer(SMALL, packed), random_images(2, 16, 5, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), layer.values)
    torch.testing.assert_close(gradient, expected)


def test_transposed_convolution_of_every_kernel_stride_and_padding() -> None:
    num_cases = 0
    for kernel, stride, padding, output_padding, height in product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2), (0, 1), (4, 5)):
        if output_padding >= stride or (height - 1) * stride - 2 * padding + kernel + output_padding < stride:
            continue
        generator = torch.Generator().manual_seed(num_cases)
        weight = torch.randn(16, 8, kernel, kernel, dtype=torch.float64, generator=generator)
        weight[:, :, 0] = 0
        x = random_images(2, 16, height, height + 1).double()
        bias = torch.randn(8, dtype=torch.float64, generator=generator)
        phases = pack_phases(weight, stride=(stride,) * 2, padding=(padding,) * 2, output_padding=(output_padding,) * 2)
        expected = conv_transpose2d(x, weight, bias, stride, padding, output_padding).relu()
        torch.testing.assert_close(group_conv_transpose2d(x, phases, bias, act="relu"), expected)
        num_cases += 1
    assert num_cases > 100


def test_transposed_convolution_has_the_gradient_of_x() -> None:
    weight = torch.randn(16, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = random_images(1, 16, 3, 3).double().requires_grad_()
    phases = pack_phases(weight, stride=(2, 2), padding=(1, 1))
    (gradient,) = torch.autograd.grad(group_conv_transpose2d(x, phases).square().sum(), x)
    (expected,) = torch.autograd.grad(conv_transpose2d(x, weight, stride=2, padding=1).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_an_output_of_a_window_is_as_large_as_torch_says() -> None:
    for size, kernel, stride, padding, dilation in product((7, 8), (1, 3), (1, 2), (0, 2), (1, 2)):
        window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 4, (dilation,) * 2)
        out = conv2d(torch.empty(1, 1, size, 9), torch.empty(1, 1, kernel, kernel), None, stride, padding, dilation)
        assert window.out_size(size, 9) == out.shape[2:]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 20, 5, 4)}, r"x: must be \[B, C, H, W\] with C a multiple of 16, got \[2, 20, 5, 4\]"),
        ({"x": torch.zeros(2, 16, 5, 4).half()}, "x: must be torch.float32 on cpu like the weight's values"),
        ({"x": torch.zeros(2, 16, 0, 4)}, "x: 0 x 4 pixels are fewer than the padded kernel covers"),
        ({"n_out": 40}, "n_out 40: the packed weight has 32 rows in blocks of 16"),
        ({"act": "tanh"}, "act 'tanh': must be one of none, relu, gelu, silu"),
        ({"residual": torch.zeros(2, 24, 5, 4)}, r"residual: must be \[2, 24, 3, 2\] like the output"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name(changed: dict[str, object], message: str) -> None:
    _, packed = masked_weight(SMALL)
    arguments = {"x": torch.zeros(2, 16, 5, 4), "n_out": 24, **changed}
    x = arguments.pop("x")
    with pytest.raises(KernelError, match=message):
        group_conv2d(x, packed.values, *index(packed), kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), **arguments)  # type: ignore[arg-type]


def test_channels_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(KernelError, match="weight: 24 input channels are no multiple of 16, the columns of a group"):
        pack_conv2d(torch.ones(16, 24, 3, 3))
