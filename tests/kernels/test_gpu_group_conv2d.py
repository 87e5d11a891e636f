"""The Triton convolution on a GPU, against float64 on the CPU: every tile that the table may choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsekit.kernels.configs import CONV_TILES, Tile, conv_tile, gpu_at, max_stages
from sparsekit.kernels.group_conv2d import group_conv2d
from sparsekit.kernels.group_conv_transpose2d import group_conv_transpose2d, pack_phases
from tests.kernels.convs import CONVS, Conv, exact, masked_weight, random_images, rounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDE = Conv(3, 128, 15, 13, 256, 3, padding=(1, 1), rows=128, step=64)


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # type: ignore[attr-defined]


def compare(conv: Conv, dtype: torch.dtype, tolerance: float, tile: Tile | None = None) -> None:
    weight, packed = masked_weight(conv)
    packed, weight = rounded(packed, weight, dtype)
    x = random_images(conv.images, conv.channels, conv.height, conv.width).to(dtype)
    size = conv.images, conv.num_out, *conv.window.out_size(conv.height, conv.width)
    residual = random_images(*size, seed=1).to(dtype)
    bias = torch.randn(conv.num_out, generator=torch.Generator().manual_seed(2))
    parts = [tensor.cuda() for tensor in (x, packed.values, packed.gidx, packed.ptr, packed.order, bias, residual)]
    if tile is None:
        window = conv.window
        out = group_conv2d(
            *parts, n_out=conv.num_out, kernel_size=window.kernel_size, stride=window.stride, padding=conv.padding,
            dilation=window.dilation, act=conv.act,
        )  # fmt: skip
    else:
        from sparsekit.kernels.triton.group_conv2d import launch

        out = torch.empty_like(parts[-1])
        launch(out, *parts[:5], bias=parts[5], residual=parts[6], window=conv.window, act=conv.act, tile=tile)
    expected = exact(conv, x, weight, bias, residual)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.name)
def test_it_is_the_masked_convolution(conv: Conv, dtype: torch.dtype) -> None:
    compare(conv, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("conv", CONVS[:3], ids=lambda conv: conv.name)
def test_it_is_the_masked_convolution_in_tf32(conv: Conv) -> None:
    compare(conv, torch.float32, 2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("tile", CONV_TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
def test_every_tile_with_more_warps_and_stages(tile: Tile, num_warps: int, num_stages: int, dtype: torch.dtype) -> None:
    stage_bytes = (tile.block_m + tile.block_n) * WIDE.step * 2
    if num_stages > max_stages(gpu_at(torch.device("cuda", 0)).arch, stage_bytes):
        pytest.skip("does not fit the shared memory")
    compare(WIDE, dtype, TOLERANCE[dtype], replace(tile, num_warps=num_warps, num_stages=num_stages))


def test_a_batch_whose_offsets_exceed_32_bits() -> None:
    conv = Conv(33, 64, 1024, 1024, 16, 1, rows=16, step=64, act="none", density=1.0)
    weight, packed = masked_weight(conv)
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.float16, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    x[-1].normal_()
    parts = packed.values.half().cuda(), packed.gidx.cuda(), packed.ptr.cuda(), packed.order.cuda()
    out = group_conv2d(x, *parts, n_out=16, kernel_size=(1, 1))[-1:, :, -8:]
    expected = torch.nn.functional.conv2d(x[-1:, :, -8:].float(), weight.half().float().cuda())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)


def test_a_cuda_graph_replays_it() -> None:
    _, packed = masked_weight(WIDE)
    x = random_images(3, 128, 15, 13).half().cuda()
    parts = packed.values.half().cuda(), packed.gidx.cuda(), packed.ptr.cuda(), packed.order.cuda()

    def run() -> torch.Tensor:
        return group_conv2d(x, *parts, n_out=256, kernel_size=(3, 3), padding=(1, 1), act="relu")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.copy_(random_images(3, 128, 15, 13, seed=5))
    graph.replay()
    assert torch.equal(out, run())


def test_gradients_are_those_on_the_cpu() -> None:
    conv = Conv(2, 32, 9, 8, 40, 3, stride=2, padding=(2, 1), act="silu")
    _, packed = masked_weight(conv)
    gradients = []
    for device in ("cpu", "cuda"):
        x = random_images(2, 32, 9, 8).to(device).requires_grad_()
        values = packed.values.to(device).requires_grad_()
        parts = packed.gidx.to(device), packed.ptr.to(device), packed.order.to(device)
        out = group_conv2d(x, values, *parts, n_out=40, kernel_size=(3, 3), stride=(2, 2), padding=(2, 1), act="silu")
        gradients.append([grad.cpu() for grad in torch.autograd.grad(out.square().sum(), (x, values))])
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-2, atol=2e-2)


def test_transposed_convolution() -> None:
    weight = torch.randn(64, 32, 4, 4, generator=torch.Generator().manual_seed(0)) / 16
    x, bias = random_images(2, 64, 9, 7).half().cuda(), torch.zeros(32, device="cuda")
    phases = tuple(
        replace(phase, weight=phase.weight.to(device="cuda", dtype=torch.float16))
        for phase in pack_phases(weight, stride=(2, 2), padding=(1, 1))
    )
    out = group_conv_transpose2d(x, phases, bias)
    expected = torch.nn.functional.conv_transpose2d(x.double().cpu(), weight.half().double(), stride=2, padding=1)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-3, atol=2e-3)


def test_the_table_has_a_tile_for_this_gpu() -> None:
    for num_pixels, rows, num_steps in ((49, 128, 72), (802816, 128, 1), (32768, 16, 9)):
        gpu = gpu_at(torch.device("cuda", 0))
        sizes = {"num_pixels": num_pixels, "rows": rows, "num_steps": num_steps}
        assert conv_tile(gpu, num_blocks=1, step=64, itemsize=2, **sizes) is not None
