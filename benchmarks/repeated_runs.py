"""One latency budget, many runs: does every exported file hold the budget when it is timed again later?

    python -m benchmarks.repeated_runs [--model NAME] [--budget TEXT] [--runs N] [--threads N]

Each run is `sparsekit compress` in a process of its own, as a user would start it, without data. After the last one,
each file is timed beside the dense one by `sparsekit bench`, a process again. One row; `in_band` counts the files
between 0.95 of the budget and the budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from sparsekit import export_onnx
from sparsekit.budget import Budget
from sparsekit.closed_loop import BAND
from sparsekit.networks import build_network


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeated_runs", description=__doc__)
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--budget", default="latency<=0.5x")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    limit = Budget.parse(chosen.budget).limits[0].value
    flags = ("--model", chosen.model, "--method", "magnitude", "--no-data", "--threads", str(chosen.threads))
    with tempfile.TemporaryDirectory() as folder:
        network = build_network(chosen.model).eval()
        dense = export_onnx(network, (torch.randn(2, 3, 224, 224),), Path(folder, "dense.onnx")).path
        runs, seconds = [], []
        for number in range(chosen.runs):
            start = time.perf_counter()
            runs.append(rows.compress(*flags, "--budget", chosen.budget, "--out", f"{folder}/{number}"))
            seconds.append(time.perf_counter() - start)
            print(f"run {number}: {seconds[-1]:.0f} s, {runs[-1]['latency']['ratio']}", flush=True)
        again = [
            _bench(dense, Path(folder, str(number), "model.onnx"), chosen.threads) for number in range(chosen.runs)
        ]
    ratios = [bench["ratios"][0] for bench in again]
    rows.append(
        "repeated_runs",
        {
            "model": chosen.model,
            "budget": chosen.budget,
            "threads": chosen.threads,
            "in_band": sum(BAND * limit <= ratio["value"] <= limit for ratio in ratios),
            "within_budget": sum(ratio["value"] <= limit for ratio in ratios),
            "runs": chosen.runs,
            "again": [[ratio["value"], ratio["low"], ratio["high"]] for ratio in ratios],
            "reported": [run["latency"]["ratio"] for run in runs],
            "macs_ratio": [run["compact"]["num_macs"] / run["dense"]["num_macs"] for run in runs],
            "candidates": [len(run["search"]) for run in runs],
            "seconds": seconds,
            "busy": [bench["busy"] for bench in again],
            "runtime": again[0]["runtime"],
        },
    )


def _bench(dense: Path, small: Path, threads: int) -> dict[str, Any]:
    """`sparsekit bench` in a fresh process."""
    command = [sys.executable, "-c", "from sparsekit.cli import main; main()", "bench", str(dense), str(small)]
    flags = ["--threads", str(threads), "--resolve", "0.02", "--max-seconds", "120", "--json"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
