"""Ops that move, merge, split, join or pick positions without computing anything."""

from __future__ import annotations

import math
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


def slicing(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::slice and narrow. Slices that are one of several equal parts keep the same positions of each."""
    source, (out,) = op.args["self"], op.outputs
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    label, size, length = given[dim], source.shape[dim], out.shape[dim]
    if label is None or length == size:
        return [given]
    start = start_of(op, size)
    step = op.args.get("step") or 1
    if step == 1 and length > 1 and size % length == 0 and start % length == 0:
        _unite_parts(coupling, [label[at : at + length] for at in range(0, size, length)])
    return [(*given[:dim], _part(coupling, op, label[start::step][:length]), *given[dim + 1 :])]


def start_of(op: Op, size: int) -> int:
    """The first position that a slice, narrow or select takes of a dimension of `size`."""
    start = op.args["index"] if op.name == "select" else op.args["start"]
    start = 0 if start is None else int(start)
    return min(max(start + size if start < 0 else start, 0), size)


def select(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """One position by its number: it stays."""
    source = op.args["self"]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    label = given[dim]
    if label is not None:
        at = start_of(op, len(label))
        coupling.freeze([label[at : at + 1]], "select picks a channel by its number")
    return [given[:dim] + given[dim + 1 :]]


def unbind(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Every position by its number: all stay."""
    source = op.args["self"]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    coupling.freeze([given[dim]], "unbind picks the channels by their numbers")
    return [given[:dim] + given[dim + 1 :]] * len(op.outputs)


def splitting(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::split, split_with_sizes and chunk. Equal parts keep the same positions of each."""
    source = op.args["self"]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    label = given[dim]
    if label is None or len(op.outputs) == 1:
        return [given] * len(op.outputs)
    sizes = [ref.shape[dim] for ref in op.outputs]
    ends = np.cumsum(sizes)
    parts = [label[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if len(set(sizes)) == 1 and sizes[0] > 1:
        _unite_parts(coupling, parts)
    return [(*given[:dim], _part(coupling, op, part), *given[dim + 1 :]) for part in parts]


def glu(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The first half of a dimension times the sigmoid of the second."""
    given = coupling.labels(op.args["self"])
    dim = op.args["dim"] % len(given)
    label = given[dim]
    if label is not None:
        half = len(label) // 2
        _unite_parts(coupling, [label[:half], label[half:]])
        label = _part(coupling, op, label[:half])
    return [(*given[:dim], label, *given[dim + 1 :])]


def _unite_parts(coupling: Coupling, parts: list[Label]) -> None:
    """`chunk` and `x[:, : n // 2]` divide what is left into equal parts again."""
    for part in parts[1:]:
        coupling.unite(parts[0], part)


def _part(coupling: Coupling, op: Op, part: Label) -> Label | None:
    if len(part) == 1:
        coupling.freeze([part], f"{op.name} picks a channel by its number")
        return None
    return part


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


def index(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """x[i, :, j]: dimensions that are indexed by tensors keep all their positions, the others follow."""
    source, (out,) = op.args["self"], op.outputs
    given = list(coupling.labels(source))
    indices = [*op.args["indices"]]
    ranks = [len(ref.shape) for ref in indices if ref is not None]
    # A mask takes as many dimensions as it has and gives one; numbers take one and give as many as they have.
    masked = len(ranks) == 1 < ranks[0] and len(out.shape) == len(given) - ranks[0] + 1
    taken: list[int] = []
    dim = 0
    for ref in indices:
        span = len(ref.shape) if ref is not None and masked else 1
        taken += range(dim, dim + span) if ref is not None else ()
        dim += span
    coupling.freeze([given[dim] for dim in taken], "index picks channels by their numbers")
    num_new = len(out.shape) - (len(given) - len(taken))
    if not taken:
        return [tuple(given)]
    first = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    rest = [label for dim, label in enumerate(given) if dim not in taken]
    return [(*rest[:first], *(None,) * num_new, *rest[first:])]


def pick(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::index_select and embedding: one dimension is indexed, the others follow."""
    if op.name == "embedding":
        rows, channels = coupling.labels(op.args["weight"])
        coupling.freeze([rows], "embedding picks rows by their numbers")
        return [(*(None,) * len(op.args["indices"].shape), channels)]
    source = op.args["self"]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    coupling.freeze([given[dim]], f"{op.name} picks channels by their numbers")
    return [(*given[:dim], None, *given[dim + 1 :])]


def roll(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::roll and flip along dimensions without channels."""
    source = op.args["self"]
    rank = len(source.shape)
    moved = {dim % rank for dim in op.args["dims"] or range(rank)}
    given = coupling.labels(source)
    coupling.freeze([given[dim] for dim in moved], f"{op.name} moves the channels by numbers")
    return [given]


def unfold(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::unfold, sliding windows as a new last dimension."""
    source = op.args["self"]
    given = list(coupling.labels(source))
    dim = op.args["dimension"] % len(source.shape)
    coupling.freeze([given[dim]], "unfold slides over the channels")
    given[dim] = None
    return [(*given, None)]


def im2col(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C, H, W] to [..., C k k, L]: a channel owns all positions of its windows."""
    given = coupling.labels(op.args["self"])
    coupling.freeze(given[-2:], "im2col slides over the channels")
    area = math.prod(op.args["kernel_size"])
    return [(*given[:-3], None if given[-3] is None else np.repeat(given[-3], area, axis=0), None)]


def col2im(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C k k, L] to [..., C, H, W]."""
    given = coupling.labels(op.args["self"])
    return [(*given[:-2], _outer(op, coupling, given[-2], math.prod(op.args["kernel_size"])), None, None)]


def pixel_shuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C r r, H, W] to [..., C, H r, W r]."""
    given = coupling.labels(op.args["self"])
    return [(*given[:-3], _outer(op, coupling, given[-3], op.args["upscale_factor"] ** 2), None, None)]


def pixel_unshuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C, H r, W r] to [..., C r r, H, W]."""
    given = coupling.labels(op.args["self"])
    area = op.args["downscale_factor"] ** 2
    return [(*given[:-3], None if given[-3] is None else np.repeat(given[-3], area, axis=0), None, None)]


def _outer(op: Op, coupling: Coupling, label: Label | None, inner_size: int) -> Label | None:
    """The channels of a dimension of channels x `inner_size` positions, all of which each channel keeps."""
    if label is None:
        return None
    outer, inner = coupling.split(label, [len(label) // inner_size, inner_size])
    coupling.freeze([inner], f"{op.name} spreads every position of a window", report=False)
    return outer


def channel_shuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The same positions of every one of `groups` parts go, which are then interleaved."""
    source = op.args["self"]
    given, num_parts = coupling.labels(source), op.args["groups"]
    label = given[1]
    if label is not None:
        sizes = [num_parts, len(label) // num_parts]
        outer, inner = coupling.split(label, sizes)
        coupling.freeze([outer], "the number of shuffled parts stays", report=False)
        label = merge([inner, outer], sizes[::-1])
    return [(given[0], label, *given[2:])]
