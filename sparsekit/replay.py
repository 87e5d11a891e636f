"""A network's forward passes, recorded, cut and turned into a `Program`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import is_namedtuple_instance

from sparsekit.coupling import Labels
from sparsekit.errors import PlanError
from sparsekit.joining import cast_alone, finished, join, joined
from sparsekit.living import Living
from sparsekit.program import Program
from sparsekit.record import Op, Recording, Ref
from sparsekit.rewriting import rewrite
from sparsekit.steps import OfModel, Pass, Step, Structure, Value
from sparsekit.takes import Take, takes_of

# Recordings of one model -> the labels of each, by `Ref.index`, and bool [num_atoms], which atoms are alive.
LivingOf = Callable[[list[Recording]], tuple[list[dict[int, Labels]], NDArray[np.bool_]]]

_ATEN = torch.ops.aten
_CLONE, _MEAN = str(_ATEN.clone.default), str(_ATEN.mean.dim)
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)


def as_program(model: nn.Module, small: nn.Module, example_inputs: tuple[Any, ...], living: LivingOf) -> Program:
    """`model` as its recorded ops, their sizes rewritten to the parameters and buffers of `small`.

    Both modes are recorded, and each at two batch sizes: numbers that grow with the batch are written as its
    multiples. Where the forward does not follow the batch size, the program takes that of the example alone.

    Args:
        model: the dense network; it is not changed.
        small: source of the parameters and buffers, which become the program's: named as in `model`, and cut.
        example_inputs: positional inputs of one forward pass, batch first.
        living: gives, for recordings of `model`, the labels of each, and which atoms are alive.

    Raises:
        PlanError: the forward fails, or follows the values of tensors; an op numbers what is cut and has no rule.
    """
    states = dict(small.named_parameters(remove_duplicate=False)) | dict(small.named_buffers(remove_duplicate=False))
    evaluated = takes_of(model, example_inputs)
    trained: Pass | str
    try:
        training = takes_of(model, example_inputs, evaluated)
        both = [evaluated] if training is evaluated else [evaluated, training]
        (passed, *other), constants = _passes(both, living, states)
        trained = other[0] if other else passed
    except PlanError as error:
        (passed,), constants = _passes([evaluated], living, states)
        trained = str(error)
    program = Program(states | constants, passed, trained)
    return program.train(small.training)


def _passes(
    modes: list[list[Take]], living: LivingOf, states: Mapping[str, Tensor]
) -> tuple[list[Pass], dict[str, Tensor]]:
    """A pass per mode, and the constants that they read by name."""
    labels, alive = living([take.recording for takes in modes for take in takes])
    rows = iter(labels)
    constants: dict[str, Tensor] = {}
    passes = []
    for takes in modes:
        first, *others = [_draft(take.recording, Living(next(rows), alive), states, constants) for take in takes]
        for take, other in zip(takes[1:], others, strict=True):
            mine, theirs = (first, other) if take.dtype is takes[0].dtype else (other, first)
            pair = (takes[0], take) if mine is first else (take, takes[0])
            first = joined(mine, theirs, partial(join, *pair), partial(cast_alone, pair[0].dtype)) or first
        passes.append(finished(first))
    used = {name for one in passes for name in one.states.values()}
    return passes, {name: value for name, value in constants.items() if name in used}


def _draft(recording: Recording, living: Living, states: Mapping[str, Tensor], constants: dict[str, Tensor]) -> Pass:
    """One recording's steps, with the numbers of its own batch size and all defaults written out."""
    steps: list[Step] = []
    call = None
    for op in recording.ops:
        if op.inside is None:
            _append(steps, op, living)
        elif op.inside is not call:
            call = op.inside
            # The scale stays the dense network's where head dims are cut.
            given = call.args["scale"]
            scale = 1 / math.sqrt(call.args["query"].shape[-1]) if given is None else given
            steps.append(Step(str(call.func), _encoded(call.args | {"scale": scale}), (call.output.index,), op.no_grad))
    names = {}
    for name, ref in recording.states.items():
        if living.shape(ref) != list(states[name].shape):
            raise PlanError(f"{name!r}: {list(states[name].shape)} are left, the recorded ops need {living.shape(ref)}")
        names[ref.index] = name
    for index, value in recording.constants.items():
        for dim, mask in enumerate(living.masks(Ref(index, tuple(value.shape)))):
            value = value.index_select(dim, torch.from_numpy(mask.nonzero()[0])) if not mask.all() else value
        names[index] = _named(value, constants, states)
    inputs = tuple(ref.index for ref in recording.inputs)
    shapes = tuple(tuple(ref.shape) for ref in recording.inputs)
    return Pass(inputs, shapes, names, tuple(steps), _structured(recording.returned))


def _append(steps: list[Step], op: Op, living: Living) -> None:
    made_last = steps[-1].op if steps and op.tensors and steps[-1].outputs == (op.tensors[0].index,) else ""
    if (op.name, made_last) == ("as_strided_", _MEAN) and tuple(op.args["size"]) == op.args["self"].shape:
        return  # global pooling says so that its one pixel is channels last
    step = _step(rewrite(op, living))
    if (op.name, made_last) == ("_unsafe_view", _CLONE):
        # A reshape that had to copy: whether it has to depends on sizes and devices.
        step = replace(step, args=step.args | {"self": steps.pop().args["self"]})
    steps.append(step)


def _named(value: Tensor, constants: dict[str, Tensor], states: Mapping[str, Tensor]) -> str:
    for name, known in constants.items():
        if known.dtype == value.dtype and torch.equal(known, value):
            return name
    number = len(constants)
    while f"constant_{number}" in states:
        number += 1
    constants[f"constant_{number}"] = value.detach().clone()
    return f"constant_{number}"


def _step(op: Op) -> Step:
    func, args = op.func, op.args
    if func in _VIEWS:  # strides, which decide whether a view is possible, depend on the device
        func, args = _ATEN.reshape.default, {"self": args["self"], "shape": args["size"]}
    elif op.name == "lift_fresh":  # what torch.tensor made anew; the program keeps one
        func = _ATEN.clone.default
    return Step(str(func), _encoded(args), tuple(ref.index for ref in op.outputs), op.no_grad)


def _encoded(value: Any) -> Any:
    """Arguments as steps have them."""
    if isinstance(value, Ref):
        return Value(value.index)
    if isinstance(value, dict):
        return {name: _encoded(item) for name, item in value.items() if name != "pin_memory"}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return OfModel("device") if isinstance(value, torch.device) else value


def _structured(returned: Any) -> Any:
    if isinstance(returned, Ref):
        return Value(returned.index)
    if isinstance(returned, dict):
        return Structure("dict", tuple(returned), tuple(map(_structured, returned.values())))
    if not isinstance(returned, list | tuple):
        return returned
    items = tuple(map(_structured, returned))
    if is_namedtuple_instance(returned):
        fields: tuple[str, ...] = vars(type(returned))["_fields"]
        return Structure(type(returned).__name__, fields, items)
    return Structure("list" if isinstance(returned, list) else "tuple", (), items)
