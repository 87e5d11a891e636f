"""Everything known about a network before a plan: what it did, how its dimensions are coupled, its channel groups."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparsekit.baking import bake_all
from sparsekit.channels import Channels, connect
from sparsekit.components import components
from sparsekit.copying import kept_tensors
from sparsekit.coupling import Coupling, Labels, Mark, Product
from sparsekit.errors import PlanError, TraceError
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.probe import Probe
from sparsekit.record import MetaKernels, Recording, on_meta, record
from sparsekit.rules import follow
from sparsekit.surgery import copied, fresh

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Survey:
    """Attributes:
    twin: the copy of the model that was recorded, its computed weights made plain.
    recordings: the forward pass in eval mode, and in training mode where that alone uses some parameters.
    coupling: what the rules said about them.
    calls: multiply-accumulates of the eval pass: what only training runs costs nothing at inference.
    passes: what else takes time in it.
    channels: what is connected.
    groups: group number -> group.
    """

    twin: nn.Module
    recordings: list[Recording]
    coupling: Coupling
    calls: tuple[Product, ...]
    passes: tuple[Product, ...]
    channels: Channels
    groups: dict[int, ChannelGroup]


def survey(model: nn.Module, inputs: tuple[Any, ...], *, renormalise: bool) -> Survey:
    """Record `model`, follow the rules, and probe what they predict until the forward agrees.

    Raises:
        TraceError: the forward fails on the inputs.
    """
    kernels = MetaKernels()
    twin, recordings = _record(model, inputs, kernels)
    coupling = Coupling()
    labels = [follow(recordings[0], coupling)]
    calls, passes = tuple(coupling.macs), tuple(coupling.passes)
    labels += [follow(recording, coupling) for recording in recordings[1:]]
    probe = Probe(twin, (inputs, for_training(inputs)), recordings, labels, kernels)
    connected, order = components(coupling), _first_use(recordings)
    while True:
        channels = connect(coupling, connected, renormalise=renormalise)
        groups = _groups(coupling, channels, order)
        if probe.agrees(groups, channels, coupling):
            return Survey(twin, recordings, coupling, calls, passes, channels, groups)


def living(
    recordings: list[Recording], plan: PruningPlan, coupling: Coupling
) -> tuple[list[dict[int, Labels]], NDArray[np.bool_]]:
    """The labels of each recording of one model, and bool [num_atoms], which atoms the plan leaves.

    Args:
        recordings: of one model.
        plan: what it keeps.
        coupling: an empty one, which is filled.

    Raises:
        PlanError: the plan has a group that this model does not.
    """
    labels = [follow(recording, coupling) for recording in recordings]
    channels = connect(coupling, components(coupling), renormalise=True)
    used = {name for recording in recordings for name in _first_use([recording])}
    slots = {group: next((slot for slot in group.slots if slot.tensor in used), None) for group in plan.keep}
    given = {group: slot for group, slot in slots.items() if slot is not None}  # others are of heads for training alone
    labels_of = [coupling.places.get((slot.tensor, slot.dim)) for slot in given.values()]
    found = channels.positions([_NOWHERE if label is None else label for label in labels_of])
    alive = np.ones(len(channels.group), dtype=bool)
    for (group, slot), numbers in zip(given.items(), found, strict=True):
        number = next((number for number, index in numbers.items() if np.array_equal(index, slot.index.numpy())), None)
        if number is None:
            raise PlanError(f"group {group.name!r}: the recorded forward of this model has no such channels")
        inside = np.flatnonzero(channels.group == number)
        alive[inside] = plan.keep[group].numpy()[channels.rank[inside]]
    return labels, channels.alive(np.arange(coupling.num_atoms)[:, None], alive)


_NOWHERE = np.zeros((0, 1), dtype=np.int64)


def _record(model: nn.Module, inputs: tuple[Any, ...], kernels: MetaKernels) -> tuple[nn.Module, list[Recording]]:
    """A copy of the model without storage and what it did; a real one where the forward needs values."""
    twin = _without_caches(bake_all(on_meta(model)))
    recordings = _recordings(twin, inputs, kernels)
    if recordings[0].error is not None:
        twin = bake_all(copied(model).cpu())
        recordings = _recordings(twin, inputs, kernels)
    error = recordings[0].error
    if error is not None:
        raise TraceError(f"forward fails on the example inputs: {type(error).__name__}: {error}") from error
    return _without_caches(twin), recordings


def _without_caches(twin: nn.Module) -> nn.Module:
    """What a forward left behind would change the next one."""
    return fresh(twin) if kept_tensors(twin) else twin


def for_training(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch twice: BatchNorm wants more than one value per channel."""
    doubled: tuple[Any, ...] = tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, inputs)
    return doubled


def _recordings(twin: nn.Module, inputs: tuple[Any, ...], kernels: MetaKernels) -> list[Recording]:
    """The pass in eval mode, and the one in training mode where that alone uses some parameters."""
    evaluated = record(twin.eval(), inputs, kernels)
    used = {ref.index for op in evaluated.ops for ref in op.tensors}
    idle = [name for name, _ in twin.named_parameters() if evaluated.states[name].index not in used]
    if not idle or evaluated.error is not None:
        return [evaluated]
    training = record(copied(twin).train(), for_training(inputs), kernels)
    if training.error is None:
        return [evaluated, training]
    log.warning("%s: unused in eval mode, and the training pass fails: %s", idle[0], training.error)
    return [evaluated]


def _groups(coupling: Coupling, channels: Channels, order: dict[str, int]) -> dict[int, ChannelGroup]:
    """Group number -> group, ordered and named by the first layer that makes its channels; `order` of the layers."""
    slots: dict[int, list[Slot]] = {}
    read = np.zeros(coupling.num_atoms, dtype=bool)
    for label in coupling.read:
        read[label] = True
    firsts = {id(first): first for first in map(coupling.first, coupling.places.values())}  # the others own the same
    found = {
        first: [(number, index[0, 0], torch.from_numpy(index)) for number, index in positions.items()]
        for first, positions in zip(firsts, channels.positions([*firsts.values()]), strict=True)
    }
    for (tensor, dim), label in coupling.places.items():
        for number, start, index in found[id(coupling.first(label))]:
            is_read = bool(read[label[start]].all())
            slots.setdefault(number, []).append(Slot(tensor, dim, len(label), index, is_read))
    residual = channels.groups_in(channels.owning(coupling.added))
    silent, inexact = channels.groups_in(channels.silent), channels.groups_in(~channels.exact)
    reasons = _reasons(coupling.fixed, channels)
    makers = {
        number: min(_makers(owned), key=lambda name: order.get(name, len(order))) for number, owned in slots.items()
    }
    groups: dict[int, ChannelGroup] = {}
    taken: dict[str, int] = {}
    sizes = {number: owned[0].index.shape[0] for number, owned in slots.items()}
    for number in sorted(slots, key=lambda number: (order.get(makers[number], len(order)), sizes[number])):
        path = makers[number].rpartition(".")[0] or makers[number]
        taken[path] = taken.get(path, 0) + 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        groups[number] = ChannelGroup(
            name,
            sizes[number],
            tuple(slots[number]),
            exact=number not in inexact,
            residual=number in residual,
            silent=number in silent,
            fixed_by=reasons.get(number, ""),
        )
    return groups


def _reasons(fixed: list[Mark], channels: Channels) -> dict[int, str]:
    """Group number -> the first line that fixes its size."""
    reasons: dict[int, str] = {}
    for mark in fixed:
        for number in channels.groups_in(channels.owning([mark.atoms])):
            where = f"{mark.op.source}, aten::{mark.op.name}: " if mark.op else ""
            reasons.setdefault(number, where + mark.reason)
    return reasons


def _makers(slots: Iterable[Slot]) -> list[str]:
    """Tensors that make a group's channels, weights of layers before per-channel vectors."""
    names = [slot.tensor for slot in slots if not slot.read]
    return [name for name in names if name.endswith("weight")] or names


def _first_use(recordings: list[Recording]) -> dict[str, int]:
    when: dict[int, int] = {}
    for op in recordings[0].ops:
        for ref in op.tensors:
            when.setdefault(ref.index, len(when))
    return {name: when[ref.index] for name, ref in recordings[0].states.items() if ref.index in when}
