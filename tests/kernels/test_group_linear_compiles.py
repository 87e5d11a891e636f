"""What group_linear's kernel needs of every GPU, without one."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit.kernels.configs import LINEAR_TILES, Gpu, Tile, linear_tile
from sparsekit.kernels.triton.group_linear import group_linear_kernel
from tests.kernels.compiling import SHARED_LIMIT, Compiled, compiled

H100, STEP = Gpu("sm_90", 132), 64
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def built(tile: Tile, arch: str, dtype: str = "fp16", *, rows: int = 128, cols: int = 16) -> Compiled:
    """With all that can be fused; an odd number of outputs, the worst case, so that stores are not aligned."""
    pointers = dict.fromkeys(("y", "x", "values", "bias", "residual"), f"*{dtype}")
    indices, sizes = dict.fromkeys(("gidx", "ptr", "order"), "*i32"), ("num_samples", "num_out", "x_groups")
    constants = {"V": rows, "COLS": cols, "ACT": "gelu", "UPCAST": False, "BAND": 8}
    constants["PRECISION"] = "tf32" if arch.startswith("sm_") else "ieee"
    return compiled(
        group_linear_kernel,
        pointers | indices | dict.fromkeys(sizes, "i32"),
        constants | {"BM": tile.block_m, "BN": tile.block_n, "BK": STEP},
        arch,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=sizes,
    )


def chosen(arch: str, num_samples: int, dtype: str = "fp16") -> Tile:
    """The table's tile for a weight of 4096 x 4096 and a GPU as wide as an H100."""
    sizes = {"num_samples": num_samples, "num_out": 4096, "rows": 128, "step": STEP}
    return linear_tile(Gpu(arch, H100.num_processors), **sizes, itemsize=BYTES[dtype])


def assert_fits(kernel: Compiled, arch: str) -> None:
    assert kernel.spilled == 0
    assert kernel.registers <= (512 if arch.startswith("gfx") else 255)
    assert kernel.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("num_samples", [16, 4096])
def test_the_tile_of_every_gpu_fits_it(arch: str, num_samples: int) -> None:
    kernel = built(chosen(arch, num_samples), arch)
    assert_fits(kernel, arch)
    if arch.startswith("sm_"):
        assert set(kernel.copies) == {16}


@pytest.mark.parametrize("tile", LINEAR_TILES, ids=str)
def test_an_h100_runs_every_tile_with_all_its_stages_in_flight(tile: Tile) -> None:
    kernel = built(tile, "sm_90")
    assert_fits(kernel, "sm_90")
    assert set(kernel.copies) == {16}
    wide = tile.block_m >= 64  # below, Ampere's mma, which needs one buffer less
    assert ("wgmma" in kernel.text) == wide
    stage_bytes = (tile.block_m + tile.block_n) * STEP * 2
    assert kernel.shared // stage_bytes == tile.num_stages - (not wide)


@pytest.mark.parametrize("cols", [8, 64])
def test_groups_of_any_width_are_copied_16_bytes_at_a_time(cols: int) -> None:
    kernel = built(chosen("sm_90", 4096), "sm_90", cols=cols)
    assert_fits(kernel, "sm_90")
    assert set(kernel.copies) == {16}


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_90", "fp32"), ("sm_89", "fp32"), ("sm_90", "bf16"), ("gfx942", "bf16")]
)
def test_other_dtypes_fit(arch: str, dtype: str) -> None:
    tile = chosen(arch, 4096, dtype)
    assert_fits(built(tile, arch, dtype), arch)


def test_a_wide_tile_uses_the_tensor_cores_of_blackwell() -> None:
    assert "tcgen05" in built(chosen("sm_100", 4096), "sm_100").text


def test_two_programs_of_the_widest_tile_share_a_multiprocessor_of_an_h100() -> None:
    kernel = built(LINEAR_TILES[0], "sm_90")
    assert 2 * kernel.shared <= SHARED_LIMIT["sm_90"]
    assert 2 * kernel.registers * 32 * LINEAR_TILES[0].num_warps <= 65536


@pytest.mark.parametrize(
    ("num_samples", "num_out", "rows", "tile"),
    [(4096, 4096, 128, (128, 128)), (4096, 4096, 32, (64, 32)), (64, 4096, 128, (64, 32)), (1, 4096, 128, (16, 32)),
     (1024, 768, 128, (64, 64)), (1, 16, 16, (16, 16))],
)  # fmt: skip
def test_the_tile_is_the_largest_that_leaves_few_multiprocessors_idle(
    num_samples: int, num_out: int, rows: int, tile: tuple[int, int]
) -> None:
    sizes = {"num_samples": num_samples, "num_out": num_out, "rows": rows, "step": STEP, "itemsize": 2}
    found = linear_tile(H100, **sizes)
    assert (found.block_m, found.block_n) == tile
