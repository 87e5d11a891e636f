"""Latency: the mechanics and the statistics. No assertion here rests on how fast the machine is."""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsekit import latency, latency_worker
from sparsekit.errors import MeasurementError, UsageError
from sparsekit.latency import Sample, compare, measure_latency, summarize, width_warning

# Answers like the real worker; the file it "loads" holds CPU nanoseconds, taken in turn from launch to launch.
STAND_IN = """
import json, os, sys, time
log = os.environ["LOG"]
for line in sys.stdin:
    command = json.loads(line)
    if command["command"] == "load":
        path = command["path"]
        times = json.load(open(path))
        lines = open(log).readlines() if os.path.exists(log) else []
        cpu = times[len({line.split()[1] for line in lines if line.split()[0] == path}) % len(times)]
        answer = {"runtime": "stand-in", "load_ms": 1.0, "num_repeats": 1}
    else:
        begin = time.monotonic_ns()
        answer = {"samples": [[2 * cpu, cpu, 0]] * command["num_samples"]}
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
    monkeypatch.setattr(latency, "WORKER", worker)
    monkeypatch.setenv("LOG", str(log))
    return log


def value(name: str, type: str, shape: list[int | str | None]) -> SimpleNamespace:
    return SimpleNamespace(name=name, type=type, shape=shape)


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
        assert x.load_ms > 0
        assert 0 <= x.clean_share <= 1
    (ratio,) = result.ratios
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert result.num_launches == 2
    assert result.runtime.startswith("onnxruntime 1.")
    assert result.runtime.endswith(" CPUExecutionProvider")
    document = json.loads(json.dumps(result.to_json()))
    assert [row["path"] for row in document["latencies"]] == [str(path) for path in paths]
    assert document["ratios"] == [{"value": ratio.value, "low": ratio.low, "high": ratio.high}]


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
import os, signal, sys, time
open(os.environ["LOG"], "a").write(f"{os.getpid()} ")
for line in sys.stdin:
    if "load" in line:
        print('{"runtime": "", "load_ms": 1, "num_repeats": 1}', flush=True)
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
    assert str(caught.value) == f"{path}: {reason}"


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
    values = [
        value("x", "tensor(float)", ["n", 3, 2]),
        value("mask", "tensor(bool)", [None, "n"]),
        value("table", "tensor(float16)", [7, 5]),
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
    with pytest.raises(SystemExit, match=r"input 's': cannot make up a tensor\(string\)"):
        latency_worker.make_inputs([value("s", "tensor(string)", [1])], 1, seed=0)


def test_a_network_is_warmed_up_and_a_short_one_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    run_s = 0.0

    def run(*_: object) -> None:
        nonlocal now
        now += run_s

    clock = SimpleNamespace(
        perf_counter=lambda: now, perf_counter_ns=lambda: int(now * 1e9), process_time_ns=lambda: int(now * 0.5e9)
    )
    session = SimpleNamespace(run=run, get_inputs=lambda: [value("x", "tensor(float)", ["n"])])
    monkeypatch.setattr(latency_worker, "time", clock)
    monkeypatch.setattr(latency_worker, "load_session", lambda path, threads: session)
    for run_s, warm_up_s, num_repeats in ((0.0006, 0.3, 4), (0.25, 1.25, 1)):
        now = 0.0
        network = latency_worker.Network("m.onnx", 1, 1, 0)
        assert now == pytest.approx(warm_up_s, abs=2 * run_s if run_s < 0.1 else 0.0)
        assert network.num_repeats == num_repeats
        wall_ns, cpu_ns, _ = network.sample()
        assert (wall_ns, cpu_ns) == pytest.approx((run_s * 1e9, run_s * 0.5e9), rel=1e-6)


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
    (ratio,), busy = compare([launch(100, 40), launch(100, 50), launch(100, 62.5)], threads=1)
    factor = math.exp(4.302653 * math.log(1.25) / math.sqrt(3))  # t(0.975, 2 degrees), sd of the logs
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5 / factor, 0.5 * factor), rel=1e-6)
    assert not busy


def test_one_thread_is_judged_by_cpu_time_however_busy_the_machine() -> None:
    busy_launch = [[Sample(100, 10, 90)] * 4, [Sample(900, 20, 880)] * 4]
    (ratio,), busy = compare([busy_launch] * 3, threads=1)
    assert ratio.value == pytest.approx(2.0)
    assert busy


def test_more_threads_are_judged_by_clean_wall_time_and_by_all_of_it_only_when_there_is_none() -> None:
    clean, disturbed = launch(100, 50, num=5), launch(700, 700, wait_ns=600, num=5)
    mixed = [a + b for a, b in zip(clean, disturbed, strict=True)]
    (ratio,), busy = compare([mixed, mixed, disturbed], threads=2)
    assert ratio.value == pytest.approx(0.5)
    assert not busy
    (ratio,), busy = compare([mixed, disturbed, disturbed], threads=2)
    assert busy
    assert ratio.value > 0.5


def test_percentiles_come_from_clean_samples_where_ten_are_clean() -> None:
    quiet = [Sample(ns * 1e6, 1e6, 0) for ns in range(1, 11)]
    loud = [Sample(1e9, 1e6, 1e9)] * 10
    result = summarize(Path("m"), quiet + loud, threads=1, batch_size=1, load_ms=0.0)
    assert (result.p20_ms, result.p50_ms, result.p80_ms) == pytest.approx((2.8, 5.5, 8.2))
    assert (result.num_samples, result.clean_share) == (20, 0.5)
    result = summarize(Path("m"), quiet[:9] + loud, threads=1, batch_size=1, load_ms=0.0)
    assert result.p80_ms == pytest.approx(1000.0)


def test_widths_that_four_divides_are_not_warned_of() -> None:
    assert width_warning({}) is None
    assert width_warning({"a": 4, "b": 12}) is None
    line = width_warning({"a": 4, "layer1.conv": 6, "c": 63})
    assert line is not None
    assert line.startswith("2 of 3 layers keep")
    assert "layer1.conv, 6" in line
    assert line.endswith("--round-to 16")
    assert "\n" not in line
