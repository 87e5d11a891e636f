"""What timed runs say: which had the CPU to themselves, a file's latency, and the ratio of two with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

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


class Loaded(NamedTuple):
    """What loading a file told, as in `Latency`."""

    precision: str
    note: str
    load_ms: float
    cold_start_ms: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Ratio:
    """Candidate time over baseline time, with its 95 % interval; below 1 the candidate is faster.

    Attributes:
        resolved: the interval is as narrow as was asked for.
    """

    value: float
    low: float
    high: float
    resolved: bool


@dataclass(frozen=True)
class Latency:
    """How long one run of one file takes, and what it takes up.

    Attributes:
        p20_ms: 20th percentile of wall time (like `p50_ms`, `p80_ms`, `p99_ms`) over clean samples; over all if
            under 10 are. A sample is one run, or the mean of several that together last 2 ms.
        cpu_ms: 25th percentile of the CPU time of all threads.
        clean_share: fraction of the samples that did not wait for a CPU.
        load_ms: median time to open the file and optimise it.
        cold_start_ms: median time from opening the file to the first output, in a fresh process that has imported
            the runtime.
        peak_memory_bytes: the most resident memory that loading and running it added to the process, median; None
            where the system does not tell.
        precision: what the network was computed in, as far as the runtime tells.
        output_error: max |y - y_ref| / max |y_ref|, y_ref from ONNX Runtime in float32 on the CPU on the same random
            inputs, for which it is 0 by definition. None where no ONNX file of the network is known, or y_ref is
            all zeros.
        wait_share: time that its threads waited for a CPU over the time it ran; None where the system does not tell.
        note: what else is to be known of how it ran, else empty.
    """

    path: Path
    p20_ms: float
    p50_ms: float
    p80_ms: float
    p99_ms: float
    cpu_ms: float
    num_samples: int
    clean_share: float
    wait_share: float | None
    threads: int
    batch_size: int
    load_ms: float
    cold_start_ms: float
    peak_memory_bytes: int | None
    precision: str
    output_error: float | None
    note: str


@dataclass(frozen=True)
class LatencyComparison:
    """Several files measured side by side.

    Attributes:
        latencies: one per file.
        ratios: each file after the first over the first.
        busy: some file has fewer than 10 clean samples. Wall times are then upper bounds, and ratios that rest on
            them mean nothing; with one thread on the CPU they rest on CPU time and hold.
        runtime: name, version and provider.
        target: as the user wrote it.
        device: what of the machine decides the times.
        affinity: the CPUs that were used, None for any.
        resolve: the effect that the ratios were to be told from none by.
    """

    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    num_launches: int
    busy: bool
    runtime: str
    target: str
    device: Mapping[str, str]
    affinity: tuple[int, ...] | None
    resolve: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self) | {"latencies": [asdict(x) | {"path": str(x.path)} for x in self.latencies]}


def trusted(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The clean samples, or all of them where fewer than `MIN_CLEAN` are."""
    clean = [sample for sample in samples if sample.clean]
    return clean if len(clean) >= MIN_CLEAN else samples


def wait_share(samples: Sequence[Sample]) -> float | None:
    """The share of all their time that the threads waited for a CPU; over 1 where several did at once.

    >>> wait_share([Sample(100.0, 90.0, 10.0), Sample(300.0, 290.0, 10.0)])
    0.05
    """
    waits = [sample.wait_ns for sample in samples if sample.wait_ns is not None]
    return sum(waits) / sum(sample.wall_ns for sample in samples) if len(waits) == len(samples) else None


def lower_quartile(values: Iterable[float]) -> float:
    return float(np.percentile(list(values), 25))


def compare(
    launches: Sequence[Sequence[Sequence[Sample]]], *, by_cpu_time: bool, resolve: float = 0.05
) -> tuple[tuple[Ratio, ...], bool]:
    """Each file's time over the first file's, and whether the machine was too busy for wall times.

    Args:
        launches: samples[launch][file], at least two launches.
        by_cpu_time: from the CPU time of all samples; else from the wall time of the clean ones.
        resolve: a ratio is resolved where its interval is narrower than +-`resolve`/2.

    >>> def launch(baseline, candidate):
    ...     return [[Sample(ns, ns, 0.0)] * 4 for ns in (baseline, candidate)]
    >>> (ratio,), busy = compare([launch(100, 50), launch(102, 51), launch(98, 49)], by_cpu_time=True)
    >>> round(ratio.value, 9), round(ratio.high - ratio.low, 9), ratio.resolved, busy
    (0.5, 0.0, True, False)
    """
    num_clean = [sum(s.clean for samples in file for s in samples) for file in zip(*launches, strict=True)]
    busy = min(num_clean) < MIN_CLEAN
    if by_cpu_time:
        times = [[lower_quartile(s.cpu_ns for s in samples) for samples in launch] for launch in launches]
        return _ratios(times, resolve), busy
    clean = [[[s for s in samples if s.clean] for samples in launch] for launch in launches]
    usable = [launch for launch in clean if all(launch)]
    busy = busy or len(usable) < 2
    chosen = launches if busy else usable
    times = [[lower_quartile(s.wall_ns for s in samples) for samples in launch] for launch in chosen]
    return _ratios(times, resolve), busy


def _ratios(times: Sequence[Sequence[float]], resolve: float) -> tuple[Ratio, ...]:
    """t-intervals of the mean log ratio; `times` is [launch][file]."""
    ratios = []
    for i in range(1, len(times[0])):
        logs = [math.log(launch[i] / launch[0]) for launch in times]
        half_width = float(stdtrit(len(logs) - 1, 0.975)) * stdev(logs) / math.sqrt(len(logs))
        mean = fmean(logs)
        low, high = math.exp(mean - half_width), math.exp(mean + half_width)
        ratios.append(Ratio(math.exp(mean), low, high, 2 * half_width < resolve))
    return tuple(ratios)


def relative_error(outputs: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> float | None:
    """max |y - y_ref| / max |y_ref|, the largest over outputs; infinite where only `outputs` are.

    None where it has no meaning: `expected` is all zeros or not finite.

    >>> relative_error([np.float32([1.0, 2.5])], [np.float32([1.0, 2.0])])
    0.25
    """
    errors = []
    for y, y_ref in zip(outputs, expected, strict=True):
        scale = np.abs(y_ref).max(initial=0.0)
        if not 0 < scale < math.inf:
            return None
        error = float(np.abs(y.astype(np.float64) - y_ref).max() / scale)
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors, default=None)


def summarize(
    path: Path,
    samples: Sequence[Sample],
    loaded: Sequence[Loaded],
    *,
    threads: int,
    batch_size: int,
    output_error: float | None,
) -> Latency:
    """What one file's samples, and its load in every launch, say.

    >>> quiet, waited = Sample(2e6, 2e6, 0.0), Sample(9e6, 2e6, 7e6)
    >>> loaded = Loaded("float32", "", 3.0, 5.0, None)
    >>> latency = summarize(
    ...     Path("m"), [quiet] * 15 + [waited] * 5, [loaded], threads=1, batch_size=1, output_error=0.0
    ... )
    >>> latency.p80_ms, latency.cpu_ms, latency.clean_share
    (2.0, 2.0, 0.75)
    """
    p20_ms, p50_ms, p80_ms, p99_ms = np.percentile(
        [x.wall_ns / 1e6 for x in trusted(samples)], (20, 50, 80, 99)
    ).tolist()
    peaks = [x.peak_memory_bytes for x in loaded if x.peak_memory_bytes is not None]
    return Latency(
        path=path,
        p20_ms=p20_ms,
        p50_ms=p50_ms,
        p80_ms=p80_ms,
        p99_ms=p99_ms,
        cpu_ms=lower_quartile(sample.cpu_ns for sample in samples) / 1e6,
        num_samples=len(samples),
        clean_share=sum(sample.clean for sample in samples) / len(samples),
        wait_share=wait_share(samples),
        threads=threads,
        batch_size=batch_size,
        load_ms=median(x.load_ms for x in loaded),
        cold_start_ms=median(x.cold_start_ms for x in loaded),
        peak_memory_bytes=int(median(peaks)) if peaks else None,
        precision=loaded[0].precision,
        output_error=output_error,
        note=loaded[0].note,
    )
