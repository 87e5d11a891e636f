"""Which positions of which tensors live and die together: what the rules of `rules.py` write down.

Every parameter position starts as an *atom* of its own. A rule looks at one recorded op, unites the atoms that the
op forces to agree and labels the dimensions of the op's outputs with atoms. What is connected in the end is one
channel. A dimension labelled None holds no channel: batch, space, the model's input, constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sparsekit.plan import COUNT
from sparsekit.record import Op, Recording, Ref

Atoms = NDArray[np.int64]  # one atom per position of a dimension
Labels = tuple[Atoms | None, ...]  # one entry per dimension of a tensor
Place = tuple[str, int]  # parameter, buffer or attribute name, and the dimension


@dataclass(frozen=True, eq=False)
class Frozen:
    """Atoms that must stay, and why; `op` is None where nothing is lost (the model's input, its output)."""

    atoms: Atoms
    reason: str
    op: Op | None


@dataclass(frozen=True, eq=False)
class Product:
    """A cost: `scale` times the product of the sizes of `dims` (a label, or a fixed size)."""

    name: str
    scale: float
    dims: tuple[Atoms | int, ...]


class Coupling:
    """What the ops of one or more recordings of the same model say about its channels."""

    def __init__(self) -> None:
        self.places: dict[Place, Atoms] = {}
        self.edges: list[tuple[Atoms, Atoms]] = []
        self.frozen: list[Frozen] = []
        self.read: list[Atoms] = []
        self.added: list[Atoms] = []  # where outputs of layers are summed element by element
        self.macs: list[Product] = []
        self.num_atoms = 0
        self._labels: dict[int, Labels] = {}
        self._static: set[int] = set()  # tensors computed from parameters alone
        self._op: Op | None = None

    def begin(self, recording: Recording) -> None:
        """Forget the tensors of an earlier recording and label this one's parameters; what is united stays."""
        self._labels, self._static = {}, set()
        for name, ref in recording.states.items():
            self._labels[ref.index] = tuple(self._place((name, dim), size) for dim, size in enumerate(ref.shape))
            self._static.add(ref.index)

    def enter(self, op: Op | None) -> None:
        """Name `op` as the cause of what is frozen from here on."""
        self._op = op

    def leave(self, op: Op, outputs: Sequence[Labels]) -> None:
        """Label the outputs of `op`."""
        inputs = op.tensors()
        static = bool(inputs) and all(self.is_static(ref) for ref in inputs)
        for ref, labels in zip(op.outputs, outputs, strict=True):
            self._labels[ref.index] = labels
            if static:
                self._static.add(ref.index)

    def labels(self, ref: Ref) -> Labels:
        """Labels of a tensor's dimensions; all None where no rule labelled it (inputs, constants)."""
        return self._labels.get(ref.index, (None,) * len(ref.shape))

    def is_static(self, ref: Ref) -> bool:
        """Whether the tensor is computed from parameters alone."""
        return ref.index in self._static

    def unite(self, *labels: Atoms | None) -> Atoms | None:
        """Force positions to agree across labels of one length; where one is None the others are frozen."""
        given = [label for label in labels if label is not None]
        if len(given) < len(labels):
            self.freeze(given, "meets a tensor whose channels are fixed")
        for other in given[1:]:
            self.edges.append((given[0], other))
        return given[0] if given else None

    def contract(self, left: tuple[Ref, Atoms | None], right: tuple[Ref, Atoms | None]) -> None:
        """Two dimensions are multiplied and summed over; the parameter among them is what reads the channel."""
        for ref, label in (left, right):
            if label is not None and self.is_static(ref):
                self.read.append(label)
        if left[1] is None or right[1] is None:
            static = all(label is None or self.is_static(ref) for ref, label in (left, right))
            reason = "reads the model's input" if static else "is summed with fixed weights"
            self.freeze([left[1], right[1]], reason, report=not static)
            return
        self.edges.append((left[1], right[1]))

    def freeze(self, labels: Iterable[Atoms | None], reason: str, *, report: bool = True) -> None:
        """Keep these atoms for good; with `report` the present op is named as the cause."""
        for label in labels:
            if label is not None:
                self.frozen.append(Frozen(label, reason, self._op if report else None))

    def attribute(self, name: str, size: int) -> Atoms:
        """Atoms of an integer module attribute that counts `size` things, cut like a dimension."""
        return self.places.setdefault((name, COUNT), self.fresh(size))

    def _place(self, place: Place, size: int) -> Atoms | None:
        if size <= 1:  # nothing of a single position can be cut
            return None
        if place not in self.places:
            self.places[place] = self.fresh(size)
        return self.places[place]

    def fresh(self, size: int) -> Atoms:
        """New atoms, of no parameter yet."""
        self.num_atoms += size
        return np.arange(self.num_atoms - size, self.num_atoms, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Channels:
    """Connected atoms: `of[atom]` is the channel's number, `group[channel]` its group or -1, `rank` its place there."""

    of: NDArray[np.int64]
    group: NDArray[np.int64]
    rank: NDArray[np.int64]


def connect(coupling: Coupling) -> Channels:
    """Channels that occupy the same places equally often form one group; frozen ones form none."""
    size = coupling.num_atoms
    pairs = [np.stack([a, b]) for a, b in coupling.edges] or [np.zeros((2, 0), np.int64)]
    left, right = np.concatenate(pairs, axis=1)
    links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
    count, of = connected_components(links, directed=False)
    free = np.ones(count, dtype=bool)
    for frozen in coupling.frozen:
        free[of[frozen.atoms]] = False
    read = np.zeros(size, dtype=bool)
    for atoms in coupling.read:
        read[atoms] = True
    # Random 64-bit marks summed over places: equal sums mean equal places, but for a 2**-64 chance.
    marks = np.random.default_rng(0).integers(1, 2**63, size=(len(coupling.places), 2), dtype=np.uint64)
    signature = np.zeros(count, dtype=np.uint64)
    readers, makers = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for place_marks, atoms in zip(marks, coupling.places.values(), strict=True):
        reads = read[atoms]
        np.add.at(signature, of[atoms], place_marks[reads.astype(np.int64)])
        readers[of[atoms[reads]]] = True
        makers[of[atoms[~reads]]] = True
    free &= readers & makers
    group = np.full(count, -1, dtype=np.int64)
    rank = np.zeros(count, dtype=np.int64)
    _, members, sizes = np.unique(signature[free], return_inverse=True, return_counts=True)
    group[free] = np.where(sizes[members] > 1, members, -1)  # a single channel can never go
    for number in np.unique(group[group >= 0]):
        inside = group == number
        rank[inside] = np.arange(inside.sum())
    return Channels(of.astype(np.int64), group, rank)
