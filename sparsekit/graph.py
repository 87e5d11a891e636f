"""trace(model, example_inputs) -> ChannelGraph: the groups of coupled channels, and what is locked and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import nn

from sparsekit.channels import Channels, owned
from sparsekit.copying import states_by_name
from sparsekit.coupling import Coupling, Label, Product
from sparsekit.garbage import paused_collection
from sparsekit.layers import Layer
from sparsekit.plan import ChannelGroup
from sparsekit.record import Ref, check_inputs
from sparsekit.rules import RULES
from sparsekit.survey import Survey, survey


@dataclass(frozen=True)
class Refusal:
    """Channels that are never cut, and what in the forward pass holds them.

    Attributes:
        module: path of the module that ran the op.
        source: "file.py:147", the user's line.
        op: the ATen operator.
        reason: in words.
        macs_share: share in [0, 1] of the network's MACs in layers with a dimension locked by this refusal.
    """

    module: str
    source: str
    op: str
    reason: str
    macs_share: float


Size = dict[tuple[int, ...], float]


@dataclass(frozen=True, eq=False)
class CostTerm:
    """`scale` times the product of sizes that follow the number of channels kept.

    A size is a sum: group numbers -> positions per channel of each. `{(): 3, (0,): 4}` is 3 + 4 count[0], and
    `{(1, 2): 3}` is 3 count[1] count[2], as in packed queries, keys and values of heads x head dims. `layer` is what a
    layer of these sizes computes, None where no one knows how to build one, or what it computes is a constant.
    """

    name: str
    scale: float
    sizes: tuple[Size, ...]
    layer: Layer | None = None


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What may be cut from a network.

    Attributes:
        model: the user's network, never changed.
        groups: coupled channels, in the order in which the forward pass makes them.
        refusals: what is locked, worst first.
        macs: multiply-accumulates per example, a term per layer call.
        params: parameters, a term per tensor.
        uncounted: ops that take tensors and have no rule: their MACs are in no number.
        passes: numbers per example that other ops go over, a term per call: activations, sums, normalisation.
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]
    macs: tuple[CostTerm, ...]
    params: tuple[CostTerm, ...]
    uncounted: tuple[str, ...]
    passes: tuple[CostTerm, ...] = ()

    @property
    def timed(self) -> tuple[CostTerm, ...]:
        """All that takes time: the terms of `macs`, then those of `passes`."""
        return self.macs + self.passes


def trace(model: nn.Module, example_inputs: Any, *, renormalise: bool = False) -> ChannelGraph:
    """Record one forward pass of `model` in eval mode and derive its channel groups.

    The model is neither run nor changed: a copy without storage is, or a real one where the forward needs values. A
    network with parameters that only the training pass uses (auxiliary heads) is recorded in both modes.

    Args:
        model: any nn.Module; its source needs no edits.
        example_inputs: the forward's positional inputs, a tensor or a tuple; batch first.
        renormalise: also offer channels that a LayerNorm, a softmax or a mean runs over, as groups with
            `exact=False`: what is left of them is normalised anew.

    Raises:
        TraceError: the forward fails on the example inputs.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    check_inputs(model, inputs)
    with paused_collection():
        # No name for the survey: it would live until the collector runs again, which would walk all of it.
        return _graph(
            model, survey(model, inputs, renormalise=renormalise), _batch_size(inputs), on_request=not renormalise
        )


def _batch_size(inputs: tuple[Any, ...]) -> int:
    return next((x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1), 1)


def _graph(model: nn.Module, found: Survey, batch_size: int, *, on_request: bool) -> ChannelGraph:
    coupling, channels, groups, calls = found.coupling, found.channels, found.groups, found.calls
    evaluated = found.recordings[0]
    numels = [
        _numel(name, evaluated.states[name], coupling)
        for name, state in states_by_name(found.twin).items()
        if isinstance(state, nn.Parameter)
    ]
    sizes = _Sizes(channels, groups, coupling.first, [*calls, *found.passes, *numels])
    macs = tuple(sizes.term(call, batch_size) for call in calls)
    passes = tuple(sizes.term(product, batch_size) for product in found.passes)
    params = tuple(sizes.term(numel, 1) for numel in numels)
    uncounted = {op.name for op in evaluated.ops if op.name not in RULES and op.tensors}
    refusals = _refusals(coupling, channels, calls, on_request=on_request)
    return ChannelGraph(model, tuple(groups.values()), refusals, macs, params, tuple(sorted(uncounted)), passes)


def _numel(name: str, ref: Ref, coupling: Coupling) -> Product:
    dims = tuple(coupling.places.get((name, dim), size) for dim, size in enumerate(ref.shape))
    return Product(name, 1.0, dims)


class _Sizes:
    """Turns products of labels into products of sizes that follow the channel counts."""

    def __init__(
        self,
        channels: Channels,
        groups: dict[int, ChannelGroup],
        first_of: Callable[[Label], Label],
        products: list[Product],
    ) -> None:
        """`first_of` gives one of all labels that agree."""
        self._first_of = first_of
        self._sizes: dict[int, Size] = {}  # by the id of a label, which many products share
        by_number = np.full(len(channels.group) + 1, -1, dtype=np.int64)
        by_number[list(groups)] = np.arange(len(groups))
        position = by_number[np.append(channels.group, -1)]  # owner -1 reads the last entry
        counts = [float(group.size) for group in groups.values()]
        firsts = (first_of(dim) for product in products for dim in product.dims if not isinstance(dim, int))
        distinct = {id(label): label for label in firsts}
        labels = list(distinct.values())
        for which, _, _, owners in owned(labels, channels.of):
            numbers = np.sort(position[owners], axis=1)
            # One number for each row is much faster to sort than rows.
            keys = (numbers + 1) @ (len(counts) + 1) ** np.arange(numbers.shape[1])
            order = np.lexsort((keys, which))
            new = (np.diff(which[order], prepend=-1) != 0) | (np.diff(keys[order], prepend=-1) != 0)
            starts = np.flatnonzero(new)
            first, amounts = order[starts], np.diff(starts, append=len(order))
            for label_number, row, amount in zip(
                which[first].tolist(), numbers[first].tolist(), amounts.tolist(), strict=True
            ):
                key = tuple(number for number in row if number >= 0)
                size = self._sizes.setdefault(id(labels[label_number]), {})
                size[key] = size.get(key, 0.0) + amount / math.prod(counts[number] for number in key)

    def term(self, product: Product, num_examples: int) -> CostTerm:
        """Per example."""
        layer = product.layer.per_example(num_examples) if product.layer else None
        return CostTerm(product.name, product.scale / num_examples, tuple(map(self._size, product.dims)), layer)

    def _size(self, label: Label | int) -> Size:
        return {(): float(label)} if isinstance(label, int) else self._sizes[id(self._first_of(label))]


def _refusals(
    coupling: Coupling, channels: Channels, calls: tuple[Product, ...], *, on_request: bool
) -> tuple[Refusal, ...]:
    """One row per line of the user's code, operator and reason, with the MACs of the layers it locks.

    What is frozen along one factor while another can still be cut, as the three parts of packed queries, keys and
    values, locks nothing and is not listed. `on_request` lists what `renormalise=True` would offer.
    """
    found: dict[tuple[str, str, str, str], list[Label]] = {}
    for mark in coupling.frozen:
        if mark.op is not None and len(mark.atoms):
            found.setdefault((mark.op.module, mark.op.source, mark.op.name, mark.reason), []).append(mark.atoms)
    for mark in coupling.renormalised if on_request else ():
        if mark.op is not None and (channels.group[channels.owning([mark.atoms])] < 0).any():
            reason = f"{mark.reason}{_ON_REQUEST}"
            found.setdefault((mark.op.module, mark.op.source, mark.op.name, reason), []).append(mark.atoms)
    for factored in coupling.factored:
        if factored.op is not None and channels.tangled[channels.owners(factored.rows)].any():
            key = (factored.op.module, factored.op.source, factored.op.name)
            reason = "splits the channels in ways that do not fit together"
            found.setdefault((*key, reason), []).append(factored.rows)
    if not found or not calls:
        return ()
    # Positions of tokens or kernels are no channels: only what a layer makes or reads can be lost.
    layers = channels.owning([label for call in calls for label in call.weight])
    held = _rows((channels.owning(labels) & layers for labels in found.values()), len(layers))
    locked = _rows((_locked(channels, call.dims) & layers for call in calls), len(layers))
    sizes = [call.scale * np.prod([float(d) if isinstance(d, int) else len(d) for d in call.dims]) for call in calls]
    hits = (held @ locked.T).toarray() > 0
    shares = hits @ (np.array(sizes) / sum(sizes))
    offered = [
        key[-1].endswith(_ON_REQUEST) and bool(count) for key, count in zip(found, np.diff(held.indptr), strict=True)
    ]
    rows = [
        Refusal(*key, macs_share=float(share))
        for key, share, hit, on_request in zip(found, shares, hits, offered, strict=True)
        if hit.any() or on_request
    ]
    return tuple(sorted(rows, key=lambda row: -row.macs_share))


def _rows(masks: Iterable[NDArray[np.bool_]], width: int) -> csr_array:
    """Sparse from the start: calls times channels are gigabytes where a layer is called for every step in time."""
    columns = [np.flatnonzero(mask) for mask in masks]
    starts = np.cumsum([0, *map(len, columns)])
    return csr_array((np.ones(starts[-1], np.int64), np.concatenate(columns), starts), shape=(len(columns), width))


_ON_REQUEST = "; renormalise=True offers them"


def _locked(channels: Channels, dims: Iterable[Label | int]) -> NDArray[np.bool_]:
    """bool [num_components], the owners of positions of which no owner can be cut."""
    labels = [label for label in dims if not isinstance(label, int)]
    return channels.owning([label[channels.locked(label)] for label in labels])
