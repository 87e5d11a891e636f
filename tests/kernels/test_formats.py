"""Packed weights: what goes in comes out, and the masks are what was asked for."""

import math
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekit.errors import KernelError
from sparsekit.kernels.formats import COLS, NM24, ROWS, GroupSparse, from_torch_bsr, pack
from sparsekit.kernels.masks import group_mask, nm_mask


def draw(seed: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A weight, a mask finer than its groups, and arguments of `pack`; every third weight fits the groups."""
    generator = torch.Generator().manual_seed(seed)

    def choice(*of: int) -> int:
        return of[int(torch.randint(len(of), (), generator=generator))]

    rows, cols, taps = choice(*ROWS), choice(*COLS), choice(1, 1, 4, 9)
    step = max(cols, choice(16, 32, 64, 128))
    num_out, per_tap = choice(1, 16, 50, 130), choice(1, 8, 24, 70, 200)
    if seed % 3 == 0:
        num_out, per_tap = 2 * rows, 3 * cols
    weight = torch.randn(num_out, taps * per_tap, generator=generator)
    density = choice(0, 1, 5, 30, 100) / 100
    mask = group_mask(torch.rand(weight.shape, generator=generator), rows=rows, cols=cols, density=density, taps=taps)
    mask &= torch.rand(weight.shape, generator=generator) < 0.9
    return weight, mask, {"rows": rows, "cols": cols, "step": step, "taps": taps}


def row_blocks(packed: GroupSparse) -> list[list[int]]:
    """Stored group columns of each row block, repetitions at the end of a step left out."""
    steps, ends = packed.gidx.view(packed.values.shape[0] + 1, -1).tolist(), packed.ptr.tolist()
    parts: list[list[int]] = [list(chain(*steps[begin:end])) for begin, end in pairwise(ends)]
    for part in parts:
        while len(part) > 1 and part[-1] == part[-2]:
            part.pop()
    return parts


@pytest.mark.parametrize("seed", range(60))
def test_unpacking_a_packed_weight_gives_the_masked_weight(seed: int) -> None:
    weight, mask, arguments = draw(seed)
    packed = pack(weight, mask, **arguments)
    assert torch.equal(packed.to_dense(), weight * mask)
    assert (packed.rows, packed.cols, packed.taps) == (arguments["rows"], arguments["cols"], arguments["taps"])
    assert packed.values.shape[2] == arguments["step"]


@pytest.mark.parametrize("seed", range(60))
def test_each_row_block_stores_each_of_its_groups_once_and_in_order(seed: int) -> None:
    weight, mask, arguments = draw(seed)
    packed = pack(weight, mask, **arguments)
    rows, cols, taps = arguments["rows"], arguments["cols"], arguments["taps"]
    per_tap = weight.shape[1] // taps
    expected = [
        sorted({int(c) // per_tap * math.ceil(per_tap / cols) + int(c) % per_tap // cols for c in part.nonzero()[:, 1]})
        for part in mask.split(rows)
    ]
    stored = row_blocks(packed)
    assert stored == expected
    num_slots = arguments["step"] // cols
    num_steps = [math.ceil(len(groups) / num_slots) for groups in expected]
    assert packed.ptr.diff().tolist() == num_steps
    assert packed.max_steps == max(num_steps)
    assert [num_steps[row] for row in packed.order] == sorted(num_steps, reverse=True)
    assert sorted(packed.order.tolist()) == list(range(len(num_steps)))
    assert packed.density == sum(map(len, expected)) / (len(expected) * taps * math.ceil(per_tap / cols))


@pytest.mark.parametrize("seed", range(20))
def test_indices_stay_in_the_weight_also_one_step_past_the_end(seed: int) -> None:
    weight, mask, arguments = draw(seed)
    packed = pack(weight, mask, **arguments)
    assert packed.gidx.numel() == (packed.values.shape[0] + 1) * arguments["step"] // arguments["cols"]
    num_cols = arguments["taps"] * math.ceil(weight.shape[1] // arguments["taps"] / arguments["cols"])
    assert 0 <= packed.gidx.min() <= packed.gidx.max() < num_cols
    assert packed.gidx.dtype == packed.ptr.dtype == packed.order.dtype == torch.int32


def test_without_a_mask_zeros_decide_and_with_one_kept_zeros_are_stored() -> None:
    weight = torch.zeros(32, 32)
    assert pack(weight, rows=16, cols=8).values.numel() == 0
    assert pack(weight, torch.ones_like(weight, dtype=torch.bool), rows=16, cols=8).density == 1
    weight[0, 0] = torch.nan
    dropped = pack(weight, torch.zeros_like(weight, dtype=torch.bool), rows=16, cols=8)
    assert torch.equal(dropped.to_dense(), torch.zeros(32, 32))


@pytest.mark.parametrize("seed", range(12))
def test_a_packed_weight_survives_a_safetensors_file(seed: int, tmp_path: Path) -> None:
    weight, mask, arguments = draw(seed)
    save_file(pack(weight, mask, **arguments).tensors(), tmp_path / "weight.safetensors")
    read = GroupSparse.from_tensors(load_file(tmp_path / "weight.safetensors"))
    assert torch.equal(read.to_dense(), weight * mask)
    assert (read.rows, read.cols, read.taps) == (arguments["rows"], arguments["cols"], arguments["taps"])


def test_to_touches_only_the_values_dtype() -> None:
    packed = pack(torch.eye(64), rows=16, cols=8).to(dtype=torch.float16)
    assert packed.values.dtype == torch.float16
    assert packed.gidx.dtype == packed.ptr.dtype == packed.order.dtype == torch.int32
    assert torch.equal(packed.to_dense(), torch.eye(64, dtype=torch.float16))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize("block", [(16, 16), (32, 8), (64, 64), (128, 128)])
def test_a_torch_bsr_weight_keeps_its_blocks_also_those_of_zeros(block: tuple[int, int]) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    stored = torch.rand(256 // block[0], 384 // block[1], generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.sparse.check_sparse_tensor_invariants():
        bsr = (weight * torch.kron(stored, torch.ones(block))).to_sparse_bsr(block)
    bsr.values()[0] = 0
    packed = from_torch_bsr(bsr)
    assert torch.equal(packed.to_dense(), bsr.to_dense())
    assert packed.density == pytest.approx(stored.float().mean().item())


@pytest.mark.parametrize("seed", range(12))
def test_the_gradient_of_the_values_is_the_dense_gradient_at_the_groups(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    upstream, (rows, cols) = torch.randn(70, 9 * 40, generator=generator), ((16, 8), (32, 16))[seed % 2]
    mask = group_mask(torch.rand(70, 9 * 40, generator=generator), rows=rows, cols=cols, density=0.3, taps=9)
    packed = pack(torch.ones_like(upstream), mask, rows=rows, cols=cols, taps=9)
    values = packed.values.requires_grad_()
    (grad,) = torch.autograd.grad(packed.to_dense(), values, upstream)
    assert torch.equal(grad, pack(upstream, mask, rows=rows, cols=cols, taps=9).values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 24, "cols": 8}, "group of 24 x 8"),
        ({"rows": 16, "cols": 128}, "group of 16 x 128"),
        ({"rows": 16, "cols": 32, "step": 16}, "step 16"),
        ({"rows": 16, "cols": 8, "step": 48}, "step 48"),
        ({"rows": 16, "cols": 8, "taps": 9}, "64 columns are no multiple of 9 taps"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        pack(torch.eye(64), **arguments)
    assert "\n" not in str(caught.value)


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(KernelError, match=r"mask: must be torch\.bool"):
        pack(torch.eye(64), torch.eye(64), rows=16, cols=8)


def test_a_weight_that_32_bits_cannot_index_is_refused() -> None:
    with pytest.raises(KernelError, match="32-bit"):
        pack(torch.ones(1, 1).expand(1, 2**31), rows=16, cols=8)


def test_a_dense_tensor_is_not_taken_for_bsr() -> None:
    with pytest.raises(KernelError, match="strided"):
        from_torch_bsr(torch.eye(64))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("taps", [1, 9])
def test_a_group_mask_keeps_exactly_the_best_groups_even_when_scores_tie(balanced: bool, taps: int) -> None:
    scores = torch.randint(3, (64, taps * 32), generator=torch.Generator().manual_seed(0)).float()
    mask = group_mask(scores, rows=16, cols=8, density=0.3, balanced=balanced, taps=taps)
    groups = mask.view(4, 16, taps * 4, 8).transpose(1, 2)
    assert torch.equal(groups.flatten(2).any(2), groups.flatten(2).all(2))
    kept, sums = groups[:, :, 0, 0], scores.view(4, 16, taps * 4, 8).sum((1, 3))
    rivals = zip(kept, sums, strict=True) if balanced else [(kept, sums)]
    for kept_here, sums_here in rivals:
        assert kept_here.sum() == round(0.3 * kept_here.numel())
        assert sums_here[kept_here].min() >= sums_here[~kept_here].max()


@pytest.mark.parametrize("shape", [(50, 70), (1, 9), (16, 8)])
def test_groups_at_the_edge_may_be_cut(shape: tuple[int, int]) -> None:
    assert group_mask(torch.rand(shape), rows=16, cols=8, density=1.0).all()
    assert not group_mask(torch.rand(shape), rows=16, cols=8, density=0.0).any()


def test_a_density_outside_0_to_1_is_refused() -> None:
    with pytest.raises(KernelError, match=r"density 1\.5"):
        group_mask(torch.rand(16, 8), rows=16, cols=8, density=1.5)


@pytest.mark.parametrize("num_in", [4, 8, 20, 128])
@pytest.mark.parametrize("seed", range(4))
def test_a_2_to_4_weight_comes_back_from_nine_sixteenths_of_its_bytes(num_in: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, num_in, generator=generator) * (torch.rand(7, num_in, generator=generator) < 0.8)
    weight = (weight * nm_mask(weight.abs())).half()
    packed = NM24.pack(weight)
    assert torch.equal(packed.to_dense(), weight)
    num_bytes = packed.values.nbytes + packed.positions.nbytes
    assert num_bytes * 16 == 9 * 7 * (num_in + num_in % 8) * 2


def test_the_values_of_a_2_to_4_weight_have_gradients() -> None:
    packed = NM24.pack(nm_mask(torch.rand(3, 8)).double())
    assert torch.autograd.gradcheck(
        lambda values: NM24(values, packed.positions, packed.shape).to_dense(), packed.values.requires_grad_()
    )


def test_more_than_2_of_4_are_refused_by_name() -> None:
    weight = torch.zeros(3, 12)
    weight[1, 8:11] = 1
    with pytest.raises(KernelError, match="row 1 has more than 2 nonzeros in inputs 8 to 11"):
        NM24.pack(weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_every_run_keeps_exactly_n_even_when_all_scores_tie(n: int, m: int) -> None:
    assert (nm_mask(torch.ones(5, 24), n, m).view(5, -1, m).sum(2) == n).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 5)])
def test_patterns_that_do_not_fit_are_refused(n: int, m: int) -> None:
    with pytest.raises(KernelError, match=f"pattern {n}:{m}"):
        nm_mask(torch.ones(2, 8), n, m)
