"""What each layer of a network takes, what it is bound by, and what cutting it would bring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from sparsekit.cost import Costs, Counts
from sparsekit.graph import ChannelGraph, CostTerm
from sparsekit.latency_model import Latencies
from sparsekit.layer_shapes import Shape, shape_of, traffic_bytes, weight_bytes
from sparsekit.layers import Convolution, MatrixProduct, Pass
from sparsekit.staircase import edges
from sparsekit.targets import Target
from sparsekit.width_tables import measure_shapes

# A product that runtimes multiply as fast as they can, and one with a weight too large for any cache.
_MULTIPLYING = Shape(MatrixProduct("right"), (1, 512, 1024, 1024), (False,) * 4)
_STREAMING = Shape(MatrixProduct("right"), (1, 1, 8192, 4096), (False,) * 4)

Array = NDArray[np.float64]
Bound = Literal["compute", "memory", "overhead"]


@dataclass(frozen=True)
class Peaks:
    """What the device does at best, as measured on it.

    Attributes:
        macs_per_ms: multiply-accumulates.
        bytes_per_ms: read from memory.
    """

    macs_per_ms: float
    bytes_per_ms: float


@dataclass(frozen=True)
class LayerTime:
    """One layer of the dense network.

    Attributes:
        name: path of the module.
        what: the operator, where it is none that multiplies and sums.
        share: fraction of the time of all layers.
        width: channels of the group that the layer makes; None where their number is fixed.
        edge: the next lower number of channels that is a plateau's end for all layers that the group touches together;
            None without one.
        edge_change: the time of those layers with that many channels over their present time, less 1.
        bound: what takes most of its time: multiplying at the device's peak, moving its bytes at the device's peak, or
            neither.
        gain_ms: what the whole network gains when the group loses a tenth of its channels, rounded up.
    """

    name: str
    what: str
    num_macs: int
    time_ms: float
    share: float
    width: int | None
    edge: int | None
    edge_change: float | None
    bound: Bound
    gain_ms: float | None


def measure_peaks(target: Target, *, threads: int = 1, cache_dir: Path | None = None) -> Peaks:
    """How fast the target multiplies a large matrix, and reads one that it needs only once.

    Raises:
        MeasurementError: the target does not run.
    """
    ms = measure_shapes([_MULTIPLYING, _STREAMING], target, threads=threads, cache_dir=cache_dir)
    num_macs = _MULTIPLYING.layer.macs(_MULTIPLYING.sizes)
    num_bytes = traffic_bytes(_STREAMING.layer, _STREAMING.sizes)
    return Peaks(num_macs / ms[_MULTIPLYING][_MULTIPLYING.sizes], num_bytes / ms[_STREAMING][_STREAMING.sizes])


def layer_times(graph: ChannelGraph, latencies: Latencies, peaks: Peaks, *, batch_size: int = 1) -> list[LayerTime]:
    """A row per layer whose time is known, those without multiply-accumulates last.

    Args:
        graph: the dense network.
        latencies: of the same graph.
        peaks: of the target and number of threads that the latencies are of.
        batch_size: that the latencies are of.
    """
    dense = Costs(graph).dense
    per_layer = latencies.per_layer(dense)
    shapes = [(number, shape) for number, term in enumerate(graph.timed) if (shape := shape_of(term, dense))]
    rates = [shape.layer.macs(shape.sizes) * batch_size / per_layer[number] for number, shape in shapes]
    peaks = Peaks(max([peaks.macs_per_ms, *rates]), peaks.bytes_per_ms)
    rows = []
    for number, shape in shapes:
        term, time_ms = graph.timed[number], float(per_layer[number])
        group = _made(term, dense)
        cut = _NO_CUT if group is None else _cut(latencies.along(dense, group))
        rows.append(
            LayerTime(
                name=term.name,
                what=shape.layer.op if isinstance(shape.layer, Pass) else "",
                num_macs=shape.layer.macs(shape.sizes),
                time_ms=time_ms,
                share=time_ms / float(per_layer.sum()),
                width=None if group is None else graph.groups[group].size,
                bound=_bound(shape, time_ms / batch_size, peaks, batch_size),
                **cut,
            )
        )
    return rows


class _Cut(TypedDict):
    edge: int | None
    edge_change: float | None
    gain_ms: float | None


_NO_CUT = _Cut(edge=None, edge_change=None, gain_ms=None)


def _cut(curve_C: Array) -> _Cut:
    """What cutting a group brings, from the time of all layers that it touches at its widths 1 to C."""
    gain_ms = float(curve_C[-1] - curve_C[max(1, len(curve_C) * 9 // 10) - 1])
    found = edges(curve_C)
    if len(found) == 1:
        return _Cut(edge=None, edge_change=None, gain_ms=gain_ms)
    return _Cut(edge=found[-2], edge_change=float(curve_C[found[-2] - 1] / curve_C[-1]) - 1, gain_ms=gain_ms)


def _made(term: CostTerm, dense: Counts) -> int | None:
    """The group of most of the channels that a layer makes; None where their number is fixed."""
    made = 1 if isinstance(term.layer, Convolution | Pass) else len(term.sizes) - 1
    if isinstance(term.layer, Convolution) and not (term.layer.transposed and not term.layer.cut_groups):
        made = 0
    owners = {
        group: per_channel * math.prod(int(dense[g]) for g in groups)
        for groups, per_channel in term.sizes[made].items()
        for group in groups[-1:]
    }
    return max(owners, key=lambda group: owners[group]) if owners else None


def _bound(shape: Shape, time_ms: float, peaks: Peaks, batch_size: int) -> Bound:
    """What takes most of one example's time; of what is left of it, neither multiplying nor memory is the cause."""
    layer = shape.layer
    num_bytes = traffic_bytes(layer, shape.sizes) - (1 - 1 / batch_size) * weight_bytes(layer, shape.sizes)
    compute_ms = layer.macs(shape.sizes) / peaks.macs_per_ms
    memory_ms = num_bytes / peaks.bytes_per_ms
    if time_ms - max(compute_ms, memory_ms) > max(compute_ms, memory_ms):
        return "overhead"
    return "compute" if compute_ms >= memory_ms else "memory"
