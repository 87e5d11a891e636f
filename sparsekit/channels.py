"""What a coupling says in the end: channels, and the groups of channels that are interchangeable.

Connected atoms form a component. A component that is a product lives if all its factors do; a component that is none
is a channel, the thing that can be cut. Channels that occupy the same places equally often, beside the same
partners and under the same conditions, form a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparsekit.components import Components
from sparsekit.coupling import Coupling, Label
from sparsekit.plan import COUNT

_NONE = -1


@dataclass(frozen=True, eq=False)
class Channels:
    """Connected atoms.

    Attributes:
        of: int64 [num_atoms, f], the channels that own each atom, -1 where there are fewer than f.
        group: int64 [num_components], the number of each channel's group, or -1.
        rank: int64 [num_components], its place in the group.
        silent, exact, fixed: bool [num_components], see `ChannelGroup`.
        tangled: bool [num_components], factors of a dimension that is split in ways that do not fit together.
    """

    of: NDArray[np.int64]
    group: NDArray[np.int64]
    rank: NDArray[np.int64]
    silent: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    fixed: NDArray[np.bool_]
    tangled: NDArray[np.bool_]

    def owners(self, label: Label) -> NDArray[np.int64]:
        """int64 [size, n], the channels of which every one must live for a position of `label` to live; -1 is none."""
        owners: NDArray[np.int64] = self.of[label].reshape(len(label), label.shape[1] * self.of.shape[1])
        return owners

    def group_of(self, label: Label) -> NDArray[np.int64]:
        """int64 [size, n], the groups of the owners; -1 where there is none or it cannot be cut."""
        return self._padded_group[self.owners(label)]

    def locked(self, label: Label) -> NDArray[np.bool_]:
        """bool [size], where no owner of a position can be cut."""
        locked: NDArray[np.bool_] = np.all(self.group_of(label) < 0, axis=1)
        return locked

    def positions(self, labels: Sequence[Label]) -> list[dict[int, NDArray[np.int64]]]:
        """Per label, group number -> int64 [C, k], the positions that each of the group's channels owns."""
        found: list[dict[int, NDArray[np.int64]]] = [{} for _ in labels]
        for which, at, _, owners in owned(labels, self.of):
            numbers = self._padded_group[owners]
            row, column = np.nonzero(numbers >= 0)
            which, at = which[row], at[row]
            number, rank = numbers[row, column], self.rank[owners[row, column]]
            # Rows come sorted by label and position: one stable sort by one number does the rest.
            order = np.argsort((which * len(self.group) + number) * len(self.group) + rank, kind="stable")
            which, number = which[order], number[order]
            starts = np.flatnonzero((np.diff(which, prepend=-1) != 0) | (np.diff(number, prepend=-1) != 0))
            for inside, first in zip(np.split(order, starts[1:]), starts, strict=False):  # of none, one empty piece
                index = at[inside].reshape(int(rank[inside[-1]]) + 1, -1)
                found[which[first]][int(number[first])] = index
        return found

    def groups_in(self, those: NDArray[np.bool_]) -> set[int]:
        """The groups that have a channel among `those`, bool [num_components]."""
        return set(np.unique(self.group[those]).tolist()) - {_NONE}

    def owning(self, labels: Sequence[Label]) -> NDArray[np.bool_]:
        """bool [num_components], the channels that own any position of these."""
        owning = np.zeros(len(self.group) + 1, dtype=bool)
        for label in labels:
            owning[self.owners(label)] = True
        result: NDArray[np.bool_] = owning[:-1]
        return result

    def alive(self, label: Label, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [size], the positions that live where `alive` [num_components] says which channels do."""
        living: NDArray[np.bool_] = np.all(np.append(alive, True)[self.owners(label)], axis=1)
        return living

    @cached_property
    def _padded_group(self) -> NDArray[np.int64]:
        return np.append(self.group, _NONE)  # owner -1 reads the last entry


def connect(coupling: Coupling, components: Components, *, renormalise: bool) -> Channels:
    """The channels of a coupling; those that are normalised together may go only with `renormalise`."""
    of, tangled = components.of, components.tangled
    count = len(tangled)

    def those(marked: list[Label]) -> NDArray[np.bool_]:
        hit = np.zeros(count + 1, dtype=bool)
        if marked:
            hit[of[np.concatenate([label.ravel() for label in marked])]] = True
        return hit[:-1]

    is_place = np.zeros(coupling.num_atoms, dtype=bool)
    for (_, dim), label in coupling.places.items():
        if dim != COUNT:
            is_place[label] = True
    # A parameter that is reshaped before it reads has other atoms there than in its own place.
    moved = [label for label in coupling.read if not is_place[label].all()]
    silent = those([mark.atoms for mark in coupling.silent] + moved)
    divisors = those(coupling.divisors)
    # What cannot be silenced is as good as normalised together.
    inexact = those([mark.atoms for mark in coupling.renormalised]) | (silent & divisors)
    silent &= ~divisors
    fixed = those([mark.atoms for mark in coupling.fixed])
    free = ~those([mark.atoms for mark in coupling.frozen]) & ~tangled
    if not renormalise:
        free &= ~inexact
    signature, made, read = _signatures(coupling, of, count, silent * 4 + inexact * 2 + fixed)
    free &= made & (read | silent | inexact)
    free &= ~components.product  # a product is no channel
    group = np.full(count, _NONE, dtype=np.int64)
    rank = np.zeros(count, dtype=np.int64)
    _, members, sizes = np.unique(signature[free], return_inverse=True, return_counts=True)
    group[free] = np.where(sizes[members] > 1, members, _NONE)  # a single channel can never go
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], group[order])
    rank[order] = np.arange(count) - starts
    return Channels(of, group, rank, silent, ~inexact, fixed, tangled)


def _signatures(
    coupling: Coupling, of: NDArray[np.int64], count: int, kinds: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Per component a number that says which places it occupies and how, whether it is made and whether it is read.

    Random 64-bit marks summed over places: equal sums mean equal places, but for a 2**-64 chance.
    """
    is_read = np.zeros(coupling.num_atoms, dtype=bool)
    for label in coupling.read:
        is_read[label] = True
    random = np.random.default_rng(0)
    identity = np.append(random.integers(1, 2**63, size=count, dtype=np.uint64), np.uint64(0))
    signature = np.zeros(count + 1, dtype=np.uint64)
    signature[:-1] = random.integers(1, 2**63, size=8, dtype=np.uint64)[kinds]
    made, read = np.zeros(count + 1, dtype=bool), np.zeros(count + 1, dtype=bool)
    for which, _, rows, owners in owned([*coupling.places.values()], of):
        reads = is_read[rows].all(axis=1)
        marks = random.integers(1, 2**63, size=(len(coupling.places) * 2, owners.shape[1]), dtype=np.uint64)
        amounts = marks[which * 2 + reads]
        if owners.shape[1] > 1:
            partners = identity[owners]
            amounts *= (partners.sum(axis=1, keepdims=True) - partners) * 2 + 1
        np.add.at(signature, owners.ravel(), amounts.ravel())  # flat, it is seven times faster
        read[owners[reads]] = True
        made[owners[~reads]] = True
    return signature[:-1], made[:-1], read[:-1]


def owned(
    labels: Sequence[Label], of: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Label, NDArray[np.int64]]]:
    """The positions of many labels at once, which is much faster than label by label.

    For each position its label's number, its place there, its atoms, and their owners in `of`, int64 [n, k], -1 where
    there are fewer. All positions of a label come together and in order; labels whose positions have one owner each
    come with k = 1.
    """
    for width in sorted({label.shape[1] for label in labels}):
        numbers = np.array([number for number, label in enumerate(labels) if label.shape[1] == width])
        sizes = np.array([len(labels[number]) for number in numbers])
        rows = np.concatenate([labels[number] for number in numbers])
        which = np.repeat(numbers, sizes)
        at = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if width * of.shape[1] == 1:
            yield which, at, rows, of[rows[:, 0]]
            continue
        several = np.full(len(labels), width > 1)
        if width == 1:
            several[which[of[rows[:, 0], 1] >= 0]] = True
        for columns, those in ((of[:, :1], ~several[which]), (of, several[which])):
            if those.any():
                owners = columns[rows[those]]
                yield which[those], at[those], rows[those], owners.reshape(len(owners), width * columns.shape[1])
