"""2:4 weights on sparse tensor cores, and on the CPU as dense ones."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from sparsekit.kernels.cusparselt_linear import compress, cusparselt_linear, takes
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.modules import CusparseltLinear, LinearAct


def layer(device: str = "cpu", dtype: torch.dtype = torch.float32) -> LinearAct:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)
    weight = (weight * nm_mask(weight.abs())).to(device, dtype)
    return LinearAct(weight, torch.randn(64, generator=generator).to(device, dtype), act="relu")


def test_it_is_the_dense_layer_and_can_be_it_again() -> None:
    dense = layer()
    sparse, x = CusparseltLinear(dense), torch.randn(2, 40, 96)
    assert torch.equal(sparse(x), dense(x))
    assert torch.equal(sparse.densify()(x), dense(x))
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert not takes(dense.weight)


def test_the_operator_keeps_torchs_contract() -> None:
    dense = layer()
    arguments = torch.randn(40, 96), dense.weight, compress(dense.weight), dense.bias
    opcheck(torch.ops.sparsekit.cusparselt_linear.default, arguments)
    compiled = torch.compile(CusparseltLinear(dense), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), dense(arguments[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_samples", [40, 128, 1001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_it_is_the_dense_product(dtype: torch.dtype, num_samples: int) -> None:
    dense = layer("cuda", dtype)
    assert takes(dense.weight)
    x = torch.randn(num_samples, 96, device="cuda", dtype=dtype)
    expected = torch.relu(x.double() @ dense.weight.double().T + dense.bias.double())
    found = cusparselt_linear(x, dense.weight, compress(dense.weight), dense.bias, act="relu").double()
    assert (found - expected).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 2e-3) * expected.abs().max()
