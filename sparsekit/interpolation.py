"""The latency of a layer at any width, from measurements at some.

Along one size, the others whole, `staircase.fit` gives the latency at every width. Between grid lines a width stands
where its latency along the full line puts it, not where its number does: the middle of a plateau is as far as its end.
"""

# Q widths of one size, K of them on the grid
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsekit.layer_shapes import Point, Shape
from sparsekit.staircase import STRUCTURES, Structure, evidence, fit, hats

Array = NDArray[np.float64]

_APART = 0.8  # grid lines closer than this in latency are one: slopes between them would be noise
LEAST_MS = 1e-4


class WidthTable:
    """Milliseconds of one layer against its sizes, at any width up to its own.

    Attributes:
        shape: the layer.
        bases: per size, float [size + 1, K]: how much of each grid line's value a size takes.
        values_ms: at the crossings of the grid lines, one dimension per size.
    """

    def __init__(self, shape: Shape, ms: Mapping[Point, float], structures: Mapping[int, Structure]) -> None:
        """
        Args:
            shape: the layer.
            ms: measured at `points(shape)`.
            structures: per axis that varies, how the runtime pads it.
        """
        self.shape = shape
        curves = {axis: fit(along(shape, ms, axis), shape.num_widths(axis), structures[axis]) for axis in shape.axes}
        full_ms = float(np.mean([curve_Q[-1] for curve_Q in curves.values()] or [ms[shape.sizes]]))
        lines: list[list[int]] = []
        bases = []
        for axis, size in enumerate(shape.sizes):
            if axis not in curves:
                lines.append([size])
                bases.append(np.ones((size + 1, 1)))
                continue
            curve_Q = curves[axis] = curves[axis] / curves[axis][-1]
            chosen = _apart(curve_Q, shape.grid(axis))
            lines.append(chosen)
            bases.append(_stretch(_places(curve_Q, curve_Q[chosen]), shape.step(axis), size))
        self.bases = tuple(bases)
        values = [_value(shape, ms, full_ms, curves, crossing) for crossing in itertools.product(*lines)]
        self.values_ms: Array = np.array(values).reshape([len(line) for line in lines])

    def __call__(self, *sizes: NDArray[np.int64] | int) -> Array:
        """Milliseconds at these sizes, which broadcast."""
        arrays = np.broadcast_arrays(*sizes)
        left = np.broadcast_to(self.values_ms, arrays[0].shape + self.values_ms.shape)
        for base, array in zip(self.bases[::-1], arrays[::-1], strict=True):
            rows = base[array]
            left = (left * rows.reshape(array.shape + (1,) * (left.ndim - array.ndim - 1) + (-1,))).sum(-1)
        result: Array = np.maximum(left, LEAST_MS)
        return result


def along(shape: Shape, ms: Mapping[Point, float], axis: int) -> dict[int, float]:
    """Width in steps -> milliseconds, as measured along one axis with the others whole."""
    return {width: ms[shape.at({axis: width})] for width in shape.scan(axis)}


def _value(
    shape: Shape, ms: Mapping[Point, float], full_ms: float, curves: Mapping[int, Array], crossing: Sequence[int]
) -> float:
    """Milliseconds where grid lines cross: on the full lines what the curves say, which know more than one sample."""
    cut = {axis: crossing[axis] for axis, curve_Q in curves.items() if crossing[axis] < len(curve_Q) - 1}
    if len(cut) > 1:
        return ms[shape.at(cut)]
    return full_ms * math.prod(float(curves[axis][width]) for axis, width in cut.items())


def _apart(curve_Q: Array, widths: Sequence[int]) -> list[int]:
    """Those of `widths`, the last among them, whose latencies rise from one to the next by more than noise."""
    kept = [widths[-1]]
    for width in widths[-2::-1]:
        if curve_Q[width] < _APART * curve_Q[kept[-1]]:
            kept.append(width)
    return kept[::-1]


def _places(curve_Q: Array, knots_K: Array) -> Array:
    """[Q, K], where each width's latency lies between those of the grid lines."""
    return curve_Q[:, None] / knots_K if len(knots_K) == 1 else hats(curve_Q, knots_K)


def _stretch(base_QK: Array, step: int, size: int) -> Array:
    """[size + 1, K] from rows at the multiples of `step`, straight in between."""
    if step == 1:
        return base_QK
    multiples = np.arange(size + 1) / step
    return np.stack([np.interp(multiples, np.arange(len(base_QK)), column) for column in base_QK.T], 1)


def build_tables(measured: Mapping[Shape, Mapping[Point, float]]) -> dict[Shape, WidthTable]:
    """The table of each shape; how the runtime pads a size, all shapes of a kind say together.

    Args:
        measured: milliseconds at `points(shape)`, per shape.
    """
    found: dict[object, Array] = {}
    for shape, ms in measured.items():
        for axis in shape.axes:
            kind = shape.kind(axis)
            found[kind] = found.get(kind, 0) + evidence(along(shape, ms, axis), shape.num_widths(axis))
    chosen = {kind: STRUCTURES[int(criteria.argmin())] for kind, criteria in found.items()}
    return {
        shape: WidthTable(shape, ms, {axis: chosen[shape.kind(axis)] for axis in shape.axes})
        for shape, ms in measured.items()
    }
