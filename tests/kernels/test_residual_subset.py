"""`residual_subset_conv2d_` on the CPU, and as an op that torch's tools take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import conv2d

from sparsekit.errors import KernelError
from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.group_conv2d import group_conv2d, pack_conv2d
from sparsekit.kernels.residual_subset import pack_subset, residual_subset_conv2d, residual_subset_conv2d_
from tests.kernels.convs import random_images

OUT_GROUPS = torch.tensor([2, 0], dtype=torch.int32)
WRITTEN = [*range(32, 48), *range(16)]
WINDOW: dict[str, Any] = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}


def parts(packed: GroupSparse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return packed.values, packed.gidx, packed.ptr, packed.order


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, GroupSparse, Tensor, Tensor]:
    """Stream [2, 64, 3, 4], x [2, 48, 5, 7], a weight that reads the last and the first group of x; scale, bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, 3, 3, generator=generator).to(dtype) / 17
    packed = pack_subset(weight, torch.tensor([2, 0]), channels=48)
    scale, bias = torch.rand(32, generator=generator), torch.randn(32, generator=generator)
    stream, x = random_images(2, 64, 3, 4).to(dtype), random_images(2, 48, 5, 7, seed=1).to(dtype)
    return stream, x, weight, packed, scale, bias


class Block(nn.Module):
    """Two branches that update one stream."""

    def __init__(self, packed: GroupSparse) -> None:
        super().__init__()
        self.values, self.gidx = nn.Buffer(packed.values), nn.Buffer(packed.gidx)
        self.ptr, self.order, self.out_groups = nn.Buffer(packed.ptr), nn.Buffer(packed.order), nn.Buffer(OUT_GROUPS)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        stream = torch.relu(start).contiguous(memory_format=torch.channels_last)
        weight = self.values, self.gidx, self.ptr, self.order, self.out_groups
        residual_subset_conv2d_(stream, x, *weight, **WINDOW)
        residual_subset_conv2d_(stream, x, *weight, **WINDOW)
        return stream


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_forms_update_their_channels_and_no_others(dtype: torch.dtype) -> None:
    stream, x, weight, packed, scale, bias = example(dtype)
    expected = stream.double().clone()
    branch = conv2d(x[:, [*range(32, 48), *range(16)]].double(), weight.double(), stride=2, padding=1)
    branch = branch * scale.double()[:, None, None] + bias.double()[:, None, None]
    expected[:, WRITTEN] = torch.relu(expected[:, WRITTEN] + branch)
    functional = residual_subset_conv2d(stream, x, *parts(packed), OUT_GROUPS, scale, bias, **WINDOW)
    in_place = stream.clone()
    residual_subset_conv2d_(in_place, x, *parts(packed), OUT_GROUPS, scale, bias, **WINDOW)
    # The functional form rounds the branch before it adds it
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(in_place.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(functional.double(), expected, rtol=2 * tolerance, atol=2 * tolerance)
    assert torch.equal(in_place[:, 16:32], stream[:, 16:32])
    assert torch.equal(in_place[:, 48:], stream[:, 48:])


def test_a_post_relu_stream_is_exact_where_the_branch_is_zero_outside_its_channels() -> None:
    stream, x, weight, packed, *_ = example()
    stream = stream.relu()
    dense = torch.zeros(64, 48, 3, 3)
    dense[WRITTEN] = torch.zeros(32, 48, 3, 3).index_copy(1, torch.tensor([*range(32, 48), *range(16)]), weight)
    whole = torch.relu(stream + conv2d(x, dense, stride=2, padding=1))
    subset = residual_subset_conv2d(stream, x, *parts(packed), OUT_GROUPS, **WINDOW)
    torch.testing.assert_close(subset, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(subset[:, 16:32], whole[:, 16:32])


def test_the_functional_form_has_the_gradients_of_the_whole_convolution() -> None:
    stream, x, _, packed, scale, bias = example(torch.float64)
    inputs = stream, x, packed.values, scale.double(), bias.double()

    def run(stream: Tensor, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        index = packed.gidx, packed.ptr, packed.order, OUT_GROUPS
        return residual_subset_conv2d(stream, x, values * (packed.values != 0), *index, scale, bias, **WINDOW)

    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs), fast_mode=True)


def test_opcheck() -> None:
    stream, x, _, packed, scale, bias = example()
    arguments = (stream, x, *parts(packed), OUT_GROUPS, scale, bias, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1], "relu")
    results = torch.library.opcheck(torch.ops.sparsekit.residual_subset_conv2d_.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_it_exports_for_any_batch() -> None:
    stream, x, _, packed, *_ = example()
    batch = torch.export.Dim("batch", min=2)
    block = Block(packed)
    with torch.no_grad():
        program = torch.export.export(block, (x, stream), dynamic_shapes={"x": {0: batch}, "start": {0: batch}})
    three = random_images(3, 48, 5, 7), random_images(3, 64, 3, 4)
    torch.testing.assert_close(program.module()(*three), block(*three))


def test_it_compiles_into_one_graph() -> None:
    stream, x, _, packed, *_ = example()
    block = Block(packed)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, stream), block(x, stream))


class Chain(nn.Module):
    """A stream made by an op of ours and updated by two, so that Inductor has no code to generate but calls."""

    def __init__(self, packed: GroupSparse) -> None:
        super().__init__()
        self.block = Block(packed)
        start = pack_conv2d(torch.ones(64, 48, 3, 3))
        self.values, self.gidx = nn.Buffer(start.values), nn.Buffer(start.gidx)
        self.ptr, self.order = nn.Buffer(start.ptr), nn.Buffer(start.order)

    def forward(self, x: Tensor) -> Tensor:
        stream = group_conv2d(x, self.values, self.gidx, self.ptr, self.order, n_out=64, **WINDOW)
        block = self.block
        for _ in range(2):
            weight = block.values, block.gidx, block.ptr, block.order, block.out_groups
            residual_subset_conv2d_(stream, x, *weight, **WINDOW)
        return stream


def test_compiled_updates_share_one_stream_without_a_copy() -> None:
    _, x, _, packed, *_ = example()
    chain = Chain(packed)
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(chain, fullgraph=True), x)
        torch.testing.assert_close(out, chain(x))
    call = code[code.index("def call(") : code.index("def get_args")]
    streams = re.findall(r"residual_subset_conv2d_\.default\((\w+),", call)
    assert len(streams) == 2
    assert len(set(streams)) == 1
    assert not re.search(r"copy|clone|empty_strided|cpp_fused", call)


def test_a_gradient_is_refused_in_place() -> None:
    stream, x, _, packed, *_ = example()
    with pytest.raises(KernelError, match="works in place and has no gradient; use residual_subset_conv2d"):
        residual_subset_conv2d_(stream, x.requires_grad_(), *parts(packed), OUT_GROUPS, **WINDOW)
    with torch.no_grad():
        residual_subset_conv2d_(stream, x, *parts(packed), OUT_GROUPS, **WINDOW)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (torch.zeros(2, 64, 3, 4), "stream: must be channels_last to be updated in place"),
        (random_images(2, 64, 3, 3), r"stream: must be \[2, D, 3, 4\], got \[2, 64, 3, 3\]"),
        (random_images(2, 40, 3, 4), "stream: 40 channels must be a multiple of 16, at least 32"),
        (random_images(2, 64, 3, 4).half(), "stream: must be torch.float32 on cpu like x"),
    ],
    ids=["strides", "size", "channels", "dtype"],
)
def test_a_stream_that_does_not_fit_is_refused(stream: Tensor, message: str) -> None:
    _, x, _, packed, *_ = example()
    with pytest.raises(KernelError, match=message):
        residual_subset_conv2d_(stream, x, *parts(packed), OUT_GROUPS, **WINDOW)


@pytest.mark.parametrize("in_groups", [[0, 0], [0], [0, 3], [-1, 0]], ids=str)
def test_input_groups_that_do_not_fit_are_refused(in_groups: list[int]) -> None:
    with pytest.raises(KernelError, match=r"in_groups: \[.*\] are not 32 of 48 channels"):
        pack_subset(torch.ones(16, 32, 1, 1), torch.tensor(in_groups), channels=48)
