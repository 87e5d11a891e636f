"""The recordings of one pass from which it is learnt what follows the batch size and the dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.errors import PlanError
from sparsekit.meta import MetaKernels, on_cpu, on_meta
from sparsekit.record import Recording, record

LIMITS = ("eps", "min", "max", "tiny")  # of `torch.finfo`


@dataclass(frozen=True, eq=False)
class Take:
    """One recording of a pass: on inputs of this batch size, or 0 where they share none, with parameters of `dtype`."""

    recording: Recording
    size: int
    dtype: torch.dtype


def takes_of(model: nn.Module, inputs: tuple[Any, ...], evaluated: list[Take] | None = None) -> list[Take]:
    """Recordings of a pass of `model` that differ in batch size and dtype, the one on the example inputs first.

    The pass in eval mode; or, given the takes of that, the one in training mode: the same takes if it does the same.

    Raises:
        PlanError: the pass fails, or what it does depends on values of its inputs.
    """
    sizes = {leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    size = sizes.pop() if len(sizes) == 1 else 0
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    other = torch.float32 if dtype is torch.float64 else torch.float64
    twins: list[Callable[[nn.Module], nn.Module]] = [on_meta, on_cpu]
    kernels = MetaKernels()

    training = evaluated is not None

    @cache
    def taken(size: int, dtype: torch.dtype) -> Take:
        return Take(_recorded(model, _with_batch(inputs, size), dtype, twins, kernels, training=training), size, dtype)

    if evaluated and _does_the_same(taken(evaluated[-1].size, evaluated[-1].dtype), evaluated[-1]):
        return evaluated
    # Batch norm does not train on one example; two are those of the last take in eval mode.
    first_size, second_size = (3, 2) if training and size == 1 else (size, size + 1 if size else 0)
    first = taken(first_size, dtype)
    error = first.recording.error
    if error is not None:
        raise PlanError(f"the forward fails on the example inputs: {error}") from error
    own = next((op for op in first.recording.ops if op.function), None)
    if training and own is not None:
        raise PlanError(f"{own.source}: {own.function} has a backward of its own, which is not recorded")
    both = taken(second_size, other)
    if _alike(first, both):
        return [first, both]
    if first.size == 1:  # one example may take shorter ways, then two and three say what every number of them does
        third = taken(3, dtype)
        if _alike(third, both) and _grow(first, both, third):
            return [third, both]
    one_by_one = [taken(size, other), *([taken(size + 1, dtype)] if size else [])]
    return [first, *(take for take in one_by_one if take.recording.error is None)]


def _does_the_same(trained: Take, evaluated: Take) -> bool:
    """Whether training mode changes nothing: no dropout, no batch statistics, no head of its own."""
    a, b = trained.recording, evaluated.recording

    def rows(recording: Recording) -> list[Any]:
        calls = [op.inside and (op.inside.func, op.inside.args, op.inside.output) for op in recording.ops]
        return [(op.func, op.args, op.outputs, op.no_grad, call) for op, call in zip(recording.ops, calls, strict=True)]

    return (
        a.error is None
        and not any(op.function for op in a.ops)
        and (a.states, a.returned, rows(a)) == (b.states, b.returned, rows(b))
        and all(torch.equal(value, b.constants[index]) for index, value in a.constants.items())
    )


def _alike(a: Take, b: Take) -> bool:
    """Whether the same ops ran, but for copies and casts."""
    if a.recording.error is not None or b.recording.error is not None:
        return False
    skipped = ("clone", "view", "_unsafe_view", "_to_copy")
    mine, theirs = ([op for op in take.recording.ops if op.name not in skipped] for take in (a, b))
    if [op.name for op in mine] != [op.name for op in theirs]:
        return False
    pairs = list(zip(mine, theirs, strict=True))
    if any(one.name == "permute" and one.args["dims"] != other.args["dims"] for one, other in pairs):
        return False  # einsum leaves out dimensions of one position
    return all(
        x == y or type(x) is not float or limit_of(a.dtype, x, b.dtype, y)
        for one, other in pairs
        for x, y in zip(one.args.values(), other.args.values(), strict=False)
    )


def limit_of(mine: torch.dtype, a: float, theirs: torch.dtype, b: Any) -> str:
    """Which limit of one dtype a number is, if another is the same of another dtype: "eps", "max"; or ""."""
    limits = torch.finfo(mine), torch.finfo(theirs)
    return next((name for name in LIMITS if (a, b) == tuple(getattr(limit, name) for limit in limits)), "")


def _grow(first: Take, second: Take, third: Take) -> bool:
    """Whether the outputs' shapes go on from one to the next as they went before."""
    rows = [[ref.shape for ref in take.recording.outputs] for take in (first, second, third)]
    ranks = [[len(shape) for shape in row] for row in rows]
    sizes = [[size for shape in row for size in shape] for row in rows]
    return ranks[0] == ranks[1] == ranks[2] and all(b - a == c - b for a, b, c in zip(*sizes, strict=True))


def _with_batch(inputs: Any, size: int) -> Any:
    """Each tensor repeated or cut to `size` along its first dimension; as they are where it is 0."""

    def resized(x: Tensor) -> Tensor:
        return x[torch.arange(size, device=x.device) % len(x)] if size and x.dim() else x

    return tree_map_only(Tensor, resized, inputs)


def _recorded(
    model: nn.Module,
    inputs: tuple[Any, ...],
    dtype: torch.dtype,
    twins: list[Callable[[nn.Module], nn.Module]],
    kernels: MetaKernels,
    *,
    training: bool,
) -> Recording:
    """On shapes alone; on a real copy where the forward needs values, or makes constants that the steps need.

    What does not do is taken from `twins`: it would not do for another take either.

    Raises:
        PlanError: what the forward does depends on values of its inputs.
    """
    while True:
        twin = twins[0](model).train(training)
        if dtype not in {parameter.dtype for parameter in twin.parameters()}:
            twin = twin.to(dtype)
            inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
        recording = record(twin, inputs, kernels)
        lacking = recording.error is not None or any(value.is_meta for value in recording.constants.values())
        if not lacking or len(twins) == 1:
            break
        del twins[0]
    fixed = {name for name, buffer in twin.named_buffers() if not buffer.is_floating_point()}
    _refuse_values(recording, fixed, _READS if on_meta in twins else _READS | _SIZES)
    return recording


_READS, _SIZES = {torch.Tag.data_dependent_output}, {torch.Tag.dynamic_output_shape}


def _refuse_values(recording: Recording, fixed: set[str], tags: set[torch.Tag]) -> None:
    """Numbers read from tensors, and sizes that follow values, are those of the example alone."""
    static = recording.constants.keys() | {recording.states[name].index for name in fixed}
    for op in recording.ops:
        # What is picked by indices has no say in how much is picked.
        deciding = [ref for ref in op.args["indices"] if ref is not None] if op.name == "index" else op.tensors
        inputs = {ref.index for ref in deciding}
        if {ref.index for ref in op.tensors} <= static and torch.Tag.nondeterministic_seeded not in op.func.tags:
            static |= {ref.index for ref in op.outputs}
        elif not inputs <= static and (tags & set(op.func.tags) or op.name == "torchvision::nms"):
            name = op.name if "::" in op.name else f"aten::{op.name}"
            raise PlanError(f"{op.source}, {name}: the forward follows values of tensors here, and cannot be replayed")
        elif op.func._schema.is_mutable and inputs & static:
            static = set()  # a view of others may have been written to
