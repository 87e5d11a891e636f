"""The report of a compressed generator: its numbers survive, its page needs nothing from outside and fits a phone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sparsekit.errors import DataError
from sparsekit.gan.grids import data_uri, grid
from sparsekit.gan_report import Comparison, GanReport
from sparsekit.measured import Measurement, TargetFacts
from tests.test_report import Page, charts_of, sample_report
from tests.test_report_browser import CHROMIUM, FAULTS, SCREENSHOTS, Tab, browser


def gradients(num: int, columns: int, channels: int, phase: float) -> str:
    """Something to look at: waves of all directions."""
    y, x = torch.meshgrid(torch.linspace(-3, 3, 28), torch.linspace(-3, 3, 28), indexing="ij")
    turn = torch.arange(num)[:, None, None] * 0.7 + phase
    waves = torch.stack([torch.sin(turn.cos() * x + turn.sin() * y + c) for c in range(channels)], 1)
    return data_uri(grid(waves, columns))


def pictures(channels: int = 1) -> tuple[Comparison, ...]:
    return (
        Comparison("Samples", gradients(64, 8, channels, 0), gradients(64, 8, channels, 0.1)),
        Comparison("From one noise to another", gradients(36, 9, channels, 1), gradients(36, 9, channels, 1.1)),
    )


def epochs(num: int, *names: str) -> list[dict[str, float | None]]:
    records: list[dict[str, float | None]] = []
    for epoch in range(1, num + 1):
        records.append({"epoch": epoch, "lr": 2e-4, **{name: 1 / epoch + i for i, name in enumerate(names)}})
    return records


def full_report() -> GanReport:
    other = sample_report()
    names = ("fd_resnet56", "is_resnet56", "f8_resnet56", "f1/8_resnet56")
    metrics = {"dense": 14.25, "pruned": 88.5, "recovered": 31.0, "compact": 15.0}
    return GanReport(
        dense=Measurement(None, 4_276_739, 1_600_000_000, 17_200_000, 12.5, 12.1, 13.0),
        compact=Measurement(None, 2_100_000, 790_000_000, 8_500_000, 6.9, 6.6, 7.2),
        environment=other.environment,
        recipe={"model": "sngan", "data": "imagefolder:cifar10", "method": "gan_slimming", "budget": "macs<=0.5x"},
        recipe_hash="3fa9c1d27be04410",
        metrics={point: dict(zip(names, (fd, 7.5, 0.97, 0.85), strict=True)) for point, fd in metrics.items()},
        history={
            "dense": epochs(12, "d_loss", "g_loss", "variance"),
            "retrain": epochs(5, "d_loss", "g_loss", "distillation", "variance"),
        },
        pictures=pictures(),
        latency={"runtime": "onnxruntime 1.31.1", "ratio": {"value": 0.55, "low": 0.54, "high": 0.56}},
        target=TargetFacts("onnxruntime", "onnxruntime 1.31.1", "float32", 1, output_error=3e-7),
        certificate={"max_relative_error": 3e-15, "num_groups": 7},
        warnings=("the machine was busy: wall times are upper bounds",),
        seconds={"dense": 1800.0, "prune": 300.25},
    )


def bare_report() -> GanReport:
    sides = Measurement(None, 200, 1000, 900), Measurement(None, 110, 490, 500)
    return GanReport(*sides, sample_report().environment, {"model": "dcgan"}, "3fa9c1d2", {})


def cycle_report() -> GanReport:
    """Two directions, images in colour, and many losses."""
    given = gradients(16, 4, 3, 2)
    translated = tuple(
        Comparison(title, gradients(16, 4, 3, 3), gradients(16, 4, 3, 3.1), given)
        for title in ("Horse to deer", "Deer to horse")
    )
    losses = [f"{kind}_{side}_loss" for kind in ("d", "g", "cycle", "identity") for side in ("horse", "deer")]
    return replace(full_report(), pictures=translated, history={"cycle": epochs(200, *losses)})


REPORTS = {"full": full_report(), "bare": bare_report(), "cycle": cycle_report()}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_survives_json(report: GanReport) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert GanReport.from_json(document) == report
    assert (document["kind"], document["schema_version"]) == ("gan", 1)


def test_only_what_is_needed_must_be_there() -> None:
    document = bare_report().to_json()
    for name in ("history", "pictures", "latency", "target", "certificate", "warnings", "seconds"):
        del document[name]
    assert GanReport.from_json(document) == bare_report()
    del document["metrics"]
    with pytest.raises(DataError, match="report: damaged: KeyError: 'metrics'"):
        GanReport.from_json(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"must be 'gan' and 1, got \('gan', 2\)"),
        ({"kind": None}, r"must be 'gan' and 1, got \(None, 1\)"),
        ({"dense": {"accuracy": 1.0}}, "damaged: TypeError"),
        ({"pictures": [{"title": "x"}]}, "damaged: TypeError"),
    ],
)
def test_a_damaged_document_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        GanReport.from_json(full_report().to_json() | change)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_none_and_not_drawn() -> None:
    lost: list[dict[str, float | None]] = [{"epoch": 1, "d_loss": 0.5, "g_loss": 0.7}]
    lost.append({"epoch": 2, "d_loss": math.nan, "g_loss": math.inf})
    report = replace(full_report(), history={"dense": lost}, metrics={"dense": {"fd_x": math.nan}})
    document = report.to_json()
    json.dumps(document, allow_nan=False)
    assert document["history"]["dense"][1] == {"epoch": 2, "d_loss": None, "g_loss": None}
    for one in (report, GanReport.from_json(document)):
        assert "nan" not in " ".join(Page(one.html()).text.lower().split("recipe")[0].split())


def test_the_headline_says_what_is_known_and_no_more() -> None:
    assert full_report().headline == "0.49x the MACs at 0.55x the latency [0.54, 0.56], fd_resnet56 from 14.25 to 15"
    assert bare_report().headline == "0.49x the MACs"
    only_dense = replace(bare_report(), metrics={"dense": {"fid": 14.0}})
    assert only_dense.headline == "0.49x the MACs"


def test_ratios_are_compact_over_dense_and_the_paired_one_wins() -> None:
    assert full_report().ratio == {
        "num_params": pytest.approx(2_100_000 / 4_276_739),
        "num_macs": pytest.approx(0.49375),
        "size_bytes": pytest.approx(85 / 172),
        "latency_ms": 0.55,
    }
    assert replace(full_report(), latency=None).ratio["latency_ms"] == pytest.approx(6.9 / 12.5)
    assert bare_report().ratio["latency_ms"] is None


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_the_page_nests_and_asks_for_nothing_from_outside(report: GanReport) -> None:
    html = report.html()
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] or "" for _, attributes in page.tags if "src" in attributes]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|url\(|@import", re.sub(r"data:image/png;base64,[^\"]*", "", html))


def test_pictures_stand_side_by_side_with_their_names() -> None:
    images = [attributes for tag, attributes in Page(full_report().html()).tags if tag == "img"]
    shown = [(image["alt"], image["src"]) for image in images]
    samples, strips = full_report().pictures
    assert shown == [
        ("Samples, dense", samples.dense),
        ("Samples, compact", samples.compact),
        ("From one noise to another, dense", strips.dense),
        ("From one noise to another, compact", strips.compact),
    ]
    alts = [attributes["alt"] for tag, attributes in Page(cycle_report().html()).tags if tag == "img"]
    assert alts[:3] == [f"Horse to deer, {caption}" for caption in ("given", "dense", "compact")]


def test_the_page_shows_every_part_of_the_report() -> None:
    text = " ".join(Page(full_report().html()).text.split())
    for part in (
        "0.49x the MACs at 0.55x the latency [0.54, 0.56], fd_resnet56 from 14.25 to 15",
        "parameters 4,276,739 2,100,000 0.491x MACs 1.6 G 790.0 M 0.494x file size 17.2 MB 8.5 MB 0.494x",
        "latency p50 12.5 ms 6.9 ms 0.550x [0.54, 0.56]",
        "Latency on onnxruntime 1.31.1, float32, 1 thread",
        "output error 3.0e-07.",
        "fd_resnet56 14.25 88.5 31 15 is_resnet56 7.5 7.5 7.5 7.5",
        *("dense12 epochs", "retrain5 epochs", "losses", "distillation", "the machine was busy"),
        *("max relative error 3e-15", "prune 300.2", 'model = "sngan"', "3fa9c1d27be04410"),
    ):
        assert part in text, part


def test_sections_without_content_are_left_out() -> None:
    html = bare_report().html()
    parts = ("Distance", "Training", "Warning", "Samples", "Latency on", "Certificate", "Seconds")
    assert not any(part in Page(html).text for part in parts)
    assert not any(tag in ("svg", "img") for tag, _ in Page(html).tags)


def titles(report: GanReport) -> list[str | None]:
    return [ElementTree.fromstring(chart).findtext("title") for chart in charts_of(report.html())]


def test_losses_stand_two_by_two() -> None:
    report = full_report()
    assert titles(report) == ["losses", "variance", "losses", "distillation", "variance"]
    assert "d from 1 to 0.08333; g from 2 to 1.083" in charts_of(report.html())[0]
    assert titles(cycle_report()) == ["losses"] * 4
    third = replace(report, history={"dense": epochs(3, "discriminator_loss", "generator_loss", "added_loss")})
    assert titles(third) == ["losses", "added loss"]


def test_losses_of_one_epoch_are_dots_of_their_own() -> None:
    report = replace(full_report(), history={"prune": epochs(1, "d_loss", "g_loss")})
    assert titles(report) == ["d loss", "g loss"]
    assert all("<circle" in chart for chart in charts_of(report.html()))


def test_names_in_a_legend_do_not_run_into_each_other() -> None:
    long = replace(full_report(), history={"x": epochs(2, "discriminator_of_horses_loss", "generator_of_horses_loss")})
    names = re.findall(r'class="name"[^>]*>([^<]*)<', charts_of(long.html())[0])
    assert names == ["\u2026nator_of_horses", "\u2026rator_of_horses"]


def test_hostile_names_are_text_everywhere() -> None:
    hostile = '"></title><script>alert("1")</script>'
    report = replace(
        full_report(),
        recipe={"model": hostile, hostile: hostile},
        recipe_hash=hostile,
        metrics={hostile: {hostile: 1.0}, "dense": {hostile: 1.0}, "compact": {hostile: 1.0}},
        history={hostile: [{"epoch": 1, hostile: 1.0, "a_loss": 1.0, hostile + "_loss": 1.0}]},
        pictures=(Comparison(hostile, hostile, hostile, hostile),),
        target=TargetFacts(hostile, hostile, hostile, 1),
        certificate={hostile: hostile},
        warnings=(hostile,),
        seconds={hostile: 1.0},
    )
    html = report.html()
    assert "<script" not in html
    assert not any(tag == "script" for tag, _ in Page(html).tags)
    assert Page(html).text.count(hostile) >= 10


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


SCREENS = [("full", 360, False), ("full", 360, True), ("full", 1200, False), ("cycle", 360, False), ("bare", 360, True)]
SCREENS += [("cycle", 768, True)]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("name", "width", "dark"), SCREENS)
def test_the_page_is_readable_and_complete_in_itself(
    name: str, width: int, dark: bool, tab: Tab, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(REPORTS[name].html(), encoding="utf-8")
    tab.open(page, width=width, dark=dark)
    tab.screenshot(SCREENSHOTS / f"gan-{name}-{width}-{'dark' if dark else 'light'}.png")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(FAULTS) == []
    sizes = tab.evaluate("[...document.images].map(image => [image.naturalWidth, image.width])")
    assert len(sizes) == sum(len(comparison.panels) for comparison in REPORTS[name].pictures)
    assert all(natural > 0 and 200 < shown <= width for natural, shown in sizes)
    requests = [x["params"]["request"]["url"] for x in tab.events if x["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [seen for seen in tab.events if seen["method"] in complaints] == []
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 3 * 40) == dark
