"""What a forward pass is given and what it returns, as pytree sees it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import is_namedtuple_instance, keystr, tree_flatten_with_path

from sparsekit.copying import modules_by_path, states_by_name
from sparsekit.errors import TraceError


def check_inputs(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Name what is wrong with the example inputs before the forward meets it.

    Raises:
        TraceError: no module with a forward in Python; too few or too many inputs, another device than the model's,
            another floating-point type.
    """
    parts: dict[str, Any] = modules_by_path(model) if isinstance(model, nn.Module) else {"": model}
    for name, part in parts.items():
        if not isinstance(part, nn.Module) or isinstance(part, torch.jit.ScriptModule):
            found = f"module {name!r}" if name else "the model"
            hint = "; its module() is one" if isinstance(part, torch.export.ExportedProgram) else ""
            kind = type(part).__name__
            raise TraceError(f"{found} is a {kind}: expected an nn.Module with a forward in Python{hint}")
    _check_count(model, len(example_inputs))
    states = [*states_by_name(model).values()]
    devices = [str(device) for device in dict.fromkeys(tensor.device for tensor in states)]
    used = dict.fromkeys(tensor.dtype for tensor in states if isinstance(tensor, nn.Parameter))
    dtypes = [_short(dtype) for dtype in used if dtype.is_floating_point]
    for path, leaf in tree_flatten_with_path(example_inputs)[0]:
        if not isinstance(leaf, Tensor):
            continue
        where = "example input " + keystr(path).removeprefix("[").replace("]", "", 1)
        if devices and str(leaf.device) not in devices:
            raise TraceError(f"{where} is on {leaf.device}, the model on {' and '.join(devices)}")
        if dtypes and leaf.is_floating_point() and _short(leaf.dtype) not in dtypes:
            raise TraceError(f"{where} is {_short(leaf.dtype)}, the model's parameters {' and '.join(dtypes)}")


def _check_count(model: nn.Module, num_given: int) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*[None] * num_given)
    except TypeError as error:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken = [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]
        num_least = sum(parameter.default is inspect.Parameter.empty for parameter in taken)
        if num_least <= num_given <= len(taken):
            raise TraceError(f"forward cannot be called with example inputs alone: {error}") from None
        count = str(num_least) if num_least == len(taken) else f"{num_least} to {len(taken)}"
        names = ", ".join(parameter.name for parameter in taken)
        raise TraceError(f"forward takes {count} inputs ({names}), got {num_given}") from None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: Any, opened: frozenset[int] = frozenset()) -> Any:
    """Containers as pytree knows them; other classes, in which it would see no tensors, as dicts."""
    if isinstance(value, Tensor | str | bytes | int | float | complex | torch.dtype | torch.device) or value is None:
        return value
    if id(value) in opened:
        raise TraceError(f"forward returned a {type(value).__name__} that contains itself")
    opened = opened | {id(value)}
    if isinstance(value, list | tuple):
        items = [plain(item, opened) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if is_namedtuple_instance(value) else tuple(items)
    attributes = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if attributes is None:
        raise TraceError(f"forward returned {type(value).__name__}: expected tensors in tuples, lists or dicts")
    return {key: plain(item, opened) for key, item in attributes.items()}
