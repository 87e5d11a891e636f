"""What a network's layers take together, as a function of how many channels each group keeps.

Fast enough to be asked thousands of times by a search.
"""

# T layers with a table, D sizes of a layer that follow counts, K grid lines, C counts of one group
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sparsekit.cost import Costs, Counts
from sparsekit.graph import ChannelGraph, Size
from sparsekit.interpolation import WidthTable

Array = NDArray[np.float64]


class Latencies:
    """The latency of one graph's layers, from their width tables.

    Layers without a table take no time here, nor does what lies between layers.

    Attributes:
        terms: what takes time, `graph.timed`.
    """

    def __init__(self, graph: ChannelGraph, tables: Sequence[WidthTable | None]) -> None:
        """
        Args:
            graph: the network.
            tables: per term of `graph.timed`, as `measure_tables` returns them.
        """
        self.terms = graph.timed
        self._num_terms = len(tables)
        self._dense = Costs(graph).dense
        self._numbers = [number for number, table in enumerate(tables) if table is not None]
        found = [table for table in tables if table is not None]
        # Only the sizes that vary count: the other dimensions of a table's values have length 1.
        self._bases = [[table.bases[axis] for axis in table.shape.axes] for table in found]
        self._values = [
            table.values_ms.reshape([base.shape[1] for base in bases])
            for table, bases in zip(found, self._bases, strict=True)
        ]
        self._sizes = [
            [graph.timed[number].sizes[axis] for axis in table.shape.axes]
            for number, table in zip(self._numbers, found, strict=True)
        ]
        self._touching: list[list[int]] = [[] for _ in graph.groups]
        for term, sizes in enumerate(self._sizes):
            for group in {group for size in sizes for groups in size for group in groups}:
                self._touching[group].append(term)
        self._depth = max(map(len, self._sizes), default=0)
        self._stack_sizes()
        self._stack_tables()

    def _stack_sizes(self) -> None:
        """All sizes as one product of a sparse matrix with products of counts."""
        products: dict[tuple[int, ...], int] = {(): 0}  # group numbers -> its column
        entries = [
            (term * self._depth + axis, products.setdefault(groups, len(products)), per_channel)
            for term, sizes in enumerate(self._sizes)
            for axis, size in enumerate(sizes)
            for groups, per_channel in size.items()
        ]
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        shape = (len(self._sizes) * self._depth, len(products))
        self._per_channel = csr_array((np.array(values, dtype=float), (rows, columns)), shape=shape)
        width = max(map(len, products))
        one = len(self._dense)  # a product of fewer groups is padded with one more count, which is always 1
        padded = [[*groups, *[one] * (width - len(groups))] for groups in products]
        self._groups = np.array(padded, dtype=np.int64)

    def _stack_tables(self) -> None:
        """All tables in arrays of one shape, padded with sizes of a single grid line."""
        num_lines = max((base.shape[1] for bases in self._bases for base in bases), default=1)
        rows, starts, num_rows = [np.eye(1, num_lines)], {}, 1
        for base in {id(base): base for bases in self._bases for base in bases}.values():
            starts[id(base)] = num_rows
            num_rows += len(base)
            rows.append(np.pad(base, ((0, 0), (0, num_lines - base.shape[1]))))
        self._rows = np.concatenate(rows)
        self._starts_TD = np.zeros((len(self._bases), self._depth), dtype=np.int64)
        self._values_TK = np.zeros((len(self._values), *[num_lines] * self._depth))
        for term, (bases, values) in enumerate(zip(self._bases, self._values, strict=True)):
            self._starts_TD[term, : len(bases)] = [starts[id(base)] for base in bases]
            shape = [*values.shape, *[1] * (self._depth - values.ndim)]
            corner: tuple[int | slice, ...] = (term, *(slice(length) for length in shape))
            self._values_TK[corner] = values.reshape(shape)

    def per_layer(self, counts: Counts) -> Array:
        """Milliseconds per term of `graph.timed`, 0 where no table is, when group g keeps `counts[g]` channels."""
        sizes = self._per_channel @ np.append(counts, 1)[self._groups].prod(axis=1)
        sizes_TD = np.rint(sizes).astype(np.int64).reshape(self._starts_TD.shape)
        rows_TDK = self._rows[self._starts_TD + sizes_TD]
        per_term = np.zeros(self._num_terms)
        per_term[self._numbers] = _contract(self._values_TK, list(rows_TDK.swapaxes(0, 1)))
        return per_term

    def __call__(self, counts: Counts) -> float:
        """Milliseconds of all layers when group g keeps `counts[g]` channels."""
        return float(self.per_layer(counts).sum())

    def along(self, counts: Counts, group: int) -> Array:
        """Milliseconds of the layers that a group's width changes, at its widths 1 to C, the others at `counts`."""
        width_C = np.arange(1, self._dense[group] + 1)
        total_C = np.zeros(len(width_C))
        for term in self._touching[group]:
            values, rows = self._values[term], []
            for size, base in zip(self._sizes[term], self._bases[term], strict=True):
                if any(group in groups for groups in size):
                    rows.append(base[_sizes_along(size, counts, group, width_C)])
                else:
                    values = np.moveaxis(values, len(rows), -1) @ base[_sizes_along(size, counts, group, 0)]
            total_C += _contract(values, rows)
        return total_C


def _sizes_along(size: Size, counts: Counts, group: int, width: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """The size when `group` keeps `width` channels and the others `counts`."""
    total = sum(
        per_channel * math.prod(int(counts[g]) for g in groups if g != group) * width ** groups.count(group)
        for groups, per_channel in size.items()
    )
    return np.rint(total).astype(np.int64)


def _contract(values: Array, rows: Sequence[Array]) -> Array:
    """Sum over all grid lines of `values`, [K, L, ...] or [C, K, L, ...], times `rows`, [C, K], [C, L] and so on."""
    if len(rows) == values.ndim == 1:
        return np.maximum(rows[0] @ values, 0)
    values = values[None] if values.ndim == len(rows) else values
    for row in rows[::-1]:
        values = (values * row.reshape(len(row), *[1] * (values.ndim - 2), -1)).sum(-1)
    return np.maximum(values, 0)
