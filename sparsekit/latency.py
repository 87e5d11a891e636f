"""How long ONNX files take in ONNX Runtime on this machine's CPU, and by what factor, on a machine that is not idle.

The protocol: a fixed number of threads; each file in its own fresh process; a warm-up; bursts of runs, the order of
the files shuffled every round, one process running at a time; fresh launches until the interval of the ratio is
narrow enough. Memory layout differs from launch to launch by more than runs differ within one, so only launches
count as independent. With one thread the ratio comes from CPU time, which a busy neighbour hardly moves; with
more, from the wall time of the runs that did not wait for a CPU.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, cast

import numpy as np
from scipy.special import stdtrit

from sparsekit.errors import MeasurementError, UsageError

WORKER = Path(__file__).with_name("latency_worker.py")
NUM_ROUNDS = 6
BURST = 4
MAX_WAIT = 0.03  # a run that waited for a CPU for more than this share of its time is not clean
MIN_CLEAN = 10


class Sample(NamedTuple):
    """One run: elapsed time, CPU time of all threads, time they waited for a CPU (None where no one tells)."""

    wall_ns: float
    cpu_ns: float
    wait_ns: float | None

    @property
    def clean(self) -> bool:
        """True where the run had the CPU to itself.

        >>> Sample(100.0, 99.0, 1.0).clean, Sample(100.0, 60.0, 40.0).clean, Sample(100.0, 60.0, None).clean
        (True, False, False)
        """
        if self.wait_ns is None:
            return self.wall_ns <= (1 + MAX_WAIT) * self.cpu_ns
        return self.wait_ns < MAX_WAIT * self.wall_ns


@dataclass(frozen=True)
class Latency:
    """How long one run of one file takes.

    Attributes:
        p20_ms: 20th percentile of wall time (like `p50_ms`, `p80_ms`) over clean samples; over all if under 10 are.
        cpu_ms: 25th percentile of the CPU time of all threads.
        clean_share: fraction of the samples that did not wait for a CPU.
        load_ms: median time to open the file and optimise it.
    """

    path: Path
    p20_ms: float
    p50_ms: float
    p80_ms: float
    cpu_ms: float
    num_samples: int
    clean_share: float
    threads: int
    batch_size: int
    load_ms: float


@dataclass(frozen=True)
class Ratio:
    """Candidate time over baseline time, with its 95% interval; below 1 the candidate is faster."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyComparison:
    """Several files measured side by side.

    Attributes:
        latencies: one per file.
        ratios: each file after the first over the first.
        busy: some file has fewer than 10 clean samples. Wall times are then upper bounds, and with several
            threads the ratios mean nothing; with one thread they rest on CPU time and hold.
        runtime: name, version and provider.
    """

    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    num_launches: int
    busy: bool
    runtime: str

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self) | {"latencies": [asdict(x) | {"path": str(x.path)} for x in self.latencies]}


class _Launch(NamedTuple):
    """What one fresh process per file measured, in the order of the files."""

    samples: list[list[Sample]]
    load_ms: list[float]
    runtime: str


def measure_latency(
    paths: Sequence[Path | str],
    *,
    threads: int = 1,
    batch_size: int = 1,
    resolve: float = 0.05,
    min_launches: int = 3,
    max_launches: int = 10,
    max_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyComparison:
    """Time ONNX files in ONNX Runtime on the CPU, each against the first, on random inputs.

    A first dimension without a fixed size is the batch; no other may lack one.

    Args:
        resolve: the smallest effect to tell from none: launches go on until every ratio's interval is narrower
            than +-`resolve`/2.
        max_seconds: no launch beyond `min_launches` starts that would end later, and each of those is shortened
            to its share.
        progress: called after each launch with the number done and the most there can be.

    Raises:
        MeasurementError: a file is missing, is no ONNX file or has inputs of unknown size; ONNX Runtime is
            missing or crashed.
        UsageError: no paths, no threads, no batch, or fewer than two launches asked for.
    """
    files = [Path(path) for path in paths]
    if not 2 <= min_launches <= max_launches or min(len(files), threads, batch_size) < 1:
        raise UsageError("latency: need 2 <= min_launches <= max_launches, a file, a thread and a batch")
    for file in files:
        if not file.is_file():
            raise MeasurementError(f"{file}: no such file")
    order = random.Random(0)
    launches: list[_Launch] = []
    start = time.monotonic()
    for num_launches in range(1, max_launches + 1):
        launches.append(_launch(files, order, threads, batch_size, max_seconds / min_launches))
        if progress:
            progress(num_launches, max_launches)
        if num_launches < min_launches:
            continue
        ratios, busy = compare([launch.samples for launch in launches], threads)
        resolved = all(math.log(ratio.high / ratio.low) < resolve for ratio in ratios)
        next_end = (time.monotonic() - start) * (1 + 1 / num_launches)
        if resolved or next_end > max_seconds:
            break
    latencies = []
    for i, file in enumerate(files):
        samples = [sample for launch in launches for sample in launch.samples[i]]
        load_ms = median(launch.load_ms[i] for launch in launches)
        latencies.append(summarize(file, samples, threads=threads, batch_size=batch_size, load_ms=load_ms))
    return LatencyComparison(tuple(latencies), ratios, len(launches), busy, launches[0].runtime)


def _launch(files: Sequence[Path], order: random.Random, threads: int, batch_size: int, max_seconds: float) -> _Launch:
    """One fresh process per file; all idle but the one whose turn it is."""
    start = time.monotonic()
    with ExitStack() as stack:
        asks, loads = [], []
        for file in files:
            ask = stack.enter_context(_worker(file))
            command = {"path": str(file), "threads": threads, "batch_size": batch_size, "seed": 0}
            loads.append(ask({"command": "load", **command}))
            asks.append(ask)
        samples: list[list[Sample]] = [[] for _ in files]
        for _ in range(NUM_ROUNDS):
            for i in order.sample(range(len(files)), len(files)):
                burst = asks[i]({"command": "run", "num_samples": BURST})["samples"]
                samples[i] += [Sample(*sample) for sample in burst]
            if time.monotonic() - start > max_seconds:
                break
    return _Launch(samples, [load["load_ms"] for load in loads], loads[0]["runtime"])


@contextmanager
def _worker(file: Path) -> Iterator[Callable[[Mapping[str, object]], dict[str, Any]]]:
    """A process that runs one file, as a function from command to answer; killed at the end, whatever happens."""
    with TemporaryFile() as stderr:
        # -P: the worker's own folder must not shadow other modules. A session of its own: Ctrl-C comes to us.
        arguments = [sys.executable, "-P", str(WORKER)]
        process = Popen(arguments, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=stderr, start_new_session=True)
        stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        with process:

            def ask(command: Mapping[str, object]) -> dict[str, Any]:
                try:
                    stdin.write(json.dumps(command).encode() + b"\n")
                    answer = stdout.readline()
                except BrokenPipeError:
                    answer = b""
                if answer:
                    return dict(json.loads(answer))
                status = process.wait()
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").splitlines()
                lines = lines or [f"the measuring process ended with status {status}"]
                # A traceback's last line, less the module path of the exception's class.
                raise MeasurementError(f"{file}: " + re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1]))

            try:
                yield ask
            finally:
                process.kill()


def summarize(path: Path, samples: Sequence[Sample], *, threads: int, batch_size: int, load_ms: float) -> Latency:
    """The percentiles of one file's samples.

    >>> quiet, waited = Sample(2e6, 2e6, 0.0), Sample(9e6, 2e6, 7e6)
    >>> samples = [quiet] * 15 + [waited] * 5
    >>> latency = summarize(Path("m.onnx"), samples, threads=1, batch_size=1, load_ms=3.0)
    >>> latency.p80_ms, latency.cpu_ms, latency.clean_share
    (2.0, 2.0, 0.75)
    """
    clean = [sample for sample in samples if sample.clean]
    trusted = clean if len(clean) >= MIN_CLEAN else samples
    p20, p50, p80 = (float(np.percentile([x.wall_ns for x in trusted], q)) / 1e6 for q in (20, 50, 80))
    cpu = float(np.percentile([sample.cpu_ns for sample in samples], 25)) / 1e6
    return Latency(path, p20, p50, p80, cpu, len(samples), len(clean) / len(samples), threads, batch_size, load_ms)


def compare(launches: Sequence[Sequence[Sequence[Sample]]], threads: int) -> tuple[tuple[Ratio, ...], bool]:
    """Each file's time over the first file's, and whether the machine was too busy for wall times.

    Args:
        launches: samples[launch][file], at least two launches.

    >>> def launch(baseline, candidate):
    ...     return [[Sample(ns, ns, 0.0)] * 4 for ns in (baseline, candidate)]
    >>> (ratio,), busy = compare([launch(100, 50), launch(102, 51), launch(98, 49)], threads=1)
    >>> round(ratio.value, 9), round(ratio.high - ratio.low, 9), busy
    (0.5, 0.0, False)
    """
    num_clean = [sum(s.clean for samples in file for s in samples) for file in zip(*launches, strict=True)]
    busy = min(num_clean) < MIN_CLEAN
    if threads == 1:
        times = [[_lower_quartile(s.cpu_ns for s in samples) for samples in launch] for launch in launches]
        return _ratios(times), busy
    clean = [[[s for s in samples if s.clean] for samples in launch] for launch in launches]
    usable = [launch for launch in clean if all(launch)]
    busy = busy or len(usable) < 2
    chosen = launches if busy else usable
    return _ratios([[_lower_quartile(s.wall_ns for s in samples) for samples in x] for x in chosen]), busy


def _lower_quartile(values: Iterable[float]) -> float:
    return float(np.percentile(list(values), 25))


def _ratios(times: Sequence[Sequence[float]]) -> tuple[Ratio, ...]:
    """t-intervals of the mean log ratio; `times` is [launch][file]."""
    ratios = []
    for i in range(1, len(times[0])):
        logs = [math.log(launch[i] / launch[0]) for launch in times]
        half_width = float(stdtrit(len(logs) - 1, 0.975)) * stdev(logs) / math.sqrt(len(logs))
        mean = fmean(logs)
        ratios.append(Ratio(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)))
    return tuple(ratios)


def width_warning(widths: Mapping[str, int]) -> str | None:
    """One line if these channel counts lose time in ONNX Runtime on x86, else None.

    Its fast convolution takes input channels by fours: 63 were measured 21 to 42% slower than 64. `widths` holds
    the number of channels that each layer keeps, by name.

    >>> width_warning({"conv1": 60, "conv2": 64})
    >>> width_warning({"conv1": 63, "conv2": 64, "conv3": 10})[:60]
    '2 of 3 layers keep a number of channels that 4 does not divi'
    """
    slow = [(name, width) for name, width in widths.items() if width % 4]
    if not slow:
        return None
    name, width = slow[0]
    return (
        f"{len(slow)} of {len(widths)} layers keep a number of channels that 4 does not divide (first: {name}, "
        f"{width}), which ONNX Runtime on x86 runs off its fast path; try --round-to 16"
    )
