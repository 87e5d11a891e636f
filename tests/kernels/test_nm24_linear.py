"""nm24_linear in plain torch, and as an operator that torch can export and compile."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.formats import NM24
from sparsekit.kernels.masks import nm_mask
from sparsekit.kernels.nm24_linear import nm24_linear


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, NM24, Tensor]:
    num_samples, num_out, num_in = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=dtype)
        for size in ((num_samples, num_in), (num_out, num_in), (num_out,))
    )
    return x, NM24.pack(weight * nm_mask(weight.abs())), bias


@pytest.mark.parametrize("shape", [(5, 20, 24), (1, 3, 4), (0, 16, 8)], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_is_the_linear_layer_of_the_masked_weight(shape: tuple[int, int, int], act: str) -> None:
    x, packed, bias = draw(shape)
    torch.testing.assert_close(
        nm24_linear(x, packed, bias, act=act), ACTIVATIONS[act](linear(x, packed.to_dense(), bias))
    )


def test_samples_may_have_any_number_of_dimensions() -> None:
    x, packed, _ = draw((6, 20, 24))
    torch.testing.assert_close(nm24_linear(x.view(2, 3, 24), packed), nm24_linear(x, packed).view(2, 3, 20))


def test_the_operator_keeps_torchs_contract() -> None:
    x, packed, bias = draw((5, 20, 24), torch.float32)
    operator = torch.ops.sparsekit.nm24_linear.default
    torch.library.opcheck(operator, (x, packed.values, packed.positions, bias, "relu"))
    torch.library.opcheck(operator, (x, packed.values, packed.positions, None, "none"))


def test_it_compiles_to_one_graph() -> None:
    x, packed, bias = draw((5, 20, 24), torch.float32)
    compiled = torch.compile(lambda x: nm24_linear(x, packed, bias) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), nm24_linear(x, packed, bias) + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "tanh"}, "act 'tanh': must be one of none, relu, gelu, silu"),
        ({"x": torch.zeros(5, 23)}, r"x: must end in 24 inputs like the weight, got \[5, 23\]"),
        ({"x": torch.zeros(5, 24).half()}, r"x: must be torch\.float32 like the weight, got torch\.float16"),
        ({"bias": torch.zeros(19)}, r"bias: must be \[20\], got \[19\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    x, weight, _ = draw((5, 20, 24), torch.float32)
    with pytest.raises(KernelError, match=message):
        nm24_linear(**{"x": x, "weight": weight, **changes})
