"""Ops that treat every position alike: arithmetic, activations, copies, new tensors, pooling and resizing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsekit.coupling import Coupling, Label, Labels
from sparsekit.record import Op


def no_rule(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Freeze every channel that the op touches; dimensions that keep their size stay known as frozen ones."""
    touched: dict[tuple[int, int], Label] = {}
    for ref in op.tensors:
        labels = coupling.labels(ref)
        coupling.freeze(labels, f"no rule for aten::{op.name}")
        for dim, (size, label) in enumerate(zip(ref.shape, labels, strict=True)):
            if label is not None:
                touched[dim, size] = label
    return [tuple(touched.get(place) for place in enumerate(ref.shape)) for ref in op.outputs]


def elementwise(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Broadcast the inputs: dimensions of the same size agree position by position, size 1 binds nothing."""
    out = op.outputs[0]
    labels: list[Label | None] = []
    inputs = [ref for ref in op.tensors if ref.shape]
    for back in range(len(out.shape), 0, -1):
        size = out.shape[-back]
        meeting = [coupling.labels(ref)[-back] for ref in inputs if len(ref.shape) >= back and ref.shape[-back] == size]
        known = any(label is not None for label in meeting)
        if op.name.startswith("add") and len(meeting) > 1 and not any(coupling.is_static(ref) for ref in inputs):
            coupling.added += [label for label in meeting if label is not None]
        labels.append(coupling.unite(*meeting) if known and size > 1 else None)
    return [tuple(labels)] * len(op.outputs)


def per_channel(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Pooling and resizing: the last 1, 2 or 3 dimensions, as the name says, are space and hold no channel."""
    given = coupling.labels(op.tensors[0])
    num_spatial = int(re.findall(r"(\d)d", op.name)[0])
    coupling.freeze(given[-num_spatial:], f"{op.name} runs over the channels")
    return [given[:-num_spatial] + (None,) * num_spatial for _ in op.outputs]


def sampled(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """grid_sampler [N, C, ...] and roi_align, roi_pool [N, C, H, W] -> [K, C, h, w] keep dimension 1."""
    source = op.args["input"]
    given = coupling.labels(source)
    coupling.freeze([given[0], *given[2:]], f"{op.name} runs over the channels")
    return [(None, given[1], *(None,) * (len(ref.shape) - 2)) for ref in op.outputs]


def same(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The output has the input's shape and channels: another dtype, stride or device, or a new `*_like` tensor."""
    source = op.tensors[0]
    if any(ref.shape != source.shape for ref in op.outputs):
        return no_rule(op, coupling)
    return [coupling.labels(source) for _ in op.outputs]


def filled(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The same everywhere, zeros, ones, or not yet written: any position may go, with whatever it meets."""
    return [tuple(coupling.fresh(size) if size > 1 else None for size in ref.shape) for ref in op.outputs]


def constant(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """A new tensor of a size that the forward names: nothing of the input's values or channels is in it."""
    return [(None,) * len(ref.shape) for ref in op.outputs]
