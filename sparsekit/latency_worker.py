"""Runs one ONNX file and times it, told what to do by JSON lines; needs only numpy and onnxruntime.

The file stands alone, so that it can be copied to another machine and started there as a script. One command per
line on stdin, one answer per line on stdout:

    {"command": "load", "path": "m.onnx", "threads": 1, "batch_size": 1, "seed": 0}
        -> {"runtime": "onnxruntime 1.31.1 CPUExecutionProvider", "load_ms": 12.5, "num_repeats": 3}
    {"command": "run", "num_samples": 4}
        -> {"samples": [[wall_ns, cpu_ns, wait_ns or null], ...]}, each for one run of the network

Anything that goes wrong ends the process; the last line of stderr says what. So does the end of stdin.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

PROVIDER = "CPUExecutionProvider"
MIN_WARMUPS = 5
MIN_WARMUP_S = 0.3
# A sample repeats a short network until it lasts this long: clocks and /proc cost some 20 us.
MIN_SAMPLE_S = 0.002

FLOATS = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
# Zero is a valid index, label and flag everywhere.
INTEGERS = {f"tensor({name})": name for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16")}


def load_session(path: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    # Threads spin while the network runs, as they do in production, and stop with it: the next process's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=[PROVIDER])


def make_inputs(values: list[onnxruntime.NodeArg], batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Standard normal inputs, zeros where they are integers; the first dimension, where dynamic, is the batch."""
    generator = np.random.default_rng(seed)
    batch_names = {value.shape[0] for value in values if value.shape and isinstance(value.shape[0], str)}
    feeds = {}
    for value in values:
        shape = [
            batch_size if not isinstance(size, int) and (axis == 0 or size in batch_names) else size
            for axis, size in enumerate(value.shape)
        ]
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                sys.exit(f"input {value.name!r}: dimension {axis} ({size or 'unnamed'}) has no fixed size")
        if value.type in FLOATS:
            feeds[value.name] = generator.standard_normal(shape).astype(FLOATS[value.type])
        elif value.type in INTEGERS:
            feeds[value.name] = np.zeros(shape, INTEGERS[value.type])
        else:
            sys.exit(f"input {value.name!r}: cannot make up a {value.type}")
    if all(batch_size not in feed.shape[:1] for feed in feeds.values()):
        sizes = {name: list(feed.shape) for name, feed in feeds.items()}
        sys.exit(f"batch size {batch_size}: the inputs have fixed shapes {sizes}")
    return feeds


def wait_ns() -> int | None:
    """Nanoseconds that this process's threads have waited for a CPU; None where Linux does not tell."""
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            total += int(Path(task.path, "schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return total


class Network:
    """A loaded file, warm, with its inputs."""

    def __init__(self, path: str, threads: int, batch_size: int, seed: int) -> None:
        start = time.perf_counter()
        self.session = load_session(path, threads)
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.feeds = make_inputs(self.session.get_inputs(), batch_size, seed)
        self.num_repeats = max(1, math.ceil(MIN_SAMPLE_S / self.warm_up()))

    def warm_up(self) -> float:
        """Seconds of the fastest run."""
        start, fastest, num_runs = time.perf_counter(), math.inf, 0
        while num_runs < MIN_WARMUPS or time.perf_counter() - start < MIN_WARMUP_S:
            before = time.perf_counter()
            self.session.run(None, self.feeds)
            fastest = min(fastest, time.perf_counter() - before)
            num_runs += 1
        return fastest

    def sample(self) -> tuple[float, float, float | None]:
        """Wall time, CPU time of all threads, and time waited for a CPU, in nanoseconds per run."""
        waited, wall, cpu = wait_ns(), time.perf_counter_ns(), time.process_time_ns()
        for _ in range(self.num_repeats):
            self.session.run(None, self.feeds)
        cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
        after = wait_ns()
        wait = None if after is None or waited is None else (after - waited) / self.num_repeats
        return wall / self.num_repeats, cpu / self.num_repeats, wait


def main() -> None:
    # The answers keep stdout to themselves: whatever else a library prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    network = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "load":
            network = Network(command["path"], command["threads"], command["batch_size"], command["seed"])
            answer = {
                "runtime": f"onnxruntime {onnxruntime.__version__} {PROVIDER}",
                "load_ms": network.load_ms,
                "num_repeats": network.num_repeats,
            }
        elif network is None:
            sys.exit("run before load")
        else:
            answer = {"samples": [network.sample() for _ in range(command["num_samples"])]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
