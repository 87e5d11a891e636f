"""Quality against latency: points, the front of those that nothing beats, and a scatter chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from markupsafe import Markup

from sparsekit.svg import axis_ticks, fluid_chart, percent, scale, tag, text, tick_texts

Kind = Literal["dense", "compact", "tried", "stock"]

_LEFT, _TOP, _BOTTOM = 44.0, 52.0, 270.0  # margin and edges of the plot, in pixels
_NAMES: dict[Kind, str] = {"dense": "dense", "compact": "compact", "tried": "tried", "stock": "stock network"}
_ORDER: tuple[Kind, ...] = ("tried", "stock", "dense", "compact")
_SHAPES: dict[Kind, str] = {
    "dense": "M-4.5-4.5h9v9h-9z",
    "compact": "M5 0a5 5 0 1 1-10 0a5 5 0 1 1 10 0z",
    "tried": "M3 0a3 3 0 1 1-6 0a3 3 0 1 1 6 0z",
    "stock": "M0-6L6 0 0 6-6 0z",
}


@dataclass(frozen=True)
class Point:
    """One network against the dense one.

    Attributes:
        latency_ratio: its latency over the dense network's, with `low` and `high` if the interval is known.
        accuracy: in [0, 1], None where unknown or measured on another task.
        mark: what stands beside it.
    """

    kind: Kind
    label: str
    latency_ratio: float
    macs_ratio: float
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    mark: str = ""


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats, fastest first: at most its latency and at least its accuracy, one of them better.

    Of points without an accuracy, MACs stand for it: those that keep the most at a latency. Stock networks' MACs are
    of another network, and stay out of that.

    >>> fast, slow, beaten = (Point("tried", "", x, x, y) for x, y in ((0.5, 0.8), (1.0, 0.9), (0.7, 0.7)))
    >>> front([slow, beaten, fast]) == [fast, slow]
    True
    """
    rated = [(point, point.accuracy) for point in points if point.accuracy is not None]
    if not rated:
        rated = [(point, point.macs_ratio) for point in points if point.kind != "stock"]
    best: list[tuple[Point, float]] = []
    for point, quality in sorted(rated, key=lambda pair: (pair[0].latency_ratio, -pair[1])):
        equal = best and (point.latency_ratio, quality) == (best[-1][0].latency_ratio, best[-1][1])
        if not best or quality > best[-1][1] or equal:
            best.append((point, quality))
    return [point for point, _ in best]


def pareto_charts(points: Sequence[Point]) -> list[Markup]:
    """Accuracy against latency where at least two accuracies are known, and MACs against latency.

    >>> dense, small = Point("dense", "net", 1.0, 1.0, 0.9), Point("compact", "half", 0.5, 0.5, 0.8)
    >>> len(pareto_charts([dense, small])), len(pareto_charts([dense]))
    (2, 0)
    """
    rated = [Placed(point, 100 * point.accuracy, "% accuracy") for point in points if point.accuracy is not None]
    sized = [Placed(point, point.macs_ratio, "x the MACs") for point in points]
    charts = []
    if len(rated) > 1:
        charts.append(_scatter(rated, front(points), "accuracy (%) over latency"))
    if len(sized) > 1:
        charts.append(_scatter(sized, [] if charts else front(points), "MACs over latency", diagonal=True))
    return charts


class Placed(NamedTuple):
    """A point and its place on the y axis, in `unit`."""

    point: Point
    y: float
    unit: str

    @property
    def described(self) -> str:
        return f"{self.point.label}: {self.point.latency_ratio:.3f}x the latency, {self.y:.4g}{self.unit}"


def _scatter(placed: Sequence[Placed], best: Sequence[Point], title: str, *, diagonal: bool = False) -> Markup:
    """A mark for each point over its latency, with its interval; `best` are joined by steps."""
    points = [point for point, _, _ in placed]
    x_ticks = axis_ticks(
        min(p.latency_ratio if p.low is None else p.low for p in points),
        max(p.latency_ratio if p.high is None else p.high for p in points),
    )
    y_ticks = axis_ticks(min(y for _, y, _ in placed), max(y for _, y, _ in placed))

    def x_at(ratio: float) -> float:
        return scale(ratio, x_ticks[0], x_ticks[-1], 0.0, 1.0)

    def y_at(y: float) -> float:
        return scale(y, y_ticks[0], y_ticks[-1], _BOTTOM, _TOP)

    marks = [text(-_LEFT, 12, title, "start", "title"), *_legend(points), *_axes(x_ticks, y_ticks)]
    low, high = max(x_ticks[0], y_ticks[0]), min(x_ticks[-1], y_ticks[-1])
    if diagonal and low < high:
        marks.append(_line(x_at(low), y_at(low), x_at(high), y_at(high), "diagonal"))
    y_of = {point: y_at(y) for point, y, _ in placed}
    for fast, slow in pairwise(best):
        x1, x2 = x_at(fast.latency_ratio), x_at(slow.latency_ratio)
        marks += [_line(x1, y_of[fast], x2, y_of[fast], "front"), _line(x2, y_of[fast], x2, y_of[slow], "front")]
    below = _below([(point, x_at(point.latency_ratio), y_of[point]) for point in points if point.mark])
    # What was tried lies below, and the small network on top.
    for one in sorted(placed, key=lambda one: _ORDER.index(one.point.kind)):
        point, y = one.point, y_of[one.point]
        if point.low is not None and point.high is not None:
            marks.append(_line(x_at(point.low), y, x_at(point.high), y, "whisker"))
        marks.append(_mark(point, x_at(point.latency_ratio), y, one.described, below=point in below))
    told = "; ".join(one.described for one in placed)
    return fluid_chart(_BOTTOM + 36, title, told, marks, "scatter")


def _below(marked: Sequence[tuple[Point, float, float]]) -> set[Point]:
    """Points whose mark must stand below them, for a neighbour to the left has its own above."""
    below: set[Point] = set()
    for (left, x1, y1), (right, x2, y2) in pairwise(sorted(marked, key=lambda one: one[1])):
        if x2 - x1 < 0.06 and abs(y2 - y1) < 16 and left not in below:
            below.add(right)
    return below


def _mark(point: Point, x: float, y: float, described: str, *, below: bool) -> Markup:
    """Shape and number of a point; the shape's own coordinates are pixels around it."""
    marks = [tag("title", described), tag("path", d=_SHAPES[point.kind], class_=point.kind)]
    if point.mark:
        anchor = "end" if x > 0.9 else "start"
        marks.append(text(-7 if x > 0.9 else 7, 15 if below else -6, point.mark, anchor, "count"))
    return tag("svg", *marks, x=percent(x), y=y, overflow="visible")


def _legend(points: Sequence[Point]) -> list[Markup]:
    marks, x = [], 5.0 - _LEFT
    for kind in (kind for kind in _NAMES if any(point.kind == kind for point in points)):
        mark = tag("path", d=_SHAPES[kind], class_=kind)
        marks += [tag("svg", mark, x=x, y=28.0, overflow="visible"), text(x + 10, 32, _NAMES[kind], "start")]
        x += 36 + 6 * len(_NAMES[kind])
    return marks


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[Markup]:
    marks = []
    for y, label in zip(y_ticks, tick_texts(y_ticks), strict=True):
        at = scale(y, y_ticks[0], y_ticks[-1], _BOTTOM, _TOP)
        marks += [_line(0.0, at, 1.0, at, "rule"), text(-6, at + 3.5, label, "end")]
    for x, label in zip(x_ticks, tick_texts(x_ticks), strict=True):
        share = scale(x, x_ticks[0], x_ticks[-1], 0.0, 1.0)
        marks += [_line(share, _BOTTOM, share, _BOTTOM + 4, "axis"), text(percent(share), _BOTTOM + 16, label)]
    marks.append(_line(0.0, _BOTTOM, 1.0, _BOTTOM, "axis"))
    marks.append(text("50%", _BOTTOM + 31, "latency, ratio to the dense network"))
    return marks


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=percent(x1), y1=y1, x2=percent(x2), y2=y2, class_=style)
