"""What the edges and products of a coupling connect: components of atoms, and which are products of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sparsekit.coupling import Coupling

_NONE = -1
_MAX_DEPTH = 8
_MAX_FACTORS = 4


@dataclass(frozen=True, eq=False)
class Components:
    """What a coupling's edges and products connect, which no mark changes.

    Attributes:
        of: int64 [num_atoms, f], the channels that own each atom, -1 where there are fewer than f.
        product: bool [num_components], made of others, and so no channel.
        tangled: bool [num_components], see `Channels`.
    """

    of: NDArray[np.int64]
    product: NDArray[np.bool_]
    tangled: NDArray[np.bool_]


def components(coupling: Coupling) -> Components:
    """Its connected components and what is a product of others."""
    component, factors = _components(coupling)
    leaves, tangled = _leaves(factors)
    of = leaves[component]
    owners = np.zeros(len(factors) + 1, dtype=bool)
    owners[of[tangled[component]]] = True
    return Components(of, factors[:, 0] >= 0, owners[:-1] | tangled)


def _components(coupling: Coupling) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Component of every atom, and int64 [num_components, f] the factors of each that is a product, else -1.

    A component that is a product in two ways has the factors of both united, column by column.
    """
    firsts = coupling.firsts()
    own = firsts == np.arange(coupling.num_atoms)
    node = (np.cumsum(own) - 1)[firsts]  # most atoms are those of a place that agrees with others
    size = int(own.sum())
    edges = [np.stack([np.concatenate(ends) for ends in zip(*coupling.edges, strict=True)])] if coupling.edges else []
    width = max((factored.rows.shape[1] for factored in coupling.factored), default=1)
    products = [
        np.pad(
            np.concatenate([factored.atoms[:, None], factored.rows], axis=1),
            ((0, 0), (0, width - factored.rows.shape[1])),
            constant_values=_NONE,
        )
        for factored in coupling.factored
    ]
    table = np.concatenate(products) if products else np.zeros((0, 1 + width), np.int64)
    while True:
        left, right = node[np.concatenate([*edges, np.zeros((2, 0), np.int64)], axis=1)]
        links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
        count, component = connected_components(links, directed=False)
        component = component.astype(np.int64)[node]
        padded = np.append(component, _NONE)
        rows = _distinct(padded[table])
        clash = _clashes(rows)
        if not clash.size:
            factors = np.full((count, width), _NONE, dtype=np.int64)
            factors[rows[:, 0]] = rows[:, 1:]
            return component, factors
        first = np.zeros(count, dtype=np.int64)  # an atom of each component
        first[component] = np.arange(len(component))
        edges.append(first[clash])


def _distinct(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted rows, each once; ten times faster than numpy's own."""
    rows = rows[np.lexsort(rows.T[::-1])]
    new = np.append(True, (rows[1:] != rows[:-1]).any(axis=1))[: len(rows)]
    distinct: NDArray[np.int64] = rows[new]
    return distinct


def _clashes(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs [2, n] of components that must be one, where a component is a product in several ways or of itself."""
    pairs = []
    again = np.flatnonzero(rows[1:, 0] == rows[:-1, 0])
    for upper, lower in ((again, again + 1),) if len(again) else ():
        same_arity = ((rows[upper] >= 0) == (rows[lower] >= 0)).all(axis=1)
        for column in range(1, rows.shape[1]):
            a, b = rows[upper, column], rows[lower, column]
            known = same_arity & (a >= 0)
            pairs.append(np.stack([a[known], b[known]]))
        for row in np.concatenate([rows[upper[~same_arity]], rows[lower[~same_arity]]]):
            pairs += [np.array([[row[1]], [factor]]) for factor in row[2:] if factor >= 0]
        odd = ~same_arity
        pairs.append(np.stack([rows[upper[odd], 1], rows[lower[odd], 1]]))
    itself = (rows[:, 1:] == rows[:, :1]).any(axis=1)
    for row in rows[itself]:
        pairs += [np.array([[row[0]], [factor]]) for factor in row[1:] if factor >= 0]
    if not pairs:
        return np.zeros((2, 0), np.int64)
    found = np.concatenate(pairs, axis=1)
    return found[:, found[0] != found[1]]


def _leaves(factors: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """int64 [num_components, f], the channels each component is the product of; a channel is its own.

    And bool [num_components], those of a product that goes in circles or has too many factors: none of them can go.
    """
    count, arity = factors.shape
    alone = np.pad(np.arange(count, dtype=np.int64)[:, None], ((0, 0), (0, arity - 1)), constant_values=_NONE)
    composite = np.append(factors[:, 0] >= 0, False)
    step = np.append(np.where(composite[:-1, None], factors, alone), np.full((1, arity), _NONE), axis=0)
    tangled = np.zeros(count + 1, dtype=bool)
    rows = np.flatnonzero(composite)  # few: the others are their own
    leaves = rows[:, None]
    for _ in range(_MAX_DEPTH):
        if not composite[leaves].any():
            break
        leaves = _without_empty(step[leaves].reshape(len(rows), -1))
        wide = (leaves >= 0).sum(axis=1) > _MAX_FACTORS
        tangled[leaves[wide]] = True
        leaves = _without_empty(np.where(wide[:, None], alone[rows, :1], leaves))
        step[rows[wide]] = alone[rows[wide]]
        composite[rows[wide]] = False
    circular = composite[leaves].any(axis=1)
    tangled[leaves[circular]] = True
    tangled[rows[circular]] = True
    result = np.full((count, leaves.shape[1] if len(rows) else 1), _NONE, dtype=np.int64)
    result[:, 0] = np.arange(count)
    result[rows] = leaves
    return result, tangled[:-1]


def _without_empty(leaves: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each channel once, entries moved to the left, columns that hold none dropped."""
    leaves = leaves.copy()
    for column in range(1, leaves.shape[1]):
        leaves[(leaves[:, :column] == leaves[:, column : column + 1]).any(axis=1), column] = _NONE
    order = np.argsort(leaves < 0, axis=1, kind="stable")
    packed = np.take_along_axis(leaves, order, axis=1)
    return packed[:, : max(1, int((packed >= 0).sum(axis=1).max(initial=1)))]
