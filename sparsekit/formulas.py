"""Formulas for the shapes that torch works out in Python on the meta device, a tenth of a millisecond or more for each.

Each takes an op's arguments and answers for the common case: float tensors of one dtype, contiguous, that fit. None
leaves it to torch, errors included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

META = torch.device("meta")  # told by name, torch parses it every time
_ATEN = torch.ops.aten


def worked_out(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns on meta tensors, or None."""
    formula = _FORMULAS.get(func)
    if formula is not None:
        return formula(*args, **kwargs)
    return _elementwise((*args, *kwargs.values())) if func._schema.name in _CLOSED else None


def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What `empty_like` makes of a dense tensor, for which torch goes through Python."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=META)


def _contiguous(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """As `tensor.new_empty(shape)`, in a quarter of the time."""
    return torch.empty(shape, dtype=tensor.dtype, device=META)


def _alike(*tensors: Tensor | None) -> bool:
    """Of one dtype that is accumulated in itself."""
    return {tensor.dtype for tensor in tensors if tensor is not None} in ({torch.float32}, {torch.float64})


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory without gaps, each once."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _elementwise(values: tuple[Any, ...]) -> Tensor | None:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not _alike(*tensors) or any(isinstance(value, complex) for value in values):
        return None
    first, *others = tensors
    if all(tensor.is_contiguous() for tensor in tensors):
        return _broadcast(tensors)
    if any((tensor.shape, tensor.stride()) != (first.shape, first.stride()) for tensor in others):
        return None
    return like(first, first.dtype) if is_dense(first) else _packed(first)


def _broadcast(tensors: list[Tensor]) -> Tensor | None:
    shape = list(tensors[0].shape)
    for tensor in tensors[1:]:
        other = tensor.shape
        shape = [1] * (len(other) - len(shape)) + shape
        for dim in range(-len(other), 0):
            if shape[dim] != other[dim]:
                if 1 not in (shape[dim], other[dim]):
                    return None
                shape[dim] = other[dim] if shape[dim] == 1 else shape[dim]
    return _contiguous(tensors[0], shape)


def _packed(tensor: Tensor) -> Tensor | None:
    """Without the gaps, its dimensions in the order that they have in memory."""
    if 0 in tensor.stride():
        return None
    strides = [1] * tensor.dim()
    filled = 1
    for _, size, dim in sorted(zip(tensor.stride(), tensor.shape, range(0, -tensor.dim(), -1), strict=True)):
        strides[-dim] = filled
        filled *= size
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=META)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    (batch, channels, *sizes), (num_out, num_in, *kernel) = x.shape, weight.shape
    fits = len(sizes) == len(kernel) > 0 and channels == num_in * groups and num_out % groups == 0
    if transposed or not fits or not x.is_contiguous() or not _alike(x, weight, bias):
        return None
    if bias is not None and bias.shape != (num_out,):
        return None
    rows = zip(sizes, kernel, *(_each(values, len(sizes)) for values in (stride, padding, dilation)), strict=True)
    out = [(size + 2 * pad - spread * (k - 1) - 1) // step + 1 for size, k, step, pad, spread in rows]
    return _contiguous(x, (batch, num_out, *out)) if min(batch, num_out, *out) > 0 else None


def _each(values: Sequence[int], count: int) -> Sequence[int]:
    return values if len(values) == count else [*values] * count


def _mean(
    x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    gone = {dim % x.dim() for dim in dims or () if -x.dim() <= dim < x.dim()}
    if not dims or len(gone) < len(dims) or dtype is not None or not _alike(x) or not x.is_contiguous():
        return None
    return _contiguous(
        x, [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
    )


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor | None:
    fits = len(shifts) == len(dims) > 0 and all(-x.dim() <= dim < x.dim() for dim in dims)
    return _contiguous(x, x.shape) if fits and x.is_contiguous() else None


def _addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    fits = bias.shape == right.shape[1:] and left.shape[1] == right.shape[0]
    return _contiguous(bias, (left.shape[0], right.shape[1])) if fits and _alike(bias, left, right) else None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...] | None:
    states = [state for state in (weight, bias, running_mean, running_var) if state is not None]
    if not (x.is_contiguous() and _alike(x, *states) and all(state.shape == x.shape[1:2] for state in states)):
        return None
    return like(x, x.dtype), _contiguous(x, x.shape[1:2]), _contiguous(x, x.shape[1:2])


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> tuple[Tensor, ...] | None:
    shape = tuple(normalized_shape)
    states = [state for state in (weight, bias) if state is not None]
    if not _alike(x, *states) or any(
        tail != shape for tail in (x.shape[-len(shape) :], *(state.shape for state in states))
    ):
        return None
    statistics = [*x.shape[: -len(shape)], *[1] * len(shape)]
    return _contiguous(x, x.shape), _contiguous(x, statistics), _contiguous(x, statistics)


def _softmax(x: Tensor, dim: int, *cast: Any) -> Tensor | None:
    return like(x, x.dtype) if x.is_contiguous() and not any(cast) else None


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0].shape
    if not (0 <= dim < len(first) and _alike(*tensors) and all(tensor.is_contiguous() for tensor in tensors)):
        return None
    if any(tensor.shape[:dim] != first[:dim] or tensor.shape[dim + 1 :] != first[dim + 1 :] for tensor in tensors):
        return None
    return _contiguous(tensors[0], [*first[:dim], sum(tensor.shape[dim] for tensor in tensors), *first[dim + 1 :]])


# Element by element, floats to floats of the same dtype.
_CLOSED = frozenset(
    f"aten::{name}{in_place}"
    for name in "add sub mul div neg exp sqrt rsqrt clamp clamp_min relu hardtanh hardswish hardsigmoid leaky_relu elu "
    "silu mish gelu sigmoid tanh".split()
    for in_place in ("", "_")
)
_FORMULAS: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.convolution.default: _convolution,
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.mean.dim: _mean,
    _ATEN.addmm.default: _addmm,
    _ATEN.roll.default: _roll,
    _ATEN.cat.default: _cat,
    _ATEN._softmax.default: _softmax,
    _ATEN._safe_softmax.default: _softmax,
}
