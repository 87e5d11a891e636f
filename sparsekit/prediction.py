"""What a coupling predicts of a forward pass once channels are gone, and where another recording differs from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekit.channels import Channels
from sparsekit.coupling import Label, Labels
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.record import Op, Recording, Ref
from sparsekit.rules import ELEMENTWISE
from sparsekit.rules.picks import start_of

_MAX_DRAWS = 5

Side = tuple[str, int, int]  # "in" or "out", number of the tensor, dimension


@dataclass(frozen=True, eq=False)
class Predicted:
    channels: Channels
    alive: NDArray[np.bool_]
    _counts: dict[int, int] = field(default_factory=dict)  # by the id of a label, which many tensors share

    def living(self, label: Label) -> NDArray[np.bool_]:
        return self.channels.alive(label, self.alive)

    def shape(self, ref: Ref, labels: Labels) -> tuple[int, ...]:
        return tuple(
            size if label is None else self.count(label) for size, label in zip(ref.shape, labels, strict=True)
        )

    def count(self, label: Label) -> int:
        count = self._counts.get(id(label))
        if count is None:
            count = self._counts[id(label)] = int(self.living(label).sum())
        return count


def drawn(
    groups: dict[int, ChannelGroup], channels: Channels, places: Iterable[Label]
) -> tuple[PruningPlan, Predicted] | None:
    """A random cut of every group that is not fixed, the same in every call, or None where there is none.

    Sizes that were equal before should differ afterwards, or one passes for the other: groups of one size lose
    different numbers as far as there are any, and products (`places`, heads x head dims) come out as no group does.
    """
    rng = np.random.default_rng(0)
    loose = {number: group for number, group in groups.items() if not group.fixed_by}
    packed = (label for label in places if label.shape[1] * channels.of.shape[1] > 1)
    labels = [label for label in packed if (channels.owners(label[:1]) >= 0).sum() > 1]
    for _ in range(_MAX_DRAWS):
        left: dict[int, list[int]] = {}
        keep = {}
        alive = np.ones(len(channels.group), dtype=bool)
        for number, group in loose.items():
            if not left.get(group.size):  # not a single one, which broadcasts
                left[group.size] = rng.permutation(np.arange(min(2, group.size - 1), group.size)).tolist()
            stay = rng.permutation(group.size) < left[group.size].pop()
            keep[group] = torch.from_numpy(stay)
            inside = np.flatnonzero(channels.group == number)
            alive[inside] = stay[channels.rank[inside]]
        predicted = Predicted(channels, alive)
        sizes = {(group.size, int(stay.sum())) for group, stay in keep.items()}
        if not any((len(label), predicted.count(label)) in sizes for label in labels):
            break
    return (PruningPlan(keep), predicted) if loose else None


@dataclass(frozen=True, eq=False)
class Found:
    """The first step that differs, the dimensions in which it does, and the sizes that a reshape asked for there."""

    step: int
    sides: tuple[Side, ...]
    reason: str
    asked: tuple[int, ...] = ()


NUMBER = "a number in the forward follows the size"
_FIXED = "the forward fixes a size here"
# Whether a tensor must be copied before it is reshaped depends on its size.
_COPIES = frozenset(["alias", "clone", "contiguous", "detach"])
_VIEWS = dict.fromkeys(["_unsafe_view", "_reshape_alias", "reshape"], "view")


def compare(recording: Recording, again: Recording, labels: dict[int, Labels], predicted: Predicted) -> Found | None:
    """The first step at which shapes, slices or numbers are not those predicted."""
    others = [op for op in again.ops if op.name not in _COPIES]
    steps = [step for step, op in enumerate(recording.ops) if op.name not in _COPIES]
    for number, step in enumerate(steps):
        op, got = recording.ops[step], others[number] if number < len(others) else None
        wanted = [predicted.shape(ref, labels[ref.index]) for ref in op.outputs]
        if got is None or _kind(got) != _kind(op):
            asked = _asked(op, again) if got is None else []
            sizes = wanted[0] if wanted and len(asked) == len(wanted[0]) else ()
            wrong = {dim: asked[dim] for dim, size in enumerate(sizes) if asked[dim] not in (-1, size)}
            if wrong:
                return Found(step, tuple(("out", 0, dim) for dim in wrong), _FIXED, tuple(wrong.values()))
            said = f": {again.error}" if got is None and again.failed is None else ""
            return Found(step, _all_sides(op), _FIXED + said)
        shapes = [ref.shape for ref in got.outputs]
        if shapes != wanted:
            sides = tuple(
                ("out", number, dim)
                for number, (a, b) in enumerate(zip(shapes, wanted, strict=False))
                for dim in range(min(len(a), len(b)))
                if a[dim] != b[dim]
            )
            return Found(step, sides, _FIXED)
        if not _same_start(op, got, labels, predicted):
            return Found(step, (("in", 0, op.args["dim"] % len(op.args["self"].shape)),), _FIXED)
        if op.inside is None and _numbers(op, recording) != _numbers(got, again):
            return Found(step, _all_sides(op), NUMBER)
    return None


def _asked(op: Op, again: Recording) -> list[int]:
    """The sizes that a reshape asked for and could not have, if that is how the pass stopped at `op`."""
    if again.failed is not None:
        asked = again.failed.args.get("size") or again.failed.args.get("shape") or ()
        return list(asked) if _kind(again.failed) == _kind(op) else []
    stated = re.match(r"shape '\[([-\d, ]+)\]' is invalid for input", str(again.error))  # no op of its own
    return [int(size) for size in stated[1].split(",")] if stated and _kind(op) == "view" else []


def _kind(op: Op) -> str:
    return _VIEWS.get(op.name, op.name)


def _all_sides(op: Op) -> tuple[Side, ...]:
    outs = [("out", number, dim) for number, ref in enumerate(op.outputs) for dim in reversed(range(len(ref.shape)))]
    ins = [("in", number, dim) for number, ref in enumerate(op.tensors) for dim in reversed(range(len(ref.shape)))]
    return (*outs, *ins)


def _same_start(op: Op, got: Op, labels: dict[int, Labels], predicted: Predicted) -> bool:
    """Slices begin after the living positions that lie before them."""
    if op.name not in ("slice", "narrow", "select"):
        return True
    source = op.args["self"]
    dim = op.args["dim"] % len(source.shape)
    label = labels.get(source.index, (None,) * len(source.shape))[dim]
    size, now = source.shape[dim], got.args["self"].shape[dim]
    start = start_of(op, size)
    expected = start if label is None else int(predicted.living(label)[:start].sum())
    return start_of(got, now) == expected


def _numbers(op: Op, recording: Recording) -> list[Any]:
    """The numbers that decide values, not sizes; also where they come as tensors."""
    kinds = (int, float) if op.name in ELEMENTWISE else (float,)
    numbers = []
    for value in op.args.values():
        if type(value) is list:
            numbers += [item for item in value if isinstance(item, kinds)]
        elif isinstance(value, kinds):
            numbers.append(value)
    constants = [recording.constants[ref.index] for ref in op.tensors if ref.index in recording.constants]
    return numbers + [float(constant) for constant in constants if constant.dim() == 0 and not constant.is_meta]


def compare_layers(
    recording: Recording, again: Recording, labels: dict[int, Labels], predicted: Predicted
) -> Found | None:
    """As `compare`, for ops that use parameters and dimensions that hold channels."""
    steps = [step for step, op in enumerate(recording.ops) if _uses_states(op, recording)]
    others = [op for op in again.ops if _uses_states(op, again)]
    for number, step in enumerate(steps):
        op = recording.ops[step]
        if number >= len(others):
            if again.error is None:  # other boxes, other branches: no more to compare
                return None
            return Found(step, _all_sides(op), f"{_FIXED}: {again.error}")
        got = others[number]
        if (got.module, got.name) != (op.module, op.name):
            return None
        for out, (ref, now) in enumerate(zip(op.outputs, got.outputs, strict=True)):
            given = labels[ref.index]
            wanted = predicted.shape(ref, given)
            sides = tuple(
                ("out", out, dim)
                for dim, label in enumerate(given)
                if label is not None and now.shape[dim] != wanted[dim]
            )
            if sides:
                return Found(step, sides, _FIXED)
    if again.error is None:
        return None
    return Found(len(recording.ops) - 1, _all_sides(recording.ops[-1]), f"{_FIXED}: {again.error}")


def _uses_states(op: Op, recording: Recording) -> bool:
    states = recording.states.values()
    last = max((ref.index for ref in states), default=-1)
    return any(ref.index <= last for ref in op.tensors)
