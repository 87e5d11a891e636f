"""Where a forward pass spends its time: two networks' modules and layers above each other, on one time scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise, takewhile
from typing import NamedTuple

from markupsafe import Markup

from sparsekit.number_text import ms
from sparsekit.svg import axis_ticks, fluid_chart, percent, tag, text, tick_texts

_ROW = 20  # height of a level
_MAX_LEVELS = 3
_PER_CHAR = 6.5  # pixels, of the names' font
_ROOMS = (320, 640, 960)  # widths of the chart in pixels: the CSS shows a name from the first that it fits at


class Span(NamedTuple):
    """A run of neighbouring layers, `start` up to `stop`, of the module at path `name`."""

    name: str
    start: int
    stop: int


def levels(names: Sequence[str]) -> list[list[Span]]:
    """Layers in order under the modules that hold them, coarse to fine, at most three levels; last the layers alone.

    A depth of the module paths at which nothing splits further is left out.

    >>> [[span.name for span in level] for level in levels(["stem", "net.a.0", "net.a.1", "net.b.0", "net.b.1"])]
    [['stem', 'net'], ['stem', 'net.a', 'net.b'], ['stem', 'net.a.0', 'net.a.1', 'net.b.0', 'net.b.1']]
    """
    paths = [name.split(".") for name in names]
    found: list[list[Span]] = []
    num_runs = 1
    for depth in range(1, max(map(len, paths), default=0)):
        heads = [".".join(path[:depth]) for path in paths]
        stops = list(accumulate(len(list(run)) for _, run in groupby(heads)))
        if num_runs < len(stops) < len(names):
            found.append([Span(heads[start], start, stop) for start, stop in pairwise([0, *stops])])
            num_runs = len(stops)
    return [*found[: _MAX_LEVELS - 1], [Span(name, i, i + 1) for i, name in enumerate(names)]]


def flame(rows: Sequence[tuple[str, float, float]]) -> Markup:
    """Layers of (name, dense ms, compact ms) in the order of the forward pass: a box per module and layer, by time.

    >>> drawn = str(flame([("conv1", 3.0, 1.0), ("fc", 1.0, 1.0)]))
    >>> drawn.count("<rect"), "conv1: 3.00 ms dense, 1.00 ms compact" in drawn
    (4, True)
    """
    found = levels([name for name, _, _ in rows])
    dense = [0.0, *accumulate(row[1] for row in rows)]
    compact = [0.0, *accumulate(row[2] for row in rows)]
    total = max(dense[-1], compact[-1]) or 1.0
    titles = {
        span: f"{span.name}: {ms(_spent(dense, span))} ms dense, {ms(_spent(compact, span))} ms compact"
        for level in found
        for span in level
    }
    height = _ROW * len(found)
    marks, top = [], 0
    for side, ends in (("dense", dense), ("compact", compact)):
        marks.append(text("0%", top + 12, f"{side}, {ms(ends[-1])} ms", "start", "title"))
        marks += _boxes(found, [end / total for end in ends], titles, top + 20, side)
        top += height + 32
    marks += _scale_below(total, top - 8)
    described = "; ".join(titles[span] for span in found[0])
    return fluid_chart(top + 22, "Time per layer", described, marks, "flame")


def _spent(ends: Sequence[float], span: Span) -> float:
    return ends[span.stop] - ends[span.start]


def _boxes(
    found: Sequence[Sequence[Span]], ends: Sequence[float], titles: dict[Span, str], top: int, side: str
) -> list[Markup]:
    """One box per span and level; `ends` are shares of the chart's width. A span alone in its module goes unnamed."""
    boxes = []
    paths = [span.name.split(".")[:-1] for span in found[-1]]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    above = dict.fromkeys(range(len(paths)), ".".join(parts[0] for parts in shared))  # layer -> module over it
    for level, spans in enumerate(found):
        y = top + level * _ROW
        for number, span in enumerate(spans):
            share = _spent(ends, span)
            name = span.name.removeprefix(above[span.start] + ".")
            marks = [tag("title", titles[span])]
            marks.append(
                tag(
                    "rect",
                    x=percent(ends[span.start]),
                    y=y,
                    width=percent(share),
                    height=_ROW - 1,
                    class_=f"{side} {'even' if number % 2 else 'odd'}",
                )
            )
            room = next((n for n, width in enumerate(_ROOMS, 1) if len(name) * _PER_CHAR + 6 <= share * width), None)
            if room and name != above[span.start]:
                x = percent(ends[span.start] + share / 2)
                marks.append(text(x, y + 13.5, name, style=f"name on-{side} room-{room}"))
            if share:
                boxes.append(tag("g", *marks))
        above = {layer: span.name for span in spans for layer in range(span.start, span.stop)}
    return boxes


def _scale_below(total: float, y: int) -> list[Markup]:
    marks = [tag("line", x1="0%", x2="100%", y1=y, y2=y, class_="axis")]
    ticks = axis_ticks(0.0, total)
    for tick, label in zip(ticks, tick_texts(ticks), strict=True):
        if tick <= total:
            x = percent(tick / total)
            marks.append(tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"))
            anchor = "start" if tick == 0 else "end" if tick > 0.95 * total else "middle"
            marks.append(text(x, y + 17, f"{label} ms" if tick == 0 else label, anchor))
    return marks
