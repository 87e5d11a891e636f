"""`residual_subset_conv2d_` for GPUs that are not there."""

import pytest

from tests.kernels.compiling import CUDA, HIP
from tests.kernels.conv_compiling import Layer, check

# The last convolution of ResNet-50's first blocks, 64 channels to half of 256, batch 256
FIRST_STAGE = Layer(num_pixels=256 * 56 * 56, num_blocks=1, steps_per_block=1, channels=64, kernel=1, subset=True)


@pytest.mark.parametrize("arch", CUDA + HIP)
def test_a_layer_that_is_bound_by_memory(arch: str) -> None:
    check(FIRST_STAGE, arch)
