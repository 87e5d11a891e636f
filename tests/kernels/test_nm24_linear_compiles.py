"""What nm24_linear's kernel needs of every GPU, without one."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit.kernels.triton.nm24_linear import BLOCK_M, BLOCK_N, NUM_WARPS, RUNS, nm24_linear_kernel, stages
from tests.kernels.compiling import SHARED_LIMIT, compiled


@pytest.mark.parametrize(("arch", "dtype"), [*((arch, "fp16") for arch in SHARED_LIMIT), ("sm_89", "fp32")])
def test_it_fits_every_gpu_and_reads_the_weight_asynchronously(arch: str, dtype: str) -> None:
    num_stages = stages(arch, 4 if dtype == "fp32" else 2)
    kernel = compiled(
        nm24_linear_kernel,
        dict.fromkeys(("y", "x", "values", "bias"), f"*{dtype}")
        | {"positions": "*u8"}
        | dict.fromkeys(("num_samples", "num_out", "num_in", "num_bytes"), "i32"),
        {"ACT": "gelu", "UPCAST": False, "BM": BLOCK_M, "BN": BLOCK_N, "RUNS": RUNS},
        arch,
        num_warps=NUM_WARPS,
        num_stages=num_stages,
        unaligned=("num_samples", "num_out"),
    )
    assert kernel.spilled == 0
    assert kernel.registers <= 255
    assert kernel.shared <= SHARED_LIMIT[arch]
    if arch.startswith("sm_"):
        positions, wide = (sum(size == wanted for size in kernel.copies) for wanted in (4, 16))
        assert positions == num_stages
        assert wide == len(kernel.copies) - positions > 0
