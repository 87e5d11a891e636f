"""The kernels' benchmark without a GPU: its tables, its verdicts, its measuring, its failures."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from benchmarks import kernels, kernels_cases, kernels_networks, kernels_run, rows
from benchmarks.kernels_checks import CHECKS, checked
from benchmarks.kernels_convs import Conv, Subset
from benchmarks.kernels_linears import Linear
from benchmarks.kernels_measure import OURS, Case, Clock, Goal, Turns, measure, relative_error
from sparsekit.errors import KernelError
from sparsekit.kernels.configs import CONV_TILES, LINEAR_TILES
from sparsekit.kernels.formats import COLS, ROWS

NAMES = [*kernels.table()]


def layers(kind: type) -> Iterator[tuple[Case, Any]]:
    """The cases of a kind of layer, and the layers."""
    for case in kernels_cases.CASES:
        layer = getattr(case.build, "__self__", None)
        if isinstance(layer, kind):
            yield case, layer


def clock_of(*seconds: float) -> Clock:
    """Nothing is captured, and calls take these seconds in turns."""
    times = cycle(seconds)

    def stopwatch(run: Callable[[], object]) -> float:
        run()
        return next(times)

    return Clock(lambda run: run, lambda: stopwatch)


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"only": None, "out": folder, "max_seconds": 60.0} | changes)


@pytest.fixture
def no_gpu_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_run, "gpu_facts", lambda: {"gpu": "none"})
    monkeypatch.setattr(kernels_run, "alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize(
    ("prefix", "num_cases"),
    [("k0", 1), ("k1", 11), ("k1-bsr", 12), ("k2", 8), ("k3a", 6), ("k3b", 6), ("k5", 2), ("k6", 18), ("k7", 1)],
)
def test_every_row_of_the_goal_table_has_its_cases(prefix: str, num_cases: int) -> None:
    assert sum(name.startswith(f"{prefix}/") for name in NAMES) == num_cases


def test_names_are_unique_and_all_but_the_baseline_comparison_have_goals() -> None:
    cases = [*kernels_cases.CASES, kernels_networks.K0_CASE]
    assert len({case.name for case in cases}) == len(cases)
    assert [case.name for case in cases if not case.goals and not case.name.startswith("k1-bsr/")] == []
    assert {goal.must <= (goal.stretch or goal.must) for case in cases for goal in case.goals if not goal.at_most} == {
        True
    }


def test_the_shapes_fit_the_formats() -> None:
    for _, linear in layers(Linear):
        rows, cols = linear.group
        assert rows in ROWS
        assert min(cols, 64) in COLS
        assert (linear.num_out % rows, linear.num_in % cols) == (0, 0)
        assert not linear.bsr or linear.num_samples % (64 if linear.num_samples <= 64 else 128) == 0
    for _, conv in layers(Conv):
        assert conv.channels % conv.cols == 0
        assert conv.cols in COLS


@pytest.mark.parametrize("kind", [Linear, Conv, Subset])
def test_what_takes_turns_computes_the_same(kind: type) -> None:
    small = {
        Linear: {"num_samples": 5, "num_in": 1024, "num_out": 128, "bsr": False},
        Conv: {"num_images": 1, "channels": 64, "side": 3},
        Subset: {"num_images": 1, "side": 3},
    }[kind]
    tried = {replace(layer, **small) for _, layer in layers(kind)}
    assert len(tried) > 1
    for layer in tried:
        row = measure(layer.case("tiny/case"), clock_of(1e-3), device="cpu", num_rounds=1)
        assert set(row["failed"]) <= {"B3"}, row["failed"]  # it is cuDNN's
        assert OURS in row["max_relative_error"]


def test_the_soft_top_k_case_runs_and_meets_its_sum_on_the_cpu() -> None:
    case = next(case for case in kernels_cases.CASES if case.name.startswith("k7/"))
    row = measure(case, clock_of(30e-6, 1e-3, 3e-3, 2.4e-4), device="cpu", num_rounds=1)
    assert row["failed"] == {}
    goals = {goal["what"]: (goal["verdict"], goal["stretch_met"]) for goal in row["goals"]}
    assert goals == {
        "us": ("met", False),
        "ours vs padded eager": ("met", False),
        "ours vs padded graph": ("met", False),
        "sum error": ("met", False),
    }


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal("B0", 1.2, drop_below=1.0), 1.2, "met"),
        (Goal("B0", 1.2, drop_below=1.0), 1.19, "missed"),
        (Goal("B0", 1.2, drop_below=1.0), 1.0, "missed"),
        (Goal("B0", 1.2, drop_below=1.0), 0.99, "dropped by the kill rule"),
        (Goal("B0", 0.95, drop_below=0.95), 0.94, "dropped by the kill rule"),
        (Goal("B0", 1.2), 0.1, "missed"),
        (Goal("us", 40, 20, at_most=True), 40, "met"),
        (Goal("us", 40, 20, at_most=True), 41, "missed"),
    ],
)
def test_verdicts(goal: Goal, value: float, verdict: str) -> None:
    assert goal.verdict(value) == verdict


def test_a_row_has_the_ratios_of_the_rounds_and_the_verdicts() -> None:
    case = Linear(8, 64, 64, (16, 16), 0.5).case("tiny/linear", Goal("B0", 1.4, 1.6), Goal("B0", 2.0, drop_below=1.6))
    case = replace(case, num_bytes=75 * 2**20)
    row = measure(case, clock_of(2e-3, 3e-3, 2e-3, 3e-3, 2e-3, 4e-3), device="cpu", num_rounds=3)
    assert row["num_copies"] == 2
    assert row["us_quartiles"]["ours"] == pytest.approx([1000.0] * 3)  # of one copy
    assert row["ratio_quartiles"] == {"ours vs B0": pytest.approx([1.5, 1.5, 1.75])}
    assert row["quantities"]["TB/s"] == pytest.approx(75 * 2**20 / 1e-3 / 1e12)
    assert row["teraflops"]["ours"] == pytest.approx(row["teraflops"]["B0"] * 1.5 / 2)
    assert row["max_relative_error"]["ours"] < 1e-2
    assert [goal["verdict"] for goal in row["goals"]] == ["met", "dropped by the kill rule"]
    assert [goal["stretch_met"] for goal in row["goals"]] == [False, False]


def test_a_wrong_kernel_is_not_timed_and_a_baseline_that_fails_leaves_its_goal_open() -> None:
    def build(device: str, seed: int) -> Turns:
        def refused() -> Tensor:
            raise RuntimeError("no engine found\nand more")

        right = torch.ones(2)
        runs = {OURS: lambda: right * wrong, "B0": lambda: right, "B3": refused}
        return Turns(runs, dict.fromkeys(runs, lambda: right))

    wrong = 1.0
    case = Case("tiny/case", build, (Goal("B0", 1.5), Goal("B3", 1.5)))
    row = measure(case, clock_of(1.0, 2.0), device="cpu", num_rounds=1)
    assert row["failed"] == {"B3": "RuntimeError: no engine found"}
    assert [goal["verdict"] for goal in row["goals"]] == ["met", None]
    for wrong in (1.1, float("nan")):  # noqa: B007 (build reads it)
        row = measure(case, clock_of(1.0), device="cpu", num_rounds=1)
        assert row["failed"]["ours"].startswith("MeasurementError: wrong by")
        assert [goal["verdict"] for goal in row["goals"]] == [None, None]
        assert "ours" not in row["us_quartiles"]
        json.dumps(row, allow_nan=False)


def test_infinite_errors_of_not_a_number() -> None:
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


@pytest.mark.usefixtures("no_gpu_asked")
def test_a_case_that_fails_stops_no_other_and_rows_need_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, Any]:
        raise KernelError("x: must be otherwise")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("SPARSEKIT_COMMIT", "abc")
    table = {"k1/a": fails, "k1/b": lambda: {"case": "k1/b"}, "k2/c": fails}
    kernels_run.run_all("benchmarks.tiny", table, options(tmp_path / "new", only=["k1"]))
    kernels_run.run_all("benchmarks.tiny", table, options(tmp_path / "new", only=["k2"], max_seconds=-1.0))
    written = [json.loads(line) for line in (tmp_path / "new" / "tiny.jsonl").read_text().splitlines()]
    assert [(row["case"], row.get("error")) for row in written] == [
        ("k1/a", "KernelError: x: must be otherwise"),
        ("k1/b", None),
        ("k2/c", "skipped: -1 s are over"),
    ]
    assert {(row["commit"], row["gpu"]) for row in written} == {("abc", "none")}


@pytest.mark.usefixtures("no_gpu_asked")
def test_a_broken_context_hands_the_rest_to_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(kernels_run, "alive", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))
    monkeypatch.setattr(rows, "append", lambda name, values, folder: None)
    table = {name: lambda: {"case": "k1"} for name in ("k1/a", "k1/b", "k1/c")}
    with pytest.raises(SystemExit, match="k1/a broke the GPU's context"):
        kernels_run.run_all("benchmarks.tiny", table, options(tmp_path))
    assert [command[1:3] + command[-3:] for command in started] == [["-m", "benchmarks.tiny", "--only", "k1/b", "k1/c"]]


def test_the_mean_beside_bsr_needs_all_shapes() -> None:
    shapes = [name for name in NAMES if name.startswith("k1-bsr/")]
    measured = [
        {"case": name, "quantities": {"ours vs B1": 4.0 if number % 2 else 1.0}} for number, name in enumerate(shapes)
    ]
    mean = kernels.beside_bsr(measured)
    assert mean is not None
    assert mean["goals"][0]["value"] == pytest.approx(2.0)
    assert mean["goals"][0]["verdict"] == "met"
    assert kernels.beside_bsr([*measured[1:], {"case": shapes[0], "error": "skipped"}]) is None


def test_checks_try_every_tile_with_4_and_8_warps_and_every_depth() -> None:
    for name, tiles in (("check/k1", LINEAR_TILES), ("check/k2", CONV_TILES), ("check/k5", CONV_TILES)):
        tried = [label for label, dtype, _ in CHECKS[name]("cpu") if dtype == torch.bfloat16]
        assert len(tried) == len(set(tried))
        for tile in tiles:
            for num_warps in (4, 8):
                assert f"{replace(tile, num_warps=num_warps)}, torch.bfloat16" in tried
        assert all(label.count("num_stages=0") == label.count("num_stages=1,") == 0 for label in tried)


def test_checks_name_what_is_wrong_and_leave_the_precision_alone() -> None:
    def refused() -> float:
        raise RuntimeError("out of shared memory")

    bf16 = torch.bfloat16
    row = checked(iter([("a", bf16, lambda: 1e-2), ("b", bf16, lambda: 1e-1)]))
    assert row == {
        "num_right": 1,
        "num_wrong": 1,
        "wrong": {"b": "wrong by 0.1, allowed are 0.02"},
        "largest_share_of_tolerance": pytest.approx(5.0),
    }
    assert checked(CHECKS["check/k7"]("cpu"))["num_wrong"] == 0
    assert checked(islice(CHECKS["check/k3b"]("cpu"), 2, 3))["num_right"] == 1
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("module", [kernels, kernels_networks])
def test_without_a_gpu_one_line_says_so(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels"])
    with pytest.raises(SystemExit, match=r"^python -m benchmarks\.kernels\w*: needs a CUDA device$"):
        module.main()


def test_networks_at_the_same_share_of_arithmetic() -> None:
    network = kernels_networks.Generator(128, num_in=128, num_sizes=1)
    masked = kernels_networks.masked_copy(network, 0.25)
    shares = [float((parameter != 0).float().mean()) for parameter in masked.parameters() if parameter.dim() == 4]
    assert shares == pytest.approx([0.25, 0.25], abs=0.01)
    x = torch.randn(3, 128, 4, 4)
    assert kernels_networks.num_flops(network, x) == 2 * 3 * 2 * 16 * 9 * 128**2


def test_networks_take_turns_and_all_compute_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    monkeypatch.setattr(kernels_networks, "BF16", torch.float32)

    def make(compact: bool) -> torch.nn.Module:
        return kernels_networks.Generator(48 if compact else 64, num_in=64, num_sizes=2)

    case = kernels_networks.Network(make, (2, 64, 4, 4), torch.float32).case("tiny/generator")
    row = measure(replace(case, tolerance=1e-4), clock_of(1e-3), device="cpu", num_rounds=1)
    assert row["failed"] == {}
    assert set(row["max_relative_error"]) == {"dense", "compacted", "compacted, fused", "masked"}
    assert 0.5 < row["quantities"]["share of arithmetic"] < 0.6


def test_batch_norms_of_the_dense_baseline_go_into_its_convolutions() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    x = torch.randn(2, 4, 8, 8)
    out, (code, *_) = run_and_get_code(kernels_networks.frozen(network, x))
    torch.testing.assert_close(out, kernels_networks.inferred(network, x))
    assert "sqrt" not in code
