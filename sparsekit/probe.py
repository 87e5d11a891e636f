"""Cut at random, record again: does the network do what the coupling predicts?

This finds what no rule can see, sizes that the user's forward writes as literal numbers, and shows rules that lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparsekit.compaction import compact
from sparsekit.coupling import Atoms, Channels, Frozen, Labels
from sparsekit.errors import TraceError
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.record import Op, Recording, record


def probe(
    twin: nn.Module,
    groups: dict[int, ChannelGroup],
    channels: Channels,
    recordings: list[Recording],
    trails: list[list[tuple[Labels, ...]]],
    inputs: tuple[Any, ...],
) -> Frozen | None:
    """What to freeze because a shape is not the one predicted once every group lost a random share, or None."""
    rng = np.random.default_rng(0)
    keep = {}
    alive = np.ones(len(channels.group), dtype=bool)
    for number, group in groups.items():
        stay = rng.permutation(group.size) < rng.integers(1, group.size)
        keep[group] = torch.from_numpy(stay)
        inside = np.flatnonzero(channels.group == number)
        alive[inside] = stay[channels.rank[inside]]
    if not keep:
        return None
    small = compact(twin, PruningPlan(keep))
    for recording, trail, mode in zip(recordings, trails, (False, True), strict=False):
        again = record(small.train(mode), inputs)
        for step, (op, labels) in enumerate(zip(recording.ops, trail, strict=True)):
            got = again.ops[step] if step < len(again.ops) else None
            if got is None or got.name != op.name or _shapes(got) != _predicted(op, labels, alive, channels):
                reason = "the forward fixes a size here"
                return _blame(recording, trail, step, channels, f"{reason}: {again.error}" if got is None else reason)
    return None


def _shapes(op: Op) -> list[tuple[int, ...]]:
    return [ref.shape for ref in op.outputs]


def _predicted(
    op: Op, labels: tuple[Labels, ...], alive: NDArray[np.bool_], channels: Channels
) -> list[tuple[int, ...]]:
    def size(dim: int, atoms: Atoms | None) -> int:
        return dim if atoms is None else int(alive[channels.of[atoms]].sum())

    return [
        tuple(size(dim, atoms) for dim, atoms in zip(ref.shape, row, strict=True))
        for ref, row in zip(op.outputs, labels, strict=True)
    ]


def _blame(recording: Recording, trail: list[tuple[Labels, ...]], step: int, channels: Channels, reason: str) -> Frozen:
    """Lock the channels of the nearest op at or before `step` that carries any."""
    made = {
        ref.index: labels
        for op, row in zip(recording.ops, trail, strict=True)
        for ref, labels in zip(op.outputs, row, strict=True)
    }
    for op, row in zip(recording.ops[step::-1], trail[step::-1], strict=True):
        rows = [*row, *(made.get(ref.index, ()) for ref in op.tensors())]
        atoms = [label for labels in rows for label in labels if label is not None]
        free = [label for label in atoms if (channels.group[channels.of[label]] >= 0).any()]
        if free:
            return Frozen(np.concatenate(free), reason, op)
    raise TraceError(f"the forward behaves differently when cut, before any channel is made: {reason}")
