"""One rule per ATen op: which channels the op couples, and where they are in its outputs.

To add an op, write one function `(op, coupling) -> labels of its outputs` and name it in `RULES`. An op without a
rule freezes the dimensions it touches and nothing else; what is frozen is never cut. A wrong rule is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsekit.coupling import Coupling, Labels
from sparsekit.record import Op, Recording
from sparsekit.rules import norms, picks, pointwise, products, shapes, windows
from sparsekit.rules.passes import passes
from sparsekit.rules.silence import divisors, stays_zero

Rule = Callable[[Op, Coupling], Sequence[Labels]]


def _names(names: str) -> list[str]:
    return names.split()


_OF_ELEMENTS = _names("""
    abs add addcmul addcdiv atan atan2 bernoulli bitwise_and bitwise_not bitwise_or celu clamp clamp_max clamp_min copy
    cos div dropout elu eq erf erfc exp expm1 fill floor fmod ge gelu gt hardsigmoid hardswish hardtanh isinf isnan
    le leaky_relu lerp log log10 log1p log2 log_sigmoid_forward logical_and logical_not logical_or logit lt masked_fill
    maximum minimum mish mul nan_to_num native_dropout ne neg normal pow prelu reciprocal relu relu6 remainder round
    rrelu_with_noise rsqrt rsub selu sigmoid sign silu sin softplus softshrink sqrt square sub tan tanh threshold trunc
    uniform where zero _prelu_kernel
""")
ELEMENTWISE = frozenset([*_OF_ELEMENTS, *(f"{name}_" for name in _OF_ELEMENTS)])
_PER_CHANNEL = _names("""
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
    avg_pool2d avg_pool3d max_pool2d max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d upsample_bicubic2d upsample_bilinear2d
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact2d
""")
_SAMPLERS = _names("grid_sampler_2d grid_sampler_3d torchvision::roi_align torchvision::roi_pool")
_REDUCTIONS = _names("""
    all amax amin any argmax argmin linalg_vector_norm logsumexp max mean min norm prod std std_mean sum var var_mean
""")
_SAME = _names("""
    _assert_tensor_metadata _to_copy alias as_strided_ contiguous clone detach empty_like full_like lift_fresh
    ones_like rand_like randn_like zeros_like
""")
_ATTENTION = _names("""
    _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_fused_attention_overrideable
""")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, pointwise.elementwise),
    **dict.fromkeys(_PER_CHANNEL, pointwise.per_channel),
    **dict.fromkeys(_SAMPLERS, pointwise.sampled),
    **dict.fromkeys(_SAME, pointwise.same),
    **dict.fromkeys(_names("empty full new_empty new_full new_ones new_zeros ones zeros"), pointwise.filled),
    **dict.fromkeys(_names("arange eye linspace rand randn scalar_tensor"), pointwise.constant),
    **dict.fromkeys(_names("view _unsafe_view reshape _reshape_alias squeeze unsqueeze"), shapes.view),
    **dict.fromkeys(_names("t transpose permute"), shapes.permute),
    **dict.fromkeys(_names("slice narrow"), picks.slicing),
    **dict.fromkeys(_names("split split_with_sizes chunk unsafe_split unsafe_chunk"), picks.splitting),
    **dict.fromkeys(_names("index_select embedding"), picks.pick),
    **dict.fromkeys(_names("roll flip"), picks.roll),
    **dict.fromkeys(_names("channel_shuffle native_channel_shuffle"), windows.channel_shuffle),
    "select": picks.select,
    "unbind": picks.unbind,
    "expand": shapes.expand,
    "repeat": shapes.repeat,
    "cat": shapes.cat,
    "stack": shapes.stack,
    "glu": picks.glu,
    "index": picks.index,
    **dict.fromkeys(_names("index_put index_put_"), picks.put),
    "unfold": windows.unfold,
    "im2col": windows.im2col,
    "col2im": windows.col2im,
    "pixel_shuffle": windows.pixel_shuffle,
    "pixel_unshuffle": windows.pixel_unshuffle,
    "constant_pad_nd": shapes.constant_pad,
    "convolution": products.convolution,
    "torchvision::deform_conv2d": products.deform_conv,
    **dict.fromkeys(_names("mm addmm bmm baddbmm"), products.matmul),
    **dict.fromkeys(_names("mv dot"), products.vector_product),
    **dict.fromkeys(_ATTENTION, products.attention),
    **dict.fromkeys(_REDUCTIONS, norms.reduction),
    **dict.fromkeys(_names("_softmax _log_softmax _safe_softmax"), norms.softmax),
    **dict.fromkeys(_names("native_layer_norm _fused_rms_norm"), norms.layer_norm),
    "native_group_norm": norms.group_norm,
    **dict.fromkeys(_names("native_batch_norm cudnn_batch_norm"), norms.batch_norm),
}

_ALIASES = frozenset(
    _names("""
    alias detach expand narrow permute _reshape_alias select slice split split_with_sizes squeeze t transpose unbind
    unfold unsafe_split unsqueeze view
""")
)


def follow(recording: Recording, coupling: Coupling) -> dict[int, Labels]:
    """Apply the rules to every op in order; `Ref.index` -> the labels of that tensor's dimensions."""
    coupling.begin(recording)
    used = _used(recording)
    for op in recording.ops:
        coupling.enter(op, used=op in used)
        outputs = RULES.get(op.name, pointwise.no_rule)(op, coupling)
        coupling.divisors += divisors(op, coupling)
        coupling.passes += passes(op, coupling, outputs)
        coupling.leave(op, outputs, clean=stays_zero(op, coupling, outputs), alias=op.name in _ALIASES)
    coupling.enter(None, used=True)
    for ref in recording.outputs:
        coupling.freeze(coupling.labels(ref), "the model returns it")
    return coupling.all_labels()


def _used(recording: Recording) -> set[Op]:
    """The ops whose results reach what the model returns, or that write into a tensor."""
    wanted = {ref.index for ref in recording.outputs}
    used = set()
    for op in reversed(recording.ops):
        if op.func._schema.is_mutable or any(ref.index in wanted for ref in op.outputs):
            used.add(op)
            wanted |= {ref.index for ref in op.tensors}
    return used
