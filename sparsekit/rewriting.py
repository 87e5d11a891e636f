"""The sizes that a recorded op names, rewritten for a network from which positions were cut. Nothing is guessed.

An op that numbers positions of a cut dimension needs a rule here; one without is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload

from sparsekit.errors import PlanError
from sparsekit.living import Living, Mask
from sparsekit.record import Op

_ATEN = torch.ops.aten


def rewrite(op: Op, living: Living) -> Op:
    """The same op for what is left of its tensors; its `Ref`s keep the shapes they had.

    Raises:
        PlanError: it numbers positions of a cut dimension in a way that has no rule.
    """
    if op.name in _RESHAPES:  # always, because a recording of another batch size may write a size as -1
        return _resized(op, living)
    if not any(living.is_cut(ref) for ref in (*op.tensors, *op.outputs)):
        return op
    rule = _RULES.get(op.name)
    if rule is not None:
        return rule(op, living)
    spatial = re.search(r"([123])d", op.name)
    if spatial:
        return _spatial(op, living, int(spatial.group(1)))
    for name in _numbering(op.func):
        value = op.args[name]
        if _has_int(value):
            raise _refused(op, f"{name}={value} may number what is cut")
    return op


@cache
def _numbering(func: OpOverload) -> list[str]:
    """The arguments that may number positions: they are neither values nor dimensions."""
    types = {argument.name: str(argument.type) for argument in func._schema.arguments}
    named = ("dim", "dims", "dim0", "dim1")
    return [name for name, kind in types.items() if not ("number" in kind or kind == "Tensor" or name in named)]


def _has_int(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list | tuple) and any(type(item) is int for item in value))


def _refused(op: Op, reason: str) -> PlanError:
    return PlanError(f"{op.source}, {op.func.namespace}::{op.name}: {reason}")


def _with(op: Op, **args: Any) -> Op:
    return replace(op, args=op.args | args)


def _resized(op: Op, living: Living) -> Op:
    """The size named is that of the output: reshapes, expand and new tensors."""
    shape = living.shape(op.outputs[0])
    source = op.args.get("self")
    if op.name in _RESHAPES and source is not None and math.prod(shape) != math.prod(living.shape(source)):
        raise _refused(op, f"{living.shape(source)} cannot become {shape}")
    return _with(op, **{"shape" if op.name == "reshape" else "size": shape})


def _repeat(op: Op, living: Living) -> Op:
    after, repeats = living.shape(op.outputs[0]), list(op.args["repeats"])
    before = living.shape(op.args["self"])
    before = [1] * (len(after) - len(before)) + before
    wanted = [out // size if size else times for out, size, times in zip(after, before, repeats, strict=True)]
    if any(size * times != out for size, times, out in zip(before, wanted, after, strict=True)):
        raise _refused(op, f"{before} cannot repeat to {after}")
    return _with(op, repeats=wanted)


def _slice(op: Op, living: Living) -> Op:
    source = op.args["self"]
    dim = op.args["dim"] % len(source.shape)
    mask = living.mask(source, dim)
    if mask.all():
        return op
    chosen = np.arange(len(mask))[slice(op.args["start"], op.args["end"], op.args["step"])]
    now = (np.cumsum(mask) - 1)[chosen[mask[chosen]]]
    steps = np.unique(np.diff(now))
    if len(steps) > 1:
        raise _refused(op, "what is left of a strided slice is not one")
    start, step = (int(now[0]), int(steps[0]) if len(steps) else 1) if len(now) else (0, 1)
    return _with(op, start=start, end=int(now[-1]) + 1 if len(now) else 0, step=step)


def _select(op: Op, living: Living) -> Op:
    source = op.args["self"]
    mask = living.mask(source, op.args["dim"] % len(source.shape))
    index = op.args["index"] % len(mask)
    if not mask[index]:
        raise _refused(op, f"position {index}, which it selects, is cut")
    return op if mask.all() else _with(op, index=int(mask[:index].sum()))


def _split(op: Op, living: Living) -> Op:
    source = op.args["self"]
    dim = op.args["dim"] % len(source.shape)
    if not living.is_cut(source, dim):
        return op
    sizes = [living.shape(ref)[dim] for ref in op.outputs]
    args = {"self": source, "split_sizes": sizes, "dim": dim}
    return replace(op, name="split_with_sizes", func=_ATEN.split_with_sizes.default, args=args)


def _squeeze(op: Op, living: Living) -> Op:
    """A dimension cut down to one position is not one that was squeezed."""
    source = op.args["self"]
    if any(now == 1 != size for now, size in zip(living.shape(source), source.shape, strict=True)):
        args = {"self": source, "shape": living.shape(op.outputs[0])}
        return replace(op, name="reshape", func=_ATEN.reshape.default, args=args)
    return op


def _num_groups(op: Op, num_groups: int, masks: list[Mask]) -> int:
    """Groups that are left: each is gone whole, or keeps as many channels as the others."""
    left = set()
    for mask in masks:
        sizes = mask.reshape(num_groups, -1).sum(axis=1)
        if len(np.unique(sizes[sizes > 0])) > 1:
            raise _refused(op, "groups are left with different numbers of channels")
        left.add(int((sizes > 0).sum()))
    if len(left) > 1:
        raise _refused(op, "different groups are left of its input and its output")
    return left.pop()


def _convolution(op: Op, living: Living) -> Op:
    x, (out,) = op.args["input"], op.outputs
    channel = 1 if len(x.shape) == len(op.args["weight"].shape) else 0
    for ref in (x, out):
        if any(living.is_cut(ref, dim) for dim in range(channel + 1, len(ref.shape))):
            raise _refused(op, "it slides over a dimension that is cut")
    masks = [living.mask(x, channel), living.mask(out, channel)]
    return _with(op, groups=_num_groups(op, op.args["groups"], masks))


def _channel_shuffle(op: Op, living: Living) -> Op:
    groups = living.mask(op.args["self"], 1).reshape(op.args["groups"], -1)
    if (groups != np.outer(groups.any(axis=1), groups.any(axis=0))).any():
        raise _refused(op, "groups are left with different channels")
    return _with(op, groups=int(groups.any(axis=1).sum()))


def _group_norm(op: Op, living: Living) -> Op:
    x = op.args["input"]
    batch_size, num_channels, *positions = living.shape(x)
    group = _num_groups(op, op.args["group"], [living.mask(x, 1)])
    return _with(op, N=batch_size, C=num_channels, HxW=math.prod(positions), group=group)


def _layer_norm(op: Op, living: Living) -> Op:
    num_dims = len(op.args["normalized_shape"])
    return _with(op, normalized_shape=living.shape(op.args["input"])[-num_dims:])


def _pad(op: Op, living: Living) -> Op:
    source, (out,) = op.args["self"], op.outputs
    pad = list(op.args["pad"])
    for number, size in enumerate(pad):
        dim = len(out.shape) - 1 - number // 2
        mask = living.mask(out if size > 0 else source, dim)
        edge = mask[: abs(size)] if number % 2 == 0 else mask[len(mask) - abs(size) :]
        pad[number] = int(edge.sum()) if size > 0 else -int(edge.sum())
    return _with(op, pad=pad)


def _spatial(op: Op, living: Living, num_dims: int) -> Op:
    """Pooling, resizing and their like number positions of the last dimensions only."""
    for ref in (*op.tensors, *op.outputs):
        rank = len(ref.shape)
        if rank > num_dims and any(living.is_cut(ref, dim) for dim in range(rank - num_dims, rank)):
            raise _refused(op, "it runs over a dimension that is cut")
    return op


def _unfolded(op: Op, living: Living) -> Op:
    """im2col and col2im: the last two dimensions of images, the last of their columns."""
    for ref in (*op.tensors, *op.outputs):
        rank = len(ref.shape)
        if any(living.is_cut(ref, dim) for dim in range(2 if rank == 4 else rank - 1, rank)):
            raise _refused(op, "it runs over a dimension that is cut")
    return op


def _glu(op: Op, living: Living) -> Op:
    source = op.args["self"]
    left, right = np.split(living.mask(source, op.args["dim"] % len(source.shape)), 2)
    if (left != right).any():
        raise _refused(op, "its halves are cut at different positions")
    return op


def _along(name: str) -> Callable[[Op, Living], Op]:
    """A rule that allows the op where the dimensions that this argument names are not cut."""

    def rule(op: Op, living: Living) -> Op:
        source = op.tensors[0]
        given = op.args[name]
        dims = [given] if isinstance(given, int) else given
        for dim in dims or range(len(source.shape)):
            if living.is_cut(source, dim % len(source.shape)):
                raise _refused(op, f"it numbers positions of dimension {dim}, which is cut")
        return op

    return rule


def _index(op: Op, living: Living) -> Op:
    source = op.args["self"]
    for dim, index in enumerate(op.args["indices"]):
        if index is not None:
            # One that has the shape of what it stands for may be a mask, and stands for several dimensions.
            rank = len(index.shape)
            width = rank if source.shape[dim : dim + rank] == index.shape else 1
            if any(living.is_cut(source, dim + more) for more in range(width)):
                raise _refused(op, "it picks positions of a cut dimension by number")
    return op


def _embedding(op: Op, living: Living) -> Op:
    if living.is_cut(op.args["weight"], 0):
        raise _refused(op, "it picks rows of a cut table by number")
    return op


def _never(op: Op, living: Living) -> Op:
    raise _refused(op, "it picks positions of a cut tensor by number")


_RESHAPES = ("view", "_unsafe_view", "reshape")
_NEW = "expand new_zeros new_ones new_full new_empty zeros ones full empty rand randn".split()
_RULES: dict[str, Callable[[Op, Living], Op]] = {
    **dict.fromkeys([*_RESHAPES, *_NEW], _resized),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes"], _split),
    **dict.fromkeys(["squeeze", "squeeze_"], _squeeze),
    **dict.fromkeys(["im2col", "col2im"], _unfolded),
    **dict.fromkeys(["index", "index_put", "index_put_", "_index_put_impl_"], _index),
    **dict.fromkeys(["gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "take", "put_"], _never),
    **dict.fromkeys(["index_select", "unbind", "cumsum", "cumsum_", "sort", "topk", "argmax"], _along("dim")),
    "flip": _along("dims"),
    "roll": _along("dims"),
    "pixel_shuffle": partial(_spatial, num_dims=2),
    "pixel_unshuffle": partial(_spatial, num_dims=2),
    "torchvision::roi_align": partial(_spatial, num_dims=2),
    "unfold": _along("dimension"),
    "glu": _glu,
    "channel_shuffle": _channel_shuffle,
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "convolution": _convolution,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
}
