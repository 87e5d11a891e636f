"""Compile the convolution kernel with the tile that the table gives a layer, and hold its machine code to limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsekit.kernels.configs import Gpu, Tile, conv_tile
from sparsekit.kernels.triton.group_conv2d import group_conv2d_kernel
from tests.kernels.compiling import SHARED_LIMIT, Compiled, compiled

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = ("out", "x", "values")
SIZES = (
    *("num_pixels", "height_out", "width_out", "height", "width", "num_units", "num_row_tiles"),
    *("x_batch", "x_row", "x_pixel", "out_batch", "out_row", "out_pixel"),
)


@dataclass(frozen=True)
class Layer:
    """A layer of a network, as the table of tiles and the kernel see it.

    Attributes:
        num_pixels: of the output, all images.
        steps_per_block: of the packed weight.
        subset: updates channels of a stream in place.
    """

    num_pixels: int
    num_blocks: int
    steps_per_block: int
    channels: int
    kernel: int
    rows: int = 128
    cols: int = 16
    step: int = 64
    dtype: str = "bf16"
    subset: bool = False

    def tile(self, arch: str) -> Tile:
        """For a GPU of 132 multiprocessors."""
        return conv_tile(
            Gpu(arch, 132), num_pixels=self.num_pixels, num_blocks=self.num_blocks, rows=self.rows,
            num_steps=self.num_blocks * self.steps_per_block, step=self.step, itemsize=ITEMSIZE[self.dtype],
        )  # fmt: skip

    def compiled(self, arch: str) -> Compiled:
        tile, number = self.tile(arch), "*" + self.dtype
        signature = dict.fromkeys(POINTERS, number) | dict.fromkeys(("gidx", "ptr", "order"), "*i32")
        signature |= {"bias": "*fp32", "residual": number} | dict.fromkeys(SIZES, "i32")
        constants = {
            "V": self.rows, "COLS": self.cols, "UNIT": min(self.cols, 16), "KERNEL_W": self.kernel,
            "GROUPS_PER_TAP": self.channels // self.cols, "STRIDE_H": 1, "STRIDE_W": 1, "DILATION_H": 1,
            "DILATION_W": 1, "TOP": self.kernel // 2, "LEFT": self.kernel // 2, "PADDED": self.kernel > 1,
            "ACT": "relu", "PRECISION": "ieee" if arch.startswith("gfx") else "tf32", "UPCAST": False,
            "BM": tile.block_m, "BN": tile.block_n, "BK": self.step,
        }  # fmt: skip
        optional = {"scale": "*fp32", "out_groups": "*i32"}
        if self.subset:
            signature |= optional
        else:
            constants |= dict.fromkeys(optional)
        return compiled(
            group_conv2d_kernel, signature, constants, arch,
            num_warps=tile.num_warps, num_stages=tile.num_stages, unaligned=tuple(SIZES),
        )  # fmt: skip


def check(layer: Layer, arch: str) -> None:
    """No spills, no more shared memory than there is, matrix instructions, a pipeline as deep as asked."""
    binary, tile = layer.compiled(arch), layer.tile(arch)
    assert binary.spilled == 0
    assert binary.registers <= (512 if arch.startswith("gfx") else 255)
    assert binary.shared <= SHARED_LIMIT[arch]
    instruction = {"sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma"}.get(arch, r"mma\.sync|v_mfma")
    assert re.search(instruction, binary.text)
    if arch.startswith("gfx"):
        assert re.search(r"(global|buffer)_load_dwordx4", binary.text)
        assert re.search(r"(global|buffer)_store_dwordx4", binary.text)
        return
    assert set(binary.copies) == {16}
    assert re.search(r"st\.global\.v[24]\.b32", binary.text)
    stage_bytes = (tile.block_m + tile.block_n) * layer.step * ITEMSIZE[layer.dtype]
    num_buffers = tile.num_stages - (arch not in ("sm_90", "sm_100"))
    assert binary.shared // stage_bytes == num_buffers
