"""A case of the kernels' benchmarks: what takes turns, what it must reach, and the row that comes of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsekit.errors import MeasurementError, SparsekitError
from sparsekit.kernels import timing

Run = Callable[[], Tensor]
Verdict = Literal["met", "missed", "dropped by the kill rule"]
NUM_ROUNDS = 50
MAX_COPIES = 16
OURS = "ours"


@dataclass(frozen=True)
class Goal:
    """A bar for one number of a case.

    Attributes:
        what: a baseline, which `of` must be so many times faster than; or else a quantity of the case.
        must: at least this.
        stretch: better still.
        drop_below: worse than this, and the kernel is not used for such shapes.
        of: the run that is meant.
        at_most: the bars are upper ones.
    """

    what: str
    must: float
    stretch: float | None = None
    drop_below: float | None = None
    of: str = OURS
    at_most: bool = False

    def verdict(self, value: float) -> Verdict:
        """What a measured value means.

        >>> [Goal("B0", 1.2, drop_below=1.0).verdict(value) for value in (1.2, 1.1, 0.9)]
        ['met', 'missed', 'dropped by the kill rule']
        """
        if self._reaches(value, self.must):
            return "met"
        if self.drop_below is not None and not self._reaches(value, self.drop_below):
            return "dropped by the kill rule"
        return "missed"

    def row(self, quantities: Mapping[str, float]) -> dict[str, Any]:
        """The goal, what was measured, and what that means; a baseline that failed leaves it open."""
        key = self.what if self.what in quantities else versus(self.what, self.of)
        value = quantities.get(key)
        stretch = value is not None and self.stretch is not None and self._reaches(value, self.stretch)
        return {
            "what": key,
            "must": self.must,
            "stretch": self.stretch,
            "at_most": self.at_most,
            "value": value,
            "verdict": None if value is None else self.verdict(value),
            "stretch_met": stretch,
        }

    def _reaches(self, value: float, bar: float) -> bool:
        return value <= bar if self.at_most else value >= bar


@dataclass(frozen=True)
class Turns:
    """What takes turns on the same data.

    Attributes:
        runs: by name.
        expected: what runs must return, by their names, in high precision; other runs compute something else.
        num_flops: of each run.
        eager: the runs that cannot be a CUDA graph, or shall not.
        quantities: what was measured while building.
    """

    runs: Mapping[str, Run]
    expected: Mapping[str, Run]
    num_flops: Mapping[str, float] = field(default_factory=dict)
    eager: frozenset[str] = frozenset()
    quantities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: `<kernel>/<what>`.
        build: makes the turns on a device from a seed.
        goals: may be none.
        dtype: that "ours" runs in.
        num_bytes: that "ours" must read and write at least.
        tolerance: largest error, relative to the largest expected value, of what is compared with others.
        pairs: what is compared, ours first; none means "ours" with each baseline.
        note: for the row.
    """

    name: str
    build: Callable[[str, int], Turns]
    goals: tuple[Goal, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    num_bytes: float = 0
    tolerance: float = 2e-2
    pairs: tuple[tuple[str, str], ...] = ()
    note: str = ""

    @property
    def num_copies(self) -> int:
        """Sets of data to go round: together more than the cache holds."""
        if not self.num_bytes:
            return 1
        return min(MAX_COPIES, max(1, round(timing.FLUSH_BYTES / self.num_bytes)))


@dataclass(frozen=True)
class Clock:
    """How runs are prepared and timed.

    Attributes:
        capture: makes a run that launches at once what the run does.
        stopwatch: makes what takes the seconds of one call.
    """

    capture: Callable[[Callable[[], object]], Callable[[], object]]
    stopwatch: Callable[[], Callable[[Callable[[], object]], float]]


def gpu_clock() -> Clock:
    """CUDA graphs, timed from a cold cache."""
    return Clock(timing.captured, lambda: partial(timing.cold_seconds, flush=timing.flush_buffer()))


def versus(slow: str, fast: str = OURS) -> str:
    """The name of how many times faster one run is than another."""
    return f"{fast} vs {slow}"


def measure(case: Case, clock: Clock, *, device: str = "cuda", num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    """The row of a case: errors first, then times in turns, then goals.

    What fails, or is ours and wrong, is not timed; the row says why.
    """
    with _cudnn_searches(True):
        copies = [case.build(device, seed) for seed in range(case.num_copies)]
    runs, errors, failed = _prepared(case, copies, clock)
    stopwatch = clock.stopwatch()
    rounds = [{name: stopwatch(run) / len(copies) for name, run in runs.items()} for _ in range(num_rounds)]
    seconds = {name: np.array([each[name] for each in rounds]) for name in runs}
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    pairs = [pair for pair in case.pairs or ((OURS, name) for name in runs if name != OURS) if {*pair} <= {*runs}]
    ratios = {versus(slow, fast): _quartiles(seconds[slow] / seconds[fast]) for fast, slow in pairs}
    quantities = {name: median for name, (_, median, _) in ratios.items()} | dict(copies[0].quantities)
    if OURS in medians:
        quantities |= {"us": 1e6 * medians[OURS], "TB/s": case.num_bytes / medians[OURS] / 1e12}
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "num_rounds": num_rounds,
        "num_copies": len(copies),
        "us_quartiles": {name: _quartiles(1e6 * times) for name, times in seconds.items()},
        "ratio_quartiles": ratios,
        "teraflops": {
            name: flops / medians[name] / 1e12 for name, flops in copies[0].num_flops.items() if name in runs
        },
        "quantities": quantities,
        "max_relative_error": {name: error if np.isfinite(error) else None for name, error in errors.items()},
        "failed": failed,
        "goals": [goal.row(quantities) for goal in case.goals],
        "note": case.note,
    }


def _prepared(
    case: Case, copies: Sequence[Turns], clock: Clock
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """The runs ready to be timed, their errors, and why others are not."""
    first, ours = copies[0], {fast for fast, _ in case.pairs} or {OURS}
    with _cudnn_searches(False):  # in float64 it would for long
        made = {make: make() for make in set(first.expected.values())}  # before any run: some work in place
        expected = {name: made[make] for name, make in first.expected.items()}
    runs: dict[str, Callable[[], object]] = {}
    errors, failed = {}, {}
    for name, run in first.runs.items():
        try:
            with _cudnn_searches(True):
                if name in expected:
                    errors[name] = relative_error(run(), expected[name])
                if name in ours and not errors.get(name, 0) <= case.tolerance:
                    raise MeasurementError(f"wrong by {errors[name]:.2g}, allowed are {case.tolerance}")
                turn = partial(_one_after_another, [copy.runs[name] for copy in copies])
                runs[name] = turn if name in first.eager else clock.capture(turn)
        except failures() as error:
            failed[name] = described(error)
    return runs, errors, failed


@contextmanager
def _cudnn_searches(on: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms on each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _one_after_another(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinite where a number is none.

    >>> relative_error(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
    0.25
    """
    error = float((out.to(expected.dtype) - expected).abs().max() / expected.abs().max())
    return error if np.isfinite(error) else float("inf")


def _quartiles(values: Any) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def failures() -> tuple[type[Exception], ...]:
    """What a case may fail by without stopping the others: torch, CUDA, Triton, ours."""
    errors = importlib.import_module("triton.errors") if importlib.util.find_spec("triton") else None
    return (RuntimeError, SparsekitError, *([errors.TritonError] if errors else []))


def described(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
