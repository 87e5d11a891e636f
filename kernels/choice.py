"""Which layers gain from a sparse kernel on which GPU: a roofline first, a stopwatch where there is a GPU.

A layer takes the longest of its arithmetic, its memory traffic and one launch. Zeros shorten the first two, at the
share of dense speed that a kernel for them reaches. The densities from which they pay follow: half of a layer's time
may be the images that it reads and writes, which no zero in a weight makes smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True)
class Gpu:
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
    "H100": Gpu(800e12, 3.0e12),
    "H200": Gpu(800e12, 4.3e12),
    "A100": Gpu(250e12, 1.7e12),
    "B200": Gpu(1800e12, 7.0e12),
}

# Share of dense speed that a kernel reaches by its groups' sides; between them, by area.
EFFICIENCY = {(128, 128): 0.70, (128, 64): 0.67, (128, 16): 0.65, (64, 64): 0.48, (32, 32): 0.30, (16, 16): 0.18}
_WINDOW_EFFICIENCY = 0.85  # of convolutions, whose inputs are gathered pixel by pixel


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

    def seconds(self, gpu: Gpu, *, density: float = 1.0, efficiency: float = 1.0) -> float:
        """By the roofline, with this share of the weights and at this share of dense speed."""
        return max(self._times(gpu, density, efficiency).values())

    def bound(self, gpu: Gpu) -> Bound:
        """What takes longest in the dense layer."""
        times = self._times(gpu, 1.0, 1.0)
        return max(times, key=lambda name: times[name])

    def _times(self, gpu: Gpu, density: float, efficiency: float) -> dict[Bound, float]:
        return {
            "compute": 2 * density * self.num_macs / (efficiency * gpu.flops),
            "memory": (self.activation_bytes + density * self.weight_bytes) / gpu.bytes_per_s,
            "launch": gpu.launch_s,
        }


def speedup(work: Work, gpu: Gpu, *, density: float, rows: int, cols: int) -> float:
    """How many times faster than dense a kernel for groups of `rows` by `cols` should be.

    >>> linear = Work(num_macs=4096**3, activation_bytes=4 * 4096**2, weight_bytes=2 * 4096**2)
    >>> [round(speedup(linear, GPUS["H100"], density=d, rows=128, cols=16), 2) for d in (0.1, 0.25, 0.5, 1.0)]
    [6.5, 2.6, 1.3, 0.65]
    >>> pointwise = Work(num_macs=256 * 56 * 56 * 256 * 64, activation_bytes=2 * 256 * 56 * 56 * 320, weight_bytes=32768)
    >>> round(speedup(pointwise, GPUS["H100"], density=0.1, rows=128, cols=16), 2)
    1.0
    """
    efficiency = EFFICIENCY[min(EFFICIENCY, key=lambda sides: abs(sides[0] - rows) * 1000 + abs(sides[1] - cols))]
    if work.window:
        efficiency *= _WINDOW_EFFICIENCY
    return work.seconds(gpu) / work.seconds(gpu, density=density, efficiency=efficiency)


def gpu_of(device: torch.device) -> Gpu:
    """What is known of a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu for key, gpu in GPUS.items() if key in name), GPUS["H100"])


def replay_seconds(run: Callable[[], Tensor], *, num_replays: int = 20) -> float:
    """Median seconds of one call on a GPU, in a CUDA graph: what a launch from Python costs is not the layer's.

    The GPU's cache is overwritten before each, as other layers would.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries choose
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(150 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(num_replays):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)
