"""Deep copies of modules, several times faster than `copy.deepcopy`: most of what a module holds is empty or fixed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_FIXED = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size])
_NAMES = frozenset([str])
_CONTAINERS = frozenset([dict, OrderedDict, set, list])
_OWN = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, modules, hooks
# Convolutions have a __setstate__ only for pickles of old versions.
_PLAIN = (nn.Module, nn.modules.conv._ConvNd, object)


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """All modules, shared ones under each of their paths; torch's generators inside generators take far longer."""
    found = {}
    ahead = [("", model)]
    while ahead:
        path, module = ahead.pop()
        found[path] = module
        for name, child in reversed(module._modules.items()):
            if child is not None:
                ahead.append((f"{path}.{name}" if path else name, child))
    return found


def states_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, each tensor under its first name, as torch orders and names them."""
    modules = modules_by_path(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for path, module in modules.items():
            for name, value in vars(module)[kind].items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}.{name}" if path else name] = value
    return found


def copy_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`: `memo` maps the id of what is to be replaced to what replaces it."""
    modules = [module for module in dict.fromkeys(modules_by_path(model).values()) if id(module) not in memo]
    kinds = {kind for kind in set(map(type, modules)) if _copies_plainly(kind)}
    plain = [module for module in modules if type(module) in kinds]
    for module in plain:  # first all of them, because modules refer to each other
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(plain):  # parts before wholes: one that copies itself, as a compiled one, reads its parts
        twin = vars(memo[id(module)])
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _FIXED:
                twin[name] = value
            elif kind in _CONTAINERS and not value:  # most of them, so no call for each
                twin[name] = kind()
            elif name != "_compiled_call_impl":  # it would run the original; torch's own copies do not have it either
                twin[name] = _copied(value, memo)
    copied: nn.Module = copy.deepcopy(model, memo)  # finds it in the memo, or is a module that copies itself
    return copied


def kept_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that modules keep beside their parameters and buffers, in a cache or for a hook."""
    kept: list[Any] = []
    for module in modules_by_path(model).values():
        values = vars(module)
        for name in values.keys() - _OWN:
            if type(value := values[name]) not in _FIXED:
                kept += [value] if isinstance(value, Tensor) else _inside(value)
    return [leaf for leaf in kept if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]


def _inside(value: Any) -> list[Any]:
    if not isinstance(value, dict | list | tuple) or (type(value) is not dict and _FIXED.issuperset(map(type, value))):
        return []
    return tree_leaves(value)


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether nothing but the attributes makes the module."""
    own = {"__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__"}
    return not any(own & vars(base).keys() for base in kind.__mro__ if base not in _PLAIN)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _FIXED:
        return value
    if kind in _CONTAINERS and not value:
        return kind()
    if (kind is tuple or kind is list) and _FIXED.issuperset(map(type, value)):
        return value if kind is tuple else value.copy()
    if id(value) in memo:
        return memo[id(value)]
    if kind is nn.Parameter or kind is Tensor:
        # A view of a larger storage is left to torch, which keeps what is shared shared.
        if value.is_leaf and value.untyped_storage().nbytes() == value.nbytes:
            twin = value.detach().clone(memory_format=torch.preserve_format)
            memo[id(value)] = nn.Parameter(twin, value.requires_grad) if kind is nn.Parameter else twin
            return memo[id(value)]
    elif kind is dict and _NAMES.issuperset(map(type, value)):
        twins: dict[str, Any] = {}
        memo[id(value)] = twins
        for key, item in value.items():
            twins[key] = memo[id(item)] if id(item) in memo else _copied(item, memo)
        return twins
    return copy.deepcopy(value, memo)
