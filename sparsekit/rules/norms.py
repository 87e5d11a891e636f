"""Ops that normalise, or reduce over dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsekit.coupling import Coupling, Label, Labels
from sparsekit.record import Op


def batch_norm(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Per-channel statistics and affine parameters follow the channel, dimension 1."""
    x = op.args["input"]
    labels = coupling.labels(x)
    states = [op.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    channel = labels[1]
    for ref in states:
        if ref is not None and x.shape[1] > 1:
            channel = coupling.unite(channel, coupling.labels(ref)[0])
    num_features = op.attributes.get("num_features", 0)
    if channel is not None and not any(states) and 0 < num_features <= len(channel):
        # InstanceNorm sees the channels of all examples one after the other.
        coupling.attribute(f"{op.module}.num_features", channel[:num_features])
    if op.args.get("training") or op.args.get("running_mean") is None:
        for label in (labels[0], *labels[2:]):
            coupling.renormalise(label, "the statistics run over the channels")
    first: Labels = (labels[0], channel, *labels[2:])
    statistics = [(channel,) if ref.shape == x.shape[1:2] else (None,) * len(ref.shape) for ref in op.outputs[1:]]
    return [first, *statistics]


def layer_norm(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::native_layer_norm and _fused_rms_norm normalise over the last dimensions."""
    x = op.args["input"]
    labels = list(coupling.labels(x))
    num_normalised = len(op.args["normalized_shape"])
    for back in range(1, num_normalised + 1):
        for name in ("weight", "bias"):
            ref = op.args.get(name)
            if ref is not None and x.shape[-back] > 1:
                labels[-back] = coupling.unite(labels[-back], coupling.labels(ref)[-back])
        coupling.renormalise(labels[-back], "LayerNorm normalises over the channels")
    kept = tuple(labels[:-num_normalised])
    return [tuple(labels), *(kept + (None,) * (len(ref.shape) - len(kept)) for ref in op.outputs[1:])]


def group_norm(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Whole normalisation groups go, which leaves the others as they are; one group is a LayerNorm."""
    x, num_norm_groups = op.args["input"], op.args["group"]
    labels = coupling.labels(x)
    channel = labels[1]
    for name in ("weight", "bias"):
        if op.args[name] is not None:
            channel = coupling.unite(channel, coupling.labels(op.args[name])[0])
    coupling.freeze(labels[2:], "GroupNorm runs over the channels")
    groups: Label | None = None
    if channel is not None and num_norm_groups == 1:
        coupling.renormalise(channel, "GroupNorm normalises over the channels")
    elif channel is not None:
        groups = coupling.fresh(num_norm_groups)
        if op.attributes.get("num_groups") == num_norm_groups:
            coupling.attribute(f"{op.module}.num_groups", groups)
        else:
            coupling.fix(groups, "the number of normalisation groups is not an attribute of the module")
        channel = coupling.unite(channel, np.repeat(groups, x.shape[1] // num_norm_groups, axis=0))
    return [(labels[0], channel, *labels[2:]), *[(labels[0], groups)] * 2]


def softmax(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Along one dimension; across channels removal is not masking."""
    given = coupling.labels(op.args["self"])
    dim = op.args["dim"] % len(given) if given else 0
    if given:
        coupling.renormalise(given[dim], f"{op.name.strip('_')} normalises over the channels")
    return [given]


def reduction(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Mean, sum, norm, variance, maximum: over channels removal is masking only where zeros add nothing."""
    source = op.args["self"]
    given = coupling.labels(source)
    rank = len(source.shape)
    dims = op.args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {dim % rank for dim in dims or range(rank)}
    for dim in reduced:
        _reduce(op, coupling, given[dim], vanishes=op.name in _SUMS and coupling.is_clean(source))
    keepdim = bool(op.args.get("keepdim"))
    kept = tuple(None if dim in reduced else given[dim] for dim in range(rank) if keepdim or dim not in reduced)
    return [kept if len(ref.shape) == len(kept) else (None,) * len(ref.shape) for ref in op.outputs]


_SUMS = ("sum", "linalg_vector_norm", "norm")


def _reduce(op: Op, coupling: Coupling, label: Label | None, *, vanishes: bool) -> None:
    if label is None:
        return
    if vanishes:
        coupling.silence(label)
    else:
        coupling.renormalise(label, f"{op.name} runs over the channels")
