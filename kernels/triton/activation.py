"""The activation at the end of a kernel."""

import triton
import triton.language as tl


@triton.jit
def activated(z, ACT: tl.constexpr):
    """act(z) of float32; ACT is "none", "relu", "gelu" or "silu"."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # a NaN stays one, as in torch
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z
