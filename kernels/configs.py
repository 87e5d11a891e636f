"""Tile sizes of every op: plain tables, and the rule that picks from them. Nothing is timed at run time.

The tables follow from arithmetic and from the registers and shared memory that the compiler reports; no GPU has timed
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from sparsekit.errors import KernelError

# Bytes of shared memory that one program may have; an architecture that is not listed takes its elder's.
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}


@dataclass(frozen=True)
class Gpu:
    """What a tile must fit: an entry of `SHARED_BYTES`, and the number of its multiprocessors."""

    arch: str
    num_processors: int


@dataclass(frozen=True)
class Tile:
    """Work of one program of a kernel: `block_m` samples or pixels by `block_n` outputs.

    Attributes:
        block_n: divides the rows of the weight's groups.
        num_stages: steps whose loads are in flight, as Triton counts them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Largest first. Stages are those of 16-bit numbers and steps of 64, and shrink to what shared memory holds.
# 128 x 128 takes 96 KiB and 128 registers: two programs share a multiprocessor of an H100, hide each other's epilogue.
# Few samples are bound by the weight's bytes: narrow tiles put them on all multiprocessors, many stages in flight.
LINEAR_TILES = (
    Tile(128, 128, num_warps=8, num_stages=3),
    Tile(128, 64, num_warps=4, num_stages=4),
    Tile(64, 64, num_warps=4, num_stages=4),
    Tile(64, 32, num_warps=4, num_stages=5),
    Tile(32, 32, num_warps=4, num_stages=6),
    Tile(32, 16, num_warps=2, num_stages=8),
    Tile(16, 64, num_warps=4, num_stages=6),
    Tile(16, 32, num_warps=2, num_stages=8),
    Tile(16, 16, num_warps=2, num_stages=8),
)


def linear_tile(gpu: Gpu, *, num_samples: int, num_out: int, rows: int, step: int, itemsize: int) -> Tile:
    """The largest tile that keeps three quarters of the GPU busy, else the smallest.

    Args:
        num_samples: rows of x.
        num_out: outputs of the layer.
        rows: outputs of a group.
        step: inputs of a step of the packed weight.
        itemsize: bytes of a number.
    """
    fitting = [
        replace(tile, num_stages=num_stages)
        for tile in LINEAR_TILES
        if tile.block_n <= rows and tile.block_m < 2 * max(num_samples, 16)
        if (num_stages := min(tile.num_stages, max_stages(gpu.arch, (tile.block_m + tile.block_n) * step * itemsize)))
        > 1
    ]
    busy = (
        tile
        for tile in fitting
        if 4 * -(-num_samples // tile.block_m) * -(-num_out // tile.block_n) >= 3 * gpu.num_processors
    )
    return next(busy, fitting[-1])


# Of a convolution, block_m pixels by block_n output channels. 128 x 128 takes some 220 registers, 64 x 128 some 130.
# 8 warps take 128 at 128 x 128 and would hide more, but wait until they are proved right on a GPU.
CONV_TILES = (
    Tile(128, 128, num_warps=4, num_stages=3),
    Tile(64, 128, num_warps=4, num_stages=3),
    Tile(128, 64, num_warps=4, num_stages=3),
    Tile(64, 64, num_warps=4, num_stages=4),
    Tile(64, 32, num_warps=4, num_stages=4),
    Tile(64, 16, num_warps=4, num_stages=4),
)
MEMORY_BOUND_STEPS = 4  # a 1x1 convolution of 256 inputs: its tile takes longer to load and store than to multiply


def conv_tile(
    gpu: Gpu, *, num_pixels: int, num_blocks: int, rows: int, num_steps: int, step: int, itemsize: int
) -> Tile:
    """The largest tile that fits and keeps three quarters of the GPU busy, else the smallest.

    Short sums take at most 64 x 128: several programs of a multiprocessor then load while others store.

    Args:
        num_pixels: output pixels of all images.
        num_blocks: row blocks of the packed weight.
        rows: outputs of a row block.
        num_steps: steps of all row blocks.
        step: inputs of a step.
        itemsize: bytes of a number.
    """
    steps_per_block = -(-num_steps // num_blocks)
    # The sum and the operands both lie in registers unless mma is asynchronous, and on AMD's wider programs
    roomy = itemsize == 2 and (gpu.arch in ("sm_90", "sm_100") or gpu.arch.startswith("gfx"))
    largest = 128 * 128 if roomy and steps_per_block > MEMORY_BOUND_STEPS else 64 * 128
    fitting = [
        replace(tile, num_stages=max(2, min(tile.num_stages, steps_per_block + 1, stages)))
        for tile in CONV_TILES
        if tile.block_n <= rows and tile.block_m * tile.block_n <= largest
        if (stages := max_stages(gpu.arch, (tile.block_m + tile.block_n) * step * itemsize)) > 1
    ]
    busy = (
        tile
        for tile in fitting
        if 4 * -(-num_pixels // tile.block_m) * num_blocks * (rows // tile.block_n) >= 3 * gpu.num_processors
    )
    return next(busy, fitting[-1])


def max_stages(arch: str, stage_bytes: int) -> int:
    """The most stages whose buffers of `stage_bytes` fit; asynchronous mma needs one a stage, else one less."""
    num_stages = SHARED_BYTES[arch] // stage_bytes + (arch not in ("sm_90", "sm_100"))
    return min(num_stages, 2) if arch.startswith("gfx") else num_stages  # AMD's are unrolled: 8 compile for 15 s


@cache
def gpu_at(device: torch.device) -> Gpu:
    """The GPU of a device. Triton's interpreter, on the CPU, plays one with a single multiprocessor.

    Raises:
        KernelError: if the GPU is older than all in the table.
    """
    if device.type == "cpu":
        return Gpu("sm_90", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return Gpu(name if name in SHARED_BYTES else "gfx942", properties.multi_processor_count)
    known = [int(arch[3:]) for arch in SHARED_BYTES if arch.startswith("sm_")]
    elders = [arch for arch in known if arch <= 10 * properties.major + properties.minor]
    if not elders:
        raise KernelError(
            f"{properties.name}: the kernels need compute capability 8.0, got {properties.major}.{properties.minor}"
        )
    return Gpu(f"sm_{max(elders)}", properties.multi_processor_count)
