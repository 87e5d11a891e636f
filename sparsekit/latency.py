"""How long network files take on a target, and by what factor, on a machine that is not idle.

The protocol: a fixed number of threads; each file in its own fresh process; a warm-up; bursts of runs, the order of
the files shuffled every round, one process running at a time; fresh launches until the interval of the ratio is
narrow enough. Memory layout differs from launch to launch by more than runs differ within one, so only launches
count as independent. On the CPU with one thread the ratio comes from CPU time, which a busy neighbour hardly moves;
with more, or on another device, from the wall time of the runs that did not wait for a CPU. Every file's outputs are
held against those of ONNX Runtime in float32 on the same inputs: a runtime that computes in less is faster, and says
nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekit.errors import MeasurementError, UsageError
from sparsekit.samples import (
    Latency,
    LatencyComparison,
    Loaded,
    Ratio,
    Sample,
    compare,
    lower_quartile,
    relative_error,
    summarize,
)
from sparsekit.targets import Target, parse_target
from sparsekit.targets.machine import Site
from sparsekit.targets.worker import Conditions, Worker, start

__all__ = ["Latency", "LatencyComparison", "Ratio", "Sample", "measure_files", "measure_latency", "width_warning"]

REFERENCE = "onnxruntime"
NUM_ROUNDS = 6
BURST = 4
MIN_WARMUPS = 5
WARMUP_S = 0.3
# Of each of many small files. The spread within a launch is small beside what a fresh memory layout makes.
FEW_WARMUPS = 3
SHORT_WARMUP_S = 0.004
MAX_FILES = 128  # in one process: some runtimes keep threads per network


class _Launch(NamedTuple):
    """What one fresh process per file measured, in the order of the files."""

    runtime: str
    device: dict[str, str]
    loaded: list[Loaded]
    outputs: list[list[NDArray[np.float32]]]
    samples: list[list[Sample]]


@dataclass(frozen=True)
class _Files:
    """Files on a target, and how they are run there."""

    files: tuple[Path, ...]
    target: Target
    site: Site
    how: Conditions

    def start(self) -> AbstractContextManager[Worker]:
        """A fresh process there."""
        return start(self.target.name, self.site, self.files, self.how)

    @property
    def by_cpu_time(self) -> bool:
        return self.how.threads == 1 and self.target.runtime.on_cpu


@contextmanager
def _on(
    paths: Sequence[Path | str], target: Target | str, threads: int, batch_size: int, affinity: Sequence[int] | None
) -> Iterator[_Files]:
    """The files at `paths` where the target runs them."""
    files = tuple(Path(path) for path in paths)
    if min(threads, batch_size) < 1:
        raise UsageError("latency: need a thread and a batch")
    for file in files:
        if not file.is_file():
            raise MeasurementError(f"{file}: no such file")
    target = parse_target(target) if isinstance(target, str) else target
    cpus = None if affinity is None else tuple(affinity)
    with target.site(files, batch_size) as site:
        yield _Files(files, target, site, Conditions(threads, batch_size, cpus, target.runtime.options))


def measure_latency(
    paths: Sequence[Path | str],
    *,
    target: Target | str = "onnxruntime",
    threads: int = 1,
    batch_size: int = 1,
    affinity: Sequence[int] | None = None,
    resolve: float = 0.05,
    min_launches: int = 3,
    max_launches: int = 10,
    max_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyComparison:
    """Time network files on a target, each against the first, on random inputs.

    A first dimension without a fixed size is the batch; no other may lack one.

    Args:
        affinity: the CPUs to run on; any by default.
        resolve: the smallest effect to tell from none: launches go on until every ratio's interval is narrower
            than +-`resolve`/2.
        max_seconds: no launch beyond `min_launches` starts that would end later, and the runs of each of those
            are cut to their share.
        progress: called after each launch with the number done and the most there can be.

    Raises:
        MeasurementError: a file is missing, is none that the target runs, or has inputs of unknown size; the
            runtime is missing, crashed, or computes something else.
        UsageError: no such target, no paths, no threads, no batch, or fewer than two launches asked for.
    """
    if not paths or not 2 <= min_launches <= max_launches:
        raise UsageError("latency: need a file and 2 <= min_launches <= max_launches")
    order = random.Random(0)
    launches: list[_Launch] = []
    with _on(paths, target, threads, batch_size, affinity) as on:
        begin = time.monotonic()
        for num_launches in range(1, max_launches + 1):
            launches.append(_launch(on, order, max_seconds / min_launches))
            if progress:
                progress(num_launches, max_launches)
            if num_launches < min_launches:
                continue
            ratios, busy = compare([launch.samples for launch in launches], by_cpu_time=on.by_cpu_time, resolve=resolve)
            next_end = (time.monotonic() - begin) * (1 + 1 / num_launches)
            if all(ratio.resolved for ratio in ratios) or next_end > max_seconds:
                break
    errors = _output_errors(on, launches[0].outputs)
    latencies = tuple(
        summarize(
            file,
            [sample for launch in launches for sample in launch.samples[i]],
            [launch.loaded[i] for launch in launches],
            threads=threads,
            batch_size=batch_size,
            output_error=errors[i],
        )
        for i, file in enumerate(on.files)
    )
    first = launches[0]
    return LatencyComparison(
        latencies, ratios, len(launches), busy, first.runtime, on.target.name, first.device, on.how.affinity, resolve
    )


def _launch(on: _Files, order: random.Random, max_seconds: float) -> _Launch:
    """One fresh process per file; all idle but the one whose turn it is."""
    with ExitStack() as stack:
        processes, loaded = [], []
        for i in range(len(on.files)):
            process = stack.enter_context(on.start())
            loaded.append(process.load(i, min_warmups=MIN_WARMUPS, warmup_s=WARMUP_S))
            processes.append(process)
        outputs = [process.outputs(i) for i, process in enumerate(processes)]
        samples: list[list[Sample]] = [[] for _ in processes]
        begin = time.monotonic()
        for _ in range(NUM_ROUNDS):
            for i in order.sample(range(len(processes)), len(processes)):
                samples[i] += processes[i].run(i, BURST)
            if time.monotonic() - begin > max_seconds:
                break
        return _Launch(processes[0].runtime, processes[0].device, loaded, outputs, samples)


def _output_errors(on: _Files, outputs: Sequence[Sequence[NDArray[np.float32]]]) -> list[float | None]:
    """Of each file, held against the ONNX file of the same name; None where there is none."""
    reference = parse_target(REFERENCE)
    if (on.target.runtime, on.target.machine) == (reference.runtime, reference.machine):
        return [0.0] * len(on.files)
    onnx_files = [file.with_suffix(".onnx") for file in on.files]
    known = [i for i, file in enumerate(onnx_files) if file.is_file()]
    errors: list[float | None] = [None] * len(onnx_files)
    if not known:
        return errors
    with _on([onnx_files[i] for i in known], reference, 1, on.how.batch_size, None) as known_files:
        for k, i in enumerate(known):
            with known_files.start() as process:
                process.load(k, min_warmups=0, warmup_s=0)
                expected = process.outputs(k)
            if [y.size for y in outputs[i]] != [y.size for y in expected]:
                raise MeasurementError(
                    f"{on.files[i]}: {on.target.name} gives outputs of other sizes than ONNX Runtime"
                )
            errors[i] = relative_error(outputs[i], expected)
            if errors[i] == math.inf:
                raise MeasurementError(
                    f"{on.files[i]}: {on.target.name} gives infinite outputs where ONNX Runtime does not"
                )
    return errors


def measure_files(
    paths: Sequence[Path | str],
    *,
    target: Target | str = "onnxruntime",
    threads: int = 1,
    batch_size: int = 1,
    affinity: Sequence[int] | None = None,
    num_launches: int = 2,
    num_rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Milliseconds that one run of each of many small files takes, measured in some 30 ms per file.

    Files share processes, each loaded once per launch; every round runs all that a process holds, shuffled. A file's
    time is the lower quartile over a launch's rounds, of CPU time or of clean wall time as in `measure_latency`,
    averaged over launches.

    Args:
        num_launches: times that every file is loaded, beside other files each time.
        progress: called with the number of files loaded and run through, and how many that will be.

    Raises:
        MeasurementError: as `measure_latency`.
        UsageError: as `measure_latency`.
    """
    if min(num_launches, num_rounds) < 1:
        raise UsageError("latency: need a launch and a round")
    order = random.Random(0)
    times_ms: list[list[float]] = [[] for _ in paths]
    num_done = 0
    with _on(paths, target, threads, batch_size, affinity) as on:
        for _ in range(num_launches):
            shuffled = order.sample(range(len(paths)), len(paths))
            for first in range(0, len(paths), MAX_FILES):
                chosen = shuffled[first : first + MAX_FILES]
                for i, time_ms in _share_process(on, chosen, order, num_rounds):
                    times_ms[i].append(time_ms)
                num_done += len(chosen)
                if progress:
                    progress(num_done, num_launches * len(paths))
    return [fmean(times) for times in times_ms]


def _share_process(
    on: _Files, chosen: Sequence[int], order: random.Random, num_rounds: int
) -> Iterator[tuple[int, float]]:
    """Index and milliseconds of each of the chosen files, all loaded by one fresh process."""
    samples: dict[int, list[Sample]] = {i: [] for i in chosen}
    with on.start() as process:
        for i in chosen:
            process.load(i, min_warmups=FEW_WARMUPS, warmup_s=SHORT_WARMUP_S)
        for _ in range(num_rounds):
            for i in order.sample(chosen, len(chosen)):
                samples[i] += process.run(i, 1)
    for i, taken in samples.items():
        if on.by_cpu_time:
            yield i, lower_quartile(sample.cpu_ns for sample in taken) / 1e6
        else:
            clean = [sample for sample in taken if sample.clean]
            yield i, lower_quartile(sample.wall_ns for sample in clean or taken) / 1e6


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
