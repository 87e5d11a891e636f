"""One forward pass -> the list of ATen ops it ran. Nothing else in sparsekit knows torch's dispatcher."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from sparsekit.errors import TraceError

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Ref:
    """A tensor of the recording: the same `index` means the same tensor object."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Op:
    """One ATen call.

    Attributes:
        name: the operator without its overload, "convolution".
        args: argument name -> value, defaults filled in, tensors as `Ref`.
        outputs: the tensors it returned.
        module: path of the innermost module that ran it.
        attributes: that module's integer attributes, such as `groups`.
        source: "file.py:147", the first line outside torch on the call stack.
    """

    name: str
    args: dict[str, Any]
    outputs: tuple[Ref, ...]
    module: str
    attributes: dict[str, int]
    source: str

    def tensors(self) -> list[Ref]:
        """Every tensor among the arguments, lists opened."""
        return [leaf for leaf in tree_flatten(self.args)[0] if isinstance(leaf, Ref)]


@dataclass(frozen=True, eq=False)
class Recording:
    """What one forward pass did; `states` are parameters and buffers by their `state_dict` names.

    `error` is what stopped the pass, if anything did: the ops up to there are still listed.
    """

    ops: tuple[Op, ...]
    states: dict[str, Ref]
    outputs: tuple[Ref, ...]
    error: Exception | None = None


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` without storage: its parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo)


def record(model: nn.Module, example_inputs: tuple[Any, ...]) -> Recording:
    """The ATen ops of `model(*example_inputs)`, in the model's present mode.

    Buffers that the forward updates are updated: pass a copy. Inputs go to the device of the model's parameters.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    device = named[0][1].device if named else torch.device("cpu")
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), example_inputs)
    with _module_stack(model) as stack, _Recorder(stack) as recorder:
        states = {name: recorder.ref(tensor) for name, tensor in named}
        try:
            output = model(*inputs)
        # The user's own forward may raise anything; whoever reads the recording decides what the error means.
        except Exception as error:  # noqa: BLE001
            return Recording(tuple(recorder.ops), states, (), error)
        leaves = [leaf for leaf in tree_flatten(_plain(output))[0] if isinstance(leaf, Tensor)]
        return Recording(tuple(recorder.ops), states, tuple(recorder.ref(leaf) for leaf in leaves))


def _plain(output: object) -> object:
    """Outputs in classes that pytree does not open (dataclass-like) as plain dicts."""
    if isinstance(output, Tensor | tuple | list | dict) or output is None:
        return output
    values = getattr(output, "__dict__", None)
    if values is None:
        raise TraceError(f"forward returned {type(output).__name__}: expected tensors in tuples, lists or dicts")
    return dict(values)


class _Recorder(TorchDispatchMode):
    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self._stack = stack
        self._refs: dict[int, Ref] = {}
        self._alive: list[Tensor] = []  # an id is only an identity while its tensor lives

    def ref(self, tensor: Tensor) -> Ref:
        known = self._refs.get(id(tensor))
        if known is None:
            known = self._refs[id(tensor)] = Ref(len(self._alive), tuple(tensor.shape))
            self._alive.append(tensor)
        return known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        bound = {argument.name: argument.default_value for argument in func._schema.arguments}
        bound |= dict(zip(bound, args, strict=False)) | (kwargs or {})
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        path, module = self._stack[-1]
        op = Op(
            name=func._schema.name.removeprefix("aten::"),
            args=tree_map_only(Tensor, self.ref, bound),
            outputs=tuple(self.ref(leaf) for leaf in outputs),
            module=path,
            attributes={name: value for name, value in vars(module).items() if type(value) is int},
            source=_source(sys._getframe(1)),
        )
        self.ops.append(op)
        return result


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules now running and their paths, innermost last; global hooks leave the model untouched."""
    paths = {id(module): path for path, module in model.named_modules()}
    stack = [("", model)]

    def enter(module: nn.Module, _: Any) -> None:
        path = paths.get(id(module))
        stack.append(stack[-1] if path is None else (path, module))

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _source(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, "<")) and path != __file__:
            return f"{_short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _short(path: str) -> str:
    """Relative to site-packages or the working directory where it lies in one, so that reports name no home."""
    _, installed, inside = path.rpartition("site-packages" + os.sep)
    if installed:
        return inside
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
