"""Ops that trade positions of space for channels: sliding windows, pixel shuffles, channel shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparsekit.coupling import Coupling, Label, Labels, merge
from sparsekit.record import Op


def unfold(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::unfold, sliding windows as a new last dimension."""
    source = op.args["self"]
    given = list(coupling.labels(source))
    dim = op.args["dimension"] % len(source.shape)
    coupling.freeze([given[dim]], "unfold slides over the channels")
    given[dim] = None
    return [(*given, None)]


def im2col(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C, H, W] to [..., C k k, L]: a channel owns all positions of its windows."""
    given = coupling.labels(op.args["self"])
    coupling.freeze(given[-2:], "im2col slides over the channels")
    area = math.prod(op.args["kernel_size"])
    return [(*given[:-3], None if given[-3] is None else np.repeat(given[-3], area, axis=0), None)]


def col2im(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C k k, L] to [..., C, H, W]."""
    given = coupling.labels(op.args["self"])
    return [(*given[:-2], _outer(op, coupling, given[-2], math.prod(op.args["kernel_size"])), None, None)]


def pixel_shuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C r r, H, W] to [..., C, H r, W r]."""
    given = coupling.labels(op.args["self"])
    return [(*given[:-3], _outer(op, coupling, given[-3], op.args["upscale_factor"] ** 2), None, None)]


def pixel_unshuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """[..., C, H r, W r] to [..., C r r, H, W]."""
    given = coupling.labels(op.args["self"])
    area = op.args["downscale_factor"] ** 2
    return [(*given[:-3], None if given[-3] is None else np.repeat(given[-3], area, axis=0), None, None)]


def _outer(op: Op, coupling: Coupling, label: Label | None, inner_size: int) -> Label | None:
    """The channels of a dimension of channels x `inner_size` positions, all of which each channel keeps."""
    if label is None:
        return None
    outer, inner = coupling.split(label, [len(label) // inner_size, inner_size])
    coupling.freeze([inner], f"{op.name} spreads every position of a window", report=False)
    return outer


def channel_shuffle(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The same positions of every one of `groups` parts go, which are then interleaved."""
    source = op.args["self"]
    given, num_parts = coupling.labels(source), op.args["groups"]
    label = given[1]
    if label is not None:
        sizes = [num_parts, len(label) // num_parts]
        outer, inner = coupling.split(label, sizes)
        coupling.freeze([outer], "the number of shuffled parts stays", report=False)
        label = merge([inner, outer], sizes[::-1])
    return [(given[0], label, *given[2:])]
