"""Ops that take some positions of a dimension: slices, parts, single positions, positions by a tensor of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsekit.coupling import Coupling, Label, Labels
from sparsekit.record import Op


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


def index(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """x[i, :, j]: dimensions that are indexed by tensors keep all their positions, the others follow."""
    source, (out,) = op.args["self"], op.outputs
    given = list(coupling.labels(source))
    ranks = [len(ref.shape) for ref in op.args["indices"] if ref is not None]
    # A mask takes as many dimensions as it has and gives one; numbers take one and give as many as they have.
    masked = len(ranks) == 1 < ranks[0] and len(out.shape) == len(given) - ranks[0] + 1
    taken = _taken(op, masked=masked)
    coupling.freeze([given[dim] for dim in taken], "index picks channels by their numbers")
    num_new = len(out.shape) - (len(given) - len(taken))
    if not taken:
        return [tuple(given)]
    first = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    rest = [label for dim, label in enumerate(given) if dim not in taken]
    return [(*rest[:first], *(None,) * num_new, *rest[first:])]


def _taken(op: Op, *, masked: bool) -> list[int]:
    """The dimensions that tensors of numbers, or with `masked` one mask of several dimensions, index."""
    taken: list[int] = []
    dim = 0
    for ref in op.args["indices"]:
        span = len(ref.shape) if ref is not None and masked else 1
        taken += range(dim, dim + span) if ref is not None else ()
        dim += span
    return taken


def put(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """x[i] = values: the dimensions behind the indexed ones agree with those of the values."""
    source, values = op.args["self"], op.args["values"]
    given, written = list(coupling.labels(source)), coupling.labels(values)
    masked = any(ref is not None and len(ref.shape) > 1 for ref in op.args["indices"])  # or so many numbers: the same
    behind = len(given) - max(_taken(op, masked=masked), default=-1) - 1
    reason = "index_put writes channels by their numbers"
    coupling.freeze(given[: len(given) - behind], reason)
    coupling.freeze(written[: max(0, len(written) - behind)], reason)
    for back in range(1, min(behind, len(written)) + 1):
        size = source.shape[-back]
        if size > 1 and values.shape[-back] == size:  # size 1 is repeated, and binds nothing
            given[-back] = coupling.unite(given[-back], written[-back])
    return [tuple(given)]


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
