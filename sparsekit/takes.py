"""The recordings of one pass from which it is learnt what follows the batch size and the dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.errors import PlanError
from sparsekit.meta import on_cpu, on_meta
from sparsekit.record import Recording, record


@dataclass(frozen=True, eq=False)
class Takes:
    """Recordings of one pass, in eval or training mode.

    Attributes:
        first: on inputs of batch size `size`.
        more: with one example more, or None where the pass then differs, and `size` means nothing.
        wide: with parameters of dtype `other` in place of `dtype`, or None where no op names a dtype.
    """

    first: Recording
    more: Recording | None
    wide: Recording | None
    size: int
    dtype: torch.dtype
    other: torch.dtype

    def all(self) -> list[Recording]:
        """The recordings there are."""
        return [one for one in (self.first, self.more, self.wide) if one is not None]


def take(model: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> Takes:
    """Record a pass of `model`.

    Raises:
        PlanError: it fails, or what it does depends on values of its inputs.
    """
    sizes = {leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    size = sizes.pop() if len(sizes) == 1 else 0  # 0: no first dimension that all share
    if size == 1 and training:  # batch norm does not train on one example
        size, inputs = 2, _with_batch(inputs, 2)
    first = _recorded(model, inputs, training=training)
    if first.error is not None:
        raise PlanError(f"the forward fails on the example inputs: {first.error}") from first.error
    own = next((op for op in first.ops if op.function), None)
    if training and own is not None:
        raise PlanError(f"{own.source}: {own.function} has a backward of its own, which is not recorded")
    more = _recorded(model, _with_batch(inputs, size + 1), training=training) if size else None
    if more is not None and not _alike(first, more):
        # One example alone may take shorter ways: then two say what every number of them does.
        third = _recorded(model, _with_batch(inputs, size + 2), training=training)
        if size == 1 and _alike(more, third) and _grow(first, more, third):
            size, inputs, first, more = 2, _with_batch(inputs, 2), more, third
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    other = torch.float32 if dtype is torch.float64 else torch.float64
    wide: Recording | None
    wide = _recorded(model, inputs, training=training, dtype=other)
    if more is not None and more.error is not None:
        more = None
    if wide.error is not None or not _name_dtype(wide):
        wide = None
    return Takes(first, more, wide, size, dtype, other)


def _alike(a: Recording, b: Recording) -> bool:
    """Whether the same ops ran, but for copies."""
    names = [[op.name for op in one.ops if op.name not in ("clone", "view", "_unsafe_view")] for one in (a, b)]
    return b.error is None and names[0] == names[1]


def _grow(first: Recording, second: Recording, third: Recording) -> bool:
    """Whether the outputs' shapes go on from one to the next as they went before."""
    rows = [[ref.shape for ref in one.outputs] for one in (first, second, third)]
    ranks = [[len(shape) for shape in row] for row in rows]
    sizes = [[size for shape in row for size in shape] for row in rows]
    return ranks[0] == ranks[1] == ranks[2] and all(b - a == c - b for a, b, c in zip(*sizes, strict=True))


def _name_dtype(recording: Recording) -> bool:
    found = {value for op in recording.ops for value in op.args.values() if type(value) is torch.dtype}
    return any(dtype.is_floating_point for dtype in found)


def _with_batch(inputs: Any, size: int) -> Any:
    return tree_map_only(Tensor, lambda x: x[torch.arange(size, device=x.device) % len(x)] if x.dim() else x, inputs)


def _recorded(
    model: nn.Module, inputs: tuple[Any, ...], *, training: bool, dtype: torch.dtype | None = None
) -> Recording:
    """On shapes alone; on a real copy where the forward needs values, or makes constants that the steps need.

    Raises:
        PlanError: what the forward does depends on values of its inputs.
    """
    for twin_of in (on_meta, on_cpu):
        twin = twin_of(model).train(training)
        if dtype is not None:
            twin = twin.to(dtype)
            inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
        recording = record(twin, inputs)
        if recording.error is None and not any(value.is_meta for value in recording.constants.values()):
            break
    fixed = {name for name, buffer in twin.named_buffers() if not buffer.is_floating_point()}
    _refuse_values(recording, fixed, _READS if twin_of is on_meta else _READS | _SIZES)
    return recording


_READS, _SIZES = {torch.Tag.data_dependent_output}, {torch.Tag.dynamic_output_shape}


def _refuse_values(recording: Recording, fixed: set[str], tags: set[torch.Tag]) -> None:
    """Numbers read from tensors, and sizes that follow values, are those of the example alone."""
    static = recording.constants.keys() | {recording.states[name].index for name in fixed}
    for op in recording.ops:
        # What is picked by indices has no say in how much is picked.
        deciding = [ref for ref in op.args["indices"] if ref is not None] if op.name == "index" else op.tensors()
        inputs = {ref.index for ref in deciding}
        if {ref.index for ref in op.tensors()} <= static and torch.Tag.nondeterministic_seeded not in op.func.tags:
            static |= {ref.index for ref in op.outputs}
        elif not inputs <= static and (tags & set(op.func.tags) or op.name == "torchvision::nms"):
            name = op.name if "::" in op.name else f"aten::{op.name}"
            raise PlanError(f"{op.source}, {name}: the forward follows values of tensors here, and cannot be replayed")
        elif op.func._schema.is_mutable and inputs & static:
            static = set()  # a view of others may have been written to
