"""The Triton body of group_linear against the dense product in float64, and within its bounds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsekit.kernels.configs import LINEAR_TILES, Tile
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import GroupSparse, pack
from sparsekit.kernels.group_linear import group_linear
from sparsekit.kernels.masks import group_mask
from sparsekit.kernels.triton.group_linear import launch
from tests.kernels.fences import fenced, is_intact

# A unit in the last place of the result, which the interpreter truncates in bfloat16, and the loss of a float32 sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(
    seed: int, shape: tuple[int, int, int], *, rows: int, cols: int, step: int, density: float, dtype: torch.dtype
) -> tuple[Tensor, GroupSparse, Tensor, Tensor]:
    """x, weight, bias and residual."""
    num_samples, num_out, num_in = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator)
        for size in ((num_samples, num_in), (num_out, num_in), (num_out,), (num_samples, num_out))
    )
    scores = torch.rand(weight.shape, generator=generator)
    mask = group_mask(scores, rows=rows, cols=cols, density=density, balanced=False)
    packed = pack((weight / num_in**0.5).to(dtype), mask, rows=rows, cols=cols, step=step)
    return x.to(dtype), packed, bias.to(dtype), residual.to(dtype)


def parts(packed: GroupSparse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return packed.values, packed.gidx, packed.ptr, packed.order


def expected(x: Tensor, packed: GroupSparse, bias: Tensor | None, residual: Tensor | None, act: str) -> Tensor:
    z = x.double() @ packed.to_dense().double().T
    z = z if bias is None else z + bias.double()
    return ACTIVATIONS[act](z if residual is None else z + residual.double())


def assert_close(y: Tensor, truth: Tensor) -> None:
    assert (y.double() - truth).abs().max() <= TOLERANCE[y.dtype] * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "rows", "cols", "step", "density"),
    [
        ((40, 128, 192), 128, 16, 64, 0.5),
        ((33, 100, 130), 32, 8, 32, 0.4),
        ((5, 48, 70), 16, 64, 64, 0.6),
        ((17, 130, 96), 64, 32, 128, 0.3),
        ((130, 64, 64), 64, 64, 64, 1.0),
        ((1, 64, 128), 16, 16, 16, 0.1),
        ((3, 32, 64), 32, 16, 64, 0.0),
    ],
    ids=str,
)
def test_the_kernel_computes_the_dense_product(
    shape: tuple[int, int, int], rows: int, cols: int, step: int, density: float, dtype: torch.dtype
) -> None:
    x, packed, bias, residual = draw(0, shape, rows=rows, cols=cols, step=step, density=density, dtype=dtype)
    assert_close(group_linear(x, packed), expected(x, packed, None, None, "none"))
    assert_close(group_linear(x, packed, bias, residual, act="relu"), expected(x, packed, bias, residual, "relu"))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_bias_residual_and_activation_are_fused_in_that_order(act: str, has_bias: bool, has_residual: bool) -> None:
    x, packed, bias, residual = draw(1, (20, 40, 64), rows=16, cols=16, step=32, density=0.5, dtype=torch.float16)
    extras = bias if has_bias else None, residual if has_residual else None
    assert_close(group_linear(x, packed, *extras, act=act), expected(x, packed, *extras, act))


@pytest.mark.parametrize("tile", LINEAR_TILES, ids=str)
@pytest.mark.parametrize("cols", [8, 64])
def test_every_tile_of_the_table_stays_inside_its_tensors(tile: Tile, cols: int) -> None:
    shape = (tile.block_m + 3, tile.block_n + 70, 320)
    rows = max(tile.block_n, 64)
    x, packed, bias, residual = draw(2, shape, rows=rows, cols=cols, step=64, density=0.4, dtype=torch.float32)
    y, buffer = fenced(torch.full(shape[:2], torch.nan))
    x, values, bias, residual = (fenced(tensor)[0] for tensor in (x, packed.values, bias, residual))
    packed = replace(packed, values=values)
    launch(y, x, *parts(packed), bias, residual, act="silu", cols=cols, tile=tile)
    assert_close(y, expected(x, packed, bias, residual, "silu"))
    assert is_intact(buffer)


def test_many_tiles_of_samples_and_outputs_are_each_computed_once() -> None:
    x, packed, _, residual = draw(3, (290, 60, 32), rows=16, cols=16, step=16, density=0.7, dtype=torch.float32)
    y = torch.full((290, 60), torch.nan)
    tile = replace(LINEAR_TILES[-1], block_m=32)
    launch(y, x, *parts(packed), None, residual, act="none", cols=16, tile=tile)
    assert_close(y, expected(x, packed, None, residual, "none"))


def test_row_blocks_are_computed_in_the_order_given() -> None:
    x, packed, *_ = draw(3, (16, 48, 32), rows=16, cols=16, step=16, density=0.7, dtype=torch.float32)
    packed = replace(packed, order=torch.ones_like(packed.order))  # that is: the second one, three times
    y = torch.full((16, 48), torch.nan)
    launch(y, x, *parts(packed), None, None, act="none", cols=16)
    assert y.isnan().all(0).tolist() == [True] * 16 + [False] * 16 + [True] * 16


def test_inputs_that_are_not_contiguous_are_read_right() -> None:
    x, packed, bias, residual = draw(4, (12, 32, 64), rows=16, cols=16, step=32, density=0.5, dtype=torch.float32)
    views = x.T.contiguous().T, residual.T.contiguous().T
    assert_close(group_linear(views[0], packed, bias, views[1]), expected(x, packed, bias, residual, "none"))


def test_a_nan_reaches_the_output_through_relu() -> None:
    x, packed, *_ = draw(5, (4, 32, 64), rows=16, cols=16, step=32, density=1.0, dtype=torch.float32)
    x[1, 7] = torch.nan
    y = group_linear(x, packed, act="relu")
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


def test_gradients_recompute_the_sum_in_the_kernel() -> None:
    x, packed, bias, residual = draw(6, (9, 40, 64), rows=16, cols=16, step=32, density=0.5, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias, residual)]
    y = group_linear(x, packed, bias, residual, act="gelu")
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(y, inputs, upstream)
    dense = expected(x, packed, bias, residual, "gelu")
    for grad, truth in zip(grads, torch.autograd.grad(dense, inputs, upstream.double()), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)
