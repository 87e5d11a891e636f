"""Charts draw what they are given: lengths, positions, ticks and names."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparsekit import charts
from sparsekit.charts import (
    Bar,
    Trial,
    curves,
    line_chart,
    lines_chart,
    member_curves,
    search_chart,
    share_bars,
    share_columns,
)
from sparsekit.svg import axis_ticks


def test_a_bar_is_filled_by_the_share_that_is_kept() -> None:
    root = ElementTree.fromstring(share_bars([Bar("a", 16, 4), Bar("b", 64, 64), Bar("c", 0, 0)], title="t"))
    bars = [float(rect.attrib["width"]) for rect in root.iter("rect")]
    full = bars[0]
    assert bars == [full, full / 4, full, full, full, 0.0]


def marks(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if style in element.get("class", "").split()]


def test_edges_are_ticks_at_their_share_of_the_bar() -> None:
    root = ElementTree.fromstring(share_bars([Bar("a", 64, 48, (16, 48, 64))], title="t"))
    whole = next(root.iter("rect"))
    left, width = float(whole.attrib["x"]), float(whole.attrib["width"])
    ticks = [float(re.findall(r"[\d.]+", tick.attrib["d"])[0]) for tick in marks(root, "edge")]
    assert ticks == pytest.approx([left + width * share for share in (0.25, 0.75, 1.0)], abs=0.06)


@pytest.mark.parametrize(
    ("kept", "edges", "off"),
    [
        (48, (16, 48, 64), False),
        (49, (16, 48, 64), True),
        (64, (16, 48, 64), False),
        (49, (), False),
        (0, (16,), False),
    ],
)
def test_only_a_count_between_two_edges_is_flagged(kept: int, edges: tuple[int, ...], off: bool) -> None:
    root = ElementTree.fromstring(share_bars([Bar("a", 64, kept, edges)], title="t"))
    assert len(marks(root, "off")) == 2 * off  # the count, and a mark that needs no colour to be seen
    assert ("off its plateau's edge" in (root.findtext("desc") or "")) == off


def test_edges_too_many_to_draw_are_the_nearest_two() -> None:
    edges = tuple(range(16, 2049, 16))
    root = ElementTree.fromstring(share_bars([Bar("a", 2048, 1030, edges)], title="t"))
    whole = next(root.iter("rect"))
    left, width = float(whole.attrib["x"]), float(whole.attrib["width"])
    ticks = [float(re.findall(r"[\d.]+", tick.attrib["d"])[0]) for tick in marks(root, "edge")]
    assert ticks == pytest.approx([left + width * edge / 2048 for edge in (1024, 1040)], abs=0.06)


@pytest.mark.parametrize("counts", [(7, 16), (1032, 2048)])
def test_counts_do_not_reach_into_the_bar(counts: tuple[int, int]) -> None:
    part, whole = counts
    root = ElementTree.fromstring(share_bars([Bar("a", whole, part, (whole,))], title="t"))
    bar = next(root.iter("rect"))
    (count,) = marks(root, "count")
    assert 320 - 7.2 * len(count.text or "") > float(bar.attrib["x"]) + float(bar.attrib["width"])  # bold of 11 px


def test_the_search_is_drawn_against_the_band() -> None:
    trials = [Trial(0.5, 0.6, 0.58, 0.62), Trial(0.45, 0.49, 0.48, 0.5)]
    root = ElementTree.fromstring(search_chart(trials, (0.475, 0.5)))
    (band,) = marks(root, "band")
    top, height = float(band.attrib["y"]), float(band.attrib["height"])
    first, second = (float(dot.attrib["cy"]) for dot in marks(root, "dot"))
    assert first < top  # above the band: too slow
    assert top < second < top + height
    measured, predicted = (line.attrib["points"] for line in root.iter("polyline"))
    assert [len(line.split()) for line in (measured, predicted)] == [2, 2]
    assert predicted.split()[0].split(",")[1] == f"{top:.1f}"  # 0.5, the upper end
    assert "2: predicted 0.450, measured 0.490" in (root.findtext("desc") or "")


def test_a_search_of_one_trial_without_a_band_is_drawn() -> None:
    root = ElementTree.fromstring(search_chart([Trial(0.5, 0.6, 0.58, 0.62)], None))
    assert len(marks(root, "dot")) == len(marks(root, "whisker")) == 1
    assert not marks(root, "band")


@pytest.mark.parametrize("num_rows", [1, 3, 9, 27, 60, 61, 200])
def test_columns_hold_every_row_once_and_in_order(num_rows: int) -> None:
    charts = share_columns([Bar(f"conv{i}", 8, 4) for i in range(num_rows)], title="t")
    names = [name for chart in charts for name in re.findall(r'class="name">(\w+)<', chart)]
    assert names == [f"conv{i}" for i in range(num_rows)]
    assert len(charts) <= 3


def test_a_long_name_keeps_its_end_and_the_description_keeps_it_whole() -> None:
    name = "features.denseblock3.denselayer24.conv1"
    root = ElementTree.fromstring(share_bars([Bar(name, 8, 4)], title="t"))
    shown = next(text.text or "" for text in root.iter("text") if text.get("class") == "name")
    assert len(shown) == 20
    assert name.endswith(shown[1:])
    assert name in (root.findtext("desc") or "")


def test_a_curve_falls_on_the_page_where_its_values_fall() -> None:
    root = ElementTree.fromstring(line_chart([(1, 1.0), (2, 0.5), (3, 0.0)], title="loss", x_label="epoch"))
    line = next(root.iter("polyline")).attrib["points"]
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    assert x1 < x2
    assert y1 < y2  # SVG's y points down


def test_a_gap_in_the_records_is_skipped_and_an_empty_series_is_not_drawn() -> None:
    records: list[dict[str, float | None]] = [
        {"epoch": 1, "loss": 1.0},
        {"epoch": 2, "loss": None, "lr": None},
        {"epoch": 3, "loss": float("nan")},
        {"step": 7, "loss": 0.7},
        {"epoch": 4, "loss": 0.5},
    ]
    (chart,) = curves(records, ["loss", "lr"])
    root = ElementTree.fromstring(chart)
    assert len(list(root.iter("circle"))) == 2
    assert "at epoch 4" in (root.findtext("desc") or "")


def test_members_share_the_chart_and_the_axes_of_their_quantity_and_subject() -> None:
    records: list[dict[str, float | None]] = [
        {"step": 1, "mask/conv1/7": 0.0, "mask/conv1/2": 1.0, "score/conv1/7": 3.0, "loss": 1.0},
        {"step": 2, "mask/conv1/7": 1.0, "mask/conv1/2": None},
        {"step": 3, "mask/conv1/7": 1.0, "mask/conv1/2": 0.0},
        {"epoch": 1, "mask/conv1/7": 9.0},
    ]
    masks, scores = (ElementTree.fromstring(chart) for chart in member_curves(records))
    assert [chart.findtext("title") for chart in (masks, scores)] == ["mask in conv1", "score in conv1"]
    up, down = (
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in masks.iter("polyline")
    )
    assert len(up) == 3
    assert down == [up[0][:1] + up[1][1:], up[2][:1] + up[0][1:]]  # falls from where the other ends to where it began


def test_lines_are_told_apart_by_the_legend_by_colour_and_by_dashes() -> None:
    series = {name: [(1, 0.0), (2, 1.0)] for name in ("7", "12", "63")}
    root = ElementTree.fromstring(lines_chart(series, title="t", x_label="step"))
    styles = [line.attrib["class"] for line in root.iter("polyline")]
    swatches = [path.attrib["class"] for path in root.iter("path") if "style" in path.attrib["class"]]
    assert styles == swatches == ["line style-1", "line style-2", "line style-3"]
    assert [text.text for text in root.iter("text") if text.get("class") == "name"] == ["7", "12", "63"]
    page = (Path(charts.__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
    assert all(re.search(rf"\.{style} {{ stroke: var\(.*dasharray", page) for style in ("style-2", "style-3"))


def test_a_legend_fits_into_the_chart() -> None:
    series = {str(number): [(1, 0.0)] for number in (1022, 1023, 1024)}
    root = ElementTree.fromstring(lines_chart(series, title="t" * 60, x_label="step"))
    names = [text for text in root.iter("text") if text.get("class") == "name"]
    ends = [float(text.attrib["x"]) + 6.5 * len(text.text or "") for text in names]  # monospace of 10.5 px
    starts = [float(text.attrib["x"]) - 23 for text in names]
    assert all(end < start for end, start in zip(ends, [*starts[1:], 320], strict=True))
    assert len(next(text.text or "" for text in root.iter("text") if text.get("class") == "title")) <= 44


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.1, 0.3), (-3, 5), (0, 0), (7, 7), (-2, -2), (1e-9, 3e-9), (0, 1e9), (0.5, 0.5000001), (91.2, 96.4)],
)
def test_ticks_are_few_even_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = axis_ticks(low, high)
    steps = [after - before for before, after in pairwise(ticks)]
    assert 2 <= len(ticks) <= 7
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:e}"[0] in "125"
    slack = 1e-9 * steps[0]
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert low < 0 or ticks[0] >= 0
