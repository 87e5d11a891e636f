"""A network without storage, and its ops run on shapes alone: what `record` needs of a forward pass, fast.

Torch works out the shapes of many ops in Python, up to a millisecond for each. Formulas, and a memory of what was
asked before, give the same answers in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from sparsekit.copying import copy_module, kept_tensors, states_by_name
from sparsekit.formulas import META, is_dense, like, worked_out

_UNTAGGED = ("aten::hardswish", "aten::hardswish_", "aten::mish", "aten::mish_")
_AS_IT_IS = (None, torch.preserve_format)
Template = tuple[torch.Size, tuple[int, ...], torch.dtype]


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` without storage: its parameters and buffers are on the meta device."""
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


def on_cpu(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU. Buffers are copies; parameters that are there already share their storage."""
    return _copy(model, lambda tensor: tensor.detach().to("cpu", copy=not isinstance(tensor, nn.Parameter)))


def _copy(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for tensor in states_by_name(model).values():
            twin = convert(tensor)
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        for tensor in kept_tensors(model):  # constants; or made by a hook, and no leaf
            memo.setdefault(id(tensor), convert(tensor))
        return copy_module(model, memo)


class MetaKernels:
    """Runs ops; on meta tensors, an op that was run before on tensors like these is not worked out again."""

    def __init__(self) -> None:
        self._known: dict[Any, Template | list[Template] | None] = {}

    def __call__(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` returns."""
        kind = _kind(func)
        if kind is None:
            return func(*args, **kwargs)
        alike = _elementwise(func) and kwargs.get("memory_format") in _AS_IT_IS and _one_layout(args)
        key = (func, _key(args, shapes=not alike), _key(tuple(kwargs.items())) if kwargs else ())
        if None in key:  # other devices
            return func(*args, **kwargs)
        if kind == "in place":  # neither the shape nor the dtype changes, or torch refuses
            if key not in self._known:
                made = worked_out(func, args, kwargs)
                if made is None or made.shape != args[0].shape:
                    func(*args, **kwargs)
                self._known[key] = None
            return args[0]
        known = self._known.get(key)
        if known is None:
            result = worked_out(func, args, kwargs)
            if result is None:
                result = func(*args, **kwargs)
            if isinstance(result, tuple):
                self._known[key] = [_template(x) for x in result]
            elif result.is_meta:  # not zeros_like(x, device="cpu")
                self._known[key] = _template(result)
            return result
        if isinstance(known, list):
            return tuple(map(_empty, known))
        return like(args[0], known[2]) if alike else _empty(known)


@cache
def _kind(func: OpOverload) -> Literal["pure", "in place"] | None:
    """ "pure": takes tensors, writes to none and returns new ones, one or a tuple. "in place": element by element."""
    schema = func._schema
    returns = [(str(value.type), value.alias_info) for value in schema.returns]
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    if takes and not schema.is_mutable and set(returns) == {("Tensor", None)}:
        return "pure"
    return "in place" if schema.name.endswith("_") and _elementwise(func) else None


@cache
def _elementwise(func: OpOverload) -> bool:
    """Whether it makes one tensor, each element of it of the elements at the same place."""
    return (torch.Tag.pointwise in func.tags or func._schema.name in _UNTAGGED) and len(func._schema.returns) == 1


def _one_layout(args: tuple[Any, ...]) -> bool:
    """Whether all tensors among the arguments have one shape and one dense order of it: then only dtypes matter."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.dim() == 0:
        return False
    rest = [value for value in args[1:] if isinstance(value, Tensor)]
    if first.is_contiguous():
        return all(value.shape == first.shape and value.is_contiguous() for value in rest)
    return is_dense(first) and all((value.shape, value.stride()) == (first.shape, first.stride()) for value in rest)


def _key(values: tuple[Any, ...], *, shapes: bool = True) -> Any:
    """Equal only where what comes out is, its shape left aside without `shapes`; None where that is not known."""
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta or value.layout is not torch.strided:
                return None
            parts.append((value.shape, value.stride(), value.dtype) if shapes else value.dtype)
        elif type(value) is list and value and type(value[0]) is int:
            parts.append(tuple(value))
        elif isinstance(value, list | tuple):
            inner = _key(tuple(value))
            if inner is None:
                return None
            parts.append(inner)
        else:
            parts.append((type(value), value))  # True, 1 and 1.0 are equal, and promote differently
    return tuple(parts)


def _template(tensor: Tensor) -> Template:
    return tensor.shape, tensor.stride(), tensor.dtype


def _empty(template: Template) -> Tensor:
    size, stride, dtype = template
    return torch.empty_strided(size, stride, dtype=dtype, device=META)
