"""Ops that cost time but no multiply-accumulates: what they go over, as a term of its own.

What runtimes fold or fuse into the convolution before, BatchNorm, ReLU and sums of images, is not among it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sparsekit.coupling import Coupling, Labels, Product
from sparsekit.layers import Pass
from sparsekit.record import Op, Ref

ACTIVATIONS = frozenset("elu gelu hardsigmoid hardswish hardtanh leaky_relu sigmoid silu tanh".split())
_ALONG_LAST = frozenset("native_layer_norm _softmax _safe_softmax".split())
_SUMS = frozenset("add mul".split())
_LEAST_NUMEL = 8192  # of one example; fewer take no time that could be told from none


def passes(op: Op, coupling: Coupling, outputs: Sequence[Labels]) -> list[Product]:
    """The op's pass over its output, if it is one that takes time; over its input where that is averaged."""
    name = op.name.removesuffix("_")
    activations = [ref for ref in op.tensors if not coupling.is_static(ref)]
    if not activations or not op.outputs:
        return []
    over, labels = op.outputs[0], outputs[0]
    if name in ACTIVATIONS:
        layer = Pass(name)
    elif name in _ALONG_LAST and _along_last(op, over):
        layer = Pass(name.removeprefix("_").removeprefix("safe_"))
    elif name in _SUMS and len(activations) == 2 and (small := _broadcast(over, activations)) is not None:
        layer = Pass(name, broadcast=small)
    elif name == "mean" and op.args.get("dim"):
        over = activations[0]
        labels = coupling.labels(over)
        layer = Pass(name, reduced=tuple(sorted(dim % len(over.shape) for dim in op.args["dim"])))
    else:
        return []
    if len(over.shape) < 3 or math.prod(over.shape[1:]) < _LEAST_NUMEL:
        return []
    images = len(labels) == 4 and labels[1] is not None and labels[2] is labels[3] is None
    if images and name == "add":
        return []
    layer = replace(layer, images=images and name not in _ALONG_LAST)
    dims = tuple(size if label is None else label for size, label in zip(over.shape, labels, strict=True))
    return [Product(op.module, 1.0, dims, layer=layer)]


def _along_last(op: Op, over: Ref) -> bool:
    if op.name == "native_layer_norm":
        return len(op.args["normalized_shape"]) == 1
    return bool(op.args["dim"] % len(over.shape) == len(over.shape) - 1)


def _broadcast(over: Ref, operands: Sequence[Ref]) -> tuple[bool, ...] | None:
    """Which dimensions of the smaller operand are 1; None where neither has the shape of the result."""
    full, small = sorted(operands, key=lambda ref: -math.prod(ref.shape))
    if full.shape != over.shape or len(small.shape) != len(over.shape):
        return None
    return tuple(size == 1 < whole for size, whole in zip(small.shape, over.shape, strict=True))
