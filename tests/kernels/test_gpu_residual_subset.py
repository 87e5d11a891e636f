"""The in-place update on a GPU, against float64 on the CPU."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.residual_subset import pack_subset, residual_subset_conv2d_
from tests.kernels.convs import random_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def on_gpu(packed: GroupSparse, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = packed.to(device="cuda", dtype=dtype)
    return packed.values, packed.gidx, packed.ptr, packed.order


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kernel", "num_out_groups"), [(1, 8), (3, 7), (1, 1)])
def test_it_updates_its_channels_and_no_others(kernel: int, num_out_groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(kernel)
    in_groups = torch.tensor([3, 0, 2])
    out_groups = torch.randperm(16, generator=generator)[:num_out_groups]
    read, written = ((groups[:, None] * 16 + torch.arange(16)).flatten() for groups in (in_groups, out_groups))
    weight = (torch.randn(len(written), 48, kernel, kernel, generator=generator) / 7 / kernel).to(dtype)
    bias, scale = torch.randn(len(written), generator=generator), torch.rand(len(written), generator=generator)
    x, before = random_images(5, 64, 13, 11).to(dtype), random_images(5, 256, 13, 11, seed=1).to(dtype)
    stream = before.cuda()
    parts = on_gpu(pack_subset(weight, in_groups, channels=64), dtype)
    residual_subset_conv2d_(
        stream, x.cuda(), *parts, out_groups.int().cuda(), scale.cuda(), bias.cuda(),
        kernel_size=(kernel, kernel), padding=(kernel // 2, kernel // 2),
    )  # fmt: skip
    branch = conv2d(x[:, read].double(), weight.double(), padding=kernel // 2)
    branch = branch * scale.double()[:, None, None] + bias.double()[:, None, None]
    expected = before.double()
    expected[:, written] = torch.relu(expected[:, written] + branch)
    torch.testing.assert_close(stream.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    others = [channel for channel in range(256) if channel not in written]
    assert torch.equal(stream.cpu()[:, others], before[:, others])


class Update(nn.Module):
    """Two updates of a stream that cuDNN made."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, 64, 1, 1, generator=torch.Generator().manual_seed(0)) / 8
        values, gidx, ptr, order = on_gpu(pack_subset(weight, channels=64), torch.float16)
        self.values, self.gidx, self.ptr, self.order = (nn.Buffer(part) for part in (values, gidx, ptr, order))
        self.out_groups = nn.Buffer(torch.tensor([5, 0, 7, 2], dtype=torch.int32, device="cuda"))

    def forward(self, start: Tensor, x: Tensor) -> Tensor:
        stream = torch.relu(start)
        for _ in range(2):
            weight = self.values, self.gidx, self.ptr, self.order, self.out_groups
            residual_subset_conv2d_(stream, x, *weight, kernel_size=(1, 1))
        return stream


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_updates_share_one_stream(mode: str) -> None:
    from torch._inductor.utils import run_and_get_code

    update = Update()
    start, x = (random_images(2, channels, 9, 9).half().cuda() for channels in (128, 64))
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(torch.compile(update, fullgraph=True, mode=mode), start, x)
        torch.testing.assert_close(out, update(start, x), rtol=2e-3, atol=2e-3)
    streams = re.findall(r"residual_subset_conv2d_\.default\((\w+),", code)
    assert len(streams) == 2
    assert len(set(streams)) == 1
