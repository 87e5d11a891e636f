"""The Triton body of `residual_subset_conv2d_` against float64."""

import pytest
import torch

from sparsekit.kernels.configs import Tile
from sparsekit.kernels.residual_subset import pack_subset, residual_subset_conv2d_
from sparsekit.kernels.triton.group_conv2d import launch
from tests.kernels.convs import Conv, exact, random_images, rounded
from tests.kernels.fences import fenced, is_intact

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Channels of x that are read, and of the stream that are written, in groups of 16
CASES = (
    (Conv(2, 32, 5, 7, 32, 1), [0, 1], [3, 0]),
    (Conv(1, 64, 5, 5, 48, 3, padding=(1, 1), rows=32, act="none"), [3, 1], [2, 0, 3]),
    (Conv(3, 48, 7, 6, 16, 3, stride=2, padding=(1, 1), dilation=2, act="silu"), [1], [1]),
    (Conv(2, 32, 3, 3, 80, 1, rows=64, step=64, act="gelu"), [0, 1], [4, 2, 0, 5, 1]),
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("conv", "in_groups", "out_groups"), CASES, ids=lambda case: getattr(case, "name", str(case)))
def test_it_updates_its_channels_and_no_others(
    conv: Conv, in_groups: list[int], out_groups: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    read = (torch.tensor(in_groups)[:, None] * 16 + torch.arange(16)).flatten()
    written = (torch.tensor(out_groups)[:, None] * 16 + torch.arange(16)).flatten()
    weight = torch.randn(conv.num_out, len(read), conv.kernel, conv.kernel, generator=generator) / len(read) ** 0.5
    packed = pack_subset(weight, torch.tensor(in_groups), channels=conv.channels, rows=conv.rows, step=conv.step)
    packed, weight = rounded(packed, weight, dtype)
    x = random_images(conv.images, conv.channels, conv.height, conv.width).to(dtype)
    size = conv.window.out_size(conv.height, conv.width)
    before = random_images(conv.images, 16 * (max(out_groups) + 2), *size, seed=1).to(dtype)
    scale, bias = torch.rand(conv.num_out, generator=generator), torch.randn(conv.num_out, generator=generator)
    # NaN in channels that are not read must not reach the stream, nor must those that are not written change
    x[:, [channel for channel in range(conv.channels) if channel not in read]] = torch.nan
    stream, around = fenced(before)
    inputs = (x, packed.values, packed.gidx, packed.ptr, packed.order)
    launch(
        stream, *(fenced(tensor)[0] for tensor in inputs), scale=fenced(scale)[0], bias=fenced(bias)[0],
        residual=stream, out_groups=fenced(torch.tensor(out_groups, dtype=torch.int32))[0],
        window=conv.window, act=conv.act, tile=Tile(32, 16, num_warps=4, num_stages=3),
    )  # fmt: skip
    assert is_intact(around)
    others = [channel for channel in range(before.shape[1]) if channel not in written]
    assert torch.equal(stream[:, others], before[:, others])
    expected = exact(conv, x[:, read], weight, bias, before[:, written], scale=scale)
    torch.testing.assert_close(stream[:, written].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_op_launches_it() -> None:
    stream, x = random_images(1, 32, 4, 4), random_images(1, 16, 4, 4, seed=1)
    weight = torch.randn(16, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    packed = pack_subset(weight, channels=16)
    expected = stream.clone()
    expected[:, 16:] = torch.relu(expected[:, 16:] + torch.nn.functional.conv2d(x, weight))
    parts = packed.values, packed.gidx, packed.ptr, packed.order
    residual_subset_conv2d_(stream, x, *parts, torch.tensor([1], dtype=torch.int32), kernel_size=(1, 1))
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)
