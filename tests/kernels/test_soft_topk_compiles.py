"""The kernels of the soft top-k as machine code for every GPU, at their widest tile."""

from __future__ import annotations

import pytest

from sparsekit.kernels.triton import soft_topk as kernels
from tests.kernels.compiling import CUDA, HIP, SHARED_LIMIT, compiled

# A row's vectors are float32; where padding is, one byte each says.
NAMES = {
    "exact_mask_kernel": "scores keep valid mask",
    "exact_mask_backward_kernel": "grad mask grad_scores grad_keep",
    "sinkhorn_step_kernel": "scores keep log_odds potential valid mask new_log_odds new_potential rise",
    "sinkhorn_step_backward_kernel": "grad mask log_odds rise keep grad_scores grad_keep",
}


def signature(kernel: str) -> dict[str, str]:
    pointers = {f"{name}_ptr": "*u8" if name == "valid" else "*fp32" for name in NAMES[kernel].split()}
    steps = {"max_steps": "i32"} if kernel == "exact_mask_kernel" else {}
    return {**pointers, **steps, "num_columns": "i32", "epsilon": "fp32"}


@pytest.mark.parametrize("arch", CUDA + HIP)
@pytest.mark.parametrize("kernel", NAMES)
def test_the_widest_tile_spills_nothing(kernel: str, arch: str) -> None:
    tile, num_warps = kernels.launch_shape(kernels.MAX_TILE)
    code = compiled(getattr(kernels, kernel), signature(kernel), {"TILE": tile}, arch, num_warps=num_warps)
    assert code.spilled == 0
    assert code.registers <= 65_536 // (32 * num_warps)  # what a block of so many threads may have
    assert code.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("kernel", NAMES)
def test_rows_of_a_multiple_of_16_are_read_16_bytes_at_a_time(kernel: str) -> None:
    tile, num_warps = kernels.launch_shape(1024)
    code = compiled(getattr(kernels, kernel), signature(kernel), {"TILE": tile}, "sm_90", num_warps=num_warps)
    loads = [line for line in code.text.splitlines() if "ld.global" in line]
    assert sum(".v4.b32" in line for line in loads) >= 2


@pytest.mark.parametrize("kernel", NAMES)
def test_rows_of_any_length_spill_nothing_either(kernel: str) -> None:
    tile, num_warps = kernels.launch_shape(kernels.MAX_TILE)
    code = compiled(
        getattr(kernels, kernel),
        signature(kernel),
        {"TILE": tile},
        "sm_90",
        num_warps=num_warps,
        unaligned=("num_columns",),
    )
    assert code.spilled == 0
