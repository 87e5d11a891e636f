"""The Triton body of nm24_linear against the dense product in float64, and within its bounds."""

import pytest
import torch

from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import NM24
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.nm24_linear import nm24_linear
from sparsekit.kernels.triton.nm24_linear import launch
from tests.kernels.fences import fenced, is_intact

# A unit in the last place of the result, which the interpreter truncates in bfloat16, and the loss of a float32 sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 256), (8, 50, 300), (33, 20, 516), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_the_kernel_computes_the_dense_product_within_its_tensors(
    shape: tuple[int, int, int], dtype: torch.dtype, act: str
) -> None:
    num_samples, num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
    keep = nm_mask(weight.abs()) & (torch.rand(weight.shape, generator=generator) < 0.9)
    packed = NM24.pack((weight * keep).to(dtype))
    x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((num_samples, num_in), (num_out,)))
    y, buffer = fenced(torch.full((num_samples, num_out), torch.nan, dtype=dtype))
    x, values, bias = (fenced(tensor)[0] for tensor in (x, packed.values, bias))
    launch(y, x, values, packed.positions, bias, act=act)
    truth = ACTIVATIONS[act](x.double() @ packed.to_dense().double().T + bias.double())
    assert (y.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max().clamp_min(1)
    assert is_intact(buffer)


def test_an_empty_bias_adds_nothing() -> None:
    packed = NM24.pack(torch.tensor([[0.0, 2.0, 0.0, 3.0], [1.0, 0.0, 0.0, 0.0]]))
    assert nm24_linear(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), packed).tolist() == [[3020.0, 1.0]]
