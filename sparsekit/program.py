"""A network as the list of ops that its forward ran: plain data, saved without pickle, that runs, trains and exports.

Where a forward writes sizes as literal numbers, cutting its modules is not enough; `replay.py` turns a recording into
such steps, with those numbers rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekit.errors import DataError, PlanError, UsageError
from sparsekit.steps import Batch, OfModel, Pass, Structure, Value, namedtuple_of, pass_from_json, to_json, values

Shape = tuple[int | None, ...]


class Program(nn.Module):
    """A network that replays recorded steps; parameters and buffers keep the names they had.

    `train()` and `eval()` choose between the steps recorded in either mode.

    Attributes:
        evaluated: the pass in eval mode.
    """

    def __init__(self, states: Mapping[str, Tensor], evaluated: Pass, trained: Pass | str) -> None:
        """A program of two passes.

        Args:
            states: parameters, and buffers as plain tensors, by name; the same object under two names is tied.
            evaluated: the pass in eval mode.
            trained: the pass in training mode, or why there is none.
        """
        super().__init__()
        self.evaluated, self._trained = evaluated, trained
        for name, tensor in states.items():
            module, leaf = self._container(name), name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor)

    def _container(self, name: str) -> nn.Module:
        module: nn.Module = self
        for part in name.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    def forward(self, *inputs: Any) -> Any:
        """What the user's forward returns for these inputs; unknown classes come as dicts of their attributes.

        Raises:
            PlanError: in training mode, where that pass could not be recorded.
            UsageError: inputs of another number or shape than those recorded.
        """
        recorded = self._trained if self.training else self.evaluated
        if isinstance(recorded, str):
            raise PlanError(f"the program runs in eval mode only: {recorded}")
        run = Run(self, recorded, inputs)
        run.advance(len(recorded.steps))
        return run.returned

    def begin(self, *inputs: Any) -> Run:
        """The pass of eval mode on these inputs, before its first step.

        Raises:
            UsageError: inputs of another number or shape than those recorded.
        """
        return Run(self, self.evaluated, inputs)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, which are in `state_dict()`.

        Raises:
            PlanError: an argument is of a type that no file can hold.
        """
        states = dict(self.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, parameter in states.items():
            first.setdefault(id(parameter), name)
        return {
            "format": "sparsekit-program",
            "version": 1,
            "parameters": {name: first[id(parameter)] for name, parameter in states.items()},
            "frozen": [name for name, parameter in states.items() if not parameter.requires_grad],
            "buffers": [name for name, _ in self.named_buffers(remove_duplicate=False)],
            "eval": to_json(self.evaluated),
            "train": to_json(self._trained),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], state: Mapping[str, Tensor]) -> Program:
        """What `to_json` and `state_dict` wrote, in eval mode. Only operators are looked up; no code is run.

        Raises:
            DataError: a damaged document, an operator that is unknown here, a tensor that is missing or left over.
        """
        if not isinstance(document, dict) or document.get("format") != "sparsekit-program":
            raise DataError("not a sparsekit program")
        try:
            if document["version"] != 1:
                raise ValueError(f"version {document['version']}")
            evaluated, recorded = pass_from_json(document["eval"]), document["train"]
            trained = recorded if isinstance(recorded, str) else pass_from_json(recorded)
            states = _states(document, state)
            for used in (evaluated, *([] if isinstance(trained, str) else [trained])):
                if not states.keys() >= set(used.states.values()):
                    raise ValueError("the steps read states that are not listed")
            return cls(states, evaluated, trained).eval()
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"damaged program: {type(error).__name__}: {error}") from error


class Run:
    """A pass of a program under way, which can halt between any two steps.

    Attributes:
        tensors: those that are still to be read, by index; states are the program's own.
    """

    def __init__(self, program: Program, recorded: Pass, inputs: tuple[Any, ...]) -> None:
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        _check(given, recorded.shapes)
        self.tensors = dict(zip(recorded.inputs, given, strict=True))
        for index, name in recorded.states.items():
            path, _, leaf = name.rpartition(".")
            self.tensors[index] = getattr(program.get_submodule(path), leaf)
        tensors = [*given, *program.parameters(), *program.buffers()]
        self._recorded, self._num_done = recorded, 0
        self._facts = _Facts(self.tensors, _batch_size(given), _device(tensors), _dtype(program, given))

    @property
    def returned(self) -> Any:
        """What the forward returns, once all steps are done."""
        return self._facts.of(self._recorded.returned)

    def advance(self, moment: int) -> None:
        """Run the steps before number `moment`."""
        tensors, recorded = self.tensors, self._recorded
        for number in range(self._num_done, moment):
            tensors |= zip(recorded.steps[number].outputs, self._outputs(number, self._facts), strict=True)
            for index in recorded.dead[number]:
                del tensors[index]
        self._num_done = max(self._num_done, moment)

    def through(self, path: Sequence[int], value: Tensor) -> Tensor:
        """What the steps of these numbers make of another tensor, each reading what the one before returned.

        The run stays where it is; the steps read no other tensors.
        """
        for number in path:
            (read,) = values(self._recorded.steps[number].args)
            (value,) = self._outputs(number, replace(self._facts, tensors={read: value}))
        return value

    def _outputs(self, number: int, facts: _Facts) -> list[Tensor]:
        func, args, kwargs = self._recorded.calls[number]
        with torch.no_grad() if self._recorded.steps[number].no_grad else nullcontext():
            result = func(*(facts.of(arg) for arg in args), **{name: facts.of(arg) for name, arg in kwargs.items()})
        return [result] if isinstance(result, Tensor) else tree_leaves(result)


def _batch_size(given: list[Tensor]) -> int:
    return next((tensor.shape[0] for tensor in given if tensor.dim()), 1)


def _device(tensors: list[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dtype(program: Program, given: list[Tensor]) -> torch.dtype:
    tensors = [*program.parameters(), *given]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def _check(given: list[Tensor], shapes: tuple[Shape, ...]) -> None:
    if len(given) != len(shapes):
        raise UsageError(f"the program takes {len(shapes)} input tensors, got {len(given)}")
    for number, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
        fits = [size is None or size == got for size, got in zip(shape, tensor.shape, strict=False)]
        if tensor.dim() != len(shape) or not all(fits):
            sizes = ", ".join("batch" if size is None else str(size) for size in shape)
            raise UsageError(f"the program takes input {number} of shape [{sizes}], got {list(tensor.shape)}")


@dataclass(frozen=True, eq=False)
class _Facts:
    """What the arguments of a step stand for while a pass runs."""

    tensors: dict[int, Tensor]
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def of(self, argument: Any) -> Any:
        kind = type(argument)
        if kind is Value:
            return self.tensors[argument.index]
        if kind is list:
            return [self.of(item) for item in argument]
        if kind is Batch:
            return argument.multiple * self.batch_size
        if kind is OfModel:
            known = {"device": self.device, "dtype": self.dtype, "complex": self.dtype.to_complex()}
            return known.get(argument.what) or getattr(torch.finfo(self.dtype), argument.what)
        if kind is Structure:
            return _build(argument, [self.of(item) for item in argument.items])
        return argument


def _build(structure: Structure, items: list[Any]) -> Any:
    if structure.kind == "list":
        return items
    if structure.kind == "tuple":
        return tuple(items)
    if structure.kind == "dict":
        return dict(zip(structure.keys, items, strict=True))
    return namedtuple_of(structure.kind, structure.keys)(*items)


def _states(document: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, tied as they were, and buffers."""
    ties, buffers, frozen = dict(document["parameters"]), list(document["buffers"]), set(document["frozen"])
    missing = sorted({*ties.values(), *buffers} - state.keys())
    extra = sorted(state.keys() - {*ties, *buffers})
    if missing or extra:
        name = (missing or extra)[0]
        raise DataError(f"program: tensor {name!r} is {'missing' if missing else 'not one of its own'}")
    states: dict[str, Tensor] = {}
    for name, first in ties.items():
        states[name] = states[first] if first in states else nn.Parameter(state[first], first not in frozen)
    return states | {name: state[name] for name in buffers}
