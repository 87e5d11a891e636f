"""Layers at their full size, and the sizes at which they are measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsekit.cost import Counts
from sparsekit.graph import CostTerm, Size
from sparsekit.layers import Convolution, Layer, MatrixProduct, Pass
from sparsekit.staircase import coarse, scan, sparse_scan

Point = tuple[int, ...]  # a layer's sizes

_HEAVY_BYTES = 2**25  # weights that are slow to load; time spent on reading them has no steps


@dataclass(frozen=True)
class Shape:
    """A layer at its full size: what a table is measured for.

    Attributes:
        sizes: of the layer's cost term, all channels kept.
        varies: which of them follow channel counts.
        thorough: it is measured at runs of consecutive widths and on a fine grid, not at a few widths alone.
    """

    layer: Layer
    sizes: Point
    varies: tuple[bool, ...]
    thorough: bool = True

    @property
    def axes(self) -> tuple[int, ...]:
        """Positions of the sizes that vary."""
        return tuple(axis for axis, varies in enumerate(self.varies) if varies)

    def step(self, axis: int) -> int:
        """What the size is a multiple of."""
        return self.layer.steps(len(self.sizes))[axis]

    def num_widths(self, axis: int) -> int:
        """How many multiples of its step the size can be."""
        return self.sizes[axis] // self.step(axis)

    def scan(self, axis: int) -> list[int]:
        """The widths, in steps, at which the layer is measured with its other sizes whole."""
        num_widths = self.num_widths(axis)
        if isinstance(self.layer, Pass):  # going over numbers knows no blocks
            return coarse(num_widths)
        return scan(num_widths) if self.thorough else sparse_scan(num_widths)

    def grid(self, axis: int) -> list[int]:
        """The widths, in steps, at which it is measured together with other sizes: powers of two, and the full one.

        >>> conv = Convolution((8, 8), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, 144, False, False, True, 1)
        >>> shape = Shape(conv, (144, 512), (True, True))
        >>> shape.grid(0), shape.grid(1), Shape(conv, (144, 512), (True, True), False).grid(1)
        ([8, 16, 32, 64, 144], [8, 16, 32, 64, 128, 256, 512], [128, 256, 512])
        """
        num_widths = self.num_widths(axis)
        powers = [width for width in coarse(num_widths) if width.bit_count() == 1 and 3 * width <= 2 * num_widths]
        return [*(powers if self.thorough else powers[-2:]), num_widths]

    def at(self, widths: Mapping[int, int]) -> Point:
        """The full sizes, but for some axes that many steps."""
        return tuple(widths[i] * self.step(i) if i in widths else size for i, size in enumerate(self.sizes))

    def kind(self, axis: int) -> object:
        """Equal where a runtime may be expected to take the same kernels, and pad the size in the same way."""
        layer = self.layer
        if isinstance(layer, Convolution):
            grouped = layer.groups > 1, layer.cut_groups, layer.per_group == 1
            return len(layer.extent), max(layer.kernel) > 1, layer.transposed, layer.static, grouped, axis
        if isinstance(layer, MatrixProduct):
            return layer.static, layer.shape(self.sizes)[1] == 1, axis - len(self.sizes)
        return layer.op, axis


def weight_bytes(layer: Layer, sizes: Sequence[int]) -> int:
    """Of the layer's constant weight in float32, at these sizes of its term.

    >>> weight_bytes(MatrixProduct("right"), (1, 197, 768, 3072))
    9437184
    """
    if isinstance(layer, Convolution) and layer.static:
        return 4 * math.prod((*sizes, *layer.kernel))
    if isinstance(layer, MatrixProduct) and layer.static:
        return 4 * math.prod(sizes[-2:] if layer.static == "right" else sizes[-3:-1])
    return 0


def traffic_bytes(layer: Layer, sizes: Sequence[int]) -> int:
    """What the layer reads and writes per example in float32, its weight included, each number once.

    >>> traffic_bytes(MatrixProduct("right"), (1, 10, 3, 5)) // 4
    95
    """
    if isinstance(layer, Convolution):
        num_in, num_out, _ = layer.channels(sizes)
        images = num_in * math.prod(layer.extent) + num_out * math.prod(layer.output_extent)
        return 4 * (layer.num_inputs * images + math.prod((*sizes, *layer.kernel)))
    if isinstance(layer, MatrixProduct):
        num_matrices, rows, inner, columns = layer.shape(sizes)
        return 4 * num_matrices * (rows * inner + inner * columns + rows * columns)
    shape = layer.shape(sizes)
    return 4 * (math.prod(shape) + sum(math.prod(operand) for operand in layer.operands(shape)))


def shape_of(term: CostTerm, dense: Counts, *, thorough: bool = True) -> Shape | None:
    """The layer of a cost term when every group keeps `dense` channels; None where it is not known."""
    if term.layer is None:
        return None
    sizes = tuple(round(evaluate(size, dense)) for size in term.sizes)
    light = weight_bytes(term.layer, sizes) <= _HEAVY_BYTES
    return Shape(term.layer, sizes, tuple(any(size) for size in term.sizes), thorough and light)


def evaluate(size: Size, counts: Counts) -> float:
    """A size of a cost term at these channel counts."""
    return sum(per_channel * math.prod(int(counts[g]) for g in groups) for groups, per_channel in size.items())


def points(shape: Shape) -> list[Point]:
    """The sizes at which a layer is measured: along each axis, and where grid lines of all axes cross."""
    found = {shape.sizes}
    for axis in shape.axes:
        found.update(shape.at({axis: width}) for width in shape.scan(axis))
    grid = [shape.grid(axis) for axis in shape.axes]
    found.update(shape.at(dict(zip(shape.axes, crossing, strict=True))) for crossing in itertools.product(*grid))
    return sorted(found)
