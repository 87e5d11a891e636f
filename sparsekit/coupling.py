"""Which positions of which tensors live and die together: what the rules write down about the recorded ops.

Every parameter position starts as an *atom* of its own. A rule looks at one op, unites the atoms that the op forces to
agree and labels the dimensions of the op's outputs. A label is int64 [size, num_factors]: a position lives if the
atoms of all its columns live, so a packed dimension of heads x head dims has two columns and can be cut along either.
A dimension labelled None holds no channel: batch, space, the model's input, constants. What `channels.py` finds
connected in the end is one channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekit.layers import Layer
from sparsekit.plan import COUNT
from sparsekit.record import Op, Recording, Ref

Atoms = NDArray[np.int64]  # [size]
Label = NDArray[np.int64]  # [size, num_factors]
Labels = tuple[Label | None, ...]  # one entry per dimension of a tensor
Place = tuple[str, int]  # parameter, buffer or attribute name, and the dimension


@dataclass(frozen=True, eq=False)
class Mark:
    """Atoms and what is said of them; `op` is None where nothing is lost (the model's input, its output)."""

    atoms: Label
    reason: str
    op: Op | None


@dataclass(frozen=True, eq=False)
class Factored:
    """Atoms that live exactly if all the atoms in the row beside them do, because of `op`."""

    atoms: Atoms
    rows: Label
    op: Op | None


@dataclass(frozen=True, eq=False)
class Product:
    """A cost: `scale` times the product of the sizes of `dims` (a label, or a fixed size).

    `weight` are the labels of the weight among the factors, if one is; `layer` says what is computed.
    """

    name: str
    scale: float
    dims: tuple[Label | int, ...]
    weight: tuple[Label, ...] = ()
    layer: Layer | None = None


class Coupling:
    """What the ops of one or more recordings of the same model say about its channels.

    Attributes:
        places: parameter and buffer dimensions, and integer attributes, with the atoms of their positions.
        edges: pairs of atoms that live or die together, beside places that agree (`firsts`).
        factored: atoms that are products of others.
        frozen: atoms that must stay.
        fixed: atoms that must stay while the user's own forward runs, which names their number as a literal.
        renormalised: atoms that are normalised together, so that zero is not removal.
        read: atoms of parameters that multiply a channel inside a sum.
        silent: atoms whose channels vanish once all their own parameters are zero, and are summed over.
        divisors: atoms of parameters that something is divided by, which must not be zero.
        added: where outputs of layers are summed element by element.
        macs: multiply-accumulates, a term per call.
        passes: numbers that other ops go over, a term per call.
    """

    def __init__(self) -> None:
        self.places: dict[Place, Label] = {}
        self.edges: list[tuple[Atoms, Atoms]] = []
        self.factored: list[Factored] = []
        self.frozen: list[Mark] = []
        self.fixed: list[Mark] = []
        self.renormalised: list[Mark] = []
        self.read: list[Label] = []
        self.silent: list[Mark] = []
        self.divisors: list[Label] = []
        self.added: list[Label] = []
        self.macs: list[Product] = []
        self.passes: list[Product] = []
        self.num_atoms = 0
        self._places: dict[int, tuple[Label, Label]] = {}  # by the id of a place's label: it, and one it agrees with
        self._labels: dict[int, Labels] = {}
        self._static: set[int] = set()  # tensors computed from parameters alone
        self._clean: set[int] = set()  # tensors whose channels are zero once all their parameters are
        self._base: dict[int, int] = {}  # views, by the tensor whose memory they show
        self._op: Op | None = None
        self._used = True

    def begin(self, recording: Recording) -> None:
        """Forget the tensors of an earlier recording and label this one's parameters; what is united stays."""
        self._labels, self._static, self._clean, self._base = {}, set(), set(), {}
        for name, ref in recording.states.items():
            self._labels[ref.index] = tuple(self._place((name, dim), size) for dim, size in enumerate(ref.shape))
            self._static.add(ref.index)
            self._clean.add(ref.index)

    def enter(self, op: Op | None, *, used: bool) -> None:
        """Name `op` as the cause of what is marked from here on; `used` says that something reads its result."""
        self._op, self._used = op, used

    def leave(self, op: Op, outputs: Sequence[Labels], *, clean: bool, alias: bool) -> None:
        """Label the outputs of `op`.

        Args:
            clean: their channels vanish with their parameters.
            alias: they share the memory of the first input, so that what is written into one is in the other.
        """
        inputs = op.tensors
        static = bool(inputs) and all(self.is_static(ref) for ref in inputs)
        for ref, labels in zip(op.outputs, outputs, strict=True):
            self._labels[ref.index] = labels
            if static:
                self._static.add(ref.index)
            if alias:
                self._base[ref.index] = self._base.get(inputs[0].index, inputs[0].index)
            if clean:
                self._clean.add(ref.index)
            elif ref.index in self._clean:  # written in place
                base = self._base.get(ref.index, ref.index)
                self._clean -= {base, *(index for index, other in self._base.items() if other == base)}

    def labels(self, ref: Ref) -> Labels:
        """Labels of a tensor's dimensions; all None where no rule labelled it (inputs, constants)."""
        return self._labels.get(ref.index, (None,) * len(ref.shape))

    def all_labels(self) -> dict[int, Labels]:
        """`Ref.index` -> labels, of every tensor labelled since `begin`."""
        return self._labels

    def is_static(self, ref: Ref) -> bool:
        """Whether the tensor is computed from parameters alone."""
        return ref.index in self._static

    def is_clean(self, ref: Ref) -> bool:
        """Whether every channel in the tensor is zero once all parameter positions of that channel are."""
        return ref.index in self._clean

    def unite(self, *labels: Label | None) -> Label | None:
        """Force positions to agree across labels of one length; where one is None the others are frozen too."""
        given = sorted((label for label in labels if label is not None), key=lambda label: -label.shape[1])
        if len(given) < len(labels):
            self.freeze(given, "meets a tensor whose channels are fixed")
            return None
        for other in given[1:]:
            self._agree(given[0], other)
        return given[0]

    def _agree(self, left: Label, right: Label) -> None:
        """`left` has at least as many columns as `right`."""
        if left is right:
            return
        if left.shape[1] == 1:
            both = self.first(left), self.first(right)
            if all(id(label) in self._places for label in both):
                first, other = sorted(both, key=lambda label: int(label[0, 0]))
                self._places[id(other)] = (other, first)
            else:
                self.edges.append((left[:, 0], right[:, 0]))
        elif right.shape[1] == 1:
            self.factored.append(Factored(right[:, 0], left, self._op))
        else:
            pairs = _same_partitions(left, right)
            if pairs is None:
                product = self.fresh(len(left))
                self.factored += [Factored(product[:, 0], rows, self._op) for rows in (left, right)]
            else:
                self.edges += [(left[:, i], right[:, j]) for i, j in pairs]

    def first(self, label: Label) -> Label:
        """The first place's label that agrees with that of a place, position by position; another label as it is."""
        found = label
        while (known := self._places.get(id(found))) is not None and known[1] is not found:
            found = known[1]
        if found is not label:
            self._places[id(label)] = (label, found)
        return found

    def firsts(self) -> Atoms:
        """int64 [num_atoms], for the atoms of a place those of the first that agrees with it; others are their own."""
        atoms = np.arange(self.num_atoms)
        for label, _ in list(self._places.values()):
            start = int(label[0, 0])
            atoms[start : start + len(label)] = self.first(label)[:, 0]
        return atoms

    def contract(self, left: tuple[Ref, Label | None], right: tuple[Ref, Label | None]) -> None:
        """Two dimensions are multiplied and summed over.

        What reads the channel is the parameter among them. Where both are activations, as in attention scores, the
        channel is silent: masking sets all its parameters to zero, so that it adds nothing to the sum.
        """
        sides = (left, right)
        if left[1] is None or right[1] is None:
            static = all(label is None or self.is_static(ref) for ref, label in sides)
            reason = "reads the model's input" if static else "is summed with fixed weights"
            self.freeze([left[1], right[1]], reason, report=not static)
            return
        self.unite(left[1], right[1])
        readers = [label for ref, label in sides if label is not None and self.is_static(ref) and self.is_clean(ref)]
        if readers:
            self.read += readers
        elif any(self.is_clean(ref) for ref, _ in sides):
            self.silence(left[1])
        else:
            self.renormalise(left[1], "sums a product of activations over the channels")

    def freeze(self, labels: Iterable[Label | None], reason: str, *, report: bool = True) -> None:
        """Keep these atoms for good; with `report` the present op is named as the cause."""
        op = self._op if report else None
        self.frozen += [Mark(label, reason, op) for label in labels if label is not None]

    def fix(self, label: Label | None, reason: str) -> None:
        """The present op of the user's forward works only with all of these."""
        if label is not None:
            self.fixed.append(Mark(label, reason, self._op))

    def silence(self, label: Label) -> None:
        """The present op sums over these, which add nothing once all their own parameters are zero."""
        self.silent.append(Mark(label, "sums over the channels", self._op))

    def renormalise(self, label: Label | None, reason: str) -> None:
        """The present op normalises over these, so that removal changes what is left."""
        if label is not None and self._used:
            self.renormalised.append(Mark(label, reason, self._op))

    def attribute(self, name: str, label: Label) -> None:
        """An integer module attribute counts the positions of `label`, and is cut like a dimension."""
        known = self.places.setdefault((name, COUNT), label)
        if known is not label:
            self.unite(known, label)

    def split(self, label: Label | None, sizes: Sequence[int]) -> list[Label | None]:
        """Labels of the dimensions of `sizes` into which a labelled one is split; outermost first."""
        parts: list[list[Atoms]] = [[] for _ in sizes]
        for column in label.T if label is not None else ():
            grid = column.reshape(sizes)
            axes = [axis for axis in range(len(sizes)) if (grid != grid.take([0], axis)).any()]
            if not axes:  # one atom owns them all
                axes = [max(range(len(sizes)), key=lambda axis: sizes[axis])]
            if len(axes) == 1:
                inside = tuple(slice(None) if axis == axes[0] else 0 for axis in range(len(sizes)))
                parts[axes[0]].append(grid[inside])
                continue
            factors = [self.fresh(sizes[axis])[:, 0] for axis in axes]
            rows = np.stack(
                [_along(factor, axis, sizes).ravel() for factor, axis in zip(factors, axes, strict=True)], axis=1
            )
            self.factored.append(Factored(column, rows, self._op))
            for factor, axis in zip(factors, axes, strict=True):
                parts[axis].append(factor)
        return [np.stack(columns, axis=1) if columns else None for columns in parts]

    def _place(self, place: Place, size: int) -> Label | None:
        if size <= 1:  # nothing of a single position can be cut
            return None
        if place not in self.places:
            label = self.places[place] = self.fresh(size)
            self._places[id(label)] = (label, label)
        return self.places[place]

    def fresh(self, size: int) -> Label:
        """New atoms [size, 1], of no parameter yet."""
        self.num_atoms += size
        return np.arange(self.num_atoms - size, self.num_atoms, dtype=np.int64)[:, None]


def merge(labels: Sequence[Label | None], sizes: Sequence[int]) -> Label | None:
    """The label of one dimension made of several, outermost first."""
    columns = [
        _along(column, axis, sizes).ravel()
        for axis, label in enumerate(labels)
        if label is not None
        for column in label.T
    ]
    return np.stack(columns, axis=1) if columns else None


def _along(atoms: Atoms, axis: int, sizes: Sequence[int]) -> NDArray[np.int64]:
    """`atoms` along `axis` of a grid, repeated over the others."""
    shape = [-1 if other == axis else 1 for other in range(len(sizes))]
    return np.broadcast_to(atoms.reshape(shape), sizes)


def _same_partitions(left: Label, right: Label) -> list[tuple[int, int]] | None:
    """Which columns divide the positions in the same way, one to one, or None."""
    if left.shape[1] != right.shape[1]:
        return None
    marks = [[np.unique(column, return_inverse=True)[1] for column in label.T] for label in (left, right)]
    firsts = [[_first_seen(mark) for mark in side] for side in marks]
    pairs = []
    free = list(range(right.shape[1]))
    for i, mark in enumerate(firsts[0]):
        match = next((j for j in free if np.array_equal(firsts[1][j], mark)), None)
        if match is None:
            return None
        free.remove(match)
        pairs.append((i, match))
    return pairs


def _first_seen(mark: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the first equal entry, which does not depend on how classes are numbered."""
    first = np.full(int(mark.max()) + 1, len(mark), dtype=np.int64)
    np.minimum.at(first, mark, np.arange(len(mark)))
    return first[mark]
