"""Do width tables foretell how long a cut network takes, and what do they cost?

    python -m benchmarks.width_tables [resnet50 ...]

A row per network: seconds to measure its tables (cold) and to read them again (warm), and for six plans at random
widths the sum over layers of the cut network over that of the dense one, beside the ratio measured on exported files.
`widths` says what counts are multiples of: 16, 8, or 1, where they are odd as global scores leave them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from scipy.stats import spearmanr
from torch import nn

from benchmarks import rows
from sparsekit import compact, export_onnx, measure_latency, trace
from sparsekit.cost import Costs, Counts, num_macs
from sparsekit.graph import ChannelGraph
from sparsekit.latency_model import Latencies
from sparsekit.plan import PruningPlan
from sparsekit.selection import keep_top
from sparsekit.targets import parse_target
from sparsekit.width_tables import measure_tables

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16")
PLANS = ((16, 0.3, 0.7), (16, 0.5, 0.9), (8, 0.2, 0.6), (8, 0.5, 0.9), (1, 0.3, 0.7), (1, 0.5, 0.9))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    for parameter in model.parameters():  # ViT's head starts at zero
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def random_plan(graph: ChannelGraph, step: int, low: float, high: float, seed: int) -> tuple[PruningPlan, Counts]:
    """Each group keeps a share drawn from [low, high], to a multiple of `step`."""
    generator = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        count = round(group.size * generator.uniform(low, high) / step) * step
        kept[group] = min(group.size, max(count, min(step, group.size)))
    scores = {group: torch.from_numpy(generator.random(group.size)) for group in graph.groups}
    return keep_top(scores, kept), Costs(graph).counts(kept)


def run(name: str, threads: int) -> None:
    model, x = network(name), torch.randn(2, 3, 224, 224)
    graph = trace(model, x)
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            tables = measure_tables(graph, "onnxruntime", threads=threads, cache_dir=Path(folder))
            seconds.append(time.perf_counter() - start)
        latencies = Latencies(graph, tables)
        dense = Costs(graph).dense
        start = time.perf_counter()
        for group in range(len(graph.groups)):
            latencies.along(dense, group)
        along_ms = (time.perf_counter() - start) * 1e3 / len(graph.groups)
        files = [export_onnx(model, (x,), Path(folder, "dense.onnx")).path]
        cut: list[dict[str, Any]] = []
        for seed, (step, low, high) in enumerate(PLANS):
            plan, counts = random_plan(graph, step, low, high, seed)
            small = compact(model, plan, x)
            files.append(export_onnx(small, (x,), Path(folder, f"{seed}.onnx")).path)
            macs_ratio = num_macs(trace(small, x)) / num_macs(graph)
            cut.append({"widths": step, "macs_ratio": macs_ratio, "predicted": latencies(counts) / latencies(dense)})
        timed = measure_latency(files, threads=threads, max_seconds=300, min_launches=3, max_launches=4)
    for row, ratio in zip(cut, timed.ratios, strict=True):
        row |= {"measured": ratio.value, "measured_95": [ratio.low, ratio.high]}
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in cut]
    macs_errors = [abs(row["macs_ratio"] / row["measured"] - 1) for row in cut]
    measured = [row["measured"] for row in cut]
    rows.append(
        "width_tables",
        {
            "network": name,
            "threads": threads,
            "batch_size": 1,
            "target": parse_target("onnxruntime").fingerprint(),
            "num_tables": len({id(table) for table in tables}),
            "cold_s": seconds[0],
            "warm_s": seconds[1],
            "along_ms": along_ms,
            "sum_of_layers_ms": latencies(dense),
            "network_cpu_ms": timed.latencies[0].cpu_ms,
            "network_p50_ms": timed.latencies[0].p50_ms,
            "plans": cut,
            "mean_error": statistics.fmean(errors),
            "mean_error_of_macs": statistics.fmean(macs_errors),
            "rank_correlation": float(spearmanr([row["predicted"] for row in cut], measured).statistic),
            "rank_correlation_of_macs": float(spearmanr([row["macs_ratio"] for row in cut], measured).statistic),
            "busy": timed.busy,
            "num_launches": timed.num_launches,
        },
    )


def main() -> None:
    for name in sys.argv[1:] or NETWORKS:
        run(name, threads=1)


if __name__ == "__main__":
    main()
