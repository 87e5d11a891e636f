"""Runs against each other: the front, the chart, and which of them may be compared at all."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparsekit.comparison import comparison_html, contests
from sparsekit.pareto import Point, front, pareto_charts
from sparsekit.report import Report
from tests.test_report import Page, bare_report, latency_report, sample_report


def run(latency: float, accuracy: float | None, *, model: str = "resnet56") -> Report:
    report = sample_report()
    return replace(
        report,
        recipe={**report.recipe, "model": model, "data": "cifar10", "method": "transport"},
        latency={"ratio": {"value": latency, "low": 0.9 * latency, "high": 1.1 * latency}, "runtime": "onnxruntime"},
        dense=report.dense if accuracy is not None else replace(report.dense, accuracy=None),
        compact=replace(report.compact, accuracy=accuracy),
    )


def dot(root: ElementTree.Element, kind: str) -> tuple[float, float]:
    """Where the first mark of a kind lies in the plot: percent from the left, pixels from the top."""
    for mark in root.iter("svg"):
        if "%" in mark.attrib.get("x", "") and any(path.get("class") == kind for path in mark.iter("path")):
            return float(mark.attrib["x"].rstrip("%")), float(mark.attrib["y"])
    raise AssertionError(kind)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_holds_exactly_what_nothing_beats(seed: int) -> None:
    draw = random.Random(seed)
    points = [Point("tried", str(i), draw.randint(1, 6) / 6, 1.0, draw.randint(1, 6) / 6) for i in range(12)]

    def beats(one: Point, other: Point) -> bool:
        assert one.accuracy is not None
        assert other.accuracy is not None
        better = one.latency_ratio < other.latency_ratio or one.accuracy > other.accuracy
        return better and one.latency_ratio <= other.latency_ratio and one.accuracy >= other.accuracy

    unbeaten = {point for point in points if not any(beats(other, point) for other in points)}
    assert set(front(points)) == unbeaten


def test_macs_stand_for_accuracy_only_where_none_is_known_and_never_those_of_another_network() -> None:
    dense, small = Point("dense", "dense", 1.0, 1.0), Point("compact", "small", 0.5, 0.6)
    worse, stock = Point("compact", "worse", 0.6, 0.5), Point("stock", "stock", 0.4, 0.9)
    assert front([dense, small, worse, stock]) == [small, dense]
    rated = replace(worse, accuracy=0.9)
    assert front([dense, small, rated, stock]) == [rated]


def test_a_point_lies_where_its_latency_and_accuracy_are_and_its_interval_around_it() -> None:
    dense = Point("dense", "dense", 1.0, 1.0, 0.9)
    small = Point("compact", "small", 0.5, 0.4, 0.8, 0.4, 0.6, mark="7")
    accuracy, macs = (ElementTree.fromstring(chart) for chart in pareto_charts([dense, small]))
    (x_dense, y_dense), (x_small, y_small) = dot(accuracy, "dense"), dot(accuracy, "compact")
    assert [x_dense, x_small] == pytest.approx([100, 100 / 6], abs=0.01)  # of the axis from 0.4 to 1.0
    assert y_dense < y_small  # better is higher
    (whisker,) = [line for line in accuracy.iter("line") if line.get("class") == "whisker"]
    low, high = float(whisker.attrib["x1"].rstrip("%")), float(whisker.attrib["x2"].rstrip("%"))
    assert [low, high] == pytest.approx([0, 100 / 3], abs=0.01)
    assert float(whisker.attrib["y1"]) == y_small
    assert [text.text for text in accuracy.iter("text") if text.get("class") == "count"] == ["7"]
    assert "small: 0.500x the latency, 80% accuracy" in (accuracy.findtext("desc") or "")
    assert "small: 0.500x the latency, 0.4x the MACs" in (macs.findtext("desc") or "")


def test_the_front_is_drawn_as_steps_between_what_nothing_beats() -> None:
    points = [
        Point("compact", "a", 0.25, 0.5, 0.5),
        Point("compact", "b", 0.5, 0.5, 0.75),
        Point("dense", "c", 1, 1, 1),
    ]
    beaten = Point("compact", "beaten", 0.75, 0.5, 0.5)
    charts = pareto_charts([*points, beaten])
    steps = [line for line in ElementTree.fromstring(charts[0]).iter("line") if line.get("class") == "front"]
    assert len(steps) == 4  # along and up, twice
    assert "front" not in charts[1]
    (macs,) = pareto_charts([replace(point, accuracy=None) for point in points])
    assert 'class="front"' in macs


def test_neighbours_do_not_write_over_each_other() -> None:
    points = [Point("compact", str(i), 0.5 + 0.01 * i, 0.5, 0.8, mark=str(i)) for i in range(4)]
    root = ElementTree.fromstring(pareto_charts([*points, Point("dense", "dense", 1.0, 1.0, 0.9)])[0])
    heights = [float(text.attrib["y"]) for text in root.iter("text") if text.get("class") == "count"]
    assert [height > 0 for height in heights] == [False, True, False, True]


def test_a_run_shows_itself_its_dense_network_what_it_tried_and_stock_networks() -> None:
    kinds = [point.kind for point in latency_report().points("this run")]
    assert kinds == ["dense", "tried", "tried", "stock", "stock", "compact"]
    assert bare_report().points("this run") == []


def test_only_what_means_the_same_is_compared() -> None:
    reports = {
        Path("a"): run(0.5, 0.9),
        Path("b"): run(0.4, 0.8),
        Path("other network"): run(0.3, 0.9, model="resnet20"),
        Path("other target"): replace(run(0.3, 0.9), target=latency_report().target),
        Path("other dense"): replace(run(0.3, 0.9), dense=replace(run(0.3, 0.9).dense, num_macs=7)),
    }
    found = contests(reports)
    assert [[str(entry.folder) for entry in contest.runs] for contest in found] == [
        *(["b", "a"], ["other network"], ["other target"], ["other dense"]),
    ]
    assert [entry.number for contest in found for entry in contest.runs] == [1, 2, 3, 4, 5]


def test_the_best_runs_are_those_on_the_front() -> None:
    reports = {Path("fast"): run(0.4, 0.85), Path("beaten"): run(0.6, 0.84), Path("good"): run(0.7, 0.9)}
    (contest,) = contests(reports)
    assert [str(entry.folder) for entry in contest.best] == ["fast", "good"]
    (slower,) = contests({Path("slow"): run(1.2, 0.5), Path("slower"): run(1.3, 0.6)})
    assert slower.best == ()  # the dense network beats both


def test_the_page_lists_every_run_fastest_first_with_a_link_that_leads_there(tmp_path: Path) -> None:
    folders = [tmp_path / "out" / "a b#1", tmp_path / "out" / "c"]
    reports = {folders[0]: run(0.5, 0.9), folders[1]: run(0.4, 0.8)}
    html = comparison_html(contests(reports), tmp_path / "pages" / "pareto.html")
    assert re.findall(r'href="([^"]*)"', html) == ["../out/c/report.html", "../out/a%20b%231/report.html"]
    text = " ".join(Page(html).text.split())
    assert "2 of 2 runs are beaten by nothing else" in text
    assert "0.400x [0.36, 0.44] 0.500x 80.00 % -13.61" in text
    assert "resnet56 on cifar10" in text


def test_runs_without_accuracy_or_latency_are_listed_and_said_to_be_so() -> None:
    unmeasured = replace(run(0.5, 0.9), latency={"runtime": "onnxruntime"}, compact=bare_report().compact)
    reports = {Path("a"): run(0.5, 0.9), Path("b"): run(0.4, None), Path("c"): unmeasured}
    text = " ".join(Page(comparison_html(contests(reports), Path("pareto.html"))).text.split())
    assert "2 runs without data have no accuracy" in text
    untimed = {Path("a"): bare_report(), Path("b"): bare_report()}
    page = Page(comparison_html(contests(untimed), Path("pareto.html")))
    assert "Latency was not measured" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_hostile_folders_and_recipes_are_text() -> None:
    hostile = "<script>x</script>"
    report = replace(run(0.5, 0.9), recipe=dict.fromkeys(("model", "data", "method", "budget"), hostile))
    html = comparison_html(contests({Path(hostile): report, Path("b"): report}), Path("pareto.html"))
    assert not any(tag == "script" for tag, _ in Page(html).tags)
    assert Page(html).text.count(hostile) >= 4


def test_a_comparison_needs_nothing_but_what_json_holds() -> None:
    reports = {Path("a"): latency_report(), Path("b"): sample_report()}
    again = {path: Report.from_json(json.loads(json.dumps(report.to_json()))) for path, report in reports.items()}
    page = Path("pareto.html")
    assert comparison_html(contests(again), page) == comparison_html(contests(reports), page)
