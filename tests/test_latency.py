"""Latency: the mechanics and the statistics. No assertion here rests on how fast the machine is."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import mmap
import os
import sys
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from rich.console import Console

from sparsekit import latency, latency_worker
from sparsekit.errors import MeasurementError, UsageError
from sparsekit.latency import measure_files, measure_latency, width_warning
from sparsekit.samples import Latency, LatencyComparison, Loaded, Ratio, Sample, compare, relative_error, summarize
from sparsekit.targets import machine

# Answers like the real worker; the file it "loads" holds CPU nanoseconds, taken in turn from launch to launch.
STAND_IN = """
import json, os, sys, time
log, cpus = os.environ["LOG"], {}
for line in sys.stdin:
    command = json.loads(line)
    if command["command"] == "describe":
        answer = {"runtime": "stand-in", "device": {}}
    elif command["command"] == "load":
        path = command["path"]
        times = json.load(open(path))
        lines = open(log).readlines() if os.path.exists(log) else []
        cpus[path] = times[len({line.split()[1] for line in lines if line.split()[0] == path}) % len(times)]
        answer = {
            "precision": "float32", "note": "", "load_ms": 1.0, "cold_start_ms": 2.0, "peak_memory_bytes": 3
        }
    elif command["command"] == "outputs":
        answer = {"outputs": []}
    else:
        begin = time.monotonic_ns()
        path = command["name"]
        answer = {"samples": [[2 * cpus[path], cpus[path], 0]] * command["num_samples"]}
        print(path, os.getpid(), begin, time.monotonic_ns(), file=open(log, "a"))
    print(json.dumps(answer), flush=True)
"""


def save_model(path: Path, shape: list[int | str]) -> Path:
    """y = x * x."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def save_times(path: Path, cpu_ns: list[int]) -> Path:
    path.write_text(json.dumps(cpu_ns))
    return path


def use_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> Path:
    """Replace the worker by `source`; the path returned is the log it may write."""
    worker, log = tmp_path / "worker.py", tmp_path / "log"
    worker.write_text(source)
    monkeypatch.setattr(machine, "WORKER", worker)
    monkeypatch.setenv("LOG", str(log))
    return log


def test_real_files_are_timed_in_onnx_runtime_and_every_field_is_filled(tmp_path: Path) -> None:
    paths = [save_model(tmp_path / name, ["batch", 3, 8]) for name in ("a.onnx", "b.onnx")]
    done: list[tuple[int, int]] = []
    result = measure_latency(
        [str(path) for path in paths],
        threads=2,
        batch_size=4,
        min_launches=2,
        max_launches=2,
        progress=lambda num, total: done.append((num, total)),
    )
    assert done == [(1, 2), (2, 2)]
    assert [x.path for x in result.latencies] == paths
    assert [(x.threads, x.batch_size, x.num_samples) for x in result.latencies] == [(2, 4, 48)] * 2
    for x in result.latencies:
        assert 0 < x.p20_ms <= x.p50_ms <= x.p80_ms
        assert x.cpu_ms > 0
        assert 0 < x.load_ms < x.cold_start_ms
        assert x.p80_ms <= x.p99_ms
        assert (x.precision, x.output_error, x.note) == ("float32", 0.0, "")
        if sys.platform == "linux":
            assert x.peak_memory_bytes is not None
            assert x.wait_share is not None
        assert 0 <= x.clean_share <= 1
    (ratio,) = result.ratios
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert result.num_launches == 2
    assert result.runtime.startswith("onnxruntime 1.")
    assert result.runtime.endswith(" CPUExecutionProvider")
    assert (result.target, result.affinity, result.resolve) == ("onnxruntime", None, 0.05)
    assert result.device["cpu"]
    document = json.loads(json.dumps(result.to_json()))
    assert [row["path"] for row in document["latencies"]] == [str(path) for path in paths]
    assert document["ratios"] == [dataclasses.asdict(ratio)]


def test_every_launch_is_fresh_every_round_holds_every_file_once_and_no_two_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_worker(monkeypatch, tmp_path, STAND_IN)
    paths = [save_times(tmp_path / name, [ns]) for name, ns in (("a", 100), ("b", 200), ("c", 50))]
    result = measure_latency(paths)
    assert [ratio.value for ratio in result.ratios] == pytest.approx([2.0, 0.5])
    runs = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for _, pid, _, _ in runs}) == 3 * result.num_launches
    assert all(int(end) <= int(begin) for (*_, end), (_, _, begin, _) in pairwise(runs))
    rounds = [tuple(name for name, *_ in runs[i : i + 3]) for i in range(0, len(runs), 3)]
    assert len(rounds) == latency.NUM_ROUNDS * result.num_launches
    assert all(sorted(names) == [str(path) for path in paths] for names in rounds)
    assert len(set(rounds)) > 1


def test_launches_go_on_until_the_interval_is_narrow_but_no_further_than_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_worker(monkeypatch, tmp_path, STAND_IN)
    steady, noisy = save_times(tmp_path / "steady", [100]), save_times(tmp_path / "noisy", [100, 110])
    assert measure_latency([steady, steady]).num_launches == 3
    log.unlink()
    assert measure_latency([steady, noisy], max_launches=5).num_launches == 5
    log.unlink()
    assert measure_latency([steady, noisy], resolve=1.0).num_launches == 3
    log.unlink()
    hurried = measure_latency([steady, noisy], min_launches=2, max_seconds=0.0)
    assert hurried.num_launches == 2
    assert hurried.latencies[0].num_samples == 2 * latency.BURST
    log.unlink()
    alone = measure_latency([steady])
    assert (alone.num_launches, alone.ratios) == (3, ())


def test_ctrl_c_kills_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import json, os, signal, sys, time
open(os.environ["LOG"], "a").write(f"{os.getpid()} ")
for line in sys.stdin:
    if '"run"' not in line:
        print(json.dumps({"runtime": "", "device": {}, "precision": "", "note": "", "load_ms": 1, "outputs": [],
                          "cold_start_ms": 1, "peak_memory_bytes": 1}), flush=True)
    else:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)
"""
    log = use_worker(monkeypatch, tmp_path, source)
    path = save_times(tmp_path / "a", [1])
    with pytest.raises(KeyboardInterrupt):
        measure_latency([path, path])
    pids = [int(pid) for pid in log.read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import onnxruntime_is_not_here", "ModuleNotFoundError: No module named 'onnxruntime_is_not_here'"),
        ("import sys; sys.exit('input x: odd')", "input x: odd"),
        ("import os; os.kill(os.getpid(), 9)", "the measuring process ended with status -9"),
    ],
)
def test_a_worker_that_dies_is_reported_with_its_last_words(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, source)
    path = save_times(tmp_path / "a", [1])
    with pytest.raises(MeasurementError) as caught:
        measure_latency([path])
    assert str(caught.value) == f"onnxruntime: {reason}"


def test_a_file_that_cannot_be_measured_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    wide = save_model(tmp_path / "wide.onnx", ["batch", 3, "width"])
    fixed = save_model(tmp_path / "fixed.onnx", [1, 3, 8])
    with pytest.raises(MeasurementError, match=r"none\.onnx: no such file$"):
        measure_latency([tmp_path / "none.onnx"])
    with pytest.raises(MeasurementError, match=r"text\.onnx: InvalidProtobuf: [^\n]*Protobuf parsing failed"):
        measure_latency([tmp_path / "text.onnx"])
    with pytest.raises(MeasurementError, match=r"wide\.onnx: input 'x': dimension 2 \(width\) has no fixed size$"):
        measure_latency([wide])
    with pytest.raises(MeasurementError, match=r"fixed\.onnx: batch size 4: the inputs have fixed shapes"):
        measure_latency([fixed], batch_size=4)


def test_limits_that_give_no_interval_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "a.onnx", ["batch", 3])
    for paths, limits in (
        ([], {}),
        ([path], {"min_launches": 1}),
        ([path], {"max_launches": 2}),
        ([path], {"threads": 0}),
        ([path], {"batch_size": 0}),
    ):
        with pytest.raises(UsageError, match="latency: need"):
            measure_latency(paths, **limits)  # type: ignore[arg-type]


def test_the_batch_goes_where_the_file_leaves_it_open_and_integers_are_zero() -> None:
    values: list[tuple[str, str, list[Any]]] = [
        ("x", "float32", ["n", 3, 2]),
        ("mask", "bool", [None, "n"]),
        ("table", "float16", [7, 5]),
    ]
    feeds = latency_worker.make_inputs(values, 4, seed=0)
    assert {name: (x.shape, str(x.dtype)) for name, x in feeds.items()} == {
        "x": ((4, 3, 2), "float32"),
        "mask": ((4, 4), "bool"),
        "table": ((7, 5), "float16"),
    }
    assert not feeds["mask"].any()
    assert feeds["x"].std() > 0.5
    assert np.array_equal(feeds["x"], latency_worker.make_inputs(values, 4, seed=0)["x"])
    with pytest.raises(SystemExit, match=r"input 's': cannot make up a string"):
        latency_worker.make_inputs([("s", "string", [1])], 1, seed=0)


class Session:
    """Runs that take `run_s` on a clock of their own, the first of them `first_s` longer; half of it is CPU time."""

    precision, note, inputs = "float32", "", [("x", "float32", ["n"])]

    def __init__(self, load_s: float, first_s: float, run_s: float) -> None:
        self.now, self.load_s, self.first_s, self.run_s = 0.0, load_s, first_s, run_s
        self.clock = SimpleNamespace(
            perf_counter=lambda: self.now,
            perf_counter_ns=lambda: int(self.now * 1e9),
            process_time_ns=lambda: int(self.now * 0.5e9),
        )

    def load(self, *_: object) -> Session:
        self.now += self.load_s
        return self

    def bind(self, feeds: object) -> None:
        """Nothing to bind."""

    def run(self, num_runs: int) -> None:
        self.now += num_runs * self.run_s + self.first_s
        self.first_s = 0.0


LOAD = {"path": "m", "threads": 1, "batch_size": 1, "seed": 0, "options": {}, "min_warmups": 5, "warmup_s": 0.3}


def test_a_network_is_warmed_up_and_a_short_one_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for run_s, warm_up_s, num_repeats in ((0.0006, 0.3, 4), (0.25, 1.25, 1)):
        session = Session(2.0, 1.0, run_s)
        monkeypatch.setattr(latency_worker, "time", session.clock)
        network = latency_worker.Network({"load": session.load}, LOAD)
        assert session.now == pytest.approx(3.0 + run_s + warm_up_s, abs=2 * run_s if run_s < 0.1 else 0.0)
        assert network.num_repeats == num_repeats
        wall_ns, cpu_ns, _ = network.sample()
        assert (wall_ns, cpu_ns) == pytest.approx((run_s * 1e9, run_s * 0.5e9), rel=1e-6)


def test_a_cold_start_is_the_load_and_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(load_s=2.0, first_s=1.0, run_s=0.25)
    monkeypatch.setattr(latency_worker, "time", session.clock)
    network = latency_worker.Network({"load": session.load}, LOAD)
    assert (network.load_ms, network.cold_start_ms) == pytest.approx((2000, 3250))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_loading_added_at_most_even_if_it_gave_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(num_bytes: int) -> None:  # and give it back at once; the heap might have so much at hand
        np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)[:] = 1

    def load(*_: object) -> Session:
        write(40_000_000)
        return session

    session = Session(2.0, 1.0, 0.25)
    write(120_000_000)  # a peak of before counts for nothing
    monkeypatch.setattr(latency_worker, "time", session.clock)
    network = latency_worker.Network({"load": load}, LOAD)
    assert network.peak_memory_bytes is not None
    assert 38e6 < network.peak_memory_bytes < 60e6
    monkeypatch.setattr(latency_worker, "memory_bytes", lambda field: None)
    assert latency_worker.Network({"load": load}, LOAD).peak_memory_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_spent_waiting_for_a_cpu_is_read_on_linux_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = latency_worker.wait_ns(), latency_worker.wait_ns()
    assert first is not None
    assert second is not None
    assert 0 <= first <= second

    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "scandir", missing)
    assert latency_worker.wait_ns() is None


def launch(*times_ns: float, wait_ns: float = 0.0, num: int = 4) -> list[list[Sample]]:
    """One launch: `num` equal samples per file; CPU time is a tenth of the wall time."""
    return [[Sample(ns, ns / 10, wait_ns)] * num for ns in times_ns]


def test_the_interval_is_the_t_interval_of_the_launches_log_ratios() -> None:
    (ratio,), busy = compare([launch(100, 40), launch(100, 50), launch(100, 62.5)], by_cpu_time=True)
    factor = math.exp(4.302653 * math.log(1.25) / math.sqrt(3))  # t(0.975, 2 degrees), sd of the logs
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5 / factor, 0.5 * factor), rel=1e-6)
    assert not busy
    assert not ratio.resolved


def test_a_ratio_is_resolved_where_its_interval_is_narrower_than_the_effect_asked_for() -> None:
    launches = [launch(100, 40), launch(100, 50), launch(100, 62.5)]
    (ratio,), _ = compare(launches, by_cpu_time=True)
    width = math.log(ratio.high / ratio.low)
    assert [compare(launches, by_cpu_time=True, resolve=width * x)[0][0].resolved for x in (0.99, 1.01)] == [
        False,
        True,
    ]


def test_one_thread_is_judged_by_cpu_time_however_busy_the_machine() -> None:
    busy_launch = [[Sample(100, 10, 90)] * 4, [Sample(900, 20, 880)] * 4]
    (ratio,), busy = compare([busy_launch] * 3, by_cpu_time=True)
    assert ratio.value == pytest.approx(2.0)
    assert busy


def test_more_threads_are_judged_by_clean_wall_time_and_by_all_of_it_only_when_there_is_none() -> None:
    clean, disturbed = launch(100, 50, num=5), launch(700, 700, wait_ns=600, num=5)
    mixed = [a + b for a, b in zip(clean, disturbed, strict=True)]
    (ratio,), busy = compare([mixed, mixed, disturbed], by_cpu_time=False)
    assert ratio.value == pytest.approx(0.5)
    assert not busy
    (ratio,), busy = compare([mixed, disturbed, disturbed], by_cpu_time=False)
    assert busy
    assert ratio.value > 0.5


def summary(samples: list[Sample]) -> Latency:
    loads = [Loaded("float32", "", load_ms, 2 * load_ms, peak) for load_ms, peak in ((1.0, 7), (3.0, 9), (9.0, None))]
    return summarize(Path("m"), samples, loads, threads=1, batch_size=1, output_error=0.0)


def test_percentiles_come_from_clean_samples_where_ten_are_clean() -> None:
    quiet = [Sample(ns * 1e6, 1e6, 0) for ns in range(1, 11)]
    loud = [Sample(1e9, 1e6, 1e9)] * 10
    result = summary(quiet + loud)
    assert (result.p20_ms, result.p50_ms, result.p80_ms, result.p99_ms) == pytest.approx((2.8, 5.5, 8.2, 9.91))
    assert (result.num_samples, result.clean_share) == (20, 0.5)
    assert result.wait_share == pytest.approx(1e10 / (1e10 + 55e6))
    assert (result.load_ms, result.cold_start_ms, result.peak_memory_bytes) == (3.0, 6.0, 8)
    assert summary(quiet[:9] + loud).p80_ms == pytest.approx(1000.0)
    assert summary([Sample(1e6, 1e6, None)]).wait_share is None


def test_an_output_error_is_relative_to_the_largest_output_and_none_where_that_says_nothing() -> None:
    def error(y: list[list[float]], y_ref: list[list[float]]) -> float | None:
        return relative_error([np.array(x, np.float32) for x in y], [np.array(x, np.float32) for x in y_ref])

    assert error([[1, -3], [0.5]], [[1, -4], [0.4]]) == pytest.approx(0.25)
    assert error([[1, -4], [0.5]], [[1, -4], [0.4]]) == pytest.approx(0.25)
    assert error([[0.0]], [[0.0]]) is None
    assert error([[1.0]], [[math.nan]]) is None
    assert error([[math.nan]], [[1.0]]) == math.inf
    assert error([], []) is None


# The command line


def comparison(resolved: bool = True) -> LatencyComparison:
    rows = []
    for name in ("a/folder/with/a/long/name/dense.onnx", "small.onnx"):
        times: dict[str, Any] = {
            "p20_ms": 1111.1111,
            "p50_ms": 1222.2222,
            "p80_ms": 1333.3333,
            "p99_ms": 1444.4444,
            "cpu_ms": 1155.5,
        }
        facts: dict[str, Any] = {
            "peak_memory_bytes": 1234_000_000,
            "load_ms": 1500.0,
            "cold_start_ms": 2600.0,
            "wait_share": 0.125,
        }
        row = dataclasses.replace(summary([Sample(1.0, 1.0, 0.0)]), path=Path(name), **times, **facts)
        rows.append(dataclasses.replace(row, num_samples=240, output_error=3.2e-3, precision="bfloat16"))
    ratio = Ratio(0.5, 0.47, 0.53, resolved)
    return LatencyComparison(
        tuple(rows), (ratio,), 10, False, "openvino 2026.4.1 CPU", "openvino", {"cpu": "Some CPU"}, (0, 1), 0.05
    )


def run_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str, result: LatencyComparison) -> Any:
    file = save_times(tmp_path / "a", [1])
    asked: dict[str, Any] = {}
    bench = importlib.import_module("sparsekit.cli.bench")

    def measure(files: object, **options: Any) -> LatencyComparison:
        asked.update(options)
        return result

    monkeypatch.setattr(bench, "measure_latency", measure)
    monkeypatch.setattr(bench, "out", Console(markup=False, highlight=False, width=100))
    ran = CliRunner().invoke(bench.bench, [str(file), *flags])
    return SimpleNamespace(asked=asked, code=ran.exit_code, out=ran.stdout, err=ran.stderr)


def test_bench_prints_every_number_whole_within_100_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run_bench(monkeypatch, tmp_path, result=comparison())
    assert max(map(len, ran.out.splitlines())) <= 100
    for words in ("1111.111", "1222.222", "1333.333", "1444.444", "1155.500", "240", "0.500 [0.470, 0.530]"):
        assert words in ran.out
    for words in ("1500.0", "2600.0", "1234.0", "12.5%", "bfloat16", "3e-03", "openvino 2026.4.1 CPU", "Some CPU"):
        assert words in ran.out
    assert "not resolved" not in ran.err


def test_bench_says_plainly_what_is_not_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run_bench(monkeypatch, tmp_path, result=comparison(resolved=False))
    assert "warning: small.onnx: not resolved to 5%" in ran.err


def test_bench_hands_its_options_on_and_prints_one_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--target", "openvino", "--threads", "2", "--affinity", "0,3", "--batch-size", "4", "--resolve", "0.1")
    ran = run_bench(monkeypatch, tmp_path, *flags, "--json", result=comparison())
    asked = {key: ran.asked[key] for key in ("target", "threads", "affinity", "batch_size", "resolve")}
    assert asked == {"target": "openvino", "threads": 2, "affinity": (0, 3), "batch_size": 4, "resolve": 0.1}
    document = json.loads(ran.out)
    assert document == json.loads(json.dumps(comparison().to_json()))
    assert document["latencies"][1]["precision"] == "bfloat16"
    assert run_bench(monkeypatch, tmp_path, "--affinity", "0-3", result=comparison()).code == 2


# Many small files


def test_many_files_share_processes_and_each_gets_its_own_time_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_worker(monkeypatch, tmp_path, STAND_IN)
    monkeypatch.setattr(latency, "MAX_FILES", 4)
    files = [save_times(tmp_path / str(i), [1_000_000 * (i + 1)]) for i in range(6)]
    done: list[tuple[int, int]] = []
    times_ms = measure_files(files, num_launches=2, num_rounds=3, progress=lambda *x: done.append(x))
    assert times_ms == [1, 2, 3, 4, 5, 6]
    assert done == [(4, 12), (6, 12), (10, 12), (12, 12)]
    runs = [line.split() for line in log.read_text().splitlines()]
    by_process = [[name for name, *_ in group] for _, group in groupby(runs, key=lambda run: run[1])]
    assert [len(names) for names in by_process] == [4 * 3, 2 * 3] * 2
    for names in by_process:
        size = len(names) // 3
        rounds = [names[i : i + size] for i in range(0, len(names), size)]
        assert len({tuple(sorted(names)) for names in rounds}) == 1
        assert len(set(rounds[0])) == size
    assert set(by_process[0]) != set(by_process[2])


def test_several_threads_are_timed_by_the_wall_and_one_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, STAND_IN)
    file = save_times(tmp_path / "a", [1_000_000])
    assert [measure_files([file], threads=threads, num_launches=1) for threads in (1, 2)] == [[1.0], [2.0]]


def test_real_small_files_are_timed(tmp_path: Path) -> None:
    files = [save_model(tmp_path / f"{size}.onnx", ["batch", size]) for size in (4, 8)]
    times_ms = measure_files(files, num_launches=1)
    assert len(times_ms) == 2
    assert min(times_ms) > 0
    assert measure_files([]) == []


def test_widths_that_four_divides_are_not_warned_of() -> None:
    assert width_warning({}) is None
    assert width_warning({"a": 4, "b": 12}) is None
    line = width_warning({"a": 4, "layer1.conv": 6, "c": 63})
    assert line is not None
    assert line.startswith("2 of 3 layers keep")
    assert "layer1.conv, 6" in line
    assert line.endswith("--round-to 16")
    assert "\n" not in line
