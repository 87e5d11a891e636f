"""Several recordings of one pass, joined into one that holds for any batch size and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._ops import OpOverload

from sparsekit.steps import Batch, OfModel, Pass, Step, Structure, Value, operator, values

Join = Callable[[Any, Any], Any]  # of two values that differ, one that stands for both, or None


def renumbered(draft: Pass) -> Pass:
    """Tensors numbered in the order of the steps, so that two recordings agree whatever they left out."""
    made = [
        index for copies in (False, True) for step in draft.steps if _copies(step) == copies for index in step.outputs
    ]
    numbers = {old: new for new, old in enumerate(dict.fromkeys([*draft.inputs, *draft.states, *made]))}

    def new(argument: Any) -> Any:
        if isinstance(argument, Value):
            return Value(numbers[argument.index])
        if isinstance(argument, Structure):
            return replace(argument, items=tuple(map(new, argument.items)))
        return [new(item) for item in argument] if isinstance(argument, list) else argument

    steps = tuple(
        replace(
            step,
            args={name: new(argument) for name, argument in step.args.items()},
            outputs=tuple(numbers[index] for index in step.outputs),
        )
        for step in draft.steps
    )
    states = {numbers[index]: name for index, name in draft.states.items()}
    inputs = tuple(numbers[index] for index in draft.inputs)
    return Pass(inputs, draft.shapes, states, steps, new(draft.returned))


def _copies(step: Step) -> bool:
    """Whether it only makes a tensor contiguous: whether that is needed depends on sizes."""
    return step.op == "aten.clone.default" and step.args["memory_format"] is torch.contiguous_format


def joined(first: Pass, other: Pass, join: Join) -> Pass | None:
    """`first` with the values that differ from those in `other` joined; None where they have no more in common."""
    joining = _Joining(join, _roots(first), _roots(other))
    steps, others = ([step for step in one.steps if not _copies(step)] for one in (first, other))
    if len(steps) != len(others):
        return None
    rows = iter(joining(steps, others))
    both = replace(
        first,
        shapes=joining(first.shapes, other.shapes),
        steps=tuple(step if _copies(step) else next(rows) for step in first.steps),
    )
    joining((first.inputs, first.states, first.returned), (other.inputs, other.states, other.returned))
    return both if joining.agrees else None


def _roots(one: Pass) -> dict[int, int]:
    """Contiguous copies -> what they are copies of."""
    roots: dict[int, int] = {}
    for step in one.steps:
        if _copies(step):
            ((source,), (copy,)) = values(step.args), step.outputs
            roots[copy] = roots.get(source, source)
    return roots


class _Joining:
    """Joins two values, part by part; `agrees` turns False where they differ."""

    def __init__(self, join: Join, *roots: dict[int, int]) -> None:
        self.agrees = True
        self._join = join
        self._roots = roots

    def __call__(self, a: Any, b: Any) -> Any:
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            return type(a)(self(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {name: self(a[name], b[name]) for name in a}
        if isinstance(a, Step | Structure) and type(a) is type(b):
            parts = {field.name: self(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)}
            return type(a)(**parts)
        if isinstance(a, Value) and isinstance(b, Value):
            mine, theirs = (roots.get(x.index, x.index) for roots, x in zip(self._roots, (a, b), strict=True))
            self.agrees &= mine == theirs
            return a
        if type(a) is type(b) and (a == b or a != a):  # NaN
            return a
        result = self._join(a, b)
        self.agrees &= result is not None
        return result


def join_batch(size: int, a: Any, b: Any) -> Any:
    is_multiple = type(a) is int and type(b) is int and a % size == 0 and a // size * (size + 1) == b
    if is_multiple:
        return Batch(a // size)
    return a if isinstance(a, OfModel) else None


def join_dtype(dtype: torch.dtype, other: torch.dtype, a: Any, b: Any) -> Any:
    return OfModel("dtype") if (a, b) == (dtype, other) else None


def finished(draft: Pass) -> Pass:
    """Without the steps that nothing reads, and without arguments left at their defaults."""
    wanted = set(values(draft.returned))
    steps: list[Step] = []
    for step in reversed(draft.steps):
        func = operator(step.op)
        if _has_effect(func) or wanted & set(step.outputs):
            wanted |= set(values(step.args))
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            args = {
                name: arg for name, arg in step.args.items() if name not in defaults or not _same(arg, defaults[name])
            }
            steps.append(replace(step, args=args))
    states = {index: name for index, name in draft.states.items() if index in wanted}
    shapes = tuple(tuple(None if isinstance(size, Batch) else size for size in shape) for shape in draft.shapes)
    return replace(draft, shapes=shapes, states=states, steps=tuple(reversed(steps)))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _has_effect(func: OpOverload) -> bool:
    """Whether it writes into a tensor, or draws random numbers and so decides what later ops draw."""
    is_norm = "batch_norm" in func._schema.name  # its running statistics are not marked as written to
    return is_norm or func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
