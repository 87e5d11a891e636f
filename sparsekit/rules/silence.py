"""Which ops turn zero channels into zero channels: where masking may silence a channel by its own parameters.

A channel summed over between two activations, as in attention scores, is read by no parameter that could be set to
zero. But if all of its own parameters are zero and the ops in between keep zero zero, it adds nothing to the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsekit.coupling import Coupling, Label, Labels
from sparsekit.record import Op, Ref

_ZERO_STAYS = frozenset(
    """
    abs alias celu clone contiguous detach dropout elu expand floor gelu hardswish leaky_relu mish native_dropout neg
    permute _prelu_kernel relu relu6 repeat reshape _reshape_alias round selu sign silu sin slice softshrink split
    split_with_sizes square squeeze t tanh _to_copy transpose unbind unfold _unsafe_view unsqueeze view select narrow
    cat stack roll flip index_put im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    index index_select embedding mean sum amax amin linalg_vector_norm constant_pad_nd _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices
    upsample_bicubic2d upsample_bilinear2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    reflection_pad1d reflection_pad2d replication_pad2d copy zeros new_zeros zeros_like
    """.split()
)
_NORMS = frozenset(["native_batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm"])


def stays_zero(op: Op, coupling: Coupling, outputs: Sequence[Labels]) -> bool:
    """Whether every channel of the outputs is zero once all parameters of that channel are."""
    name = op.name.removesuffix("_")
    if name in _ZERO_STAYS:
        return all(coupling.is_clean(ref) for ref in op.tensors)
    if name in _NORMS:  # zero scale and zero shift
        affine = [op.args.get("weight"), op.args.get("bias")]
        return all(isinstance(ref, Ref) and coupling.is_clean(ref) for ref in affine[: 1 if "rms" in name else 2])
    if name == "convolution":
        return coupling.is_clean(op.args["weight"])
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return _product_stays_zero(op, coupling, outputs[0])
    if name.startswith("_scaled_dot_product"):
        return coupling.is_clean(op.args["value"])
    if name in ("mul", "div", "add", "sub"):
        covering = [ref for ref in op.tensors if coupling.is_clean(ref) and _covers(coupling.labels(ref), outputs[0])]
        if name == "mul":
            return bool(covering)
        return op.args["self"] in covering and (name == "div" or len(covering) == 2)
    return False


def divisors(op: Op, coupling: Coupling) -> list[Label]:
    """Labels of parameters that must not be set to zero, because the op divides by them."""
    name = op.name.removesuffix("_")
    ref = op.args["other"] if name == "div" else op.args["self"] if name in _DIVIDING else None
    if not isinstance(ref, Ref) or not coupling.is_static(ref):
        return []
    return [label for label in coupling.labels(ref) if label is not None]


_DIVIDING = frozenset(["reciprocal", "rsqrt", "log", "log2", "log10"])


def _product_stays_zero(op: Op, coupling: Coupling, output: Labels) -> bool:
    names = {
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
    }
    left, right = (coupling.is_clean(op.args[name]) for name in names[op.name])
    *batch, rows, columns = output
    if (rows is not None and not left) or (columns is not None and not right):
        return False
    added = op.args["self"] if op.name in ("addmm", "baddbmm") else None
    clean_sum = added is None or (coupling.is_clean(added) and _covers(coupling.labels(added), output))
    return clean_sum and (all(label is None for label in batch) or left or right)


def _covers(labels: Labels, output: Labels) -> bool:
    """Whether the tensor has a label wherever the output has one."""
    padded = (None,) * (len(output) - len(labels)) + labels
    return all(given is not None for given, label in zip(padded, output, strict=True) if label is not None)
