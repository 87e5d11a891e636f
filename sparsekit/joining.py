"""Several recordings of one pass, joined into one that holds for any batch size and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from sparsekit.steps import Batch, OfModel, Pass, Step, Structure, Value, operator, values
from sparsekit.takes import Take, limit_of

_PLAIN = frozenset([int, float, bool, str, type(None)])
Join = Callable[[Any, Any], Any]  # of two values that differ, one that stands for both, or None
Alone = Callable[[Step], Step]  # a copy that only the first recording makes, as the joined pass has it


def joined(first: Pass, other: Pass, join: Join, alone: Alone = lambda step: step) -> Pass | None:
    """`first` with the values that differ from those in `other` joined; None where they have no more in common.

    Steps that only copy, to make a tensor contiguous or of another floating-point type, may be missing from either:
    whether they are needed depends on sizes and types.
    """
    joining = _Joining(join)
    names = {name: index for index, name in first.states.items()}
    if len(first.inputs) != len(other.inputs) or names.keys() != set(other.states.values()):
        return None
    joining.meet(first.inputs, other.inputs)
    joining.meet([names[name] for name in other.states.values()], other.states)
    steps = tuple(_joined_steps(first.steps, other.steps, joining, alone))
    shapes = joining(first.shapes, other.shapes)
    joining(first.returned, other.returned)
    return replace(first, shapes=shapes, steps=steps) if joining.agrees else None


def _joined_steps(mine: tuple[Step, ...], theirs: tuple[Step, ...], joining: _Joining, alone: Alone) -> Iterator[Step]:
    ahead, waiting = list(reversed(mine)), list(reversed(theirs))
    while joining.agrees and (ahead or waiting):
        a, b = ahead[-1] if ahead else None, waiting[-1] if waiting else None
        if a and b and a.op == b.op and (not _copies(a) or joining.are_same(values(a.args), values(b.args))):
            yield joining(ahead.pop(), waiting.pop())
        elif a and _copies(a):
            joining.pass_over(ahead.pop())
            yield alone(a)
        elif b and _copies(b):
            joining.pass_over(waiting.pop(), theirs=True)
        else:
            joining.agrees = False


def _copies(step: Step) -> bool:
    if step.op == "aten.clone.default":
        return step.args.get("memory_format") is torch.contiguous_format
    dtype = step.args.get("dtype")
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return step.op == "aten.to.dtype" or (step.op == "aten._to_copy.default" and is_float)


class _Joining:
    """Joins two values, part by part; `agrees` turns False where they differ."""

    def __init__(self, join: Join) -> None:
        self.agrees = True
        self._join = join
        self._mine: dict[int, int] = {}  # copies -> what they are copies of
        self._theirs: dict[int, int] = {}  # a tensor of the other pass -> the one it is here

    def meet(self, mine: Any, theirs: Any) -> None:
        """Each of `mine` is each of `theirs`."""
        self._theirs |= {b: self._mine.get(a, a) for a, b in zip(mine, theirs, strict=True)}

    def pass_over(self, step: Step, *, theirs: bool = False) -> None:
        """A copy that the other recording does not make is what it is a copy of."""
        (source,), (copy,) = values(step.args), step.outputs
        found = self._theirs if theirs else self._mine
        found[copy] = found.get(source, source)

    def are_same(self, mine: list[int], theirs: list[int]) -> bool:
        """Whether these are the same tensors."""
        return [self._mine.get(a, a) for a in mine] == [self._theirs.get(b, -1) for b in theirs]

    def __call__(self, a: Any, b: Any) -> Any:
        kind = type(a)
        if kind is type(b) and kind in _PLAIN and (a == b or a != a):  # NaN
            return a
        if isinstance(a, Step) and isinstance(b, Step):
            self.agrees &= len(a.outputs) == len(b.outputs) and (a.op, a.no_grad) == (b.op, b.no_grad)
            args = self(a.args, b.args)
            if self.agrees:
                self.meet(a.outputs, b.outputs)
            return replace(a, args=args)
        if isinstance(a, Value) and isinstance(b, Value):
            self.agrees &= self.are_same([a.index], [b.index])
            return a
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            return type(a)(self(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {name: self(a[name], b[name]) for name in a}
        if isinstance(a, Structure) and isinstance(b, Structure):
            parts = {field.name: self(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)}
            return Structure(**parts)
        if kind is type(b) and a == b:
            return a
        result = self._join(a, b)
        self.agrees &= result is not None
        return result


def join(mine: Take, theirs: Take, a: Any, b: Any) -> Any:
    """What two values are, if the first is of the one take and the second of the other; None where nothing common.

    Numbers that are the same multiple of the batch size, and dtypes, or limits of dtypes, that are the parameters'.
    """
    if isinstance(a, OfModel):
        return a  # found with an earlier take of the dtype of `mine`
    if (a, b) == (mine.dtype, theirs.dtype):
        return OfModel("dtype")
    if (a, b) == (mine.dtype.to_complex(), theirs.dtype.to_complex()):
        return OfModel("complex")
    if type(a) is float and type(b) is float:
        name = limit_of(mine.dtype, a, theirs.dtype, b)
        return OfModel(name) if name else None
    if type(a) is int and type(b) is int and mine.size and a % mine.size == 0 and a // mine.size * theirs.size == b:
        return Batch(a // mine.size)
    return None


def cast_alone(dtype: torch.dtype, step: Step) -> Step:
    """A cast that networks of another dtype than `dtype` need not make."""
    if step.op != "aten._to_copy.default":
        return step
    wanted = OfModel("dtype") if step.args["dtype"] is dtype else step.args["dtype"]
    return replace(step, op="aten.to.dtype", args={"self": step.args["self"], "dtype": wanted})


def finished(draft: Pass) -> Pass:
    """Without the steps that nothing reads, and without arguments left at their defaults."""
    wanted = set(values(draft.returned))
    steps: list[Step] = []
    for step in reversed(draft.steps):
        func = operator(step.op)
        if _has_effect(func) or wanted & set(step.outputs):
            wanted |= set(values(step.args))
            defaults = _defaults(func)
            args = {
                name: arg for name, arg in step.args.items() if name not in defaults or not _same(arg, defaults[name])
            }
            steps.append(replace(step, args=args))
    states = {index: name for index, name in draft.states.items() if index in wanted}
    shapes = tuple(tuple(None if isinstance(size, Batch) else size for size in shape) for shape in draft.shapes)
    return replace(draft, shapes=shapes, states=states, steps=tuple(reversed(steps)))


@cache
def _defaults(func: OpOverload) -> dict[str, Any]:
    return {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@cache
def _has_effect(func: OpOverload) -> bool:
    """Whether it writes into a tensor, or draws random numbers and so decides what later ops draw."""
    is_norm = "batch_norm" in func._schema.name  # its running statistics are not marked as written to
    return is_norm or func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
