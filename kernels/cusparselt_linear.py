"""act(x W^T + bias) with a 2:4 weight on the sparse tensor cores, through cuSPARSELt: a linear layer of many samples.

Triton cannot issue their instructions. Elsewhere than on an NVIDIA GPU the dense weight is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsekit.kernels.conv2d_act import ACTIVATIONS

# What cuSPARSELt takes: sizes of the weight that are multiples of it, and samples that are.
MULTIPLE, SAMPLES = 32, 8


def cusparselt_linear(x: Tensor, weight: Tensor, compressed: Tensor, bias: Tensor, *, act: str = "none") -> Tensor:
    """act(x W^T + bias), for inference.

    Args:
        x: [..., K], float16 or bfloat16 on a GPU.
        weight: [N, K], at most 2 of every 4 consecutive inputs not zero.
        compressed: the same by `torch._cslt_compress`; empty on the CPU.
        bias: [N].
        act: "none", "relu", "gelu" (the exact one) or "silu".
    """
    y_MN: Tensor = _product(x.reshape(-1, x.shape[-1]), weight, compressed, bias)
    return ACTIVATIONS[act](y_MN.view(*x.shape[:-1], weight.shape[0]))


def compress(weight: Tensor) -> Tensor:
    """What `cusparselt_linear` multiplies with on a GPU."""
    return torch._cslt_compress(weight) if weight.is_cuda else weight.new_empty(0)


def takes(weight: Tensor) -> bool:
    """Whether cuSPARSELt multiplies with weights of this shape, dtype and device."""
    return (
        weight.is_cuda
        and torch.backends.cusparselt.is_available()
        and weight.dtype in (torch.float16, torch.bfloat16)
        and all(size % MULTIPLE == 0 for size in weight.shape)
    )


@torch.library.custom_op("sparsekit::cusparselt_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, compressed: Tensor, bias: Tensor) -> Tensor:
    if not x.is_cuda:
        return linear(x, weight, bias)
    padded = pad(x, (0, 0, 0, -x.shape[0] % SAMPLES)).contiguous()
    y: Tensor = torch._cslt_sparse_mm(compressed, padded.t(), bias=bias, transpose_result=True)
    return y[: x.shape[0]].clone(memory_format=torch.contiguous_format) if len(padded) > len(x) else y


@_product.register_fake
def _(x: Tensor, weight: Tensor, compressed: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
