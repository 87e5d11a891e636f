"""group_linear on a real GPU: every tile and dtype, CUDA graphs, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsekit.kernels.configs import LINEAR_TILES, Tile
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import GroupSparse, pack
from sparsekit.kernels.group_linear import group_linear
from sparsekit.kernels.masks import group_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def draw(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    rows: int = 128,
    cols: int = 16,
    step: int = 64,
    density: float = 0.4,
) -> tuple[Tensor, GroupSparse, Tensor, Tensor]:
    """x, weight, bias and residual, on the GPU."""
    num_samples, num_out, num_in = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, bias, residual, scores = (
        torch.randn(size, generator=generator, device="cuda")
        for size in ((num_samples, num_in), (num_out, num_in), (num_out,), (num_samples, num_out), (num_out, num_in))
    )
    mask = group_mask(scores, rows=rows, cols=cols, density=density, balanced=False)
    packed = pack((weight / num_in**0.5).to(dtype), mask, rows=rows, cols=cols, step=step)
    return x.to(dtype), packed, bias.to(dtype), residual.to(dtype)


def assert_right(
    y: Tensor, x: Tensor, packed: GroupSparse, bias: Tensor, residual: Tensor, act: str, tolerance: float
) -> None:
    z = x.double() @ packed.to_dense().double().T + bias.double() + residual.double()
    truth = ACTIVATIONS[act](z)
    assert y.shape == truth.shape
    assert (y.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (17, 300, 1000), (64, 768, 3072), (1030, 3072, 768)], ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "step"), [(128, 16, 64), (64, 64, 64), (32, 8, 32), (16, 16, 16), (128, 32, 128)]
)
def test_it_is_the_dense_product(
    shape: tuple[int, int, int], rows: int, cols: int, step: int, dtype: torch.dtype
) -> None:
    case = draw(shape, dtype, rows=rows, cols=cols, step=step)
    assert_right(group_linear(*case, act="gelu"), *case, "gelu", TOLERANCE[dtype])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_any_activation_and_density(act: str, density: float) -> None:
    case = draw((200, 512, 512), torch.float16, density=density)
    assert_right(group_linear(*case, act=act), *case, act, TOLERANCE[torch.float16])


@pytest.mark.parametrize("tile", LINEAR_TILES, ids=str)
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_every_tile_with_other_warps_and_stages(tile: Tile, num_warps: int, num_stages: int) -> None:
    from sparsekit.kernels.triton.group_linear import launch

    x, packed, bias, residual = case = draw((300, 640, 1024), torch.bfloat16)
    y = torch.full_like(residual, torch.nan)
    launch(
        y, x, packed.values, packed.gidx, packed.ptr, packed.order, bias, residual, act="silu", cols=packed.cols,
        tile=replace(tile, num_warps=num_warps, num_stages=num_stages),
    )  # fmt: skip
    assert_right(y, *case, "silu", TOLERANCE[torch.bfloat16])


def test_float32_may_be_rounded_to_tf32_on_request() -> None:
    case = draw((256, 512, 512), torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        y = group_linear(*case)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_right(y, *case, "none", 2e-3)
    assert not torch.equal(y, group_linear(*case))


def test_a_tensor_of_more_than_2_to_the_31_numbers_is_read_to_its_end() -> None:
    x, packed, bias, _ = draw((8, 128, 4096), torch.bfloat16)
    long = torch.empty(2**19 + 8, 4096, dtype=torch.bfloat16, device="cuda")
    long[-8:] = x
    y = group_linear(long, packed, bias)
    torch.testing.assert_close(y[-8:], group_linear(x, packed, bias), rtol=2**-7, atol=1e-3)


def test_a_cuda_graph_replays_it_on_new_inputs() -> None:
    x, packed, bias, residual = draw((64, 256, 256), torch.float16)
    group_linear(x, packed, bias, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_linear(x, packed, bias, residual)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(y, x, packed, bias, residual, "none", TOLERANCE[torch.float16])


def test_gradients_are_those_of_the_dense_layer() -> None:
    x, packed, bias, residual = draw((100, 256, 256), torch.float32)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias, residual)]
    y = group_linear(x, packed, bias, residual, act="gelu")
    upstream = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    dense = ACTIVATIONS["gelu"](x.double() @ packed.to_dense().double().T + bias.double() + residual.double())
    truths = torch.autograd.grad(dense, inputs, upstream.double())
    for grad, truth in zip(torch.autograd.grad(y, inputs, upstream), truths, strict=True):
        assert (grad - truth).abs().max() <= 1e-4 * truth.abs().max()
