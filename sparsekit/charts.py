"""Charts as inline SVG: drawn to be read at about 320 px width, coloured by the CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH = 320
_ROW = 18  # height of a bar's row
_BAR = (136, 248)  # left and right end of a full bar
_NAME_CHARS, _TITLE_CHARS = 20, 44  # what fits left of the bars, and in a line
_AXES = (44, 312, 28, 116)  # left, right, top and bottom of a line chart's axes
_MAX_DOTS = 20  # longer curves are a bare line
_NUM_STYLES = 3  # of lines in one chart, told apart by dashes too


def share_bars(rows: Sequence[tuple[str, int, int]], *, title: str) -> Markup:
    """One bar per (name, whole, part): the outline is the whole, the fill its part, the text both counts.

    >>> str(share_bars([("conv1", 16, 8)], title="Kept")).count("<rect")
    2
    """
    left, right = _BAR
    height = _ROW * (len(rows) + 1)
    marks = [_text(left + share * (right - left), 10, f"{share:.0%}") for share in (0.0, 0.5, 1.0)]
    for top, (name, whole, part) in zip(range(_ROW, height, _ROW), rows, strict=True):
        share = part / whole if whole else 0.0
        marks += [
            _text(0, top + 9, _shortened(name, _NAME_CHARS), "start", "name"),
            _tag("rect", x=left, y=top, width=right - left, height=10, class_="whole"),
            _tag("rect", x=left, y=top, width=share * (right - left), height=10, class_="part"),
            _text(_WIDTH, top + 9, f"{part} / {whole}", "end", "count"),
        ]
    marks.append(_tag("path", d=f"M{(left + right) / 2:.1f} {_ROW - 4}V{height - 4}", class_="half"))
    return _svg(height, title, "; ".join(f"{name}: {part} of {whole}" for name, whole, part in rows), marks)


def share_columns(rows: Sequence[tuple[str, int, int]], *, title: str) -> list[Markup]:
    """`share_bars` of rows cut into at most three even runs, to stand side by side where there is room.

    >>> len(share_columns([("conv1", 16, 8)] * 9, title="Kept")), share_columns([], title="Kept")
    (2, [])
    """
    num_columns = max(1, min(3, math.ceil(len(rows) / 8)))
    length = max(1, math.ceil(len(rows) / num_columns))
    runs = [rows[start : start + length] for start in range(0, len(rows), length)]
    return [share_bars(run, title=f"{title}, {run[0][0]} to {run[-1][0]}") for run in runs]


def curves(records: Sequence[Mapping[str, float | None]], names: Sequence[str], *, x: str = "epoch") -> list[Markup]:
    """A line chart over `x` of each name that has a finite number; accuracies are in percent.

    >>> rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    >>> [str(chart).count("<circle") for chart in curves(rows, ["loss", "lr"])]
    [2]
    """
    charts = []
    for name in names:
        factor, unit = (100.0, " (%)") if name.endswith("accuracy") else (1.0, "")
        values = [(record.get(x), record.get(name)) for record in records]
        points = [(int(at), factor * y) for at, y in values if at is not None and y is not None and math.isfinite(y)]
        if points:
            charts.append(line_chart(points, title=name.replace("_", " ") + unit, x_label=x))
    return charts


def member_curves(records: Sequence[Mapping[str, float | None]], *, x: str = "step") -> list[Markup]:
    """A chart for each "quantity/subject" among names like "mask/conv1/7", with a line for each of its members.

    >>> rows = [{"step": 1, "mask/conv1/7": 0.5, "mask/conv1/2": 0.1}]
    >>> [str(chart).count("<polyline") for chart in member_curves(rows)]
    [2]
    """
    lines: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for name, y in record.items():
            quantity, _, rest = name.partition("/")
            subject, _, member = rest.rpartition("/")
            at = record.get(x)
            if subject and at is not None and y is not None and math.isfinite(y):
                lines.setdefault((quantity, subject), {}).setdefault(member, []).append((int(at), y))
    return [
        lines_chart(members, title=f"{quantity} in {subject}", x_label=x)
        for (quantity, subject), members in lines.items()
    ]


def line_chart(points: Sequence[tuple[int, float]], *, title: str, x_label: str) -> Markup:
    """A line through at least one (x, y), in order of x, every y finite; beside the title stands the last y.

    >>> str(line_chart([(1, 0.5), (2, 0.25)], title="loss", x_label="epoch")).count("<circle")
    2
    """
    plane = _plane(points, _AXES, x_label)
    (first, first_y), (last, last_y) = points[0], points[-1]
    dotted = points if len(points) <= _MAX_DOTS else points[-1:]
    marks = [
        _text(0, 12, title, "start", "title"),
        _text(_AXES[1], 12, f"{last_y:.4g}", "end", "last"),
        *plane.marks,
        _tag("polyline", points=plane.path(points), class_="line"),
        *(_tag("circle", cx=plane.x_at(x), cy=plane.y_at(y), r=2.2, class_="dot") for x, y in dotted),
    ]
    described = f"from {first_y:.4g} at {x_label} {first} to {last_y:.4g} at {x_label} {last}"
    return _svg(plane.height, title, described, marks)


def lines_chart(series: Mapping[str, Sequence[tuple[int, float]]], *, title: str, x_label: str) -> Markup:
    """Lines as of `line_chart` on the same axes, each named in a legend below the title.

    >>> chart = lines_chart({"7": [(1, 0.5), (2, 1.0)], "2": [(1, 0.5), (2, 0.0)]}, title="mask", x_label="step")
    >>> str(chart).count("<polyline")
    2
    """
    left, right, top, bottom = _AXES
    plane = _plane(
        [point for points in series.values() for point in points], (left, right, top + 16, bottom + 16), x_label
    )
    marks = [_text(0, 12, _shortened(title, _TITLE_CHARS), "start", "title"), *plane.marks]
    for number, (name, points) in enumerate(series.items()):
        style, x = f"line style-{number % _NUM_STYLES + 1}", left + 8 + number * (right - left) / len(series)
        marks.append(_tag("path", d=f"M{x:.1f} 26h18", class_=style))
        marks.append(_text(x + 23, 29.5, name, "start", "name"))
        marks.append(_tag("polyline", points=plane.path(points), class_=style))
    ends = (f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items())
    return _svg(plane.height, title, "; ".join(ends), marks)


@dataclass(frozen=True)
class _Plane:
    """Axes to draw on: where values fall, and the marks of rules, ticks and labels."""

    x_at: Callable[[float], float]
    y_at: Callable[[float], float]
    marks: Sequence[Markup]
    height: float

    def path(self, points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{self.x_at(x):.1f},{self.y_at(y):.1f}" for x, y in points)


def _plane(points: Sequence[tuple[int, float]], axes: tuple[int, int, int, int], x_label: str) -> _Plane:
    left, right, top, bottom = axes
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = axis_ticks(min(y for _, y in points), max(y for _, y in points))
    x_step = max(1, round(_round_step((last - first) / 5)))

    def x_at(x: float) -> float:
        return _scale(x, first, last, left + 8, right - 8)

    def y_at(y: float) -> float:
        return _scale(y, y_ticks[0], y_ticks[-1], bottom, top)

    marks = []
    for y in y_ticks:
        marks.append(_tag("path", d=f"M{left} {y_at(y):.1f}H{right}", class_="rule"))
        marks.append(_text(left - 6, y_at(y) + 3.5, _tick_text(y, y_ticks[1] - y_ticks[0]), "end"))
    for x in (x for x in range(first, last + 1) if x % x_step == 0):
        marks.append(_tag("path", d=f"M{x_at(x):.1f} {bottom}v4", class_="axis"))
        marks.append(_text(x_at(x), bottom + 16, str(x)))
    marks.append(_tag("path", d=f"M{left} {bottom}H{right}", class_="axis"))
    marks.append(_text((left + right) / 2, bottom + 31, x_label))
    return _Plane(x_at, y_at, marks, bottom + 36)


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


def _round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _tick_text(value: float, step: float) -> str:
    if step < 1e-4 or step >= 1e5:
        return f"{value:.2g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _scale(value: float, low: float, high: float, start: float, stop: float) -> float:
    """Map [low, high] to [start, stop]; an empty range maps to the middle."""
    share = (value - low) / (high - low) if high > low else 0.5
    return start + share * (stop - start)


def _shortened(name: str, num_chars: int) -> str:
    """The end of a name too long for its place: layers are told apart there."""
    return name if len(name) <= num_chars else "\u2026" + name[1 - num_chars :]


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> Markup:
    return _tag("text", text, x=x, y=y, text_anchor=anchor, class_=style)


def _svg(height: float, title: str, described: str, marks: Sequence[Markup]) -> Markup:
    heading = (_tag("title", title), _tag("desc", described))
    return _tag("svg", *heading, *marks, viewBox=f"0 0 {_WIDTH} {height}", role="img", class_="chart")


def _tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; text is escaped. Python's `class_` and `text_anchor` become `class` and `text-anchor`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))
