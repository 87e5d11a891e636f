"""Tensors between margins that show whether a kernel read or wrote past their ends.

Triton's interpreter doesn't notice: NaN that is read there reaches the result, and one that was overwritten is gone.
"""

from __future__ import annotations

from torch import Tensor

MARGIN = 256


def fenced(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with the same strides, and the buffer that it lies in, between margins of NaN, or of -1 for integers."""
    margin = float("nan") if tensor.is_floating_point() else -1
    buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), margin)
    inside = buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)
    return inside.copy_(tensor), buffer


def is_intact(buffer: Tensor) -> bool:
    """Whether the margins of a float buffer of `fenced` are as they were."""
    return bool(buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all())
