"""Cut at random, record again: does the user's own forward do what the coupling predicts?

This finds what no rule can see, sizes that the forward writes as numbers, and shows rules that lie. Where such a number
is an integer attribute of the module (`num_heads`), the attribute is cut along, if that, tried, makes the forward
agree; else the channels are marked as fixed by the forward, and go only where it is replaced by a recorded program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparsekit.channels import Channels
from sparsekit.coupling import Coupling, Label, Labels, Mark, Place
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan
from sparsekit.record import MetaKernels, Op, Recording, Ref, record
from sparsekit.rules import ELEMENTWISE
from sparsekit.rules.picks import start_of
from sparsekit.surgery import cut

_MAX_LEVELS = 3  # how far above the module that runs an op its attributes are looked for
_MAX_TRIALS = 6

Side = tuple[str, int, int]  # "in" or "out", number of the tensor, dimension
Combination = tuple[tuple[Side, int, str], ...]  # where a size appears, levels above the module, attribute


@dataclass(frozen=True, eq=False)
class _Difference:
    """The first op that differs from the prediction; `sides` are the dimensions whose sizes do."""

    at: tuple[int, int]
    op: Op
    sides: tuple[Side, ...]
    reason: str


class Probe:
    """Compares the forward pass of a network cut at random with what its coupling predicts."""

    def __init__(
        self,
        twin: nn.Module,
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        recordings: list[Recording],
        labels: list[dict[int, Labels]],
        kernels: MetaKernels,
    ) -> None:
        """`inputs` of the pass in eval mode, and of the one in training mode; the `kernels` that recorded them."""
        self._twin = twin
        self._inputs = inputs
        self._recordings = recordings
        self._labels = labels
        self._kernels = kernels
        # Real values decide how many boxes there are: then only layers are compared.
        self._loose = any(not parameter.is_meta for parameter in twin.parameters())
        self._trials: Iterator[Combination] = iter(())
        self._trial_places: list[Place] = []
        self._trial_of: _Difference | None = None

    def agrees(self, groups: dict[int, ChannelGroup], channels: Channels, coupling: Coupling) -> bool:
        """Whether the forward follows. If not, `coupling` has been told what was learnt: connect it again."""
        difference = self._difference(groups, channels)
        tried = self._trial_of
        if tried is not None and difference is not None and difference.at <= tried.at:
            for place in self._trial_places:
                del coupling.places[place]
            self._next_trial(tried, channels, coupling)
            return False
        self._trial_of = None  # it helped, or there was none
        if difference is None:
            return True
        self._trials = itertools.islice(self._combinations(difference), _MAX_TRIALS)
        self._next_trial(difference, channels, coupling)
        return False

    def _next_trial(self, difference: _Difference, channels: Channels, coupling: Coupling) -> None:
        """Cut along the next combination of attributes, or, when none is left, fix the channels."""
        self._trial_of, self._trial_places = None, []
        for combination in self._trials:
            for op, labels in self._alike(difference.op):
                for side, levels, name in combination:
                    path = _ancestor(op.module, levels)
                    place, label = (f"{path}.{name}" if path else name, COUNT), _at(op, labels, side)
                    if label is None or path is None or place in coupling.places:
                        continue
                    if vars(self._twin.get_submodule(path)).get(name) == len(label):
                        coupling.places[place] = label
                        self._trial_places.append(place)
            if self._trial_places:
                self._trial_of = difference
                return
        self._fix(difference, channels, coupling)

    def _fix(self, difference: _Difference, channels: Channels, coupling: Coupling) -> None:
        found = []
        for op, labels in self._alike(difference.op):
            atoms = [label for side in difference.sides if (label := _at(op, labels, side)) is not None]
            marks = [Mark(label, difference.reason, op) for label in atoms if _movable(channels, label)]
            # Which size a number follows is not to be seen: the innermost first, as of attention heads.
            found += marks[:1] if difference.reason == _NUMBER else marks
        coupling.fixed += (
            found
            or self._nearest(difference, channels)
            or [
                Mark(label, difference.reason, difference.op)
                for label in coupling.places.values()
                if _movable(channels, label)
            ]
        )

    def _nearest(self, difference: _Difference, channels: Channels) -> list[Mark]:
        """The channels of the nearest op at or before the difference that carries any."""
        number, step = difference.at
        labels = self._labels[number]
        for op in self._recordings[number].ops[step::-1]:
            given = [label for ref in (*op.outputs, *op.tensors) for label in labels.get(ref.index, ())]
            found = [label for label in given if label is not None and _movable(channels, label)]
            if found:
                return [Mark(label, difference.reason, op) for label in found]
        return []

    def _alike(self, op: Op) -> Iterator[tuple[Op, dict[int, Labels]]]:
        """All ops of the same line of the user's code and the same kind of module."""
        for recording, labels in zip(self._recordings, self._labels, strict=True):
            for other in recording.ops:
                if (other.name, other.source, type(other.owner)) == (op.name, op.source, type(op.owner)):
                    yield other, labels

    def _combinations(self, difference: _Difference) -> Iterator[Combination]:
        """Attributes that hold the sizes which differ, one for each, nearest modules first."""
        op = difference.op
        labels = next(labels for other, labels in self._alike(op) if other is op)
        choices = []
        for side in difference.sides:
            label = _at(op, labels, side)
            found = [] if label is None else [(side, *where) for where in self._attributes(op.module, len(label))]
            if found:
                choices.append(found)
        return itertools.product(*choices) if choices else iter(())

    def _attributes(self, path: str, size: int) -> Iterator[tuple[int, str]]:
        for levels in range(_MAX_LEVELS):
            above = _ancestor(path, levels)
            if above is None:
                return
            module = self._twin.get_submodule(above)
            if isinstance(module, nn.MultiheadAttention):  # it insists that its sizes belong together
                return
            yield from ((levels, name) for name, value in vars(module).items() if type(value) is int and value == size)

    def _difference(self, groups: dict[int, ChannelGroup], channels: Channels) -> _Difference | None:
        rng = np.random.default_rng(0)
        keep = {}
        alive = np.ones(len(channels.group), dtype=bool)
        for number, group in groups.items():
            if group.fixed_by:
                continue
            # Not a single one, which broadcasts.
            stay = rng.permutation(group.size) < rng.integers(min(2, group.size - 1), group.size)
            keep[group] = torch.from_numpy(stay)
            inside = np.flatnonzero(channels.group == number)
            alive[inside] = stay[channels.rank[inside]]
        if not keep:
            return None
        small = cut(self._twin, PruningPlan(keep))
        for number, (recording, mode) in enumerate(zip(self._recordings, (False, True), strict=False)):
            again = record(small.train(mode), self._inputs[mode], self._kernels)
            compare = _compare_layers if self._loose else _compare
            found = compare(recording, again, self._labels[number], _Predicted(channels, alive))
            if found is not None:
                step, sides, reason = found
                return _Difference((number, step), recording.ops[step], sides, reason)
        return None


@dataclass(frozen=True, eq=False)
class _Predicted:
    channels: Channels
    alive: NDArray[np.bool_]
    _counts: dict[int, int] = field(default_factory=dict)  # by the id of a label, which many tensors share

    def living(self, label: Label) -> NDArray[np.bool_]:
        return self.channels.alive(label, self.alive)

    def shape(self, ref: Ref, labels: Labels) -> tuple[int, ...]:
        return tuple(
            size if label is None else self._count(label) for size, label in zip(ref.shape, labels, strict=True)
        )

    def _count(self, label: Label) -> int:
        count = self._counts.get(id(label))
        if count is None:
            count = self._counts[id(label)] = int(self.living(label).sum())
        return count


Found = tuple[int, tuple[Side, ...], str] | None
_NUMBER = "a number in the forward follows the size"
_FIXED = "the forward fixes a size here"
# Whether a tensor must be copied before it is reshaped depends on its size.
_COPIES = frozenset(["alias", "clone", "contiguous", "detach"])
_VIEWS = dict.fromkeys(["_unsafe_view", "_reshape_alias", "reshape"], "view")


def _compare(recording: Recording, again: Recording, labels: dict[int, Labels], predicted: _Predicted) -> Found:
    """The first step at which shapes, slices or numbers are not those predicted."""
    others = [op for op in again.ops if op.name not in _COPIES]
    steps = [step for step, op in enumerate(recording.ops) if op.name not in _COPIES]
    for number, step in enumerate(steps):
        op, got = recording.ops[step], others[number] if number < len(others) else None
        wanted = [predicted.shape(ref, labels[ref.index]) for ref in op.outputs]
        if got is None or _VIEWS.get(got.name, got.name) != _VIEWS.get(op.name, op.name):
            return (
                step,
                _sides(op, again.failed, wanted),
                f"{_FIXED}: {again.error}" if got is None and again.failed is None else _FIXED,
            )
        shapes = [ref.shape for ref in got.outputs]
        if shapes != wanted:
            sides = tuple(
                ("out", number, dim)
                for number, (a, b) in enumerate(zip(shapes, wanted, strict=False))
                for dim in range(min(len(a), len(b)))
                if a[dim] != b[dim]
            )
            return step, sides, _FIXED
        if not _same_start(op, got, labels, predicted):
            return step, (("in", 0, op.args["dim"] % len(op.args["self"].shape)),), _FIXED
        if op.inside is None and _numbers(op, recording) != _numbers(got, again):
            return step, _all_sides(op), _NUMBER
    return None


def _sides(op: Op, failed: Op | None, wanted: list[tuple[int, ...]]) -> tuple[Side, ...]:
    """The dimensions that a failed reshape asked for and should not have; all of the op's, where it was another."""
    if failed is not None and failed.name == op.name:
        asked = failed.args.get("size") or failed.args.get("shape") or ()
        if len(asked) == len(wanted[0]):
            sides = tuple(("out", 0, dim) for dim, size in enumerate(asked) if size not in (-1, wanted[0][dim]))
            if sides:
                return sides
    return _all_sides(op)


def _all_sides(op: Op) -> tuple[Side, ...]:
    outs = [("out", number, dim) for number, ref in enumerate(op.outputs) for dim in reversed(range(len(ref.shape)))]
    ins = [("in", number, dim) for number, ref in enumerate(op.tensors) for dim in reversed(range(len(ref.shape)))]
    return (*outs, *ins)


def _same_start(op: Op, got: Op, labels: dict[int, Labels], predicted: _Predicted) -> bool:
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
    given = [item for value in op.args.values() for item in (value if type(value) is list else (value,))]
    numbers = [value for value in given if isinstance(value, kinds)]
    constants = [recording.constants[ref.index] for ref in op.tensors if ref.index in recording.constants]
    return numbers + [float(constant) for constant in constants if constant.dim() == 0 and not constant.is_meta]


def _compare_layers(recording: Recording, again: Recording, labels: dict[int, Labels], predicted: _Predicted) -> Found:
    """As `_compare`, for ops that use parameters and dimensions that hold channels."""
    steps = [step for step, op in enumerate(recording.ops) if _uses_states(op, recording)]
    others = [op for op in again.ops if _uses_states(op, again)]
    for number, step in enumerate(steps):
        op = recording.ops[step]
        if number >= len(others):
            if again.error is None:  # other boxes, other branches: no more to compare
                return None
            return step, _all_sides(op), f"{_FIXED}: {again.error}"
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
                return step, sides, _FIXED
    return (
        None
        if again.error is None
        else (len(recording.ops) - 1, _all_sides(recording.ops[-1]), f"{_FIXED}: {again.error}")
    )


def _uses_states(op: Op, recording: Recording) -> bool:
    states = recording.states.values()
    last = max((ref.index for ref in states), default=-1)
    return any(ref.index <= last for ref in op.tensors)


def _at(op: Op, labels: dict[int, Labels], side: Side) -> Label | None:
    where, number, dim = side
    refs = op.outputs if where == "out" else op.tensors
    if number >= len(refs) or dim >= len(refs[number].shape):
        return None
    given = labels.get(refs[number].index)
    return given[dim] if given else None


def _movable(channels: Channels, label: Label) -> bool:
    numbers = channels.group_of(label)
    owners = channels.owners(label)
    return bool(((numbers >= 0) & ~np.append(channels.fixed, True)[owners]).any())


def _ancestor(path: str, levels: int) -> str | None:
    parts = path.split(".") if path else []
    return None if levels > len(parts) else ".".join(parts[: len(parts) - levels])
