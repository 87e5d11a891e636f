"""Ops that move, merge, split or join dimensions without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sparsekit.coupling import Coupling, Label, Labels, merge
from sparsekit.record import Op

_MAX_FACTORS = 8  # of one dimension: shuffled many times over, nothing is left that can be cut


def permute(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::t, transpose and permute move labels with their dimensions."""
    source = op.args["self"]
    given, rank = coupling.labels(source), len(source.shape)
    order = list(range(rank))
    if op.name == "permute":
        order = [dim % rank for dim in op.args["dims"]]
    elif rank >= 2:
        a, b = (0, 1) if op.name == "t" else (op.args["dim0"] % rank, op.args["dim1"] % rank)
        order[a], order[b] = b, a
    return [tuple(given[dim] for dim in order)]


def expand(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Grown dimensions hold the same everywhere: any position may go, with whatever it meets. The others stay."""
    source, (out,) = op.args["self"], op.outputs
    num_new = len(out.shape) - len(source.shape)
    before = (1,) * num_new + source.shape
    given = (None,) * num_new + coupling.labels(source)
    return [
        tuple(
            coupling.fresh(after) if after > size else label
            for size, after, label in zip(before, out.shape, given, strict=True)
        )
    ]


def repeat(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::repeat tiles; each copy of a position lives with it."""
    source, repeats = op.args["self"], op.args["repeats"]
    new = len(repeats) - len(source.shape)
    tiled = [
        None if label is None else np.tile(label, (times, 1))
        for label, times in zip(coupling.labels(source), repeats[new:], strict=True)
    ]
    return [(None,) * new + tuple(tiled)]


def view(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Reshape, squeeze and unsqueeze: merged dimensions have the factors of all, split ones share them out."""
    source, (out,) = op.args["self"], op.outputs
    given = coupling.labels(source)
    result: list[Label | None] = [None] * len(out.shape)
    for ins, outs in _runs(source.shape, out.shape):
        if all(given[dim] is None for dim in ins):
            continue
        if len(ins) == len(outs) == 1:
            result[outs[0]] = given[ins[0]]
            continue
        pieces = _common_pieces([source.shape[dim] for dim in ins], [out.shape[dim] for dim in outs])
        if pieces is None:
            coupling.freeze([given[dim] for dim in ins], f"{op.name} mixes the channel dimension with others")
            continue
        split = [
            part
            for dim, sizes in zip(ins, pieces[0], strict=True)
            for part in (coupling.split(given[dim], sizes) if len(sizes) > 1 else [given[dim]])
        ]
        for dim, sizes in zip(outs, pieces[1], strict=True):
            label = split[0] if len(sizes) == 1 else merge(split[: len(sizes)], sizes)
            split = split[len(sizes) :]
            if label is not None and label.shape[1] > _MAX_FACTORS:
                coupling.freeze([label], f"{op.name} mixes the channels again and again")
                label = None
            result[dim] = label
    return [tuple(result)]


def _runs(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairs of dimension runs with equal element counts; dimensions of size 1 belong nowhere."""
    ins = [dim for dim, size in enumerate(source) if size != 1]
    outs = [dim for dim, size in enumerate(target) if size != 1]
    pairs = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        a, b = source[left[0]], target[right[0]]
        while a != b:
            if a < b:
                left.append(ins.pop(0))
                a *= source[left[-1]]
            else:
                right.append(outs.pop(0))
                b *= target[right[-1]]
        pairs.append((left, right))
    return pairs


def _common_pieces(ins: list[int], outs: list[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """The sizes of which both sides are made: [2, 6] and [4, 3] are [2], [2, 3] and [2, 2], [3]; None for no such.

    >>> _common_pieces([2, 6], [4, 3])
    ([[2], [2, 3]], [[2, 2], [3]])
    >>> _common_pieces([2, 3], [3, 2]) is None
    True
    """
    ends = [np.cumprod(sizes).tolist() for sizes in (ins, outs)]
    cuts = sorted({1, *ends[0], *ends[1]})
    if any(high % low for low, high in pairwise(cuts)):
        return None
    steps = [(high, high // low) for low, high in pairwise(cuts)]

    def inside(ends: list[int]) -> list[list[int]]:
        starts = [1, *ends[:-1]]
        return [[size for end, size in steps if start < end <= stop] for start, stop in zip(starts, ends, strict=True)]

    return inside(ends[0]), inside(ends[1])


def cat(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Along `dim` the labels follow each other; every other dimension agrees."""
    (out,) = op.outputs
    rank = len(out.shape)
    dim = op.args["dim"] % rank
    parts = [ref for ref in op.args["tensors"] if len(ref.shape) == rank]
    result: list[Label | None] = []
    for axis in range(rank):
        labels = [coupling.labels(ref)[axis] for ref in parts]
        if all(label is None or coupling.is_static(ref) for ref, label in zip(parts, labels, strict=True)):
            given = [label for label in labels if label is not None]
            if len(given) == len(labels):  # weights beside weights
                result.append(joined(given) if axis == dim else coupling.unite(*given))
            else:  # learned tokens beside tokens of the input
                coupling.freeze(given, "is joined with positions that are no channels", report=False)
                result.append(None)
        elif axis == dim:
            known = [
                _constant(coupling, ref.shape[axis]) if label is None else label
                for ref, label in zip(parts, labels, strict=True)
            ]
            result.append(joined(known))
        else:
            result.append(coupling.unite(*labels))
    return [tuple(result)]


def joined(labels: Sequence[Label]) -> Label:
    """Labels one after the other; where one has fewer factors its first is repeated."""
    width = max(label.shape[1] for label in labels)
    return np.concatenate([np.pad(label, ((0, 0), (0, width - label.shape[1])), mode="edge") for label in labels])


def stack(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """A new dimension without channels; the others agree."""
    (out,) = op.outputs
    dim = op.args["dim"] % len(out.shape)
    rows = [coupling.labels(ref) for ref in op.args["tensors"]]
    agreed = [
        None if all(label is None for label in column) else coupling.unite(*column)
        for column in zip(*rows, strict=True)
    ]
    return [(*agreed[:dim], None, *agreed[dim:])]


def constant_pad(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Padded positions are constants; the forward fixes how many there are."""
    source, (out,) = op.args["self"], op.outputs
    labels = list(coupling.labels(source))
    pads = op.args["pad"]
    for back in range(len(pads) // 2):
        axis = len(out.shape) - 1 - back
        low, high = pads[2 * back], pads[2 * back + 1]
        label = labels[axis]
        if label is None or (low, high) == (0, 0):
            continue
        if min(low, high) < 0:
            coupling.freeze([label], "negative padding cuts the channel dimension at fixed numbers")
            labels[axis] = None
            continue
        added = [coupling.fresh(low), coupling.fresh(high)]
        for part in added:
            coupling.fix(part, "pads a fixed number of channels")
        labels[axis] = joined([added[0], label, added[1]])
    return [tuple(labels)]


def _constant(coupling: Coupling, size: int) -> Label:
    atoms = coupling.fresh(size)
    # What lost a channel's track here is named where it did.
    coupling.freeze([atoms], "a constant number of channels is added", report=False)
    return atoms
