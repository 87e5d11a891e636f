"""Transposed convolution, as the upsampling layers of GANs use it, by one convolution for each phase of the output.

Output pixels at the same position modulo the stride meet the same part of the kernel: each such phase is a plain
convolution of the input by that part, mirrored, at stride 1. No zeros are put between pixels and none are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import KernelError
from sparsekit.kernels.formats import GroupSparse
from sparsekit.kernels.group_conv2d import group_conv2d, pack_conv2d


@dataclass(frozen=True, eq=False)
class Phase:
    """The output pixels [row::stride, column::stride] of a transposed convolution.

    Attributes:
        start: row and column.
        weight: of [N, taps * C], the part of the kernel that these pixels meet.
        padding: left, right, top and bottom; negative ones crop.
    """

    start: tuple[int, int]
    weight: GroupSparse
    kernel_size: tuple[int, int]
    padding: tuple[int, int, int, int]


def pack_phases(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    rows: int | None = None,
    cols: int = 16,
    step: int = 64,
) -> tuple[Phase, ...]:
    """Pack a transposed convolution's weight for `group_conv_transpose2d`.

    Args:
        weight: [C, N, R, S], as `torch.nn.functional.conv_transpose2d` takes it.
        mask: bool, as the weight, True where it is kept; None keeps what is not zero.
        stride, padding, output_padding: as there, of rows and columns.
        rows, cols, step: see `pack_conv2d`.
    """
    if mask is None:
        mask = weight != 0
    weight, mask = weight.transpose(0, 1), mask.transpose(0, 1)
    phases = []
    for start_h in range(stride[0]):
        taps_h, top, bottom = _phase(start_h, weight.shape[2], stride[0], padding[0], output_padding[0])
        for start_w in range(stride[1]):
            taps_w, left, right = _phase(start_w, weight.shape[3], stride[1], padding[1], output_padding[1])
            part, kept = (_taken(whole, taps_h, taps_w) for whole in (weight, mask))
            packed = pack_conv2d(part, kept, rows=rows, cols=cols, step=step)
            kernel_size = part.shape[2], part.shape[3]
            phases.append(Phase((start_h, start_w), packed, kernel_size, (left, right, top, bottom)))
    return tuple(phases)


def group_conv_transpose2d(
    x: Tensor, phases: Sequence[Phase], bias: Tensor | None = None, *, act: str = "none"
) -> Tensor:
    """act(conv_transpose2d(x, weight) + bias), differentiable once in x, values and bias.

    Each phase is written by its convolution and then copied to its pixels.

    Args:
        x: [B, C, H, W], fastest as channels_last.
        phases: from `pack_phases`.
        bias: [N], best float32.
        act: "none", "relu", "gelu" or "silu".

    Returns:
        [B, N, H_out, W_out] in channels_last.

    Raises:
        KernelError: as `group_conv2d`, and where padding leaves a phase without pixels.

    >>> x, weight = torch.arange(2.0).view(1, 1, 1, 2).expand(1, 16, 1, 2), torch.ones(16, 16, 1, 2)
    >>> group_conv_transpose2d(x, pack_phases(weight, stride=(1, 2)))[0, 0].tolist()
    [[0.0, 0.0, 16.0, 16.0]]
    """
    if not phases:
        raise KernelError("phases: need at least one, from pack_phases")
    parts = {
        phase.start: group_conv2d(
            x, phase.weight.values, phase.weight.gidx, phase.weight.ptr, phase.weight.order, bias,
            n_out=phase.weight.shape[0], kernel_size=phase.kernel_size, padding=phase.padding, act=act,
        )
        for phase in phases
    }  # fmt: skip
    num_h, num_w = (1 + last for last in max(parts))
    num_images, num_out = x.shape[0], phases[0].weight.shape[0]
    height = sum(parts[start, 0].shape[2] for start in range(num_h))
    width = sum(parts[0, start].shape[3] for start in range(num_w))
    out = torch.empty(
        num_images, num_out, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    for (start_h, start_w), part in parts.items():
        out[:, :, start_h::num_h, start_w::num_w] = part
    return out


def _phase(start: int, size: int, stride: int, padding: int, output_padding: int) -> tuple[list[int], int, int]:
    """Along one axis: the kernel positions that a phase meets, in the order of the input, and its padding.

    Output y = stride * q + start takes input i at position y + padding - stride * i of the kernel.
    """
    first = (start + padding) % stride
    taps = list(range(first, size, stride))[::-1]
    shift = (start + padding) // stride  # the input that meets position `first` at q = 0
    before = max(len(taps), 1) - 1 - shift
    # Of H inputs come (H - 1) * stride - 2 * padding + size + output_padding outputs; this phase's are H - 1 + num_more
    num_more = -(-(size + output_padding - 2 * padding - start) // stride)
    return taps, before, num_more - 1 + shift


def _taken(whole: Tensor, taps_h: list[int], taps_w: list[int]) -> Tensor:
    """The kernel positions of a phase; a position of zeros for one that meets none, where the bias alone is left."""
    if taps_h and taps_w:
        return whole[:, :, taps_h][:, :, :, taps_w]
    return torch.zeros_like(whole[:, :, : max(len(taps_h), 1), : max(len(taps_w), 1)])
