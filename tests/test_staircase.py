"""The latency of a layer at every width, from measurements at some."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from sparsekit.interpolation import WidthTable, build_tables
from sparsekit.layer_shapes import Shape, points
from sparsekit.layers import Convolution, MatrixProduct
from sparsekit.staircase import edges

CONV = Convolution((8, 8), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, 256, False, False, True, 1)


def padded(width: int, block: int = 16) -> int:
    return -(-width // block) * block


def exactly(shape: Shape, function: Callable[..., float]) -> dict[tuple[int, ...], float]:
    return {point: function(*point) for point in points(shape)}


def test_a_table_is_exact_at_every_width_where_latency_is_a_product_of_staircases() -> None:
    shape = Shape(CONV, (256, 144), (True, True))
    table = build_tables({shape: exactly(shape, lambda out, into: 0.5 * padded(out) * (32 + padded(into)))})[shape]
    out, into = np.meshgrid(np.arange(9, 257), np.arange(9, 145), indexing="ij")
    expected = 0.5 * (-(-out // 16) * 16) * (32 + -(-into // 16) * 16)
    np.testing.assert_allclose(table(out, into), expected, rtol=1e-6)
    assert table(256, 144).shape == ()


def test_a_slower_kernel_for_widths_that_4_does_not_divide_is_found_between_measured_runs() -> None:
    shape = Shape(CONV, (16, 512), (False, True))
    table = build_tables({shape: exactly(shape, lambda _, into: padded(into) if into % 4 == 0 else 1.5 * into)})[shape]
    widths = np.array([132, 144, 201, 204, 255, 333, 400])
    expected = [144.0, 144.0, 301.5, 208.0, 382.5, 499.5, 400.0]
    np.testing.assert_allclose(table(16, widths), expected, rtol=1e-6)


def has_its_plateaus(table: WidthTable) -> bool:
    curve = table(np.arange(1, 257), table.shape.sizes[1])
    return set(edges(curve)) <= set(range(16, 257, 16))


def test_noise_makes_no_plateaus_and_what_layers_of_a_kind_agree_on_is_found_in_each() -> None:
    generator = np.random.default_rng(0)
    shapes = [Shape(CONV, (256, into), (True, False)) for into in (8, 16, 24, 32, 48, 64)]
    measured = {
        shape: exactly(shape, lambda out, into: padded(out) * into * math.exp(generator.normal(0, 0.15)))
        for shape in shapes
    }
    alone = {shape: has_its_plateaus(build_tables({shape: measured[shape]})[shape]) for shape in shapes}
    assert set(alone.values()) == {True, False}  # some are misled by their own noise
    misled_last = sorted(shapes, key=lambda shape: alone[shape], reverse=True)
    for shape, table in build_tables({shape: measured[shape] for shape in misled_last}).items():
        assert has_its_plateaus(table)
        assert table(256, shape.sizes[1]) == pytest.approx(256 * shape.sizes[1], rel=0.1)


def test_measurements_between_grid_lines_do_not_leave_the_crossings() -> None:
    """Off the full lines a table goes through what was measured, whatever the function."""
    generator = np.random.default_rng(0)
    shape = Shape(MatrixProduct("right"), (1, 10, 256, 128), (False, False, True, True))
    ms = exactly(shape, lambda _, rows, inner, columns: inner * columns * (1 + 0.3 * generator.random()))
    table = build_tables({shape: ms})[shape]
    for inner in (16, 64, 128):
        assert float(table(1, 10, inner, 32)) == pytest.approx(ms[1, 10, inner, 32])


def test_edges_are_the_widths_that_no_wider_one_beats_two_percent_apart() -> None:
    curve = np.array([1.0, 1.0, 3.0, 2.0, 2.0, 2.5, 2.99, 3.0])
    assert edges(curve) == [2, 5, 6, 8]  # three channels are slower than five, seven no faster than eight
    assert edges(np.linspace(0.001, 1, 1000))[-3:] == [959, 979, 1000]
    assert edges(np.array([5.0])) == [1]


def test_a_sparse_scan_finds_the_same_staircase() -> None:
    shape = Shape(CONV, (256, 8), (True, False), thorough=False)
    assert len(points(shape)) < 20
    table = build_tables({shape: exactly(shape, lambda out, _: padded(out))})[shape]
    out = np.arange(9, 257)
    np.testing.assert_allclose(table(out, 8), -(-out // 16) * 16, rtol=1e-6)


def test_sizes_that_come_in_steps_are_measured_at_their_multiples_alone() -> None:
    groups = Convolution((8, 8), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 32, 4, True, False, True, 1)
    shape = Shape(groups, (128, 4), (True, False))
    assert {out % 4 for out, _ in points(shape)} == {0}
    table = build_tables({shape: exactly(shape, lambda out, _: out)})[shape]
    assert table(np.array([4, 40, 128]), 4).tolist() == pytest.approx([4, 40, 128])
