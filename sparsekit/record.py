"""One forward pass -> the list of ATen ops it ran. Nothing else in sparsekit knows torch's dispatcher."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.copying import states_by_name
from sparsekit.forward import check_inputs as check_inputs
from sparsekit.forward import plain
from sparsekit.meta import MetaKernels as MetaKernels
from sparsekit.meta import on_meta as on_meta
from sparsekit.plain_torch import kept_values, plain_torch
from sparsekit.whereabouts import Frames, running_modules

_PLAIN = frozenset([int, float, bool, type(None)])
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_AUTOGRAD = {"meta": "AutogradMeta", "cpu": "AutogradCPU", "cuda": "AutogradCUDA"}
_ONE_AT_A_TIME = threading.RLock()  # module hooks and the attention kernel are torch's globals


@dataclass(frozen=True)
class Ref:
    """A tensor of the recording: the same `index` means the same tensor object."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A call that torch broke into the ops that name it in `Op.inside`.

    Attributes:
        func: the operator and overload.
        args: argument name -> value, defaults filled in, tensors as `Ref`.
        output: the tensor it returned.
    """

    func: OpOverload
    args: dict[str, Any]
    output: Ref


@dataclass(eq=False)  # frozen, it would take three times as long to make
class Op:
    """One ATen call.

    Attributes:
        name: the operator without its overload, "convolution"; "torchvision::nms" where it is not ATen's.
        func: the operator and overload itself; its schema says which arguments are keyword-only.
        args: argument name -> value, defaults filled in, tensors as `Ref`.
        outputs: the tensors it returned.
        module: path of the innermost module that ran it.
        owner: that module.
        source: "file.py:147", the first line outside torch on the call stack.
        inside: the attention call it is a part of, if any.
        no_grad: it ran under `torch.no_grad()`.
        function: the user's `torch.autograd.Function` that ran it, whose own backward is not recorded, or "".
    """

    name: str
    func: OpOverload
    args: dict[str, Any]
    outputs: tuple[Ref, ...]
    module: str
    owner: nn.Module
    source: str
    inside: Call | None = None
    no_grad: bool = False
    function: str = ""

    @property
    def attributes(self) -> dict[str, int]:
        """Integer attributes of the owner, such as `groups`."""
        return {name: value for name, value in vars(self.owner).items() if type(value) is int}

    @cached_property
    def tensors(self) -> tuple[Ref, ...]:
        """Every tensor among the arguments, lists opened."""
        found = []
        for value in self.args.values():
            if type(value) is Ref:
                found.append(value)
            elif type(value) is list or type(value) is tuple:
                found += [item for item in value if type(item) is Ref]
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Recording:
    """What one forward pass did.

    Attributes:
        ops: in the order in which they ran.
        states: parameters and buffers by their `state_dict` names.
        outputs: the tensors among what the forward returned, flattened.
        error: what stopped the pass, if anything did: the ops up to there are still listed.
        inputs: the tensors among the example inputs, flattened.
        constants: the tensors that ops read and that are none of the above nor made by an op, by `Ref.index`, as they
            were when first read.
        returned: what the forward returned, tensors as `Ref`, unknown classes as dicts of their attributes.
        failed: the op that raised `error`, its outputs empty; None where the user's own Python did.
    """

    ops: tuple[Op, ...]
    states: dict[str, Ref]
    outputs: tuple[Ref, ...]
    error: Exception | None
    inputs: tuple[Ref, ...]
    constants: dict[int, Tensor]
    returned: Any
    failed: Op | None


def record(model: nn.Module, example_inputs: tuple[Any, ...], kernels: MetaKernels | None = None) -> Recording:
    """The ATen ops of `model(*example_inputs)`, in the model's present mode.

    Buffers that the forward updates are updated: pass a copy. Inputs are copied to the device of the model's
    parameters. Nothing can be differentiated: what backward would need is not kept. `kernels` that recorded networks
    like this one are faster.
    """
    named = states_by_name(model)
    device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
    with _ONE_AT_A_TIME, plain_torch(), kept_values(), running_modules(model) as stack:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), example_inputs)
        recorder = _Recorder(stack, kernels or MetaKernels())
        states = {name: recorder.state(tensor) for name, tensor in named.items()}
        given = tuple(recorder.made(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        returned: Any = None
        outputs: tuple[Ref, ...] = ()
        error: Exception | None = None
        try:
            with recorder, recorder.attention(device):
                output = plain(model(*inputs))
            returned = tree_map_only(Tensor, recorder.read, output)
            outputs = tuple(leaf for leaf in tree_leaves(returned) if isinstance(leaf, Ref))
        # The user's own forward may raise anything; whoever reads the recording decides what the error means.
        except Exception as raised:  # noqa: BLE001
            error = raised
        failed = recorder.failed[1] if recorder.failed is not None and recorder.failed[0] is error else None
        return Recording(tuple(recorder.ops), states, outputs, error, given, recorder.constants, returned, failed)


class _Recorder(TorchDispatchMode):
    def __init__(self, stack: list[tuple[str, nn.Module]], kernels: MetaKernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.constants: dict[int, Tensor] = {}
        self.failed: tuple[Exception, Op] | None = None
        self._stack = stack
        self._run = kernels
        self._num_refs = 0
        # An id is an identity only while its tensor lives.
        self._refs: dict[int, tuple[Ref, weakref.ref[Tensor]]] = {}
        self._states: dict[tuple[Any, ...], Ref] = {}  # by storage: `.data` is another object
        self._on_meta: list[Tensor] = []  # states whose storage was not asked for
        self._frames = Frames()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while a pass is recorded; torch's own care for that doubles the method's time."""
        return False

    def state(self, tensor: Tensor) -> Ref:
        """A parameter or buffer."""
        ref = self.made(tensor)
        if tensor.is_meta:  # no two share theirs, and few are ever asked for it
            self._on_meta.append(tensor)
            return ref
        return self._states.setdefault(_storage(tensor), ref)

    def made(self, tensor: Tensor) -> Ref:
        """A tensor that an op returned, or the user gave."""
        known = self._known(tensor)
        shape = tuple(tensor.shape)
        if known is None:
            known = Ref(self._num_refs, shape)
            self._num_refs += 1
        elif known.shape != shape:  # unsqueeze_ and its like
            known = Ref(known.index, shape)
        else:
            return known
        self._refs[id(tensor)] = (known, weakref.ref(tensor))
        return known

    def read(self, tensor: Tensor) -> Ref:
        """A tensor that an op reads."""
        if (known := self._known(tensor)) is not None:
            return known
        while self._on_meta:
            state = self._on_meta.pop()
            self._states[_storage(state)] = self.made(state)
        known = self._states.get(_storage(tensor))
        if known is None:
            known = self.made(tensor)
            self.constants[known.index] = tensor.detach().clone()
        return known

    def _known(self, tensor: Tensor) -> Ref | None:
        found = self._refs.get(id(tensor))
        return found[0] if found is not None and found[1]() is tensor else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        bound = self._bind(func, args, kwargs)  # before it writes into a constant
        try:
            result = self._run(func, args, kwargs or {})
        except Exception as error:
            self.failed = (error, self._op(func, bound, ()))
            raise
        self.ops.append(self._op(func, bound, result))
        return result

    def _op(self, func: OpOverload, bound: dict[str, Any], result: Any) -> Op:
        name, _, _ = _signature(func)
        if isinstance(result, Tensor):
            outputs: tuple[Ref, ...] = (self.made(result),)
        else:
            outputs = tuple(self.made(leaf) for leaf in _opened(result) if isinstance(leaf, Tensor))
        path, module = self._stack[-1]
        frame = sys._getframe(2)
        # The forward of an autograd function runs without grad too, and yet is differentiable.
        function = None if torch.is_grad_enabled() else self._frames.function(frame)
        no_grad = not torch.is_grad_enabled() and function is None
        return Op(
            name, func, bound, outputs, path, module, self._frames.line(frame), no_grad=no_grad, function=function or ""
        )

    def _bind(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
        _, names, defaults = _signature(func)
        bound = dict(defaults)
        for name, value in zip(names, args, strict=False):
            bound[name] = value if type(value) in _PLAIN else self._argument(value)
        if kwargs:
            for name, value in kwargs.items():
                bound[name] = self._argument(value)
        return bound

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.read(value)
        if type(value) is list or type(value) is tuple:
            if _PLAIN.issuperset(map(type, value)):
                return [*value]
            return [self._argument(item) for item in value]
        return value

    @contextmanager
    def attention(self, device: torch.device) -> Iterator[None]:
        """Mark the ops that attention is broken into: which ones they are depends on the device."""
        thread = threading.get_ident()

        def marked(*args: Any, **kwargs: Any) -> Any:
            start = len(self.ops)
            result = _ATTENTION.decompose(*args, **kwargs)
            if threading.get_ident() == thread:
                call = Call(_ATTENTION, self._bind(_ATTENTION, args, kwargs), self.made(result))
                self.ops[start:] = [replace(op, inside=call) for op in self.ops[start:]]
            return result

        with torch.library._scoped_library("aten", "IMPL") as library:
            if device.type in _AUTOGRAD:
                library.impl("scaled_dot_product_attention", marked, _AUTOGRAD[device.type])
            yield


def _opened(result: Any) -> list[Any]:
    """What an op returned, one after the other; `tree_leaves` in a tenth of the time."""
    if not isinstance(result, tuple | list):
        return [result]
    return [leaf for item in result for leaf in _opened(item)]


@cache
def _signature(func: OpOverload) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """An operator's name, the names of its arguments and their defaults."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return func._schema.name.removeprefix("aten::"), tuple(defaults), defaults


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are the same memory, seen the same way."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
