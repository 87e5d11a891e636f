"""Widths that end where plateaus do, beside plain rounding to 8 and to 16, on three runtimes.

    python -m benchmarks.plateau_widths [NETWORK ...] [--targets NAME ...] [--seeds N ...] [--macs RATIO]

Networks with random weights; groups matter by random weights (log-normal, by seed), as trained networks' do, so that
widths differ from layer to layer. All plans of a row have the same share of the MACs, but for `ours at equal damage`:

- `irregular`: least damage at those MACs, to the channel (large groups to 1 or 2 in 64);
- `round 8`, `round 16`: the same with widths that are multiples of it;
- `ours`: least damage per millisecond of the width tables, until it has those MACs;
- `ours at equal damage`: likewise, until its damage is that of `round 8`.

All files of a row are timed in turns in one run. Damage is -weight * log(share of importance kept), summed over layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import rows
from benchmarks.width_tables import network
from sparsekit import compact, export_onnx, measure_latency, trace
from sparsekit.budget import Metric
from sparsekit.cost import Costs, Counts
from sparsekit.graph import ChannelGraph
from sparsekit.latency_model import Latencies
from sparsekit.pruner import channel_norms
from sparsekit.selection import keep_top
from sparsekit.targets import parse_target
from sparsekit.tradeoff import damage_curve, spend
from sparsekit.width_tables import measure_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plateau_widths", description=__doc__)
    parser.add_argument("networks", nargs="*", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--targets", nargs="+", default=["onnxruntime", "openvino", "ncnn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--macs", type=float, default=0.5)
    chosen = parser.parse_args()
    for name in chosen.networks:
        for target in chosen.targets:
            _measure(name, target, chosen.seeds, chosen.macs)


def _measure(name: str, target_name: str, seeds: list[int], macs_ratio: float) -> None:
    model, x, target = network(name), torch.randn(1, 3, 224, 224), parse_target(target_name)
    graph = trace(model, x)
    start = time.perf_counter()
    latencies = Latencies(graph, measure_tables(graph, target))
    seconds = time.perf_counter() - start
    macs, dense, scores = Costs(graph)[Metric.NUM_MACS], Costs(graph).dense, channel_norms(graph)
    for seed in seeds:
        counts_of, damage = _plans(graph, latencies, macs_ratio, seed)
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for number, (which, counts) in enumerate({"dense": dense, **counts_of}.items()):
                kept = dict(zip(graph.groups, counts.tolist(), strict=True))
                small = compact(model, keep_top(scores, kept)) if which != "dense" else model
                onnx = export_onnx(small, (x,), Path(folder, f"{number}.onnx")).path
                files.append(target.prepare(small, (x,), onnx, Path(folder)))
            timed = measure_latency(files, target=target, threads=1, resolve=0.02, max_seconds=240)
        rows.append(
            "plateau_widths",
            {
                "network": name,
                "target": target.fingerprint(),
                "seed": seed,
                "tables_s": seconds,
                "plans": {
                    which: {
                        "latency_ratio": ratio.value,
                        "latency_ratio_95": [ratio.low, ratio.high],
                        "macs_ratio": macs(counts) / macs(dense),
                        "damage": damage(counts),
                        "predicted": latencies(counts) / latencies(dense),
                        "widths": counts.tolist(),
                    }
                    for (which, counts), ratio in zip(counts_of.items(), timed.ratios, strict=True)
                },
                "cpu_ms": [side.cpu_ms for side in timed.latencies],
                "num_launches": timed.num_launches,
                "busy": timed.busy,
                "threads": 1,
                "batch_size": 1,
            },
        )


def _plans(
    graph: ChannelGraph, latencies: Latencies, macs_ratio: float, seed: int
) -> tuple[dict[str, Counts], Callable[[Counts], float]]:
    """Counts by way, and the damage that counts do."""
    weights = np.random.default_rng(seed).lognormal(sigma=1.0, size=len(graph.groups))
    norms = channel_norms(graph)
    damages = {
        group: damage_curve(norms[group].double().square(), float(weight))
        for group, weight in zip(graph.groups, weights, strict=True)
    }
    macs, dense = Costs(graph)[Metric.NUM_MACS], Costs(graph).dense
    inner = [number for number, group in enumerate(graph.groups) if not (group.residual or group.fixed_by)]

    def damage(counts: Counts) -> float:
        return sum(float(damages[group][count - 1]) for group, count in zip(graph.groups, counts, strict=True))

    def fast(share: float) -> Counts:
        found = spend(graph, damages, [(latencies, share * latencies(dense))], inner, dense)
        assert found is not None, f"no plan takes {share} of the time"
        return found

    def bisected(too_much: Callable[[Counts], bool]) -> Counts:
        """The slowest plan of the width tables that is not too much."""
        low, high = 0.2, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if too_much(fast(middle)) else (middle, high)
        return fast(low)

    found: dict[str, Counts] = {}
    for name, step in {"irregular": 1, "round 8": 8, "round 16": 16}.items():
        counts = spend(graph, damages, [(macs, macs_ratio * macs(dense))], inner, dense, round_to=step)
        assert counts is not None, f"{macs_ratio} of the MACs: no multiples of {step}"
        found[name] = counts
    found["ours"] = bisected(lambda counts: macs(counts) > macs_ratio * macs(dense))
    allowed = damage(found["round 8"])
    found["ours at equal damage"] = bisected(lambda counts: damage(counts) < allowed)
    return found, damage


if __name__ == "__main__":
    main()
