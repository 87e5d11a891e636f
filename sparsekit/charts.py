"""Charts of a run as inline SVG: widths, training, the search for a budget; to be read at about 320 px width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from sparsekit.svg import BOX, WIDTH, axes, chart, shortened, tag, text

_ROW = 18  # height of a bar's row
_BAR = (136, 248)  # left and right end of a full bar
_NAME_CHARS, _COUNT_CHARS, _TITLE_CHARS = 20, 10, 44  # what fits left and right of the bars, and in a line
_MAX_EDGES = 40  # more would run into each other along a bar
_MAX_DOTS = 20  # longer curves are a bare line
_NUM_STYLES = 3  # of lines in one chart, told apart by dashes too


class Bar(NamedTuple):
    """A count out of a whole, and the counts up to which nothing is paid for more (ascending), if they are known."""

    name: str
    whole: int
    part: int
    edges: tuple[int, ...] = ()

    @property
    def off_edge(self) -> bool:
        """More could be kept at no cost, or less would cost less."""
        return bool(self.edges and self.part and self.part not in self.edges)


def share_bars(rows: Sequence[Bar], *, title: str) -> Markup:
    """One bar per row: the outline is the whole, the fill its part, the text both counts, ticks below the edges.

    >>> drawn = str(share_bars([Bar("conv1", 16, 7, (4, 8, 16))], title="Kept"))
    >>> drawn.count("<rect"), drawn.count('class="edge"'), drawn.count('class="count off"')
    (2, 3, 1)
    """
    left, right = _BAR
    height = _ROW * (len(rows) + 1)
    marks = [text(left + share * (right - left), 10, f"{share:.0%}") for share in (0.0, 0.5, 1.0)]
    for top, bar in zip(range(_ROW, height, _ROW), rows, strict=True):
        per_channel = (right - left) / max(1, bar.whole)
        end = left + bar.part * per_channel
        marks += [
            text(0, top + 9, shortened(bar.name, _NAME_CHARS), "start", "name"),
            tag("rect", x=left, y=top, width=right - left, height=10, class_="whole"),
            tag("rect", x=left, y=top, width=end - left, height=10, class_="part"),
            *(tag("path", d=f"M{left + e * per_channel:.1f} {top + 11}v3.5", class_="edge") for e in _drawn(bar)),
            text(WIDTH, top + 9, _counts(bar), "end", "count off" if bar.off_edge else "count"),
        ]
        if bar.off_edge:
            marks.append(tag("path", d=f"M{end:.1f} {top + 10}l-3 5h6z", class_="off"))
    marks.append(tag("path", d=f"M{(left + right) / 2:.1f} {_ROW - 4}V{height - 4}", class_="half"))
    return chart(height, title, "; ".join(map(_described, rows)), marks)


def _drawn(bar: Bar) -> list[int]:
    """The edges that a bar has room for: all of them, or the nearest on either side of its part."""
    if len(bar.edges) <= _MAX_EDGES:
        return list(bar.edges)
    below = [edge for edge in bar.edges if edge <= bar.part]
    return [*below[-1:], *bar.edges[len(below) : len(below) + 1]]


def _counts(bar: Bar) -> str:
    spaced = f"{bar.part} / {bar.whole}"
    return spaced if len(spaced) <= _COUNT_CHARS else spaced.replace(" ", "")


def _described(bar: Bar) -> str:
    return f"{bar.name}: {bar.part} of {bar.whole}" + (", off its plateau's edge" if bar.off_edge else "")


def share_columns(rows: Sequence[Bar], *, title: str) -> list[Markup]:
    """`share_bars` of rows cut into at most three even runs, to stand side by side where there is room.

    >>> len(share_columns([Bar("conv1", 16, 8)] * 9, title="Kept")), share_columns([], title="Kept")
    (2, [])
    """
    num_columns = max(1, min(3, math.ceil(len(rows) / 8)))
    length = max(1, math.ceil(len(rows) / num_columns))
    runs = [rows[start : start + length] for start in range(0, len(rows), length)]
    return [share_bars(run, title=f"{title}, {run[0].name} to {run[-1].name}") for run in runs]


def curves(records: Sequence[Mapping[str, float | None]], names: Sequence[str], *, x: str = "epoch") -> list[Markup]:
    """A line chart over `x` of each name that has a finite number; accuracies are in percent.

    >>> rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    >>> [str(line).count("<circle") for line in curves(rows, ["loss", "lr"])]
    [2]
    """
    drawn = []
    for name in names:
        factor, unit = (100.0, " (%)") if name.endswith("accuracy") else (1.0, "")
        values = [(record.get(x), record.get(name)) for record in records]
        points = [(int(at), factor * y) for at, y in values if at is not None and y is not None and math.isfinite(y)]
        if points:
            drawn.append(line_chart(points, title=name.replace("_", " ") + unit, x_label=x))
    return drawn


def member_curves(records: Sequence[Mapping[str, float | None]], *, x: str = "step") -> list[Markup]:
    """A chart for each "quantity/subject" among names like "mask/conv1/7", with a line for each of its members.

    >>> rows = [{"step": 1, "mask/conv1/7": 0.5, "mask/conv1/2": 0.1}]
    >>> [str(lines).count("<polyline") for lines in member_curves(rows)]
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
    plane = axes(points, BOX, x_label)
    (first, first_y), (last, last_y) = points[0], points[-1]
    dotted = points if len(points) <= _MAX_DOTS else points[-1:]
    marks = [
        text(0, 12, title, "start", "title"),
        text(BOX[1], 12, f"{last_y:.4g}", "end", "last"),
        *plane.marks,
        tag("polyline", points=plane.path(points), class_="line"),
        *(tag("circle", cx=plane.x_at(x), cy=plane.y_at(y), r=2.2, class_="dot") for x, y in dotted),
    ]
    described = f"from {first_y:.4g} at {x_label} {first} to {last_y:.4g} at {x_label} {last}"
    return chart(plane.height, title, described, marks)


def lines_chart(series: Mapping[str, Sequence[tuple[int, float]]], *, title: str, x_label: str) -> Markup:
    """Lines as of `line_chart` on the same axes, each named in a legend below the title.

    >>> lines = lines_chart({"7": [(1, 0.5), (2, 1.0)], "2": [(1, 0.5), (2, 0.0)]}, title="mask", x_label="step")
    >>> str(lines).count("<polyline")
    2
    """
    left, right, top, bottom = BOX
    points = [point for line in series.values() for point in line]
    plane = axes(points, (left, right, top + 16, bottom + 16), x_label)
    marks = [text(0, 12, shortened(title, _TITLE_CHARS), "start", "title"), *plane.marks]
    for number, (name, line) in enumerate(series.items()):
        style, x = f"line style-{number % _NUM_STYLES + 1}", left + 8 + number * (right - left) / len(series)
        marks.append(tag("path", d=f"M{x:.1f} 26h18", class_=style))
        marks.append(text(x + 23, 29.5, name, "start", "name"))
        marks.append(tag("polyline", points=plane.path(line), class_=style))
    ends = (f"{name} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in series.items())
    return chart(plane.height, title, "; ".join(ends), marks)


class Trial(NamedTuple):
    """A latency ratio as it was predicted, and as it was then measured with its interval."""

    predicted: float
    measured: float
    low: float
    high: float


def search_chart(trials: Sequence[Trial], band: tuple[float, float] | None) -> Markup:
    """Latency ratios over the trials, at least one: predicted, dashed; measured, with intervals; `band` is shaded.

    >>> drawn = str(search_chart([Trial(0.5, 0.55, 0.53, 0.57), Trial(0.47, 0.49, 0.48, 0.5)], (0.475, 0.5)))
    >>> drawn.count("<polyline"), drawn.count('class="whisker"'), drawn.count('class="band"')
    (2, 2, 1)
    """
    left, right, top, bottom = BOX
    measured = [(number, trial.measured) for number, trial in enumerate(trials, 1)]
    predicted = [(number, trial.predicted) for number, trial in enumerate(trials, 1)]
    ratios = [ratio for trial in trials for ratio in trial] + list(band or ())
    plane = axes([(1, min(ratios)), (len(trials), max(ratios))], (left, right, top + 16, bottom + 56), "iteration")
    marks = [text(0, 12, "latency, ratio to the dense network", "start", "title"), *plane.marks]
    if band:
        low_y, high_y = map(plane.y_at, band)
        marks.append(tag("rect", x=left, y=high_y, width=right - left, height=low_y - high_y, class_="band"))
    for number, trial in enumerate(trials, 1):
        marks.append(_whisker(plane.x_at(number), plane.y_at(trial.low), plane.y_at(trial.high)))
    for name, x, style, line in (("measured", left + 8, 1, measured), ("predicted", left + 118, 2, predicted)):
        marks.append(tag("path", d=f"M{x} 26h18", class_=f"line style-{style}"))
        marks.append(text(x + 23, 29.5, name, "start", "name"))
        marks.append(tag("polyline", points=plane.path(line), class_=f"line style-{style}"))
    marks += [tag("circle", cx=plane.x_at(x), cy=plane.y_at(y), r=2.6, class_="dot") for x, y in measured]
    told = (f"{n}: predicted {t.predicted:.3f}, measured {t.measured:.3f}" for n, t in enumerate(trials, 1))
    described = "; ".join(told) + (f"; band {band[0]:.3f} to {band[1]:.3f}" if band else "")
    return chart(plane.height, "Search for the budget", described, marks)


def _whisker(x: float, low_y: float, high_y: float) -> Markup:
    return tag("path", d=f"M{x:.1f} {low_y:.1f}V{high_y:.1f}m-3 0h6M{x - 3:.1f} {low_y:.1f}h6", class_="whisker")
