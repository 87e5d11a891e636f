"""What a network costs as a function of how many channels each group keeps: MACs, parameters, channels.

Ops that no rule knows are listed in `ChannelGraph.uncounted`, never counted as zero in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import nn

from sparsekit.budget import MEASURED, Budget, Limit, Metric
from sparsekit.graph import ChannelGraph, CostTerm
from sparsekit.plan import ChannelGroup

Counts = NDArray[np.int64]  # channels kept per group, in the order of `ChannelGraph.groups`


class Cost:
    """One metric of one graph, evaluated as sums of products so that a search may call it thousands of times."""

    def __init__(self, terms: tuple[CostTerm, ...], sizes: Counts) -> None:
        num_groups, self._sizes = len(sizes), sizes
        self._scale = np.array([term.scale for term in terms])
        self._num_sizes = max((len(term.sizes) for term in terms), default=1)
        products: dict[tuple[int, ...], int] = {(): 0}  # group numbers -> its column
        rows, columns, values = [], [], []
        for number, term in enumerate(terms):
            for position in range(self._num_sizes):
                size = term.sizes[position] if position < len(term.sizes) else {(): 1.0}
                for groups, per_channel in size.items():
                    rows.append(number * self._num_sizes + position)
                    columns.append(products.setdefault(groups, len(products)))
                    values.append(per_channel)
        width = max(map(len, products))
        # A product of fewer groups is padded with one more count, which is always 1.
        self._groups = np.array(
            [[*groups, *[num_groups] * (width - len(groups))] for groups in products], dtype=np.int64
        )
        shape = (len(terms) * self._num_sizes, len(products))
        self._per_channel = csr_array((values, (rows, columns)), shape=shape)

    def __call__(self, counts: Counts) -> float:
        """The metric when group g keeps `counts[g]` channels."""
        sizes = self._per_channel @ np.append(counts, 1)[self._groups].prod(axis=1)
        return float(self._scale @ sizes.reshape(-1, self._num_sizes).prod(axis=1))

    def along(self, counts: Counts, group: int) -> NDArray[np.float64]:
        """[size of the group], the metric by the group's width, from 1, the others as in `counts`."""
        # A product of sizes, each of degree 1 in a group's count: a polynomial, known from a few of its values.
        widths = np.arange(1, self._sizes[group] + 1)
        nodes = np.unique(np.linspace(1, self._sizes[group], self._num_sizes + 1).round().astype(np.int64))
        tried = np.repeat(counts[None], len(nodes), axis=0)
        tried[:, group] = nodes
        values = [self(row) for row in tried]
        if len(nodes) == 1:
            return np.array(values)
        return Polynomial.fit(nodes, values, len(nodes) - 1)(widths)


class Costs:
    """Every metric that follows from channel counts alone."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph

    @cached_property
    def dense(self) -> Counts:
        """All channels kept."""
        return np.array([group.size for group in self._graph.groups], dtype=np.int64)

    @cached_property
    def _costs(self) -> dict[Metric, Cost]:
        channels = (CostTerm("channels", 1.0, ({(g,): 1.0},)) for g in range(len(self._graph.groups)))
        return {
            Metric.NUM_MACS: Cost(self._graph.macs, self.dense),
            Metric.NUM_PARAMS: Cost(self._graph.params, self.dense),
            Metric.CHANNELS: Cost(tuple(channels), self.dense),
        }

    def __getitem__(self, metric: Metric) -> Cost:
        """One of them."""
        return self._costs[metric]

    def __call__(self, metric: Metric, counts: Counts) -> float:
        """`metric` when group g keeps `counts[g]` channels; MACs are per example."""
        return self._costs[metric](counts)

    def counts(self, kept: Mapping[ChannelGroup, int]) -> Counts:
        """Channels kept per group, those not named keeping all."""
        return np.array([kept.get(group, group.size) for group in self._graph.groups], dtype=np.int64)


def absolute(budget: Budget, graph: ChannelGraph) -> Budget:
    """`budget` with the fractions in it taken of this graph's costs; those of a file's stay fractions."""
    limits = (
        limit
        if limit.metric in MEASURED
        else Limit(limit.metric, limit.resolve(_dense(limit.metric, graph)), relative=False)
        for limit in budget.limits
    )
    return replace(budget, limits=tuple(limits))


def _dense(metric: Metric, graph: ChannelGraph) -> float:
    if metric is Metric.NUM_NONZERO:
        return sum(weight.numel() for weight in prunable_weights(graph).values())
    costs = Costs(graph)
    return costs(metric, costs.dense)


def prunable_weights(graph: ChannelGraph) -> dict[str, nn.Parameter]:
    """Name -> parameter of two or more dimensions that a layer multiplies with: what unstructured methods zero.

    These read a channel group, or are the `weight` of a module that multiplies and sums, or of one inside it that
    lends it its weight, as attention's output projection does. Biases, normalisation and embeddings are not among
    them, nor is what a module computes its weight from (weight norm and other parametrisations).
    """
    reading = {slot.tensor for group in graph.groups for slot in group.slots if slot.read}
    multiplying = {term.name for term in graph.macs}
    weights = {}
    for name, parameter in graph.model.named_parameters():
        owner = name.rpartition(".")[0]
        multiplies = name.endswith("weight") and not multiplying.isdisjoint((owner, owner.rpartition(".")[0]))
        if parameter.dim() > 1 and (name in reading or multiplies):
            weights[name] = parameter
    return weights


def num_nonzero(graph: ChannelGraph) -> int:
    """How many of the prunable weights are not zero."""
    return sum(int(weight.count_nonzero()) for weight in prunable_weights(graph).values())


def num_macs(graph: ChannelGraph, kept: Mapping[ChannelGroup, int] | None = None) -> int:
    """Multiply-accumulates of one example when groups keep `kept` channels (all where not named)."""
    costs = Costs(graph)
    return round(costs(Metric.NUM_MACS, costs.counts(kept or {})))


def num_params(graph: ChannelGraph, kept: Mapping[ChannelGroup, int] | None = None) -> int:
    """Parameters when groups keep `kept` channels (all where not named)."""
    costs = Costs(graph)
    return round(costs(Metric.NUM_PARAMS, costs.counts(kept or {})))


def term_value(term: CostTerm, graph: ChannelGraph) -> int:
    """One term of a cost when every channel is kept, such as the MACs of one layer."""
    dense = Costs(graph).dense
    return round(Cost((term,), dense)(dense))
