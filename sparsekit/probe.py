"""Cut at random, record again: does the user's own forward do what the coupling predicts?

This finds what no rule can see, sizes that the forward writes as numbers, and shows rules that lie. Where such a number
is an integer attribute of the module (`num_heads`), the attribute is cut along, if that, tried, makes the forward
agree; else the channels are marked as fixed by the forward, and go only where it is replaced by a recorded program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sparsekit.channels import Channels
from sparsekit.coupling import Coupling, Label, Labels, Mark, Place
from sparsekit.plan import COUNT, ChannelGroup
from sparsekit.prediction import NUMBER, Found, Predicted, Side, compare, compare_layers, drawn
from sparsekit.record import MetaKernels, Op, Recording, record
from sparsekit.surgery import cut

_MAX_LEVELS = 3  # how far above the module that runs an op its attributes are looked for
_MAX_TRIALS = 6
_FOLLOWS = "the forward takes a size here from other channels"

Combination = tuple[tuple[Side, int, str], ...]  # where a size appears, levels above the module, attribute


@dataclass(frozen=True, eq=False)
class _Difference:
    """The first op that differs from the prediction; `sides` are the dimensions whose sizes do.

    `follows` are channels of others, whose number the forward asks for there.
    """

    at: tuple[int, int]
    op: Op
    sides: tuple[Side, ...]
    reason: str
    follows: tuple[Label, ...] = ()


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
        self._loose = next((not parameter.is_meta for parameter in twin.parameters()), False)
        self._trials: Iterator[Combination] = iter(())
        self._trial_places: list[Place] = []
        self._trial_of: _Difference | None = None

    def agrees(self, groups: dict[int, ChannelGroup], channels: Channels, coupling: Coupling) -> bool:
        """Whether the forward follows. If not, `coupling` has been told what was learnt: connect it again."""
        difference = self._difference(groups, channels, coupling)
        tried = self._trial_of
        if tried is not None and difference is not None and difference.at <= tried.at:
            for place in self._trial_places:
                del coupling.places[place]
            self._next_trial(tried, channels, coupling)
            return False
        self._trial_of = None  # it helped, or there was none
        if difference is None:
            return True
        # What follows the channels of others is in no attribute.
        combinations = iter(()) if difference.follows else self._combinations(difference)
        self._trials = itertools.islice(combinations, _MAX_TRIALS)
        self._next_trial(difference, channels, coupling)
        return False

    def _next_trial(self, difference: _Difference, channels: Channels, coupling: Coupling) -> None:
        """Cut along the next combination of attributes, or, when none is left, fix the channels."""
        self._trial_of, self._trial_places = None, []
        for combination in self._trials:
            for _, op, labels in self._alike(difference.op):
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
        for _, op, labels in self._alike(difference.op):
            atoms = [label for side in difference.sides if (label := _at(op, labels, side)) is not None]
            marks = [Mark(label, difference.reason, op) for label in atoms if _movable(channels, label)]
            # Which size a number follows is not to be seen: the innermost first, as of attention heads.
            found += marks[:1] if difference.reason == NUMBER else marks
        found += [Mark(label, difference.reason, difference.op) for label in difference.follows]
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
        """The channels of the nearest op that carries any, at or before the difference and all that follow like it."""
        marks = []
        for (number, step), _, labels in self._alike(difference.op):
            for op in self._recordings[number].ops[step::-1] if (number, step) >= difference.at else ():
                given = [label for ref in (*op.outputs, *op.tensors) for label in labels.get(ref.index, ())]
                found = [label for label in given if label is not None and _movable(channels, label)]
                if found:
                    marks += [Mark(label, difference.reason, op) for label in found]
                    break
        return marks

    def _alike(self, op: Op) -> Iterator[tuple[tuple[int, int], Op, dict[int, Labels]]]:
        """All ops of the same line of the user's code and the same kind of module, and where they are."""
        for number, (recording, labels) in enumerate(zip(self._recordings, self._labels, strict=True)):
            for step, other in enumerate(recording.ops):
                if (other.name, other.source, type(other.owner)) == (op.name, op.source, type(op.owner)):
                    yield (number, step), other, labels

    def _combinations(self, difference: _Difference) -> Iterator[Combination]:
        """Attributes that hold the sizes which differ, one for each, nearest modules first."""
        op = difference.op
        labels = self._labels[difference.at[0]]
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

    def _difference(
        self, groups: dict[int, ChannelGroup], channels: Channels, coupling: Coupling
    ) -> _Difference | None:
        draw = drawn(groups, channels, coupling.places.values())
        if draw is None:
            return None
        plan, predicted = draw
        small = cut(self._twin, plan)
        for number, (recording, mode) in enumerate(zip(self._recordings, (False, True), strict=False)):
            again = record(small.train() if mode else small, self._inputs[mode], self._kernels)
            if again.error is not None:
                again.error.__traceback__ = None  # its frames hold all of this until Python's collector runs
            found = (compare_layers if self._loose else compare)(recording, again, self._labels[number], predicted)
            if found is not None:
                follows = tuple(self._followed(number, found, predicted))
                reason = _FOLLOWS if follows else found.reason
                return _Difference((number, found.step), recording.ops[found.step], found.sides, reason, follows)
        return None

    def _followed(self, number: int, found: Found, predicted: Predicted) -> Iterator[Label]:
        """For each size that a failed reshape asked for and that was cut: the nearest channels that are as many."""
        labels, ops = self._labels[number], self._recordings[number].ops
        dense = ops[found.step].outputs[0].shape
        for (_, _, dim), after in zip(found.sides, found.asked, strict=False):
            for op in ops[found.step :: -1] if after != dense[dim] else ():
                carried = [label for ref in op.tensors for label in labels.get(ref.index, ())]
                alike = [x for x in carried if x is not None and (len(x), predicted.count(x)) == (dense[dim], after)]
                if alike:
                    yield alike[0]
                    break


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
