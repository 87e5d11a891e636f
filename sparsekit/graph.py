"""trace(model, example_inputs) -> ChannelGraph: the groups of coupled channels, and what is locked and why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparsekit.coupling import Channels, Coupling, Product, connect
from sparsekit.errors import TraceError
from sparsekit.plan import ChannelGroup, Slot
from sparsekit.probe import probe
from sparsekit.record import Recording, Ref, on_meta, record
from sparsekit.rules import RULES, follow

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class CostTerm:
    """`scale` times the product of sizes that follow the number of channels kept.

    Each size is `fixed + sum(count[g] * per_channel[g])` over group numbers g.
    """

    name: str
    scale: float
    sizes: tuple[tuple[int, dict[int, int]], ...]


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
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]
    macs: tuple[CostTerm, ...]
    params: tuple[CostTerm, ...]
    uncounted: tuple[str, ...]


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Record one forward pass of `model` in eval mode and derive its channel groups.

    The model is neither run nor changed: a copy without storage is, or a real one where the forward needs values. A
    network with parameters that only the training pass uses (auxiliary heads) is recorded in both modes.

    Args:
        model: any nn.Module; its source needs no edits.
        example_inputs: the forward's positional inputs, a tensor or a tuple; batch first.

    Raises:
        TraceError: the forward fails on the example inputs.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    twin = on_meta(model)
    recordings = _recordings(twin, inputs)
    if recordings[0].error is not None:  # the forward needs values, or mixes in tensors that are no parameters
        twin = copy.deepcopy(model).cpu()
        recordings = _recordings(twin, inputs)
    error = recordings[0].error
    if error is not None:
        raise TraceError(f"forward fails on the example inputs: {type(error).__name__}: {error}") from error
    coupling = Coupling()
    trails = [follow(recordings[0], coupling)]
    calls = tuple(coupling.macs)  # of the eval pass: what only training runs costs nothing at inference
    trails += [follow(recording, coupling) for recording in recordings[1:]]
    while True:
        channels = connect(coupling)
        groups = _groups(coupling, channels, recordings)
        broken = probe(twin, groups, channels, recordings, trails, inputs)
        if broken is None:
            break
        coupling.frozen.append(broken)
    return _graph(model, coupling, channels, groups, recordings[0], calls, _batch_size(inputs))


def _recordings(twin: nn.Module, inputs: tuple[Any, ...]) -> list[Recording]:
    """The pass in eval mode, and the one in training mode where that alone uses some parameters."""
    evaluated = record(twin.eval(), inputs)
    used = {ref.index for op in evaluated.ops for ref in op.tensors()}
    idle = [name for name, _ in twin.named_parameters() if evaluated.states[name].index not in used]
    if not idle or evaluated.error is not None:
        return [evaluated]
    training = record(copy.deepcopy(twin).train(), inputs)
    if training.error is None:
        return [evaluated, training]
    log.warning("%s: unused in eval mode, and the training pass fails: %s", idle[0], training.error)
    return [evaluated]


def _batch_size(inputs: tuple[Any, ...]) -> int:
    return next((x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1), 1)


def _groups(coupling: Coupling, channels: Channels, recordings: list[Recording]) -> dict[int, ChannelGroup]:
    """Group number -> group, ordered and named by the first layer that makes its channels."""
    slots: dict[int, list[Slot]] = {}
    read = np.zeros(coupling.num_atoms, dtype=bool)
    for atoms in coupling.read:
        read[atoms] = True
    for (tensor, dim), atoms in coupling.places.items():
        numbers = channels.group[channels.of[atoms]]
        for number in np.unique(numbers[numbers >= 0]):
            positions = np.flatnonzero(numbers == number)
            ranks = channels.rank[channels.of[atoms[positions]]]
            ordered = positions[np.argsort(ranks, kind="stable")]
            index = torch.from_numpy(ordered.reshape(int(ranks.max()) + 1, -1))
            slots.setdefault(int(number), []).append(Slot(tensor, dim, index, bool(read[atoms[positions[0]]])))
    added = np.zeros(len(channels.group), dtype=bool)
    for atoms in coupling.added:
        added[channels.of[atoms]] = True
    order = _first_use(recordings)
    makers = {
        number: min(_makers(found), key=lambda name: order.get(name, len(order))) for number, found in slots.items()
    }
    groups: dict[int, ChannelGroup] = {}
    taken: dict[str, int] = {}
    for number in sorted(slots, key=lambda number: order.get(makers[number], len(order))):
        path = makers[number].rpartition(".")[0] or makers[number]
        taken[path] = taken.get(path, 0) + 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        residual = bool(added[channels.group == number].any())
        size = slots[number][0].index.shape[0]
        groups[number] = ChannelGroup(name, size, tuple(slots[number]), residual=residual)
    return groups


def _makers(slots: Iterable[Slot]) -> list[str]:
    """Tensors that make a group's channels, weights of layers before per-channel vectors."""
    names = [slot.tensor for slot in slots if not slot.read]
    return [name for name in names if name.endswith("weight")] or names


def _first_use(recordings: list[Recording]) -> dict[str, int]:
    when: dict[int, int] = {}
    for op in recordings[0].ops:
        for ref in op.tensors():
            when.setdefault(ref.index, len(when))
    return {name: when[ref.index] for name, ref in recordings[0].states.items() if ref.index in when}


def _graph(
    model: nn.Module,
    coupling: Coupling,
    channels: Channels,
    groups: dict[int, ChannelGroup],
    evaluated: Recording,
    calls: tuple[Product, ...],
    batch_size: int,
) -> ChannelGraph:
    numbers = {number: position for position, number in enumerate(groups)}
    macs = tuple(_term(call, channels, numbers, 1 / batch_size) for call in calls)
    parameters = dict(model.named_parameters())
    params = tuple(_term(_numel(name, evaluated.states[name], coupling), channels, numbers, 1.0) for name in parameters)
    uncounted = {op.name for op in evaluated.ops if op.name not in RULES and op.tensors()}
    return ChannelGraph(
        model,
        tuple(groups.values()),
        _refusals(coupling, channels, calls),
        macs,
        params,
        tuple(sorted(uncounted)),
    )


def _numel(name: str, ref: Ref, coupling: Coupling) -> Product:
    dims = tuple(coupling.places.get((name, dim), size) for dim, size in enumerate(ref.shape))
    return Product(name, 1.0, dims)


def _term(product: Product, channels: Channels, numbers: dict[int, int], factor: float) -> CostTerm:
    sizes: list[tuple[int, dict[int, int]]] = []
    for dim in product.dims:
        if isinstance(dim, int):
            sizes.append((dim, {}))
            continue
        found, counts = np.unique(channels.group[channels.of[dim]], return_counts=True)
        fixed = int(counts[found < 0].sum())
        per_channel = {
            numbers[int(group)]: int(count) // int((channels.group == group).sum())
            for group, count in zip(found, counts, strict=True)
            if group >= 0
        }
        sizes.append((fixed, per_channel))
    return CostTerm(product.name, product.scale * factor, tuple(sizes))


def _refusals(coupling: Coupling, channels: Channels, calls: tuple[Product, ...]) -> tuple[Refusal, ...]:
    """One row per line of the user's code, operator and reason, with the MACs of the layers it locks."""
    locked: dict[tuple[str, str, str, str], NDArray[np.bool_]] = {}
    for frozen in coupling.frozen:
        if frozen.op is not None and len(frozen.atoms) > 0:
            key = (frozen.op.module, frozen.op.source, frozen.op.name, frozen.reason)
            channel = locked.setdefault(key, np.zeros(len(channels.group), dtype=bool))
            channel[channels.of[frozen.atoms]] = True
    sizes = [
        call.scale * np.prod([d if isinstance(d, int) else len(d) for d in call.dims], dtype=float) for call in calls
    ]
    total = sum(sizes) or 1.0
    rows = []
    for key, channel in locked.items():
        held = [
            any(not isinstance(dim, int) and channel[channels.of[dim]].any() for dim in call.dims) for call in calls
        ]
        share = sum(size for size, hit in zip(sizes, held, strict=True) if hit) / total
        rows.append(Refusal(*key, macs_share=float(share)))
    return tuple(sorted(rows, key=lambda row: -row.macs_share))
