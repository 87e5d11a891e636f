"""Ops that multiply and sum: convolutions, matrix products, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparsekit.coupling import Coupling, Label, Labels, Product, merge
from sparsekit.layers import Convolution, Layer, MatrixProduct
from sparsekit.record import Op, Ref

OPERANDS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}


def _count(
    coupling: Coupling, op: Op, scale: float, *dims: Label | int | tuple[Ref, int], layer: Layer | None = None
) -> None:
    """Note a call that costs `scale` times the product of `dims`; (ref, dim) is that dimension of a tensor."""
    cut: list[Label | int] = []
    weight: list[Label] = []
    for dim in dims:
        if not isinstance(dim, tuple):
            cut.append(dim)
            continue
        ref, axis = dim
        label = coupling.labels(ref)[axis]
        cut.append(ref.shape[axis] if label is None else label)
        if label is not None and coupling.is_static(ref):
            weight.append(label)
    coupling.macs.append(Product(op.module, scale, tuple(cut), tuple(weight), layer))


def convolution(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::convolution, plain, grouped, depthwise and transposed, in any number of spatial dimensions."""
    x, weight, bias = op.args["input"], op.args["weight"], op.args["bias"]
    (out,) = op.outputs
    num_conv_groups, transposed = op.args["groups"], op.args["transposed"]
    x_labels, w_labels = coupling.labels(x), coupling.labels(weight)
    coupling.freeze([*x_labels[:1], *x_labels[2:]], f"{op.name} slides over the channels")
    coupling.freeze(w_labels[2:], "the kernel's extent", report=False)
    positions = x if transposed else out
    scale = math.prod(positions.shape[2:]) * math.prod(weight.shape[2:]) * positions.shape[0]
    cut_groups = num_conv_groups > 1 and _cuts_groups(num_conv_groups, x_labels[1], w_labels[0])
    layer = None if coupling.is_static(x) else _layer(op, static=coupling.is_static(weight), cut_groups=cut_groups)
    _count(coupling, op, scale, (weight, 0), (weight, 1), layer=layer)
    if num_conv_groups == 1:
        in_dim, out_dim = (0, 1) if transposed else (1, 0)
        coupling.contract((x, x_labels[1]), (weight, w_labels[in_dim]))
        made = w_labels[out_dim]
    else:
        made = _grouped(op, coupling, (x, x_labels[1]), weight, w_labels, cut_groups=cut_groups)
    if bias is not None and made is not None:
        made = coupling.unite(made, coupling.labels(bias)[0])
    return [(None, made, *(None,) * (len(out.shape) - 2))]


def _layer(op: Op, *, static: bool, cut_groups: bool) -> Convolution:
    x, weight, groups = op.args["input"], op.args["weight"], op.args["groups"]
    return Convolution(
        extent=x.shape[2:],
        kernel=weight.shape[2:],
        stride=tuple(op.args["stride"]),
        padding=tuple(op.args["padding"]),
        output_padding=tuple(op.args["output_padding"]),
        dilation=tuple(op.args["dilation"]),
        groups=groups,
        per_group=weight.shape[0] // groups,
        cut_groups=cut_groups,
        transposed=op.args["transposed"],
        static=static,
        num_inputs=x.shape[0],
    )


def _cuts_groups(num_conv_groups: int, inputs: Label | None, first: Label | None) -> bool:
    """Whether whole convolution groups leave more channels to choose than the same positions of every group."""
    if inputs is None or first is None:
        return False
    x_groups, first_groups = (label.reshape(num_conv_groups, -1, label.shape[1]) for label in (inputs, first))
    batched = (x_groups == x_groups[:1]).all() and (first_groups == first_groups[:1]).all()
    return not batched and num_conv_groups >= x_groups.shape[1]


def _grouped(
    op: Op,
    coupling: Coupling,
    x: tuple[Ref, Label | None],
    weight: Ref,
    w_labels: Labels,
    *,
    cut_groups: bool,
) -> Label | None:
    """Cut whole convolution groups or the same positions of every group.

    The first dimension of the weight holds all groups, the second the positions of one: [out, in / groups] or,
    transposed, [in, out / groups].
    """
    num_conv_groups, transposed = op.args["groups"], op.args["transposed"]
    inputs, (first, inner) = x[1], w_labels[:2]
    num_out = op.outputs[0].shape[1]
    if inputs is None or first is None:
        coupling.freeze([inputs, first, inner], "a grouped convolution meets fixed channels")
        return None
    x_groups, first_groups = (label.reshape(num_conv_groups, -1, label.shape[1]) for label in (inputs, first))
    if cut_groups:
        groups = coupling.fresh(num_conv_groups)
        _count_groups(op, coupling, groups)
        for column in range(x_groups.shape[1]):
            coupling.unite(x_groups[:, column], groups)
        for column in range(first_groups.shape[1]):
            coupling.unite(first_groups[:, column], groups)
        coupling.freeze([inner], "whole convolution groups are cut", report=False)
        return np.repeat(groups, num_out // num_conv_groups, axis=0) if transposed else first
    for row in first_groups[1:]:
        coupling.unite(first_groups[0], row)
    if transposed:
        coupling.contract(x, (weight, first))
        return None if inner is None else np.tile(inner, (num_conv_groups, 1))
    for row in x_groups:
        coupling.contract((x[0], row), (weight, inner))
    return first


def _count_groups(op: Op, coupling: Coupling, groups: Label) -> None:
    if op.attributes.get("groups") == len(groups):
        coupling.attribute(f"{op.module}.groups", groups)
    else:
        coupling.fix(groups, "the number of convolution groups is not an attribute of the module")


def deform_conv(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """torchvision::deform_conv2d without groups; offsets and modulation are the same for all channels."""
    x, weight, bias = op.args["input"], op.args["weight"], op.args["bias"]
    x_labels, w_labels = coupling.labels(x), coupling.labels(weight)
    (out,) = op.outputs
    for name in ("offset", "mask"):
        coupling.freeze(coupling.labels(op.args[name]), "deform_conv2d needs every offset")
    made: Label | None = None
    if op.args["groups"] == op.args["offset_groups"] == 1:
        coupling.contract((x, x_labels[1]), (weight, w_labels[1]))
        made = coupling.unite(w_labels[0], coupling.labels(bias)[0])
    else:
        coupling.freeze([*x_labels, *w_labels, *coupling.labels(bias)], "deform_conv2d has groups")
    scale = math.prod(out.shape[2:]) * math.prod(weight.shape[2:]) * out.shape[0]
    _count(coupling, op, scale, (weight, 0), (weight, 1))
    return [(None, made, None, None)]


def matmul(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::mm, addmm, bmm and baddbmm: [..., n, k] @ [..., k, m]."""
    left, right = (op.args[name] for name in OPERANDS[op.name])
    *left_batch, rows, left_inner = coupling.labels(left)
    *right_batch, right_inner, made = coupling.labels(right)
    coupling.contract((left, left_inner), (right, right_inner))
    if op.inside is not None and op.inside.args["scale"] is None:
        coupling.fix(left_inner, "the default scale of attention follows the size of its heads")
    batch = [_agreed(coupling, *pair) for pair in zip(left_batch, right_batch, strict=True)]
    dims = [left.shape[0] if label is None else label for label in batch]
    inner = (left, -1) if coupling.is_static(left) else (right, -2)
    _count(coupling, op, 1.0, *dims, (left, -2), inner, (right, -1), layer=_product(coupling, left, right))
    result = [*batch, rows, made]
    if op.name in ("addmm", "baddbmm"):
        added = op.args["self"]
        given = coupling.labels(added)
        for back in range(1, len(given) + 1):
            if added.shape[-back] > 1:
                result[-back] = _agreed(coupling, result[-back], given[-back])
    return [tuple(result)]


def _product(coupling: Coupling, left: Ref, right: Ref) -> MatrixProduct | None:
    """None where both are known at export, which then does it once and for all."""
    if coupling.is_static(left):
        return None if coupling.is_static(right) else MatrixProduct("left")
    return MatrixProduct("right" if coupling.is_static(right) else None)


def _agreed(coupling: Coupling, *labels: Label | None) -> Label | None:
    return None if all(label is None for label in labels) else coupling.unite(*labels)


def _shared(label: Label | None, size: int, num_heads: int, coupling: Coupling) -> Label | None:
    """A label of `size` heads of keys or values, each repeated for the neighbouring query heads that share it."""
    if label is None or size == num_heads:
        return label
    shape = size, num_heads // size
    return merge([label, coupling.fresh(shape[1])], shape)


def vector_product(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """aten::mv [n, k] @ [k] and dot [k] @ [k]."""
    left, right = (op.args["self"], op.args["vec"]) if op.name == "mv" else (op.args["self"], op.args["tensor"])
    labels = coupling.labels(left)
    coupling.contract((left, labels[-1]), (right, coupling.labels(right)[-1]))
    return [labels[:-1]]


def attention(op: Op, coupling: Coupling) -> Sequence[Labels]:
    """Scaled dot-product attention: queries [..., n, d], keys [..., m, d], values [..., m, e] to [..., n, e]."""
    query, key, value = (op.args[name] for name in ("query", "key", "value"))
    labels = [coupling.labels(ref) for ref in (query, key, value)]
    out = op.outputs[0].shape
    masks = [op.args[name] for name in ("attn_mask", "attn_bias") if op.args.get(name) is not None]
    leading: list[Label | None] = []
    for back in range(len(query.shape), 2, -1):
        meeting = [
            _shared(coupling.labels(ref)[-back], ref.shape[-back], out[-back], coupling)
            for ref in (query, key, value, *masks)
            if len(ref.shape) >= back and ref.shape[-back] > 1  # a single head serves all
        ]
        leading.append(_agreed(coupling, *meeting))
    for ref in masks:
        coupling.freeze(coupling.labels(ref)[-2:], "attention is masked along the channels")
    coupling.freeze([labels[0][-2], labels[1][-2], labels[2][-2]], "attention runs over the channels")
    coupling.contract((query, labels[0][-1]), (key, labels[1][-1]))
    if op.args.get("scale") is None:
        coupling.fix(labels[0][-1], "the default scale follows the size of the attention heads")
    batch = [size if label is None else label for size, label in zip(out, leading, strict=False)]
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    _count(coupling, op, 1.0, *batch, num_queries, (query, -1), num_keys, layer=MatrixProduct(None))
    _count(coupling, op, 1.0, *batch, num_queries, num_keys, (value, -1), layer=MatrixProduct(None))
    first: Labels = (*leading, None, labels[2][-1])
    statistics: Labels = (*leading, None)  # the logarithm of the sum of each query's scores
    others = [statistics if ref.shape == query.shape[:-1] else (None,) * len(ref.shape) for ref in op.outputs[1:]]
    return [first, *others]
