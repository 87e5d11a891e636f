"""Charts draw what they are given: lengths, positions, ticks and names."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sparsekit.charts import axis_ticks, curves, line_chart, share_bars, share_columns


def test_a_bar_is_filled_by_the_share_that_is_kept() -> None:
    root = ElementTree.fromstring(share_bars([("a", 16, 4), ("b", 64, 64), ("c", 0, 0)], title="t"))
    bars = [float(rect.attrib["width"]) for rect in root.iter("rect")]
    full = bars[0]
    assert bars == [full, full / 4, full, full, full, 0.0]


@pytest.mark.parametrize("num_rows", [1, 3, 9, 27, 60, 61, 200])
def test_columns_hold_every_row_once_and_in_order(num_rows: int) -> None:
    charts = share_columns([(f"conv{i}", 8, 4) for i in range(num_rows)], title="t")
    names = [name for chart in charts for name in re.findall(r'class="name">(\w+)<', chart)]
    assert names == [f"conv{i}" for i in range(num_rows)]
    assert len(charts) <= 3


def test_a_long_name_keeps_its_end_and_the_description_keeps_it_whole() -> None:
    name = "features.denseblock3.denselayer24.conv1"
    root = ElementTree.fromstring(share_bars([(name, 8, 4)], title="t"))
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
