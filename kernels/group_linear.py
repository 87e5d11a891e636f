"""act(x W^T + bias + residual) with a `GroupSparse` weight: a linear layer, or a 1 x 1 convolution."""

# M samples, N outputs, K inputs
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekit.errors import KernelError
from sparsekit.kernels.conv2d_act import ACTIVATIONS
from sparsekit.kernels.dispatch import runs_triton
from sparsekit.kernels.formats import GroupSparse, gather_groups, scatter_groups


def group_linear(
    x: Tensor, weight: GroupSparse, bias: Tensor | None = None, residual: Tensor | None = None, *, act: str = "none"
) -> Tensor:
    """act(x W^T + bias + residual), computed in float32 at least and rounded once.

    On a GPU only the stored groups are read and multiplied, in float16, bfloat16 or float32; float32 is rounded to
    TF32 where `torch.backends.cuda.matmul` allows that. Float64 and all of the CPU multiply the dense weight. So does
    the gradient, on any device: that of the values is gathered from that of the dense weight.

    A 1 x 1 convolution of a channels_last image is this on `image.permute(0, 2, 3, 1)`, of which no copy is made.

    Args:
        x: [..., K].
        weight: [N, K] in the dtype of x.
        bias: [N].
        residual: [..., N].
        act: "none", "relu", "gelu" (the exact one) or "silu".

    Returns:
        [..., N], differentiable in x, the weight's values, bias and residual.

    Raises:
        KernelError: if shapes, dtypes or the activation do not fit.

    >>> from sparsekit.kernels.formats import pack
    >>> group_linear(torch.arange(4.0), pack(torch.eye(2, 4), rows=16, cols=8), torch.tensor([5.0, -9.0]), act="relu")
    tensor([5., 0.])
    """
    num_out, num_in = weight.shape
    lead = x.shape[:-1]
    if act not in ACTIVATIONS:
        raise KernelError(f"act {act!r}: must be one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1] != num_in:
        raise KernelError(f"x: must end in {num_in} inputs like the weight, got {list(x.shape)}")
    if bias is not None and bias.shape != (num_out,):
        raise KernelError(f"bias: must be [{num_out}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*lead, num_out):
        raise KernelError(f"residual: must be {[*lead, num_out]} like the output, got {list(residual.shape)}")
    if x.dtype != weight.values.dtype:
        raise KernelError(f"x: must be {weight.values.dtype} like the weight, got {x.dtype}")
    y_MN: Tensor = _group_linear(
        x.reshape(-1, num_in),
        weight.values,
        weight.gidx,
        weight.ptr,
        weight.order,
        bias,
        None if residual is None else residual.reshape(-1, num_out),
        act,
        num_out,
        weight.cols,
    )
    return y_MN.view(*lead, num_out)


def _reference(
    x_MK: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual_MN: Tensor | None,
    act: str,
    num_out: int,
    cols: int,
) -> Tensor:
    """The op by a dense product: a BLAS beats any gather that torch can express, and the sum is the same."""
    dtype = torch.promote_types(x_MK.dtype, torch.float32)
    weight_NK = scatter_groups(values.to(dtype), gidx, ptr, shape=(num_out, x_MK.shape[1]), cols=cols)
    z_MN = linear(x_MK.to(dtype), weight_NK, None if bias is None else bias.to(dtype))
    return ACTIVATIONS[act](z_MN if residual_MN is None else z_MN + residual_MN).to(x_MK.dtype)


@torch.library.custom_op("sparsekit::group_linear", mutates_args=())
def _group_linear(
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    num_out: int,
    cols: int,
) -> Tensor:
    if x.dtype == torch.float64 or not x.shape[0] or not runs_triton(x):
        return _reference(x, values, gidx, ptr, order, bias, residual, act, num_out, cols)
    from sparsekit.kernels.triton.group_linear import launch

    y = x.new_empty(x.shape[0], num_out)
    residual = None if residual is None else residual.contiguous()
    launch(y, x.contiguous(), values, gidx, ptr, order, bias, residual, act=act, cols=cols)
    return y


@_group_linear.register_fake
def _fake(
    x: Tensor,
    values: Tensor,
    gidx: Tensor,
    ptr: Tensor,
    order: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    num_out: int,
    cols: int,
) -> Tensor:
    return x.new_empty(x.shape[0], num_out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act, ctx.num_out, ctx.cols = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, values, bias and residual; the sum before the activation is computed again."""
    x_MK, values, gidx, ptr, order, bias, residual_MN = ctx.saved_tensors
    needs_x, needs_values, _, _, _, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    if ctx.act != "none":
        z_MN = _group_linear(x_MK, values, gidx, ptr, order, bias, residual_MN, "none", ctx.num_out, ctx.cols)
        grad_MN = _GRADIENTS[ctx.act](grad_MN, z_MN)
    grad_x = grad_values = None
    if needs_x:
        shape = (ctx.num_out, x_MK.shape[1])
        grad_x = grad_MN @ scatter_groups(values, gidx, ptr, shape=shape, cols=ctx.cols)
    if needs_values:
        _, rows, step = values.shape
        grad_values = gather_groups(grad_MN.mT @ x_MK, gidx, ptr, rows=rows, cols=ctx.cols, num_groups=step // ctx.cols)
    grad_bias = grad_MN.sum(0) if needs_bias else None
    return grad_x, grad_values, None, None, None, grad_bias, grad_MN if needs_residual else None, None, None, None


_GRADIENTS = {
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: torch.ops.aten.gelu_backward(grad, z),
    "silu": lambda grad, z: torch.ops.aten.silu_backward(grad, z),
}
_group_linear.register_autograd(_backward, setup_context=_setup_context)
