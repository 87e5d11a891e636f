"""One rule per ATen op: what it makes of tensors of which something is known before the network sees an input.

A channel whose filter is zero, or that is multiplied by zero, is the same number for every input and position. To
follow it through one more op, write one function `(op, given) -> what is known of its outputs` and name it in `RULES`.
An op without a rule yields nothing: unknown is never constant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparsekit.constants import (
    Constant,
    aliases,
    constant,
    kernel,
    nothing_known,
    per_channel,
    product,
    reads_only,
    static,
    touched,
    uniform,
    weighted_sum,
    zeros_of,
)
from sparsekit.record import Op, Recording, Ref

Given = Mapping[int, Constant]  # by `Ref.index`
Rule = Callable[[Op, Given], Sequence[Constant]]

# The argument that holds the data, of the ops that read channels through a weight.
DATA = {"convolution": "input", "mm": "self", "addmm": "mat1"}
BATCH_NORM = ("native_batch_norm", "cudnn_batch_norm")


def constant_reads(recording: Recording, states: Mapping[str, Tensor]) -> dict[Op, Constant]:
    """What is known of the data that each convolution and each product with a matrix reads.

    Args:
        recording: one forward pass in eval mode.
        states: values, on the CPU, of the parameters and buffers that the pass does not write into.
    """
    root, _ = aliases(recording)
    given = {recording.states[name].index: static(value) for name, value in states.items()}
    reads = {}
    for op in recording.ops:
        if op.name in DATA:
            reads[op] = _item(op.args[DATA[op.name]], given)
        found = _follow(op, given)
        changed = {root.get(ref.index, ref.index) for ref in touched(op, write=True)}
        if changed:  # whatever shares memory with what was written is no longer what it was
            given = {index: item for index, item in given.items() if root.get(index, index) not in changed}
        given.update({ref.index: item for ref, item in zip(op.outputs, found, strict=False)})
    return reads


def _follow(op: Op, given: Given) -> Sequence[Constant]:
    inputs = [_item(ref, given) for ref in op.tensors]
    rule = RULES.get(op.name)
    # What is only moved needs no copy in float64.
    if inputs and rule not in (moved, same) and _is_pure(op) and all(item.static for item in inputs):
        result = _run(op, given)
        return [static(value) for value in ([result] if isinstance(result, Tensor) else result)]
    if rule is None or (op.name not in _SOURCES and not any(item.known.any() for item in inputs)):
        return ()
    return rule(op, given)


def _is_pure(op: Op) -> bool:
    """Whether the op is a function of its arguments; batch norm writes into statistics that its schema calls inputs."""
    return (
        not op.func._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.func.tags
        and op.args.get("device") is None
        and op.args.get("running_mean") is None
    )


def _item(ref: Ref, given: Given) -> Constant:
    return given.get(ref.index) or nothing_known(len(ref.shape))


def _run(op: Op, given: Given, part: str = "value", func: Any = None) -> Any:
    """The op itself, or `func` in its place, on one part of what is known of its tensors."""

    def substitute(ref: Ref) -> Tensor:
        tensor: Tensor = getattr(_item(ref, given), part)
        return tensor.double() if tensor.is_floating_point() else tensor

    args = tree_map_only(Ref, substitute, op.args)
    arguments = op.func._schema.arguments
    positional = [args[argument.name] for argument in arguments if not argument.kwarg_only]
    return (func or op.func)(*positional, **{a.name: args[a.name] for a in arguments if a.kwarg_only})


def elementwise(op: Op, given: Given) -> Sequence[Constant]:
    """Known where all inputs are. In-place ops run as what they are without the underscore."""
    inputs = [_item(ref, given) for ref in op.tensors]
    if not all(item.known.any() for item in inputs):
        return ()
    packet = getattr(torch.ops.aten, op.name.removesuffix("_"))
    value = _run(op, given, func=getattr(packet, op.func._schema.overload_name or "default"))
    if all(item.static for item in inputs):
        return [static(value)]
    return [constant(value, reduce(torch.logical_and, [item.known for item in inputs]))]


def mul(op: Op, given: Given) -> Sequence[Constant]:
    """Zero times anything is zero."""
    inputs = [_item(ref, given) for ref in op.tensors]
    if len(inputs) != 2 or all(item.static for item in inputs):
        return elementwise(op, given)
    left, right = inputs
    known = (left.known & right.known) | left.zero | right.zero
    return [constant(left.value.double() * right.value.double(), known)]


def same(op: Op, given: Given) -> Sequence[Constant]:
    """Copies and aliases, in any floating-point format."""
    dtype = op.args.get("dtype")
    return [_item(op.tensors[0], given)] if dtype is None or dtype.is_floating_point else ()


def moved(op: Op, given: Given) -> Sequence[Constant]:
    """Ops that move, repeat or drop elements do so with what is known of them; views of expanded sizes cost nothing."""
    if op.args.get("dtype") is not None:  # aten::view.dtype, another reading of the same bits
        return ()
    inputs = [(ref, _item(ref, given)) for ref in op.tensors]
    full = {ref.index: Constant(item.value.expand(ref.shape), item.known.expand(ref.shape)) for ref, item in inputs}
    # A view needs strides that expanded sizes do not have; reshape copies where it must.
    is_view = "view" in op.name or "reshape" in op.name
    func = (lambda tensor, *_: tensor.reshape(op.outputs[0].shape)) if is_view else None
    results = [_run(op, full, part, func) for part in ("value", "known")]
    values, knowns = ([result] if isinstance(result, Tensor) else result for result in results)
    if all(item.static for _, item in inputs):
        return [static(value) for value in values]
    return [constant(value, known) for value, known in zip(values, knowns, strict=True)]


def cat(op: Op, given: Given) -> Sequence[Constant]:
    """Along `dim` one after the other; the other dimensions stay as small as they can be."""
    rank = len(op.outputs[0].shape)
    dim = op.args["dim"] % rank
    inputs = [(ref.shape[dim], _item(ref, given)) for ref in op.args["tensors"] if len(ref.shape) == rank]
    value = _cat([(size, item.value) for size, item in inputs], dim)
    return [constant(value, _cat([(size, item.known) for size, item in inputs], dim))]


def _cat(tensors: list[tuple[int, Tensor]], dim: int) -> Tensor:
    other = torch.broadcast_shapes(*(tensor.narrow(dim, 0, 1).shape for _, tensor in tensors))
    return torch.cat([tensor.expand(*other[:dim], size, *other[dim + 1 :]) for size, tensor in tensors], dim)


def pad(op: Op, given: Given) -> Sequence[Constant]:
    """The padded positions are the number that the forward pads with."""
    source, pads = op.args["self"], op.args["pad"]
    item = _item(source, given)
    value = torch.constant_pad_nd(item.value.double().expand(source.shape), pads, op.args["value"])
    return [constant(value, torch.constant_pad_nd(item.known.expand(source.shape), pads, True))]


def spatial(op: Op, given: Given) -> Sequence[Constant]:
    """Pooling, resizing, reflection: of one number over the last dimensions they make the same number."""
    source = op.tensors[0]
    rank, num_spatial = len(source.shape), int(re.findall(r"(\d)d", op.name)[0])
    found = uniform(_item(source, given), range(rank - num_spatial, rank))
    padded, dilated = _differs(op.args.get("padding", 0), 0), _differs(op.args.get("dilation", 1), 1)
    if "max_pool" in op.name and padded and dilated:  # a window may then hold padding alone
        return ()
    if op.args.get("divisor_override") or ("avg_pool" in op.name and padded and op.args["count_include_pad"]):
        return [zeros_of(found)]
    return [found]


def _differs(numbers: int | Sequence[int], usual: int) -> bool:
    return any(number != usual for number in ([numbers] if isinstance(numbers, int) else numbers))


def reduction(op: Op, given: Given) -> Sequence[Constant]:
    """Mean, maximum and minimum of one number are that number; a sum depends on how many there are."""
    (source,) = op.tensors
    rank = len(source.shape)
    dims = {dim % rank for dim in op.args.get("dim") or range(rank)}
    found = uniform(_item(source, given), sorted(dims))
    if op.name == "sum":
        found = zeros_of(found)
    if op.args.get("keepdim"):
        return [found]
    kept = tuple(0 if dim in dims else slice(None) for dim in range(rank))
    return [Constant(found.value[kept], found.known[kept])]


def zeros(op: Op, given: Given) -> Sequence[Constant]:
    """New tensors of zeros."""
    shape = (1,) * len(op.outputs[0].shape)
    return [Constant(torch.zeros(shape), torch.ones(shape, dtype=torch.bool))]


def convolution(op: Op, given: Given) -> Sequence[Constant]:
    """An output is constant where every input that its filter reads is, and padding adds nothing."""
    x, bias = op.args["input"], op.args["bias"]
    weight = _item(op.args["weight"], given)
    if not weight.static:
        return ()
    taps = kernel(weight.value, op.args["groups"], transposed=op.args["transposed"])
    value, known = (part.reshape(taps.shape[0], -1) for part in per_channel(_item(x, given), 1, x.shape[1]))
    if sees_border(op):
        known = known & (value == 0)
    made, certain = weighted_sum(taps, torch.where(known, value, 0)), reads_only(taps, known)
    if bias is not None:
        shift, sure = per_channel(_item(bias, given), 0, len(made))
        made, certain = made + shift, certain & sure
    out = (1, -1, *(1,) * (len(x.shape) - 2))
    return [constant(made.reshape(out), certain.reshape(out))]


def sees_border(op: Op) -> bool:
    """Whether a constant other than zero comes out of this convolution different near the border."""
    return op.name == "convolution" and bool(op.args["transposed"] or any(op.args["padding"]))


def matmul(op: Op, given: Given) -> Sequence[Constant]:
    """aten::mm, bmm and addmm."""
    left, right = (op.args[name] for name in (("mat1", "mat2") if op.name == "addmm" else ("self", "mat2")))
    made = product(_item(left, given), _item(right, given), left.shape[-1])
    if op.name != "addmm":
        return [made]
    if (op.args["alpha"], op.args["beta"]) != (1, 1):
        return ()
    bias = _item(op.args["self"], given)
    return [constant(made.value + bias.value.double(), made.known & bias.known)]


def batch_norm(op: Op, given: Given) -> Sequence[Constant]:
    """A channel with gamma 0 is beta, whatever comes in; others keep what is known, on fixed statistics."""
    source = op.args["input"]
    x = _item(source, given)
    gamma, beta, mean, var = (
        _vector(op, name, neutral, given)
        for name, neutral in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))
    )
    value = (x.value.double() - mean.value) / torch.sqrt(var.value + op.args["eps"]) * gamma.value + beta.value
    fixed = x.known & gamma.known & mean.known & var.known
    known = gamma.zero if op.args["training"] else gamma.zero | fixed
    return [constant(value, known & beta.known)]


def _vector(op: Op, name: str, neutral: float, given: Given) -> Constant:
    """[1, C, 1, ...] of one of batch norm's vectors, `neutral` where it has none."""
    size, rank = op.args["input"].shape[1], len(op.args["input"].shape)
    shape = (1, -1, *(1,) * (rank - 2))
    ref = op.args[name]
    if ref is None:
        return static(torch.full((size,), neutral, dtype=torch.float64).reshape(shape))
    value, known = per_channel(_item(ref, given), 0, size)
    return Constant(value.reshape(shape), known.reshape(shape))


_ELEMENTWISE = """
    abs add addcmul atan celu clamp clamp_max clamp_min cos div elu eq erf exp expm1 floor ge gelu gt hardsigmoid
    hardswish hardtanh le leaky_relu lerp log log1p lt masked_fill maximum minimum mish ne neg pow _prelu_kernel
    reciprocal relu relu6 round rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tanh threshold where
""".split()
_MOVED = """
    view _unsafe_view _reshape_alias squeeze unsqueeze t transpose permute slice select narrow split split_with_sizes
    unbind stack expand repeat roll flip pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
""".split()
_SPATIAL = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d
    max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bilinear2d_aa
""".split()
# Where something becomes known that was not: sources of constants.
_SOURCES: dict[str, Rule] = {
    **dict.fromkeys(["mul", "mul_"], mul),
    **dict.fromkeys(["mm", "bmm", "addmm"], matmul),
    **dict.fromkeys(BATCH_NORM, batch_norm),
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros"], zeros),
    "convolution": convolution,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys([*_ELEMENTWISE, *(f"{name}_" for name in _ELEMENTWISE)], elementwise),
    **dict.fromkeys(_MOVED, moved),
    **dict.fromkeys(["clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy"], same),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], reduction),
    **_SOURCES,
    "cat": cat,
    "constant_pad_nd": pad,
}
