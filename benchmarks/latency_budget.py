"""Half the latency, measured: what the closed loop finds, beside Torch-Pruning at equal MACs and at equal latency.

    python -m benchmarks.latency_budget [NETWORK ...] [--threads N ...] [--budget TEXT] [--target NAME] [--cold]

Networks of torchvision with random weights, which latency does not see, without data: every layer matters the same.
A row per network and number of threads:

- ours: `sparsekit compress --method magnitude --budget 'latency<=0.5x'`; the ratio of its file to the dense one's,
  MACs, candidates measured, seconds of tables (cold or from the cache) and of the whole search;
- Torch-Pruning 1.6, magnitude, one ratio for all layers: cut to the MACs of ours at its defaults and with `round_to=8`;
  the faster of the two cut until its file takes the latency of ours to 2 %. All files are timed in turns in one run.

Torch-Pruning cannot run some networks that it has cut; the row says so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.zoo_torch_pruning import output_layers
from sparsekit import compress, export_onnx, trace
from sparsekit.cost import num_macs
from sparsekit.errors import ExportError, TraceError
from sparsekit.latency import measure_latency
from sparsekit.recipe import Recipe
from sparsekit.targets import parse_target

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16")
MACS_TOLERANCE, LATENCY_TOLERANCE, MAX_TRIES = 0.005, 0.02, 6
PEER = "torch_pruning"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_budget", description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--budget", default="latency<=0.5x")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--cold", action="store_true", help="measure the width tables anew")
    chosen = parser.parse_args()
    for network in chosen.networks:
        for threads in chosen.threads:
            with tempfile.TemporaryDirectory() as folder:
                if chosen.cold:
                    os.environ["SPARSEKIT_CACHE"] = folder
                _measure(network, threads, chosen.budget, chosen.target, Path(folder), cold=chosen.cold)


def _measure(network: str, threads: int, budget: str, target: str, folder: Path, *, cold: bool) -> None:
    torch.manual_seed(0)
    dense = torchvision.models.get_model(network, weights=None).eval()
    for parameter in dense.parameters():  # a head of zeros would make any export look right
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(2, 3, 224, 224)
    recipe = Recipe(
        model=f"torchvision:{network}",
        data=None,
        method="magnitude",
        budget=budget,
        threads=threads,
        target=target,
        allow_slower=True,
    )
    start = time.perf_counter()
    artifact = compress(dense, recipe, None, example_inputs=(x,))
    seconds = time.perf_counter() - start
    report = artifact.report
    ours = folder / "ours.onnx"
    ours.write_bytes(artifact.onnx)
    dense_file = export_onnx(dense, (x,), folder / "dense.onnx").path
    dense_macs = num_macs(trace(dense, x))
    peers, failure = _peers(dense, x, report.compact.num_macs, dense_file, ours, folder, threads, target)
    files = [dense_file, ours, *(path for _, path, _ in peers)]
    timed = measure_latency(files, target=parse_target(target), threads=threads, resolve=0.02, max_seconds=180)
    names, num_macs_of = zip(("ours", report.compact.num_macs), *((name, num) for name, _, num in peers), strict=True)
    rows.append(
        "latency_budget",
        {
            "network": network,
            "budget": budget,
            "target": target,
            "threads": threads,
            "cold_tables": cold,
            "seconds": seconds,
            "seconds_of": dict(report.seconds),
            "candidates": [dataclasses.asdict(step) for step in report.search],
            "num_groups": len(report.widths),
            "latency": {
                name: {"ratio": ratio.value, "interval": [ratio.low, ratio.high], "macs_ratio": num / dense_macs}
                for name, ratio, num in zip(names, timed.ratios, num_macs_of, strict=True)
            },
            "cpu_ms": [side.cpu_ms for side in timed.latencies],
            "p50_ms": [side.p50_ms for side in timed.latencies],
            "num_launches": timed.num_launches,
            "busy": timed.busy,
            "runtime": timed.runtime,
            "torch_pruning": failure or "ran",
            "torch_pruning_version": version("torch-pruning"),
        },
    )


def _peers(
    dense: nn.Module, x: Tensor, macs: int, dense_file: Path, ours: Path, folder: Path, threads: int, target: str
) -> tuple[list[tuple[str, Path, int]], str]:
    """Torch-Pruning's files at our MACs and at our latency: name, path and MACs; and why there are none."""

    def pruned(ratio: float, round_to: int | None) -> nn.Module:
        network = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_pruning.pruner.MagnitudePruner(
                network,
                x,
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=ratio,
                round_to=round_to,
                ignored_layers=output_layers(network, (x,)),
                num_heads={m: m.num_heads for m in network.modules() if isinstance(m, nn.MultiheadAttention)},
            ).step()
        return network.eval()

    def ratio_to_ours(path: Path) -> float:
        timed = measure_latency([ours, path], target=parse_target(target), threads=threads, max_seconds=30)
        return timed.ratios[0].value

    found = []
    try:
        for name, round_to in ((f"{PEER}_equal_macs", None), (f"{PEER}_round_8_equal_macs", 8)):
            low, high = 0.0, 0.95
            while True:  # more is pruned, fewer MACs are left
                ratio = (low + high) / 2
                network = pruned(ratio, round_to)
                num = num_macs(trace(network, x))
                if abs(num / macs - 1) < MACS_TOLERANCE or high - low < 1e-3:
                    break
                low, high = (ratio, high) if num > macs else (low, ratio)
            path = export_onnx(network, (x,), folder / f"{name}.onnx").path
            found.append((name, path, num, ratio, round_to, ratio_to_ours(path)))
        *_, ratio, round_to, _ = min(found, key=lambda each: each[-1])
        low, high, path = 0.0, 0.95, folder / "equal_latency.onnx"
        for _ in range(MAX_TRIES):
            network = pruned(ratio, round_to)
            export_onnx(network, (x,), path)
            measured = ratio_to_ours(path)
            if abs(measured - 1) < LATENCY_TOLERANCE:
                break
            low, high = (ratio, high) if measured > 1 else (low, ratio)
            ratio = (low + high) / 2
        at_latency = (f"{PEER}_equal_latency", path, num_macs(trace(network, x)))
        return [*((name, path, num) for name, path, num, *_ in found), at_latency], ""
    except (RuntimeError, ValueError, AttributeError, TraceError, ExportError) as error:
        return [], f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
