"""Which layers gain from a sparse kernel on which GPU: a roofline first, a stopwatch where there is a GPU.

A layer takes the longest of its arithmetic, its memory traffic and one launch. Zeros shorten the first two, at the
share of dense speed that a kernel for them reaches. The densities from which they pay follow: half of a layer's time
may be the images that it reads and writes, which no zero in a weight makes smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.kernels.cusparselt_linear import takes
from sparsekit.kernels.formats import blocks
from sparsekit.kernels.modules import (
    Conv2dAct,
    CusparseltLinear,
    LinearAct,
    NM24Linear,
    ResidualSubset,
    SparseConv2d,
    SparseLinear,
    touched_groups,
)
from sparsekit.kernels.residual_subset import CHANNELS
from sparsekit.kernels.timing import replay_seconds

Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True)
class Roofline:
    """What a GPU does at best.

    Attributes:
        flops: multiplications and additions per second in 16 bits, dense.
        bytes_per_s: of its memory.
        launch_s: of one kernel in a CUDA graph.
    """

    flops: float
    bytes_per_s: float
    launch_s: float = 2.5e-6


# What dense libraries reach, by the name that torch gives the device; anything else counts as an H100.
GPUS = {
    "H100": Roofline(800e12, 3.0e12),
    "H200": Roofline(800e12, 4.3e12),
    "A100": Roofline(250e12, 1.7e12),
    "B200": Roofline(1800e12, 7.0e12),
}

# Share of dense speed that a kernel reaches by its groups' sides; between them, by area.
EFFICIENCY = {(128, 128): 0.70, (128, 64): 0.67, (128, 16): 0.65, (64, 64): 0.48, (32, 32): 0.30, (16, 16): 0.18}
_WINDOW_EFFICIENCY = 0.85  # of convolutions, whose inputs are gathered pixel by pixel
_FEW_SAMPLES = 32  # so many that reading the weight takes longer than multiplying with it
_TWO_TO_FOUR = 1.6  # what sparse tensor cores reach of twice the dense speed
_WORTH_IT = 1.05  # a kernel that is no faster than this is not worth being another one


@dataclass(frozen=True)
class Work:
    """What one layer does on one batch.

    Attributes:
        num_macs: multiply-accumulates with all weights.
        activation_bytes: read and written.
        weight_bytes: of all weights.
        window: it is a convolution of more than one pixel.
    """

    num_macs: int
    activation_bytes: int
    weight_bytes: int
    window: bool = False

    def seconds(self, gpu: Roofline, *, density: float = 1.0, efficiency: float = 1.0) -> float:
        """By the roofline, with this share of the weights and at this share of dense speed."""
        return max(self._times(gpu, density, efficiency).values())

    def bound(self, gpu: Roofline) -> Bound:
        """What takes longest in the dense layer."""
        times = self._times(gpu, 1.0, 1.0)
        return max(times, key=lambda name: times[name])

    def _times(self, gpu: Roofline, density: float, efficiency: float) -> dict[Bound, float]:
        return {
            "compute": 2 * density * self.num_macs / (efficiency * gpu.flops),
            "memory": (self.activation_bytes + density * self.weight_bytes) / gpu.bytes_per_s,
            "launch": gpu.launch_s,
        }


def speedup(work: Work, gpu: Roofline, *, density: float, rows: int, cols: int) -> float:
    """How many times faster than dense a kernel for groups of `rows` by `cols` should be.

    >>> linear = Work(num_macs=4096**3, activation_bytes=4 * 4096**2, weight_bytes=2 * 4096**2)
    >>> [round(speedup(linear, GPUS["H100"], density=d, rows=128, cols=16), 2) for d in (0.1, 0.25, 0.5, 1.0)]
    [6.5, 2.6, 1.3, 0.65]
    >>> num_pixels = 256 * 56 * 56
    >>> pointwise = Work(num_macs=num_pixels * 256 * 64, activation_bytes=2 * num_pixels * 320, weight_bytes=32768)
    >>> round(speedup(pointwise, GPUS["H100"], density=0.1, rows=128, cols=16), 2)
    1.0
    """
    efficiency = EFFICIENCY[min(EFFICIENCY, key=lambda sides: abs(sides[0] - rows) * 1000 + abs(sides[1] - cols))]
    if work.window:
        efficiency *= _WINDOW_EFFICIENCY
    return work.seconds(gpu) / work.seconds(gpu, density=density, efficiency=efficiency)


@dataclass(frozen=True)
class Choice:
    """What runs one layer, and why.

    Attributes:
        layer: its name.
        size: its weight's shape.
        num_macs: on the batch that was looked at.
        bound: what takes longest in the dense layer, by the roofline.
        best: the sparse kernel that should be fastest; "none" where the zeros have no pattern.
        density: share of the weights that it would multiply with.
        expected: how many times faster than dense it should be, by the roofline.
        measured: how many times faster it was; None where it was not tried.
        taken: whether it runs.
    """

    layer: str
    size: tuple[int, ...]
    num_macs: int
    bound: Bound
    best: str = "none"
    density: float = 1.0
    expected: float = 1.0
    measured: float | None = None
    taken: bool = False


@dataclass(frozen=True)
class _Candidate:
    kernel: str
    density: float
    expected: float
    make: Callable[[], nn.Module]


def choose(
    name: str,
    layer: LinearAct | Conv2dAct,
    inputs: Sequence[Tensor],
    output: Tensor,
    *,
    gpu: Roofline,
    in_place: bool,
    timed: bool,
    forced: bool,
) -> tuple[Choice, nn.Module]:
    """The kernel for one layer, and the layer that runs it, which is `layer` where nothing is faster.

    Args:
        inputs: what it was called with: the input, and the residual if there is one. Only shapes and strides matter.
        output: what it returned, likewise.
        gpu: whose roofline to go by.
        in_place: whether the residual may be overwritten and is not negative.
        timed: whether the best candidate must also win on the stopwatch, on the layer's own device.
        forced: take the best candidate in any case.
    """
    work = work_of(layer, inputs, output)
    choice = Choice(name, tuple(layer.weight.shape), work.num_macs, work.bound(gpu))
    candidates = _candidates(layer, inputs, output, work, gpu, in_place=in_place)
    if not candidates:
        return choice, layer
    best = max(candidates, key=lambda candidate: (candidate.expected, -candidate.density))
    choice = replace(choice, best=best.kernel, density=best.density, expected=best.expected)
    if best.expected < _WORTH_IT and not forced:
        return choice, layer
    made = best.make()
    if timed:
        tensors = [torch.randn_like(like, device=layer.weight.device) for like in inputs]
        runs = [partial(each, *tensors) for each in (layer, made)]
        dense_s, made_s = map(median, replay_seconds(runs))
        choice = replace(choice, measured=dense_s / made_s)
        if dense_s < _WORTH_IT * made_s:
            return choice, layer
    return replace(choice, taken=True), made


def work_of(layer: LinearAct | Conv2dAct, inputs: Sequence[Tensor], output: Tensor) -> Work:
    """What a layer does when it is called with these inputs."""
    per_output = layer.weight[0].numel()
    size = output.element_size()
    return Work(
        num_macs=output.numel() * per_output,
        activation_bytes=size * (sum(each.numel() for each in inputs) + output.numel()),
        weight_bytes=size * layer.weight.numel(),
        window=layer.weight[0, 0].numel() > 1,
    )


def _candidates(
    layer: LinearAct | Conv2dAct, inputs: Sequence[Tensor], output: Tensor, work: Work, gpu: Roofline, *, in_place: bool
) -> list[_Candidate]:
    """The sparse kernels that a layer's zeros allow."""
    if isinstance(layer, Conv2dAct) and layer.groups > 1:
        return []
    found = []
    if in_place and isinstance(layer, Conv2dAct) and layer.act == "relu" and len(layer.weight) % CHANNELS == 0:
        kept = len(touched_groups(layer)) * CHANNELS / len(layer.weight)
        if 0 < kept < 1:
            streams = 2 * output.numel() * output.element_size()  # the residual is read and written
            less = replace(work, activation_bytes=round(work.activation_bytes - (1 - kept) * streams))
            expected = work.seconds(gpu) / less.seconds(gpu, density=kept, efficiency=EFFICIENCY[128, 64])
            found.append(_Candidate("residual subset", kept, expected, partial(ResidualSubset, layer)))
    samples = output.numel() // output.shape[-1]
    if isinstance(layer, LinearAct) and len(inputs) == 1 and _is_nm24(layer.weight):
        less = replace(work, weight_bytes=work.weight_bytes * 9 // 16)
        if samples <= _FEW_SAMPLES:
            expected = work.seconds(gpu) / less.seconds(gpu)
            found.append(_Candidate("2:4", 0.5, expected, partial(NM24Linear, layer)))
        elif takes(layer.weight):
            expected = work.seconds(gpu) / less.seconds(gpu, efficiency=_TWO_TO_FOUR)
            found.append(_Candidate("2:4 cuSPARSELt", 0.5, expected, partial(CusparseltLinear, layer)))
    nonzero_NK = layer.weight.movedim(1, -1).flatten(1) != 0
    taps = nonzero_NK.shape[1] // layer.weight.shape[1]
    for rows, cols in EFFICIENCY:
        if 2 * len(nonzero_NK) < rows or layer.weight.shape[1] % cols:
            continue
        density = float(blocks(nonzero_NK, rows, cols, taps).any(3).any(2).float().mean())
        if density < 1:
            expected = speedup(work, gpu, density=density, rows=rows, cols=cols)
            make = partial(_sparse, layer, rows, cols)
            found.append(_Candidate(f"block {rows}x{cols}", density, expected, make))
    return found


def gpu_of(device: torch.device) -> Roofline:
    """What is known of a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu for key, gpu in GPUS.items() if key in name), GPUS["H100"])


def _is_nm24(weight_NK: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive inputs are not zero."""
    return weight_NK.shape[1] % 4 == 0 and bool(((weight_NK != 0).view(len(weight_NK), -1, 4).sum(2) <= 2).all())


def _sparse(layer: LinearAct | Conv2dAct, rows: int, cols: int) -> nn.Module:
    """The layer with its weight in groups of these sides."""
    if isinstance(layer, LinearAct):
        return SparseLinear(layer, rows=rows, cols=cols)
    return SparseConv2d(layer, rows=rows, cols=cols)
