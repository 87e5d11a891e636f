"""One rule per ATen op: which channels the op couples, and where they are in its outputs.

To add an op, write one function `(op, coupling) -> labels of its outputs` and name it in `RULES`. An op without a
rule freezes the dimensions it touches and nothing else; what is frozen is never cut. A wrong rule is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from sparsekit.coupling import Atoms, Coupling, Labels, Product
from sparsekit.record import Op, Recording, Ref

Rule = Callable[[Op, Coupling], Sequence[Labels]]


def no_rule(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Freeze every channel that the op touches; dimensions that keep their size stay known as frozen ones."""
    touched: dict[tuple[int, int], Atoms] = {}
    for ref in op.tensors():
        labels = coupling.labels(ref)
        coupling.freeze(labels, f"no rule for aten::{op.name}")
        for dim, (size, label) in enumerate(zip(ref.shape, labels, strict=True)):
            if label is not None:
                touched[dim, size] = label
    return [tuple(touched.get(place) for place in enumerate(ref.shape)) for ref in op.outputs]


def elementwise(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Broadcast the inputs: dimensions of the same size agree position by position, size 1 binds nothing."""
    out = op.outputs[0]
    labels: list[Atoms | None] = []
    inputs = [ref for ref in op.tensors() if ref.shape]
    for back in range(len(out.shape), 0, -1):
        size = out.shape[-back]
        meeting = [coupling.labels(ref)[-back] for ref in inputs if len(ref.shape) >= back and ref.shape[-back] == size]
        known = any(label is not None for label in meeting)
        if op.name.startswith("add") and len(meeting) > 1 and not any(coupling.is_static(ref) for ref in inputs):
            coupling.added += [label for label in meeting if label is not None]
        labels.append(coupling.unite(*meeting) if known and size > 1 else None)
    return [tuple(labels)] * len(op.outputs)


def per_channel(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Pooling and resizing: the last 1, 2 or 3 dimensions, as the name says, are space and hold no channel."""
    given = coupling.labels(op.tensors()[0])
    num_spatial = int(re.findall(r"(\d)d", op.name)[0])
    coupling.freeze(given[-num_spatial:], f"{op.name} runs over the channels")
    return [given[:-num_spatial] + (None,) * num_spatial for _ in op.outputs]


def reduction(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Mean, sum or max over dimensions that hold no channel."""
    (source,) = op.tensors()
    given = coupling.labels(source)
    rank = len(source.shape)
    reduced = {dim % rank for dim in op.args.get("dim") or range(rank)}
    coupling.freeze([given[dim] for dim in reduced], f"{op.name} runs over the channels")
    if op.args.get("keepdim"):
        return [tuple(None if dim in reduced else given[dim] for dim in range(rank))]
    return [tuple(given[dim] for dim in range(rank) if dim not in reduced)]


def convolution(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::convolution, plain, grouped, depthwise and transposed, in any number of spatial dimensions."""
    x, weight, bias = op.args["input"], op.args["weight"], op.args["bias"]
    (out,) = op.outputs
    num_conv_groups, transposed = op.args["groups"], op.args["transposed"]
    x_labels, w_labels = coupling.labels(x), coupling.labels(weight)
    coupling.freeze([*x_labels[:1], *x_labels[2:]], "convolution slides over the channels")
    coupling.freeze(w_labels[2:], "the kernel's extent", report=False)
    positions = x if transposed else out
    scale = math.prod(positions.shape[2:]) * math.prod(weight.shape[2:]) * positions.shape[0]
    dims = tuple(label if label is not None else size for label, size in zip(w_labels[:2], weight.shape, strict=False))
    coupling.macs.append(Product(op.module, scale, dims))
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if num_conv_groups == 1:
        coupling.contract((x, x_labels[1]), (weight, w_labels[in_dim]))
        made = w_labels[out_dim]
    elif transposed:
        coupling.freeze([x_labels[1], *w_labels[:2]], "no rule for a grouped transposed convolution")
        made = None
    else:
        made = _grouped(op, coupling, x_labels[1], w_labels[0], w_labels[1])
    if bias is not None and made is not None:
        made = coupling.unite(made, coupling.labels(bias)[0])
    return [(None, made, *(None,) * (len(out.shape) - 2))]


def _grouped(op: Op, coupling: Coupling, x: Atoms | None, w_out: Atoms | None, w_in: Atoms | None) -> Atoms | None:
    """Cut whole convolution groups or the same positions of every group, whichever leaves more channels to choose."""
    num_conv_groups = op.args["groups"]
    if x is None or w_out is None:
        coupling.freeze([x, w_out, w_in], "a grouped convolution meets fixed channels")
        return None
    if op.attributes.get("groups") != num_conv_groups:
        coupling.freeze([x, w_out, w_in], "the number of convolution groups is not an attribute of the module")
        return w_out
    x_groups, out_groups = x.reshape(num_conv_groups, -1), w_out.reshape(num_conv_groups, -1)
    if num_conv_groups >= x_groups.shape[1]:
        count = coupling.attribute(f"{op.module}.groups", num_conv_groups)
        for column in (*x_groups.T, *out_groups.T):
            coupling.unite(count, column)
        coupling.freeze([w_in], "whole convolution groups are cut", report=False)
        return w_out
    for row in x_groups:
        coupling.unite(w_in, row)
    if w_in is not None:
        coupling.read.append(w_in)
    for row in out_groups[1:]:
        coupling.unite(out_groups[0], row)
    return w_out


def matmul(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::mm and aten::addmm, [n, k] @ [k, m]."""
    left, right = (op.args["mat1"], op.args["mat2"]) if op.name == "addmm" else (op.args["self"], op.args["mat2"])
    (rows, left_inner), (right_inner, made) = coupling.labels(left), coupling.labels(right)
    coupling.contract((left, left_inner), (right, right_inner))
    dims = (rows, right_inner, made)
    sizes = (left.shape[0], *right.shape)
    cut = tuple(label if label is not None else size for label, size in zip(dims, sizes, strict=True))
    coupling.macs.append(Product(op.module, 1.0, cut))
    if op.name == "addmm" and made is not None:
        bias = op.args["self"]
        made = coupling.unite(made, coupling.labels(bias)[-1])
    return [(rows, made)]


def batch_norm(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Per-channel statistics and affine parameters follow the channel, dimension 1."""
    x = op.args["input"]
    labels = coupling.labels(x)
    states = [op.args[name] for name in ("weight", "bias", "running_mean", "running_var")]
    channel = labels[1]
    for ref in states:
        if ref is not None and x.shape[1] > 1:
            channel = coupling.unite(channel, coupling.labels(ref)[0])
    first: Labels = (labels[0], channel, *labels[2:])
    statistics = [(channel,) if ref.shape == x.shape[1:2] else (None,) * len(ref.shape) for ref in op.outputs[1:]]
    return [first, *statistics]


def permute(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::t, transpose and permute move labels with their dimensions."""
    source = op.args["self"]
    given, rank = coupling.labels(source), len(source.shape)
    order = list(range(rank))
    if op.name == "permute":
        order = [dim % rank for dim in op.args["dims"]]
    elif rank >= 2:
        a, b = (0, 1) if op.name == "t" else (op.args["dim0"] % rank, op.args["dim1"] % rank)
        order[a], order[b] = b, a
    return [tuple(given[dim] for dim in order)]


def expand(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """New and grown dimensions hold no channel, the others keep theirs."""
    source, (out,) = op.args["self"], op.outputs
    given = (None,) * (len(out.shape) - len(source.shape)) + coupling.labels(source)
    return [given]


def squeeze(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Dimensions of size 1 come or go; they never hold a channel."""
    return [_reshaped(op, coupling, op.args["self"], op.outputs[0].shape)]


def view(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Reshape: a channel that spreads over merged dimensions owns all their positions."""
    return [_reshaped(op, coupling, op.args["self"], op.outputs[0].shape)]


def _reshaped(op: Op, coupling: Coupling, source: Ref, shape: tuple[int, ...]) -> Labels:
    given = coupling.labels(source)
    result: list[Atoms | None] = [None] * len(shape)
    for ins, outs in _factor(source.shape, shape):
        labelled = [dim for dim in ins if given[dim] is not None]
        if not labelled:
            continue
        spread = _spread(given, source.shape, ins, [shape[dim] for dim in outs]) if len(labelled) == 1 else None
        if spread is None:
            coupling.freeze([given[dim] for dim in labelled], f"{op.name} splits or mixes the channel dimension")
            continue
        position, label = spread
        result[outs[position]] = label
    return tuple(result)


def _factor(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairs of dimension runs with equal element counts; dimensions of size 1 belong nowhere."""
    ins = [dim for dim, size in enumerate(source) if size != 1]
    outs = [dim for dim, size in enumerate(target) if size != 1]
    pairs = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        a, b = source[left[0]], target[right[0]]
        while a != b:
            if a < b:
                left.append(ins.pop(0))
                a *= source[left[-1]]
            else:
                right.append(outs.pop(0))
                b *= target[right[-1]]
        pairs.append((left, right))
    return pairs


def _spread(given: Labels, shape: tuple[int, ...], ins: list[int], out_sizes: list[int]) -> tuple[int, Atoms] | None:
    """Where the one labelled dimension of `ins` ends up among the new ones, or None if in more than one."""
    sizes = [shape[dim] for dim in ins]
    holder = next(i for i, dim in enumerate(ins) if given[dim] is not None)
    atoms = given[ins[holder]]
    if atoms is None:
        return None
    aligned = atoms.reshape([-1 if i == holder else 1 for i in range(len(ins))])
    block = np.broadcast_to(aligned, sizes).reshape(out_sizes)
    for position in range(len(out_sizes)):
        first = np.moveaxis(block, position, -1).reshape(-1, out_sizes[position])
        if (first == first[0]).all():
            return position, first[0].copy()
    return None


def slicing(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::slice, select and narrow: along a dimension without channels, or the whole of it."""
    source, (out,) = op.args["self"], op.outputs
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    if op.name == "select":
        coupling.freeze([given[dim]], "select picks channels by number")
        return [given[:dim] + given[dim + 1 :]]
    if given[dim] is not None and out.shape[dim] != source.shape[dim]:
        coupling.freeze([given[dim]], f"{op.name} cuts the channel dimension at fixed numbers")
        return [(*given[:dim], None, *given[dim + 1 :])]
    return [given]


def splitting(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::split and chunk along a dimension without channels."""
    source = op.args["self"]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    if len(op.outputs) > 1:
        coupling.freeze([given[dim]], f"{op.name} cuts the channel dimension at fixed numbers")
        given = (*given[:dim], None, *given[dim + 1 :])
    return [given] * len(op.outputs)


def cat(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Along `dim` the labels follow each other; every other dimension agrees."""
    (out,) = op.outputs
    rank = len(out.shape)
    dim = op.args["dim"] % rank
    parts = [ref for ref in op.args["tensors"] if len(ref.shape) == rank]
    result: list[Atoms | None] = []
    for axis in range(rank):
        labels = [coupling.labels(ref)[axis] for ref in parts]
        if all(label is None for label in labels):
            result.append(None)
        elif axis == dim:
            sizes = [ref.shape[axis] for ref in parts]
            result.append(
                np.concatenate(
                    [
                        _constant(coupling, size) if label is None else label
                        for size, label in zip(sizes, labels, strict=True)
                    ]
                )
            )
        else:
            result.append(coupling.unite(*labels))
    return [tuple(result)]


def constant_pad(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Padded positions are constants whose number the forward fixes; what lies between keeps its label."""
    source, (out,) = op.args["self"], op.outputs
    labels = list(coupling.labels(source))
    pads = op.args["pad"]
    for back in range(len(pads) // 2):
        axis = len(out.shape) - 1 - back
        low, high = pads[2 * back], pads[2 * back + 1]
        label = labels[axis]
        if label is None or (low, high) == (0, 0):
            continue
        if min(low, high) < 0:
            coupling.freeze([label], "negative padding cuts the channel dimension at fixed numbers")
            labels[axis] = None
            continue
        labels[axis] = np.concatenate([_constant(coupling, low), label, _constant(coupling, high)])
    return [tuple(labels)]


def _constant(coupling: Coupling, size: int) -> Atoms:
    atoms = coupling.fresh(size)
    coupling.freeze([atoms], "a constant number of channels is added")
    return atoms


def same(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """The output has the input's shape and channels: another dtype, stride or device, or a new `*_like` tensor."""
    source = op.tensors()[0]
    return (
        [coupling.labels(source) for _ in op.outputs] if op.outputs[0].shape == source.shape else no_rule(op, coupling)
    )


def constant(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """A new tensor of a size that the forward names: nothing of the input's values or channels is in it."""
    return [(None,) * len(ref.shape) for ref in op.outputs]


def softmax(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Over a dimension without channels; across channels removal is not masking, so they stay."""
    source = op.tensors()[0]
    given = coupling.labels(source)
    dim = op.args["dim"] % len(source.shape)
    coupling.freeze([given[dim]], f"{op.name} normalises across the channels")
    return [tuple(None if axis == dim else label for axis, label in enumerate(given))]


_ELEMENTWISE = """
    abs add bernoulli bitwise_and bitwise_or celu clamp clamp_max clamp_min copy cos div dropout elu eq erf exp fill
    floor ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu log log1p logical_and logical_not lt maximum minimum
    mish mul native_dropout ne neg pow prelu reciprocal relu relu6 round rrelu_with_noise rsqrt rsub selu sigmoid sign
    silu sin softplus sqrt sub tanh threshold where zero _prelu_kernel
""".split()
_PER_CHANNEL = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool2d
    max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d reflection_pad2d replication_pad2d
    upsample_bicubic2d upsample_bilinear2d upsample_nearest1d upsample_nearest2d upsample_nearest3d
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys([*_ELEMENTWISE, *(f"{name}_" for name in _ELEMENTWISE)], elementwise),
    **dict.fromkeys(_PER_CHANNEL, per_channel),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], reduction),
    **dict.fromkeys(
        [
            "detach",
            "clone",
            "_to_copy",
            "alias",
            "contiguous",
            "as_strided_",
            "lift_fresh",
            "empty_like",
            "zeros_like",
            "ones_like",
        ],
        same,
    ),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full"], constant),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], view),
    **dict.fromkeys(["squeeze", "unsqueeze"], squeeze),
    **dict.fromkeys(["t", "transpose", "permute"], permute),
    **dict.fromkeys(["mm", "addmm"], matmul),
    **dict.fromkeys(["slice", "select", "narrow"], slicing),
    **dict.fromkeys(["split", "split_with_sizes", "chunk"], splitting),
    **dict.fromkeys(["_softmax", "_log_softmax"], softmax),
    **dict.fromkeys(["native_batch_norm", "cudnn_batch_norm"], batch_norm),
    "convolution": convolution,
    "expand": expand,
    "cat": cat,
    "constant_pad_nd": constant_pad,
}


def follow(recording: Recording, coupling: Coupling) -> list[tuple[Labels, ...]]:
    """Apply the rules to every op in order; the labels of each op's outputs."""
    coupling.begin(recording)
    trail = []
    for op in recording.ops:
        coupling.enter(op)
        outputs = tuple(RULES.get(op.name, no_rule)(op, coupling))
        coupling.leave(op, outputs)
        trail.append(outputs)
    coupling.enter(None)
    for ref in recording.outputs:
        coupling.freeze(coupling.labels(ref), "the model returns it")
    return trail
