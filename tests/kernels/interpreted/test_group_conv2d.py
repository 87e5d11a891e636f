"""The Triton body of `group_conv2d` against float64."""

import pytest
import torch

from sparsekit.kernels.configs import Tile
from sparsekit.kernels.group_conv2d import group_conv2d, pack_conv2d
from sparsekit.kernels.triton.group_conv2d import launch
from tests.kernels.convs import CONVS, Conv, exact, masked_weight, random_images, rounded
from tests.kernels.fences import fenced, is_intact

# Inputs are rounded beforehand, so what is left is the sum's rounding in float32, and the result's to its dtype
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_it_is_the_masked_convolution_and_touches_nothing_outside_its_tensors(conv: Conv, dtype: torch.dtype) -> None:
    weight, packed = masked_weight(conv)
    packed, weight = rounded(packed, weight, dtype)
    x = random_images(conv.images, conv.channels, conv.height, conv.width).to(dtype)
    size = conv.images, conv.num_out, *conv.window.out_size(conv.height, conv.width)
    residual = random_images(*size, seed=1).to(dtype)
    bias = torch.randn(conv.num_out, generator=torch.Generator().manual_seed(2))
    out, around = fenced(torch.zeros_like(residual))
    inputs = (x, packed.values, packed.gidx, packed.ptr, packed.order)
    launch(
        out, *(fenced(tensor)[0] for tensor in inputs), bias=fenced(bias)[0], residual=fenced(residual)[0],
        window=conv.window, act=conv.act, tile=Tile(32, 16, num_warps=4, num_stages=3),
    )  # fmt: skip
    assert is_intact(around)
    torch.testing.assert_close(
        out.double(), exact(conv, x, weight, bias, residual), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_the_op_takes_the_tile_of_the_table_and_any_strides() -> None:
    conv = Conv(2, 32, 7, 6, 40, 3, padding=(1, 1), rows=32, act="none")
    weight, packed = masked_weight(conv)
    x = random_images(2, 32, 6, 7).transpose(2, 3)
    out = group_conv2d(
        x, packed.values, packed.gidx, packed.ptr, packed.order, n_out=40, kernel_size=(3, 3), padding=(1, 1)
    )
    assert out.is_contiguous(memory_format=torch.channels_last)
    nothing = torch.zeros(40)
    torch.testing.assert_close(out.double(), exact(conv, x, weight, nothing, torch.zeros_like(out)), rtol=0, atol=2e-6)


def test_a_dense_weight_is_a_sparse_one_with_all_its_groups() -> None:
    weight = torch.randn(24, 40, 1, 1, generator=torch.Generator().manual_seed(0))
    packed = pack_conv2d(weight, cols=8)
    x = random_images(1, 40, 4, 5)
    out = group_conv2d(x, packed.values, packed.gidx, packed.ptr, packed.order, n_out=24, kernel_size=(1, 1))
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight), rtol=1e-5, atol=1e-5)
