"""Width tables on a target that is a function of shapes: nothing is timed here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from sparsekit import width_tables
from sparsekit.cli import commands
from sparsekit.cost import Costs
from sparsekit.graph import ChannelGraph, trace
from sparsekit.latency_model import Latencies
from sparsekit.layer_times import Peaks, layer_times
from sparsekit.layers import Convolution
from sparsekit.targets import Target
from sparsekit.width_tables import measure_tables

OVERHEAD_MS, PER_MAC_MS = 0.004, 1e-6
INSPECT = ("inspect", "lenet5", "--image-size", "28")


def padded(width: int, block: int = 16) -> int:
    return -(-width // block) * block


def file_ms(path: Path) -> float:
    """Of a file's convolutions and matrix products, channels padded to blocks of 16, and as much for each node."""
    graph = onnx.load(path).graph
    fixed = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {node.output[0]: fixed[node.input[1]] for node in graph.node if node.op_type == "Expand"}
    sizes = {value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    total = 0.0
    for node in graph.node:
        attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        if node.op_type == "Conv":
            out, inner, *kernel = weights[node.input[1]].tolist()
            _, channels, *extent = sizes[node.input[0]]
            strides = attributes.get("strides", [1, 1])
            pads = attributes.get("pads", [0] * 4)
            extent = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(extent, pads[:2], kernel, strides, strict=True)]
            sizes[node.output[0]] = [1, out, *extent]
            macs = math.prod((*extent, *kernel)) * padded(out) * (padded(inner) if inner == channels else inner)
            total += OVERHEAD_MS + PER_MAC_MS * macs
        elif node.op_type in ("MatMul", "Gemm"):
            columns = weights[node.input[1]].tolist()[-1]
            *rows, inner = sizes[node.input[0]]
            sizes[node.output[0]] = [*rows, columns]
            total += OVERHEAD_MS + PER_MAC_MS * math.prod(rows) * padded(inner) * padded(columns)
        elif node.op_type not in ("Expand", "MaxPool"):
            sizes[node.output[0]] = sizes[node.input[0]]
    return total


class Fake:
    """Stands in for `measure_files`; `left` is how many calls it lasts."""

    def __init__(self, left: float = math.inf) -> None:
        self.left, self.num_calls, self.num_files = left, 0, 0

    def __call__(self, paths: Sequence[Path], **conditions: object) -> list[float]:
        assert conditions["num_launches"] == 1
        if self.num_calls >= self.left:
            raise KeyboardInterrupt
        self.num_calls += 1
        self.num_files += len(paths)
        return [file_ms(path) for path in paths]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    stand_in = Fake()
    monkeypatch.setattr(width_tables, "measure_files", stand_in)
    monkeypatch.setattr(width_tables, "_FEW_POINTS", 1)  # a call per layer
    monkeypatch.setattr(Target, "fingerprint", lambda self: {"cpu": "fake", "runtime": self.name})
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    return stand_in


def network() -> ChannelGraph:
    """A residual stream of 48, inner layers of 80 and 96, a depthwise one, a classifier."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow = (
                nn.Conv2d(3, 48, 3),
                nn.Conv2d(48, 80, 3),
                nn.Conv2d(80, 48, 3, padding=2),
            )
            self.up, self.depthwise = nn.Conv2d(48, 96, 1), nn.Conv2d(96, 96, 3, groups=96)
            self.head = nn.Linear(96, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = x + self.narrow(self.wide(x).relu())
            y: torch.Tensor = self.head(self.depthwise(self.up(x).relu()).amax((2, 3)))
            return y

    torch.manual_seed(0)
    return trace(Net().eval(), torch.randn(2, 3, 10, 10))


def tiny() -> ChannelGraph:
    """Two layers of the same shape and one of another."""
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)]
    return trace(nn.Sequential(*layers).eval(), torch.randn(2, 3, 10, 10))


def test_tables_give_the_time_of_each_layer_alone_at_any_width(fake: Fake) -> None:
    graph = network()
    tables = measure_tables(graph)
    assert len(tables) == len(graph.timed)
    wide = tables[1]
    assert wide is not None
    out, into = np.arange(9, 81), 33
    expected = OVERHEAD_MS + PER_MAC_MS * 6 * 6 * 9 * (-(-out // 16) * 16) * 48
    np.testing.assert_allclose(wide(out, into), expected, rtol=0.02)
    depthwise = tables[4]
    assert depthwise is not None
    assert depthwise.shape.layer == Convolution(
        (8, 8), (3, 3), (1, 1), (0, 0), (0, 0), (1, 1), 96, 1, True, False, True, 1
    )
    assert float(depthwise(50, 1)) == pytest.approx(OVERHEAD_MS + PER_MAC_MS * 6 * 6 * 9 * 64, rel=0.02)


def test_layers_of_one_shape_share_a_table_and_a_known_one_is_not_measured_again(fake: Fake, tmp_path: Path) -> None:
    graph = tiny()
    first = measure_tables(graph)
    assert first[1] is first[2] is not first[0]
    assert fake.num_calls == 3
    again = measure_tables(graph)
    assert fake.num_calls == 3
    for one, two in zip(first, again, strict=True):
        assert one is not None
        assert two is not None
        np.testing.assert_array_equal(one.values_ms, two.values_ms)
    measure_tables(graph, threads=2)
    assert fake.num_calls == 6
    measure_tables(graph, batch_size=3)
    assert fake.num_calls == 9
    measure_tables(graph, cache_dir=tmp_path / "elsewhere")
    assert fake.num_calls == 12
    measure_tables(graph, "onnxruntime:CPU")  # here, another name is another fingerprint
    assert fake.num_calls == 15


def test_layers_measured_together_have_the_tables_that_each_has_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = measure_tables(tiny())
    monkeypatch.setattr(width_tables, "_FEW_POINTS", 10_000)
    monkeypatch.setattr(width_tables, "_LOADED_BYTES", 100)  # so that files of one measurement are split again
    files, calls = fake.num_files, fake.num_calls
    together = measure_tables(tiny(), cache_dir=tmp_path / "elsewhere")
    assert fake.num_files - files < files  # what stands beside the layers is the same
    assert fake.num_calls - calls > 3
    for one, two in zip(alone, together, strict=True):
        assert one is not None
        assert two is not None
        np.testing.assert_allclose(one.values_ms, two.values_ms)


def test_an_interrupted_measurement_goes_on_where_it_stopped(fake: Fake) -> None:
    fake.left = 2
    with pytest.raises(KeyboardInterrupt):
        measure_tables(tiny())
    done: list[tuple[int, int]] = []
    fake.left = math.inf
    measure_tables(tiny(), progress=lambda number, total: done.append((number, total)))
    assert fake.num_calls == 3
    assert done == [(2, 3), (3, 3)]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"ms": 3}', '{"ms": [[[1, 2], 3.0]]}', "nan", "cut"])
def test_a_damaged_table_is_measured_again(fake: Fake, tmp_path: Path, damage: str) -> None:
    measure_tables(tiny())
    file = sorted((tmp_path / "cache" / "latency").glob("*.json"))[0]
    text = file.read_text(encoding="utf-8")
    document = json.loads(text)
    document["ms"][0][1] = math.nan
    file.write_text({"nan": json.dumps(document), "cut": text[: len(text) // 2]}.get(damage, damage), encoding="utf-8")
    measure_tables(tiny())
    assert fake.num_calls == 4
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(text)
    assert {path.suffix for path in file.parent.iterdir()} == {".json"}


def test_without_a_writable_cache_tables_are_measured_all_the_same(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert all(measure_tables(tiny(), cache_dir=tmp_path / "file"))


def test_a_networks_latency_is_the_sum_of_its_tables_at_any_counts(fake: Fake) -> None:
    graph = network()
    tables = measure_tables(graph)
    latencies = Latencies(graph, tables)
    generator = np.random.default_rng(0)
    sizes = Costs(graph).dense
    for _ in range(5):
        counts = generator.integers(1, sizes + 1)
        stream, inner, up = counts
        at = [(stream, 3), (inner, stream), (stream, inner), (up, stream), (up, 1), (2, up, 10)]
        expected = [float(table(*point)) for table, point in zip(tables, at, strict=True) if table is not None]
        np.testing.assert_allclose(latencies.per_layer(counts), expected, rtol=1e-6)
        assert latencies(counts) == pytest.approx(sum(expected))
        for group in range(3):
            curve = latencies.along(counts, group)
            assert curve.shape == (sizes[group],)
            rest = latencies(counts) - curve[counts[group] - 1]
            for width in (1, 17, sizes[group]):
                changed = counts.copy()
                changed[group] = width
                assert latencies(changed) == pytest.approx(curve[width - 1] + rest)


def test_layers_without_a_table_take_no_time(fake: Fake) -> None:
    graph = network()
    tables = measure_tables(graph)
    dense = Costs(graph).dense
    per_layer = Latencies(graph, [None, *tables[1:]]).per_layer(dense)
    assert per_layer[0] == 0
    assert (per_layer[1:] > 0).all()
    assert Latencies(graph, [None] * len(tables))(dense) == 0
    assert (Latencies(graph, [None] * len(tables)).along(dense, 0) == 0).all()


def test_layer_times_name_the_plateau_the_bound_and_the_gain(fake: Fake) -> None:
    graph = network()
    latencies = Latencies(graph, measure_tables(graph))
    rows = layer_times(graph, latencies, Peaks(macs_per_ms=1 / PER_MAC_MS, bytes_per_ms=1e12))
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.name for row in rows] == ["stem", "wide", "narrow", "up", "depthwise", "head"]
    wide = rows[1]
    assert (wide.width, wide.edge) == (80, 64)
    assert wide.edge_change == pytest.approx(-0.2, abs=0.01)
    assert wide.num_macs == 6 * 6 * 9 * 48 * 80
    assert (wide.bound, rows[-1].bound) == ("compute", "overhead")
    assert wide.gain_ms == pytest.approx(0, abs=1e-4)  # 72 channels cost what 80 cost
    assert (rows[-1].width, rows[-1].edge, rows[-1].gain_ms) == (None, None, None)
    slow = layer_times(graph, latencies, Peaks(macs_per_ms=1 / PER_MAC_MS, bytes_per_ms=1e4))
    assert {row.bound for row in slow} == {"memory"}


def test_inspect_prints_latency_per_layer_and_as_json(fake: Fake) -> None:
    runner = CliRunner()
    done = runner.invoke(commands, [*INSPECT, "--latency", "--json"])
    assert done.exit_code == 0, done.output
    latency = json.loads(done.stdout)["latency"]
    assert [row["name"] for row in latency["layers"]][:2] == ["conv1", "conv2"]
    assert latency["sum_ms"] == pytest.approx(sum(row["time_ms"] for row in latency["layers"]))
    done = runner.invoke(commands, [*INSPECT, "--latency", "--threads", "2"])
    assert done.exit_code == 0, done.output
    assert "2 thread(s)" in done.stdout
    assert "next plateau" in done.stdout
    assert "latency" not in json.loads(runner.invoke(commands, [*INSPECT, "--json"]).stdout)
