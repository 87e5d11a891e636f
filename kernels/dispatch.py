"""Which body of an op runs: Triton's on a GPU and under its interpreter, else torch's, which is the reference."""

from __future__ import annotations

import os

from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernel.

    On the CPU only where TRITON_INTERPRET=1 was set before the process imported Triton.
    """
    return x.is_cuda or interpreted()


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, which gets bfloat16 silently wrong: upcast there."""
    return os.environ.get("TRITON_INTERPRET") == "1"
