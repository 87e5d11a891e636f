"""`group_conv2d` for GPUs that are not there."""

import pytest

from tests.kernels.compiling import CUDA, HIP
from tests.kernels.conv_compiling import Layer, check

# StyleGAN2's 512 channels of 64 x 64, batch 8, a quarter kept
WIDE = Layer(num_pixels=8 * 64 * 64, num_blocks=4, steps_per_block=18, channels=512, kernel=3)
# The same for a single small image, in the least groups
SMALL = Layer(
    num_pixels=16 * 16, num_blocks=32, steps_per_block=9, channels=24, kernel=3, rows=16, cols=8, dtype="fp16"
)
FLOAT = Layer(num_pixels=8 * 64 * 64, num_blocks=4, steps_per_block=36, channels=512, kernel=3, step=32, dtype="fp32")


@pytest.mark.parametrize("arch", CUDA + HIP)
def test_a_wide_layer(arch: str) -> None:
    check(WIDE, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_small_layer_of_narrow_groups(arch: str) -> None:
    check(SMALL, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_layer_of_float32(arch: str) -> None:
    check(FLOAT, arch)
