"""Runs network files and times them, told what to do by JSON lines.

    python latency_worker.py RUNTIME.py [0,1]

Both files stand alone, so that they can be copied to another machine and started there: this one needs numpy and
Python 3.8, the other (`targets/run_*.py`) what it runs networks with. The numbers are the CPUs to stay on. One
command per line on stdin, one answer per line on stdout; one process holds any number of networks, by name:

    {"command": "describe", "options": {}}
        -> {"runtime": "onnxruntime 1.31.1 CPUExecutionProvider", "device": {"cpu": "...", "cpu_flags": "avx2 ..."}}
    {"command": "load", "name": "a", "path": "m.onnx", "threads": 1, "batch_size": 1, "seed": 0, "options": {},
     "min_warmups": 5, "warmup_s": 0.3}
        -> {"precision": "float32", "note": "", "load_ms": 12.5, "cold_start_ms": 14.0,
            "peak_memory_bytes": 9000000 or null}
    {"command": "run", "name": "a", "num_samples": 4}
        -> {"samples": [[wall_ns, cpu_ns, wait_ns or null], ...]}, each for one run of the network
    {"command": "outputs", "name": "a"}
        -> {"outputs": ["float32 bytes in base64", ...]}, for inputs that only the seed and the shapes decide

Anything that goes wrong ends the process; the last line of stderr says what. So does the end of stdin.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and len(sys.argv) > 2:
    # Before any import below starts threads: they inherit it.
    try:
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[2].split(",")})
    except OSError as error:
        sys.exit(f"affinity {sys.argv[2]}: {error.strerror}: no such CPU here")

import base64
import contextlib
import json
import math
import platform
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np

# A sample repeats a short network until it lasts this long: clocks and /proc cost some 20 us.
MIN_SAMPLE_S = 0.002
FLOATS = ("float16", "float32", "float64")
# The instruction sets that decide which kernels a runtime picks.
CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def make_inputs(values: list[tuple[str, str, list[Any]]], batch_size: int, seed: int) -> dict[str, Any]:
    """Standard normal inputs, zeros where they are integers: a valid index, label and flag everywhere.

    `values` are (name, dtype, shape); the first dimension, where it has no fixed size, is the batch.
    """
    generator = np.random.default_rng(seed)
    batch_names = {shape[0] for _, _, shape in values if shape and isinstance(shape[0], str)}
    feeds = {}
    for name, dtype, shape in values:
        sizes = [
            batch_size if not isinstance(size, int) and (axis == 0 or size in batch_names) else size
            for axis, size in enumerate(shape)
        ]
        for axis, size in enumerate(sizes):
            if not isinstance(size, int):
                sys.exit(f"input {name!r}: dimension {axis} ({size or 'unnamed'}) has no fixed size")
        if dtype in FLOATS:
            feeds[name] = generator.standard_normal(sizes).astype(dtype)
        elif dtype == "bool" or dtype.startswith(("int", "uint")):
            feeds[name] = np.zeros(sizes, dtype)
        else:
            sys.exit(f"input {name!r}: cannot make up a {dtype}")
    if all(batch_size not in feed.shape[:1] for feed in feeds.values()):
        shapes = {name: list(feed.shape) for name, feed in feeds.items()}
        sys.exit(f"batch size {batch_size}: the inputs have fixed shapes {shapes}")
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


def memory_bytes(field: str) -> int | None:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def forget_peak() -> None:
    """Let the peak of resident memory start again from what is resident now, where Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Network:
    """A loaded file, warm, with its inputs."""

    def __init__(self, runtime: dict[str, Any], command: dict[str, Any]) -> None:
        forget_peak()
        before = memory_bytes("VmHWM")
        start = time.perf_counter()
        self.session = runtime["load"](command["path"], command["threads"], command["batch_size"], command["options"])
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.session.bind(make_inputs(self.session.inputs, command["batch_size"], command["seed"]))
        first_run_s = self.run_s(1)
        self.cold_start_ms = self.load_ms + first_run_s * 1e3
        fastest_s = self.warm_up(command["min_warmups"], command["warmup_s"])
        self.num_repeats = max(1, math.ceil(MIN_SAMPLE_S / min(first_run_s, fastest_s)))
        after = memory_bytes("VmHWM")
        self.peak_memory_bytes = None if before is None or after is None else after - before

    def run_s(self, num_runs: int) -> float:
        """Seconds that `num_runs` runs take."""
        start = time.perf_counter()
        self.session.run(num_runs)
        return time.perf_counter() - start

    def warm_up(self, min_runs: int, min_s: float) -> float:
        """Seconds of the fastest run."""
        start, fastest_s, num_runs = time.perf_counter(), math.inf, 0
        while num_runs < min_runs or time.perf_counter() - start < min_s:
            fastest_s = min(fastest_s, self.run_s(1))
            num_runs += 1
        return fastest_s

    def sample(self) -> tuple[float, float, float | None]:
        """Wall time, CPU time of all threads, and time waited for a CPU, in nanoseconds per run."""
        waited, wall, cpu = wait_ns(), time.perf_counter_ns(), time.process_time_ns()
        self.session.run(self.num_repeats)
        cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
        after = wait_ns()
        wait = None if after is None or waited is None else (after - waited) / self.num_repeats
        return wall / self.num_repeats, cpu / self.num_repeats, wait

    def outputs(self) -> list[str]:
        arrays = [np.ascontiguousarray(array, np.float32) for array in self.session.outputs()]
        return [base64.b64encode(array.tobytes()).decode() for array in arrays]


def device() -> dict[str, str]:
    """What of this machine decides how long a network takes on its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    flags = pairs.get("flags", pairs.get("Features", "")).split()
    cpu = pairs.get("model name") or platform.processor() or platform.machine()
    return {
        "machine": platform.machine(),
        "cpu": cpu,
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if flag in flags),
    }


def main() -> None:
    # The answers keep stdout to themselves: whatever else a library prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runtime = runpy.run_path(sys.argv[1])
    networks = {}
    for line in sys.stdin:
        command = json.loads(line)
        verb, name = command["command"], command.get("name")
        if verb == "describe":
            answer = runtime["describe"](command["options"])
            answer["device"] = {**device(), **answer.get("device", {})}
        elif verb == "load":
            networks[name] = network = Network(runtime, command)
            answer = {
                "precision": network.session.precision,
                "note": network.session.note,
                "load_ms": network.load_ms,
                "cold_start_ms": network.cold_start_ms,
                "peak_memory_bytes": network.peak_memory_bytes,
            }
        elif name not in networks:
            sys.exit(f"{verb} before load")
        elif verb == "run":
            answer = {"samples": [networks[name].sample() for _ in range(command["num_samples"])]}
        else:
            answer = {"outputs": networks[name].outputs()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # without the seconds that some runtimes take to say goodbye


if __name__ == "__main__":
    main()
