"""The report: strict JSON that round-trips, honest ratios, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sparsekit.environment import Environment
from sparsekit.errors import DataError
from sparsekit.report import (
    Candidate,
    LayerTime,
    Measurement,
    Report,
    SearchStep,
    StockNetwork,
    TargetFacts,
    Width,
)

NEW_FIELDS = ("target", "layers", "search", "latency_band", "candidates", "stock")
VOID = {"meta", "br", "hr", "link", "img", "input"}


def sample_report() -> Report:
    return Report(
        dense=Measurement(0.9361, 855_770, 125_485_696, 3_400_000, 3.4, 3.3, 3.6),
        compact=Measurement(0.9331, 427_885, 61_487_991, 1_700_000, 1.7, 1.6, 1.9),
        environment=Environment.collect(),
        recipe={"model": "resnet56", "budget": "macs<=0.5x", "weights": None, "prune": {"epochs": 2}},
        recipe_hash="3fa9c1d27be04410",
        certificate={"max_relative_error": 3e-15, "groups": {f"layer{i}": "exact" for i in range(6)}},
        latency={"ratio": {"value": 0.52, "low": 0.5, "high": 0.54}, "busy": False, "latencies": [{"cpu_ms": 3}]},
        widths=tuple(Width(f"layer1.{i}.conv1", 16, 1 + i % 16) for i in range(27)),
        history={
            "dense": [{"epoch": e, "loss": 2.0 / e, "train_accuracy": 0.1 * e, "lr": 0.1} for e in (1, 2, 3)],
            "prune": [{"epoch": e, "step": 9 * e, "loss": 1.0 / e, "mask_hardness": 0.25 / e} for e in (1, 2)],
        },
        accuracies={"dense": 0.9361, "pruned": 0.871, "compact": 0.9331},
        refusals=(
            {"module": "linear", "source": "net.py:9", "op": "aten.addmm", "reason": "output", "macs_share": 0.031},
        ),
        warnings=("3 widths are no multiple of 4",),
        seconds={"trace": 0.4, "prune": 31.0},
    )


def bare_report() -> Report:
    """A run without data, training or timing."""
    return replace(
        sample_report(),
        dense=Measurement(None, 100, 1000, 400),
        compact=Measurement(None, 50, 450, 200),
        latency=None,
        widths=(),
        history={},
        accuracies={},
        refusals=(),
        warnings=(),
    )


def latency_report() -> Report:
    """A run under a latency budget, with all that it says about time."""
    steps = (SearchStep(0.5, 0.56, 0.55, 0.57, 0.53, False), SearchStep(0.47, 0.52, 0.5, 0.54, 0.49, True))
    names = ("stem", *(f"layer{i}.{b}.conv{c}" for i in (1, 2) for b in (0, 1) for c in (1, 2)), "head")
    return replace(
        sample_report(),
        target=TargetFacts("ssh://pi", "onnxruntime", "float32", 4, "1.31.1", "Cortex-A76", 3.5e-7),
        widths=(
            Width("stem", 64, 49, (16, 48, 64)),
            Width("layer1.0.conv1", 64, 48, (16, 48, 64)),
            Width("head", 8, 8),
        ),
        layers=tuple(LayerTime(name, 0.4, 0.05 * i, 1_000_000, 100_000 * i) for i, name in enumerate(names, 1)),
        search=steps,
        latency_band=(0.494, 0.52),
        candidates=(Candidate("uniform", 0.6, 0.55, 0.9, 0.58, 0.62), Candidate("untrained", 0.55, 0.5)),
        stock=(
            StockNetwork("resnet32", 0.56, 0.57, 0.925, "cifar10", True, "beaten"),
            StockNetwork("resnet20", 0.33, 0.34, 0.7, "ImageNet-1K"),
            StockNetwork("resnet14", 0.2, None, note="not timed"),
        ),
    )


def charts_of(html: str) -> list[str]:
    """The page's charts, each with the pictures nested in it."""
    found, start, depth = [], 0, 0
    for tag in re.finditer(r"<svg|</svg>", html):
        start = tag.start() if depth == 0 else start
        depth += 1 if tag.group() == "<svg" else -1
        if depth == 0:
            found.append(html[start : tag.end()])
    return found


class Page(HTMLParser):
    """Fails on tags that do not nest; gathers tags, their attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def table_text(report: Report) -> str:
    console = Console(width=80, file=StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(report.table())
    return captured.get()


REPORTS = {"full": sample_report(), "bare": bare_report(), "latency": latency_report()}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_survives_json(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(document) == report
    assert document["schema_version"] == 1


def test_a_report_from_before_latency_budgets_still_reads() -> None:
    document = sample_report().to_json()
    for name in NEW_FIELDS:
        del document[name]
    for width in document["widths"]:
        del width["edges"]
    assert Report.from_json(json.loads(json.dumps(document))) == sample_report()


def test_json_holds_both_networks_and_their_ratio() -> None:
    document = sample_report().to_json()
    names = {"accuracy", "num_params", "num_nonzero", "num_macs", "size_bytes", "latency_ms"}
    assert names <= document["dense"].keys()
    assert names <= document["compact"].keys()
    assert names == document["ratio"].keys()


def test_json_is_strict_where_numbers_are_not_finite() -> None:
    history = {"dense": [{"loss": float("nan")}, {"loss": float("inf")}]}
    certificate = {"nested": [{"error": float("-inf")}], "names": ("a", "b")}
    document = replace(sample_report(), history=history, certificate=certificate).to_json()
    json.dumps(document, allow_nan=False)
    assert document["history"] == {"dense": [{"loss": None}, {"loss": None}]}
    assert document["certificate"] == {"nested": [{"error": None}], "names": ["a", "b"]}
    assert Report.from_json(document).to_json() == document
    assert "loss" not in Page(Report.from_json(document).html()).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version must be 1, got 2"),
        ({"dense": {"accuracy": 1.0}}, "damaged: TypeError"),
        ({"widths": [{"layer": "conv1", "colour": 3}]}, "damaged: TypeError"),
        ({"layers": [{"name": "conv1"}]}, "damaged: TypeError"),
        ({"target": {"name": "onnxruntime"}}, "damaged: TypeError"),
        ({"search": 3}, "damaged: TypeError"),
    ],
)
def test_a_damaged_document_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Report.from_json(sample_report().to_json() | change)
    assert "\n" not in str(caught.value)


def test_a_document_that_lacks_a_field_is_refused() -> None:
    document = sample_report().to_json()
    del document["recipe_hash"]
    with pytest.raises(DataError, match="recipe_hash"):
        Report.from_json(document)


def test_ratios_are_compact_over_dense() -> None:
    ratio = sample_report().ratio
    assert ratio["accuracy"] == pytest.approx(0.9331 / 0.9361)
    assert ratio["num_params"] == 0.5
    assert ratio["num_macs"] == pytest.approx(0.49, abs=1e-6)
    assert ratio["size_bytes"] == 0.5


def test_the_paired_latency_ratio_wins_over_the_quotient_of_medians() -> None:
    report = sample_report()
    assert report.ratio["latency_ms"] == 0.52
    assert replace(report, latency=None).ratio["latency_ms"] == 0.5
    assert replace(report, latency={"ratio": None, "busy": True}).ratio["latency_ms"] == 0.5


def test_a_ratio_is_unknown_where_a_side_is() -> None:
    report = replace(bare_report(), compact=Measurement(0.9, 50, 450, 200, latency_ms=1.0))
    assert report.ratio == {
        "accuracy": None,
        "num_params": 0.5,
        "num_nonzero": None,
        "num_macs": 0.45,
        "size_bytes": 0.5,
        "latency_ms": None,
    }


def test_an_accuracy_of_zero_is_a_number_and_not_a_gap() -> None:
    report = sample_report()
    report = replace(report, compact=replace(report.compact, accuracy=0.0))
    assert report.ratio["accuracy"] == 0.0
    assert "accuracy -93.6 points" in report.headline


def test_the_headline_says_what_is_known_and_no_more() -> None:
    full = "0.49x the MACs at 0.52x the latency [0.50, 0.54], accuracy -0.3 points"
    assert sample_report().headline == full
    assert replace(sample_report(), latency=None).headline == (
        "0.49x the MACs at 0.50x the latency, accuracy -0.3 points"
    )
    assert bare_report().headline == "0.45x the MACs"


def test_the_table_shows_each_quantity_of_both_networks() -> None:
    lines = {line.split("  ")[0].strip("| \u2502"): line for line in table_text(sample_report()).splitlines()}
    expected = {
        "accuracy": ("93.61 %", "93.31 %", "0.997x"),
        "parameters": ("855,770", "427,885", "0.500x"),
        "MACs": ("125.5 M", "61.5 M", "0.490x"),
        "file size": ("3.4 MB", "1.7 MB", "0.500x"),
        "latency p50": ("3.4 ms", "1.7 ms", "0.520x"),
        "(p20-p80)": ("(3.3-3.6)", "(1.6-1.9)", "[0.50, 0.54]"),
    }
    for label, cells in expected.items():
        line = next(text for start, text in lines.items() if start.startswith(label))
        assert re.search(".*".join(map(re.escape, cells)), line), line


def test_the_table_of_a_run_without_data_has_dashes() -> None:
    accuracy = next(line for line in table_text(bare_report()).splitlines() if "accuracy" in line)
    latency = next(line for line in table_text(bare_report()).splitlines() if "latency" in line)
    assert accuracy.split().count("-") == latency.split().count("-") == 3


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_the_page_nests_and_asks_for_nothing_from_outside(report: Report) -> None:
    html = report.html()
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "xlink:href"} & attributes.keys() for _, attributes in page.tags)
    assert not re.search(r"https?:|url\(|@import", html)


def test_the_page_shows_every_part_of_the_report() -> None:
    text = " ".join(Page(sample_report().html()).text.split())
    for part in (
        "0.49x the MACs at 0.52x the latency [0.50, 0.54], accuracy \u22120.3 points",
        *("855,770", "125.5 M", "3.4 ms", "(3.3-3.6)", "layer1.26.conv1", "11 / 16", "train accuracy (%)"),
        *("mask hardness", "3e-15", "net.py:9", "aten.addmm", "3.10 %", 'model = "resnet56"', "[prune]"),
        *("dense 93.61 %, pruned 87.10 %, compact 93.31 %.", "3 widths are no multiple of 4", "3fa9c1d27be04410", "31"),
    ):
        assert part in text, part


def test_sections_without_content_are_left_out() -> None:
    text = Page(bare_report().html()).text
    assert "every layer could be cut" in text
    parts = ("Channels kept", "Training", "Masks", "Warning", "Latency", "Search", "Time per layer", "Stock", "plateau")
    assert not any(part in text for part in parts)
    assert not any(tag == "svg" for tag, _ in Page(bare_report().html()).tags)


def section(report: Report, heading: str) -> str:
    """The text from a heading of second order to the next; "" without it."""
    pieces = re.split(r"<h2>(.*?)</h2>", report.html())
    found = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return " ".join(re.sub(r"<[^>]*>", " ", found.get(heading, "")).split())


NEW_SECTIONS = {
    "Search for the budget": {"search": ()},
    "Time per layer": {"layers": ()},
    "Accuracy, MACs and latency": {
        "latency": None,
        "compact": replace(sample_report().compact, latency_ms=None),
        "stock": (),
    },
}


@pytest.mark.parametrize("heading", NEW_SECTIONS)
def test_each_section_on_latency_is_there_with_its_data_and_absent_without(heading: str) -> None:
    report = latency_report()
    assert section(report, heading)
    without = replace(report, **NEW_SECTIONS[heading])  # type: ignore[arg-type]
    assert not section(without, heading)
    others = [other for other in NEW_SECTIONS if other != heading]
    assert all(section(without, other) for other in others)
    assert "Stock networks" not in replace(report, stock=()).html()


def test_the_search_is_told_step_by_step() -> None:
    text = section(latency_report(), "Search for the budget")
    assert "[0.494, 0.520] of the dense latency" in text
    assert "1 0.530x 0.500x 0.560x [0.550, 0.570] no 2 0.490x 0.470x 0.520x [0.500, 0.540] yes" in text


def test_the_layers_that_take_most_come_first_with_their_share() -> None:
    text = section(latency_report(), "Time per layer")
    first, second = (
        text.index("head 0.400 0.500 18 % 1.2x 1.0x"),
        text.index("layer2.1.conv2 0.400 0.450 16 % 1.1x 0.90x"),
    )
    assert first < second
    assert "add up to 4.00 of 3.40 ms measured for the dense network and 2.75 of 1.70 ms" in text


def test_only_ten_layers_are_listed() -> None:
    layers = tuple(LayerTime(f"conv{i}", 1.0, 0.01 * i, 10, 10) for i in range(12))
    table = replace(latency_report(), layers=layers).html().split("take most of what is left")[1].split("</table>")[0]
    assert re.findall(r"<code>(conv\d+)</code>", table) == [f"conv{i}" for i in range(11, 1, -1)]


def test_widths_off_their_plateaus_are_counted() -> None:
    text = section(latency_report(), "Channels kept")
    assert "1 count lies off an edge" in text
    on_edge = replace(latency_report(), widths=(Width("stem", 64, 48, (16, 48, 64)),))
    assert "Every count lies on one" in section(on_edge, "Channels kept")
    assert "plateau" not in section(sample_report(), "Channels kept")


def test_accuracies_on_other_data_are_said_to_be_so_and_not_drawn() -> None:
    report = latency_report()
    text = section(report, "Accuracy, MACs and latency")
    assert "resnet32 0.560x 0.570x 92.50 % beaten" in text
    assert "resnet20 0.330x 0.340x 70.00 % ImageNet-1K" in text
    assert "resnet14 0.200x - - not timed" in text
    assert "on other data than ours" in text
    accuracy, macs = charts_of(report.html())[:2]
    assert [name in accuracy for name in ("resnet32", "resnet20", "resnet14")] == [True, False, False]
    assert [name in macs for name in ("resnet32", "resnet20", "resnet14")] == [True, True, False]
    comparable = replace(report, stock=report.stock[:1])
    assert "other data" not in section(comparable, "Accuracy, MACs and latency")


def test_the_target_stands_wherever_latency_is_printed() -> None:
    report = latency_report()
    target = "ssh://pi (onnxruntime 1.31.1), float32, 4 threads, Cortex-A76"
    assert report.target_text == target
    assert target in " ".join(table_text(report).split())
    assert f"Latency on {target}; output error 3.5e-07." in " ".join(Page(report.html()).text.split())
    assert all(target in section(report, heading) for heading in NEW_SECTIONS)


def test_a_report_that_names_no_target_has_the_runtime_and_this_machine() -> None:
    report = sample_report()
    assert report.target_text == ""
    timed = replace(report, latency={"runtime": "onnxruntime 1.31.1 CPUExecutionProvider"})
    assert timed.target_text == f"onnxruntime 1.31.1 CPUExecutionProvider, {report.environment.cpu}"


def test_hostile_names_are_text_everywhere() -> None:
    hostile = '</title><script>alert("1")</script>'
    report = replace(
        sample_report(),
        target=TargetFacts(hostile, hostile, hostile, 1, hostile, hostile),
        layers=(LayerTime(hostile, 1.0, 1.0, 1, 1), LayerTime("conv", 1.0, 1.0, 1, 1)),
        candidates=(Candidate(hostile, 0.5, 0.5, 0.5),),
        stock=(StockNetwork(hostile, 0.5, 0.5, 0.5, hostile, False, hostile),),
        widths=(Width(hostile, 4, 2),),
        history={hostile: [{hostile: 1.0, "mask_" + hostile: 0.5}]},
        accuracies={hostile: 0.5},
        recipe={"model": hostile, hostile: hostile},
        recipe_hash=hostile,
        certificate={hostile: {hostile: hostile}},
        refusals=(dict.fromkeys(("module", "source", "op", "reason"), hostile) | {"macs_share": 0.1},),
        warnings=(hostile,),
        seconds={hostile: 1.0},
    )
    html = report.html()
    assert "<script" not in html
    assert not any(tag == "script" for tag, _ in Page(html).tags)
    assert Page(html).text.count(hostile) >= 10


def test_records_within_an_epoch_are_drawn_but_not_counted_as_epochs() -> None:
    between: list[dict[str, float | None]] = [{"step": 3, "mask_hardness": 0.2}]
    report = sample_report()
    page = replace(report, history={"prune": [*between, *report.history["prune"]]}).html()
    assert "<small>2 epochs</small>" in page
    assert "from 0.2 at step 3" in page


def test_every_chart_is_well_formed_and_described() -> None:
    charts = charts_of(sample_report().html())
    assert len(charts) == 2 + 3 + 2 + 1 + 1  # pareto, widths, dense (loss, accuracy), prune (loss), masks
    timed = charts_of(latency_report().html())
    assert len(timed) == 2 + 1 + 1 + 1 + 2 + 1 + 1  # pareto, search, widths, layers, as above
    for chart in charts + timed:
        root = ElementTree.fromstring(chart)
        assert root.attrib["role"] == "img"
        assert root.findtext("title")
        assert root.findtext("desc")


def test_the_environment_names_versions_and_no_host_or_path() -> None:
    environment = Environment.collect()
    text = json.dumps(replace(sample_report(), environment=environment).to_json()["environment"])
    assert environment.packages["numpy"]
    assert environment.packages["torch"]
    assert environment.num_cores >= 1
    assert environment.cpu
    assert "/home" not in text
    assert "\\\\" not in text


def test_collecting_the_environment_imports_no_heavy_package() -> None:
    # The package's own __init__ may import torch, so the module is loaded by its path alone.
    code = (
        "import importlib.util, sys; import dataclasses\n"
        "spec = importlib.util.spec_from_file_location('environment', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['environment'] = module\n"
        "spec.loader.exec_module(module); seen = module.Environment.collect()\n"
        "assert seen.num_threads is None and seen.gpu is None\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()\n"
    )
    path = sys.modules[Environment.__module__].__file__
    assert path is not None
    subprocess.run([sys.executable, "-c", code, path], check=True)
