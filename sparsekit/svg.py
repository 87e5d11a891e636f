"""What the charts are made of: SVG elements, axes and round ticks, coloured by the CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 320  # of a chart of fixed proportions, to be read at about that many pixels
BOX = (44, 312, 28, 116)  # left, right, top and bottom of its axes


@dataclass(frozen=True)
class Plane:
    """Axes to draw on: where values fall, and the marks of rules, ticks and labels."""

    x_at: Callable[[float], float]
    y_at: Callable[[float], float]
    marks: Sequence[Markup]
    height: float

    def path(self, points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{self.x_at(x):.1f},{self.y_at(y):.1f}" for x, y in points)


def axes(points: Sequence[tuple[int, float]], box: tuple[int, int, int, int], x_label: str) -> Plane:
    """Axes with room for every (x, y), within left, right, top and bottom of `box`."""
    left, right, top, bottom = box
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = axis_ticks(min(y for _, y in points), max(y for _, y in points))
    x_step = max(1, round(_round_step((last - first) / 5)))

    def x_at(x: float) -> float:
        return scale(x, first, last, left + 8, right - 8)

    def y_at(y: float) -> float:
        return scale(y, y_ticks[0], y_ticks[-1], bottom, top)

    marks = []
    for y, label in zip(y_ticks, tick_texts(y_ticks), strict=True):
        marks.append(tag("path", d=f"M{left} {y_at(y):.1f}H{right}", class_="rule"))
        marks.append(text(left - 6, y_at(y) + 3.5, label, "end"))
    for x in (x for x in range(first, last + 1) if x % x_step == 0):
        marks.append(tag("path", d=f"M{x_at(x):.1f} {bottom}v4", class_="axis"))
        marks.append(text(x_at(x), bottom + 16, str(x)))
    marks.append(tag("path", d=f"M{left} {bottom}H{right}", class_="axis"))
    marks.append(text((left + right) / 2, bottom + 31, x_label))
    return Plane(x_at, y_at, marks, bottom + 36)


def axis_ticks(low: float, high: float) -> list[float]:
    """Evenly spaced round values, from 2 to 7 of them, that enclose [low, high].

    >>> axis_ticks(0.1, 1.8)
    [0.0, 0.5, 1.0, 1.5, 2.0]
    >>> axis_ticks(0.0, 0.0)
    [0.0, 0.2, 0.4, 0.6]
    """
    # A span below 1 % of the values would need tick labels too long for the margin.
    lacking = max(0.01 * max(abs(low), abs(high)) - (high - low), 0.0) if low or high else 1.0
    bottom = max(low - lacking / 2, 0.0) if low >= 0 else low - lacking / 2
    top = high + lacking / 2
    step = _round_step((top - bottom) / 4)
    # The margin of 1e-9 keeps 0.3 / 0.1 = 2.9999999999999996 from costing a tick.
    ticks = range(math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9) + 1)
    return [float(f"{index * step:.12g}") for index in ticks]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Labels of at least two ticks of `axis_ticks`, with no more decimals than tell them apart.

    >>> tick_texts([0.0, 0.5, 1.0]), tick_texts([0.0, 20.0])
    (['0.0', '0.5', '1.0'], ['0', '20'])
    """
    step = ticks[1] - ticks[0]
    if step < 1e-4 or step >= 1e5:
        return [f"{value:.2g}" for value in ticks]
    return [f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for value in ticks]


def _round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def scale(value: float, low: float, high: float, start: float, stop: float) -> float:
    """Map [low, high] to [start, stop]; an empty range maps to the middle."""
    share = (value - low) / (high - low) if high > low else 0.5
    return start + share * (stop - start)


def percent(share: float) -> str:
    """A length along the width of a fluid chart.

    >>> percent(0.125)
    '12.500%'
    """
    return f"{100 * share:.3f}%"


def shortened(name: str, num_chars: int) -> str:
    """The end of a name too long for its place: layers are told apart there."""
    return name if len(name) <= num_chars else "\u2026" + name[1 - num_chars :]


def text(x: float | str, y: float, content: str, anchor: str = "middle", style: str = "tick") -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=style)


def chart(height: float, title: str, described: str, marks: Sequence[Markup]) -> Markup:
    """A chart of `WIDTH` by `height` that grows and shrinks as one with its text."""
    heading = (tag("title", title), tag("desc", described))
    return tag("svg", *heading, *marks, viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chart")


def fluid_chart(height: float, title: str, described: str, marks: Sequence[Markup], style: str) -> Markup:
    """A chart as wide as its place: `x` in percent, text and heights in pixels, the same on every screen."""
    heading = (tag("title", title), tag("desc", described))
    return tag("svg", *heading, *marks, height=height, role="img", class_=f"chart fluid {style}")


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; text is escaped. Python's `class_` and `text_anchor` become `class` and `text-anchor`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))
