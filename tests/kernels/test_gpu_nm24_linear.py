"""nm24_linear on a real GPU."""

import pytest
import torch

from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import NM24
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.nm24_linear import nm24_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (8, 1000, 4100), (33, 300, 520)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_is_the_dense_product(shape: tuple[int, int, int], act: str, dtype: torch.dtype, tolerance: float) -> None:
    num_samples, num_out, num_in = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, device="cuda")
        for size in ((num_samples, num_in), (num_out, num_in), (num_out,))
    )
    packed = NM24.pack((weight * nm_mask(weight.abs()) / num_in**0.5).to(dtype))
    x, bias = x.to(dtype), bias.to(dtype)
    y = nm24_linear(x, packed, bias, act=act)
    truth = ACTIVATIONS[act](x.double() @ packed.to_dense().double().T + bias.double())
    assert (y.double() - truth).abs().max() <= tolerance * truth.abs().max()
