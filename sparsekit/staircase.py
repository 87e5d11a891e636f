"""The latency of a layer against one of its widths, at every width, from noisy measurements of some.

Runtimes pad channels to blocks, so that latency is a staircase, and take a slower kernel where a number does not divide
the width. Which block and which divisor, if any, is for the measurements of all layers of a kind to say: those with
which curves explain them with few numbers (the Bayesian information criterion). A step in a curve is then one that many
measurements agree on, and noise in a single one is no step.
"""

# P measurements, K knots, Q widths
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Widths = NDArray[np.int64]

PERIOD = 32  # no runtime's blocks are larger
# Rests of widths by PERIOD that tell blocks of 4 to 32 and divisors of 2 to 16 from each other.
_RESTS = (0, 1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 17, 20, 24, 28, 31)
_LEAST_ERROR = 0.002  # nothing is measured better
_NUM_PASSES = 4

Structure = tuple[int, int]  # channels per block, and what divides the widths of the fast kernel
STRUCTURES: tuple[Structure, ...] = tuple(
    (block, divisor) for block in (1, 4, 8, 16, 32) for divisor in (1, 2, 4, 8, 16) if divisor <= max(block, 4)
)


def scan(num_widths: int) -> list[int]:
    """The widths to measure, of 1 to `num_widths`: all up to 32, else powers of two, their middles, and two runs.

    >>> scan(5)
    [1, 2, 3, 4, 5]
    >>> len(scan(64)), len(scan(512)), len(scan(2048))
    (32, 41, 45)
    """
    if num_widths <= PERIOD:
        return list(range(1, num_widths + 1))
    ends = (*range(PERIOD, 2 * PERIOD), *range(num_widths - PERIOD, num_widths))
    runs = [width for width in ends if width % PERIOD in _RESTS]
    found = {*coarse(num_widths), *runs, *(rest for rest in _RESTS if rest and num_widths <= 2 * PERIOD)}
    return sorted(width for width in found if width <= num_widths)


def sparse_scan(num_widths: int) -> list[int]:
    """A few widths that still tell common blocks and divisors from each other.

    >>> sparse_scan(128)
    [8, 16, 32, 48, 64, 96, 104, 112, 116, 120, 124, 127, 128]
    """
    near = (num_widths - below for below in (1, 4, 8, 12, 16, 24))
    return sorted({*coarse(num_widths), *(width for width in near if width > 0)})


def coarse(num_widths: int) -> list[int]:
    """Powers of two from 8 on and their middles from 48 on, up to `num_widths`, and that.

    >>> coarse(100), coarse(12)
    ([8, 16, 32, 48, 64, 96, 100], [1, 2, 4, 8, 12])
    """
    if num_widths < 16:
        return sorted({*(width for width in (1, 2, 4, 8) if width < num_widths), num_widths})
    powers = [1 << k for k in range(3, num_widths.bit_length())]
    middles = [power * 3 // 2 for power in powers if power >= PERIOD]
    return sorted({*(width for width in (*powers, *middles) if width < num_widths), num_widths})


def evidence(known: Mapping[int, float], num_widths: int) -> Array:
    """How badly each of `STRUCTURES` explains what was measured, float [S], to be added up over layers of a kind.

    >>> blocks_of_16 = {width: 2.0 * math.ceil(width / 16) for width in scan(100)}
    >>> STRUCTURES[int(evidence(blocks_of_16, 100).argmin())]
    (16, 1)
    """
    width_P, value_P = np.array([*known], dtype=np.int64), np.array([*known.values()])
    criteria = []
    for structure in STRUCTURES:
        guess_P, num_knots = _explain(width_P, value_P, width_P, num_widths, structure)
        error = max(float(np.abs(guess_P / value_P - 1).mean()), _LEAST_ERROR)
        criteria.append(2 * len(value_P) * math.log(error) + num_knots * math.log(len(value_P)))
    return np.array(criteria)


def fit(known: Mapping[int, float], num_widths: int, structure: Structure) -> Array:
    """Latency at every width, float [Q + 1] with 0 at no width, from what was measured at `scan(num_widths)`.

    >>> blocks_of_16 = {width: 2.0 * math.ceil(width / 16) for width in scan(100)}
    >>> fit(blocks_of_16, 100, (16, 1))[[70, 80, 81, 96, 97]].round(6).tolist()
    [10.0, 10.0, 12.0, 12.0, 14.0]
    """
    width_P, value_P = np.array([*known], dtype=np.int64), np.array([*known.values()])
    curve_Q, _ = _explain(width_P, value_P, np.arange(num_widths + 1), num_widths, structure)
    curve_Q[0] = 0
    return curve_Q


def _explain(
    width_P: Widths, value_P: Array, width_Q: Widths, num_widths: int, structure: Structure
) -> tuple[Array, int]:
    """The best curve of this structure, and how many numbers it takes to say so."""
    block, divisor = structure
    knots = coarse(num_widths)
    steps = sorted({-(-knot // block) * block for knot in knots})
    fast_P = width_P % divisor == 0
    padded_P, padded_Q = (-(-width // block) * block for width in (width_P, width_Q))
    curve_Q, num_knots = _straight(padded_P[fast_P], value_P[fast_P], padded_Q, steps), len(steps)
    if not fast_P.all():
        bends = [knot for knot in knots if knot > 2 * PERIOD or knot in (1, 8, PERIOD, num_widths)]
        slow_Q = _straight(width_P[~fast_P], value_P[~fast_P], width_Q, bends)
        curve_Q, num_knots = np.where(width_Q % divisor == 0, curve_Q, slow_Q), num_knots + len(bends)
    return curve_Q, num_knots


def _straight(x_P: Widths, value_P: Array, at_Q: Widths, knots: Sequence[int]) -> Array:
    """The line with bends at `knots` that has the least mean relative error, at other places."""
    if not len(x_P):
        return np.zeros(len(at_Q))
    # Knots that no measurement is near say nothing.
    right = np.clip(np.searchsorted(knots, x_P), 0, len(knots) - 1)
    used = sorted({*right.tolist(), *np.maximum(right - 1, 0).tolist()})
    knots_K = np.array(knots, dtype=np.float64)[used]
    basis_PK = hats(x_P, knots_K) / value_P[:, None]
    ridge_KK = 1e-9 / value_P.mean() ** 2 * np.eye(len(used))
    weight_P = np.ones(len(x_P))
    for _ in range(_NUM_PASSES):  # iteratively reweighted: the least absolute error, which outliers do not move
        weighted_KP = (basis_PK * weight_P[:, None]).T
        value_K = np.linalg.solve(weighted_KP @ basis_PK + ridge_KK, weighted_KP.sum(1))
        weight_P = 1 / np.maximum(np.abs(basis_PK @ value_K - 1), _LEAST_ERROR)
    result: Array = np.maximum(hats(at_Q, knots_K) @ value_K, value_P.min() * 0.1)
    return result


def hats(x_P: Widths | Array, knots_K: Array) -> Array:
    """[P, K], how much of each knot's value a place takes; beyond the outer knots lines go on straight.

    >>> hats(np.array([1.0, 2.5, 4.0]), np.array([1.0, 2.0, 3.0])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, -1.0, 2.0]]
    """
    if len(knots_K) == 1:
        return np.ones((len(x_P), 1))
    eye = np.eye(len(knots_K))
    right = np.clip(np.searchsorted(knots_K, x_P), 1, len(knots_K) - 1)
    share_P = ((x_P - knots_K[right - 1]) / (knots_K[right] - knots_K[right - 1]))[:, None]
    result: Array = (1 - share_P) * eye[right - 1] + share_P * eye[right]
    return result


def edges(curve_Q: Array, *, gain: float = 0.02) -> list[int]:
    """The widths worth keeping, ascending: each is the widest that is faster than the next by more than `gain`.

    Args:
        curve_Q: latency at widths 1 to Q, as `Latencies.along` returns.

    >>> edges(np.array([1.0, 1, 1, 1, 2, 2.02, 1.99, 2.0]))
    [4, 8]
    >>> edges(np.array([3.0, 2.5, 2.0, 2.6]))  # one and two channels are slower than three
    [3, 4]
    """
    found = [len(curve_Q)]
    while True:
        # What is wider than the one found and narrower than the last is no faster than the last: no plateau of its own.
        faster = np.flatnonzero(curve_Q[: found[-1] - 1] < (1 - gain) * curve_Q[found[-1] - 1])
        if not len(faster):
            return found[::-1]
        found.append(int(faster[-1]) + 1)
