"""What one forward pass did, as plain data: steps that replay it, and their JSON."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch._ops import OpOverload

from sparsekit.errors import PlanError

_NAMESPACES = ("aten", "prims", "torchvision")


@dataclass(frozen=True)
class Value:
    """A tensor of the pass."""

    index: int


@dataclass(frozen=True)
class Batch:
    """`multiple` times the batch size of the inputs."""

    multiple: int


@dataclass(frozen=True)
class OfModel:
    """The "device" of the inputs; the "dtype" of the parameters, the "complex" one to it, or a limit of it, "eps"."""

    what: str


@dataclass(frozen=True, eq=False)
class Step:
    """One call.

    Attributes:
        op: name of the operator and overload, "aten.view.default".
        args: by argument name: numbers, strings, dtypes, lists of them, and `Value`, `Batch`, `OfModel`. Defaults
            are left out.
        outputs: index of each tensor that it returns.
        no_grad: nothing is differentiated through it.
    """

    op: str
    args: dict[str, Any]
    outputs: tuple[int, ...]
    no_grad: bool = False


@dataclass(frozen=True, eq=False)
class Structure:
    """A container of what the forward returns: "list", "tuple" or "dict", or the name of a namedtuple."""

    kind: str
    keys: tuple[Any, ...]  # of a dict, fields of a namedtuple, else empty
    items: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        inputs: index of each input tensor.
        shapes: of each input tensor; the first dimension of all is None where any batch size will do.
        states: index of a tensor -> name of the parameter or buffer that it is.
        steps: in order.
        returned: a `Value`, a number, None or a `Structure` of such.
    """

    inputs: tuple[int, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    states: Mapping[int, str]
    steps: tuple[Step, ...]
    returned: Any

    def __deepcopy__(self, memo: object) -> Pass:
        return self  # nothing in it ever changes

    @cached_property
    def calls(self) -> tuple[tuple[OpOverload, list[Any], dict[str, Any]], ...]:
        """Per step the operator, its positional and its keyword arguments."""
        return tuple((operator(step.op), *_split(operator(step.op), step.args)) for step in self.steps)

    @cached_property
    def dead(self) -> tuple[tuple[int, ...], ...]:
        """Per step the tensors that are not read again."""
        last = dict.fromkeys(self.inputs, 0)
        for number, step in enumerate(self.steps):
            last |= dict.fromkeys([*step.outputs, *values(step.args)], number)
        for index in values(self.returned):
            last.pop(index, None)
        dead: list[list[int]] = [[] for _ in self.steps]
        for index, number in last.items():
            if self.steps:
                dead[number].append(index)
        return tuple(map(tuple, dead))


def values(argument: Any) -> list[int]:
    """The index of every tensor in an argument, or in a mapping or structure of them."""
    if isinstance(argument, Value):
        return [argument.index]
    if isinstance(argument, Structure):
        argument = argument.items
    if isinstance(argument, Mapping):
        argument = argument.values()
    elif not isinstance(argument, list | tuple):
        return []
    return [index for item in argument for index in values(item)]


@cache
def namedtuple_of(name: str, fields: tuple[str, ...]) -> Any:
    """A class like the one the user's forward returned.

    Raises:
        ValueError: not names.
    """
    return namedtuple(name, fields)


@cache
def operator(name: str) -> OpOverload:
    """The operator of a step.

    Raises:
        PlanError: none of that name, or one that a network has no use for.
    """
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    # from_file maps any file into memory, and may write it.
    if namespace in _NAMESPACES and packet.isidentifier() and overload.isidentifier() and packet != "from_file":
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(found, OpOverload):
            return found
    raise PlanError(f"{name!r}: no such operator in {', '.join(_NAMESPACES)}")


def _split(func: OpOverload, args: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments: what follows an argument left to its default can only be a keyword."""
    positional: list[Any] = []
    for argument in func._schema.arguments:
        if argument.kwarg_only or argument.name not in args:
            break
        positional.append(args[argument.name])
    names = [argument.name for argument in func._schema.arguments[len(positional) :]]
    return positional, {name: args[name] for name in names if name in args}


def to_json(value: Any) -> Any:
    """A value of a step as JSON has it.

    Raises:
        PlanError: of a type that no file can hold.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            return [to_json(item) for item in value]
        case Value(index):
            return {"tensor": index}
        case Batch(multiple):
            return {"batch": multiple}
        case OfModel(what):
            return {"model": what}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {type(value).__name__: str(value).removeprefix("torch.")}
        case Structure():
            return {"structure": value.kind, "keys": to_json(value.keys), "items": to_json(value.items)}
        case Step():
            args = {name: to_json(arg) for name, arg in value.args.items()}
            row = {"op": value.op, "args": args, "outputs": list(value.outputs)}
            return row | {"no_grad": True} if value.no_grad else row
        case Pass():
            states = {name: index for index, name in value.states.items()}
            parts = {name: to_json(getattr(value, name)) for name in ("inputs", "shapes", "steps", "returned")}
            return parts | {"states": states}
    raise PlanError(f"a {type(value).__name__} among the arguments cannot be saved")


def value_from_json(cell: Any) -> Any:
    """What `to_json` made of an argument.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    if isinstance(cell, list):
        return [value_from_json(item) for item in cell]
    if not isinstance(cell, dict):
        return cell
    if "structure" in cell:
        keys, items = (tuple(value_from_json(cell[part])) for part in ("keys", "items"))
        kind = cell["structure"]
        if kind not in ("list", "tuple", "dict"):
            namedtuple_of(kind, keys)
        if kind not in ("list", "tuple") and len(keys) != len(items):
            raise ValueError(f"{kind} of {len(items)} items has {len(keys)} keys")
        return Structure(kind, keys, items)
    ((kind, value),) = cell.items()
    match kind:
        case "tensor":
            return Value(int(value))
        case "batch":
            return Batch(int(value))
        case "model" if value in ("device", "dtype", "complex", "eps", "min", "max", "tiny"):
            return OfModel(value)
        case "float":
            return float(value)
        case "dtype" | "layout" | "memory_format":
            found = getattr(torch, value)
            if type(found) is getattr(torch, kind):
                return found
    raise ValueError(f"{kind} {value!r}")


def pass_from_json(document: Mapping[str, Any]) -> Pass:
    """What `to_json` made of a pass, found to name only operators, arguments and tensors that exist.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    steps = tuple(
        Step(
            row["op"],
            {name: value_from_json(arg) for name, arg in row["args"].items()},
            tuple(map(int, row["outputs"])),
            bool(row.get("no_grad", False)),
        )
        for row in document["steps"]
    )
    states = {int(index): str(name) for name, index in document["states"].items()}
    inputs = tuple(map(int, document["inputs"]))
    shapes = tuple(tuple(None if size is None else int(size) for size in row) for row in document["shapes"])
    if len(shapes) != len(inputs):
        raise ValueError(f"{len(inputs)} inputs of {len(shapes)} shapes")
    result = Pass(inputs, shapes, states, steps, value_from_json(document["returned"]))
    _check(result)
    return result


def _check(recorded: Pass) -> None:
    made = {*recorded.inputs, *recorded.states}
    for step in recorded.steps:
        arguments = operator(step.op)._schema.arguments
        unknown = set(step.args) - {argument.name for argument in arguments}
        missing = [a.name for a in arguments if a.name not in step.args and not a.has_default_value()]
        if unknown or missing:
            raise ValueError(f"{step.op} with arguments {sorted(step.args)}")
        _check_made(step.args, made, step.op)
        made |= set(step.outputs)
    _check_made(recorded.returned, made, "the output")


def _check_made(argument: Any, made: Iterable[int], where: str) -> None:
    unmade = set(values(argument)) - set(made)
    if unmade:
        raise ValueError(f"{where} reads a tensor that nothing made")
