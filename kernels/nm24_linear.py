"""act(x W^T + bias) with a 2:4 weight that stays packed in memory: a linear layer for at most some 32 samples."""

# M samples, N outputs, K inputs
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.dispatch import runs_triton
from sparsekit.kernels.formats import NM24


def nm24_linear(x: Tensor, weight: NM24, bias: Tensor | None = None, *, act: str = "none") -> Tensor:
    """act(x W^T + bias), computed in float32 at least and rounded once; for inference, it has no gradient.

    Reads 9/16 of the bytes of a dense 16-bit weight, which bounds the time of a layer of few samples. It does all of
    the dense layer's products: for many samples take the dense weight.

    Args:
        x: [..., K].
        weight: [N, K] in the dtype of x. On a GPU float16, bfloat16 or float32; float64 and all of the CPU multiply
            the dense weight.
        bias: [N].
        act: "none", "relu", "gelu" (the exact one) or "silu".

    Raises:
        KernelError: if shapes, dtypes or the activation do not fit.

    >>> weight = NM24.pack(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> nm24_linear(torch.tensor([1.0, 2.0, 3.0, 4.0]), weight, torch.tensor([0.5]))
    tensor([38.5000])
    """
    num_out, num_in = weight.shape
    if act not in ACTIVATIONS:
        raise KernelError(f"act {act!r}: must be one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1] != num_in:
        raise KernelError(f"x: must end in {num_in} inputs like the weight, got {list(x.shape)}")
    if bias is not None and bias.shape != (num_out,):
        raise KernelError(f"bias: must be [{num_out}], got {list(bias.shape)}")
    if x.dtype != weight.values.dtype:
        raise KernelError(f"x: must be {weight.values.dtype} like the weight, got {x.dtype}")
    y_MN: Tensor = _nm24_linear(x.reshape(-1, num_in), weight.values, weight.positions, bias, act)
    return y_MN.view(*x.shape[:-1], num_out)


@torch.library.custom_op("sparsekit::nm24_linear", mutates_args=())
def _nm24_linear(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, act: str) -> Tensor:
    if x.dtype == torch.float64 or not x.shape[0] or not runs_triton(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight_NK = NM24(values.to(dtype), positions, (values.shape[0], x.shape[1])).to_dense()
        return ACTIVATIONS[act](linear(x.to(dtype), weight_NK, None if bias is None else bias.to(dtype))).to(x.dtype)
    from sparsekit.kernels.triton.nm24_linear import launch

    y = x.new_empty(x.shape[0], values.shape[0])
    launch(y, x.contiguous(), values, positions, bias, act=act)
    return y


@_nm24_linear.register_fake
def _fake(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
