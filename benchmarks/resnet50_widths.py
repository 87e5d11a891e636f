"""ResNet-50 at the widths of a published 3.06x MACs cut: does the latency follow, and what does planning cost?

    python -m benchmarks.resnet50_widths

Row 1 and 2: ONNX Runtime latency on one thread at the published widths and rounded to 16, each beside the dense
network in one interleaved run. `quotient` is latency ratio / MACs ratio; 1.0 means every saved MAC saves its time.
Row 3: wall time of trace + plan + compact beside Torch-Pruning on the same model, in turns, in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch_pruning
import torchvision
from torch import nn

from benchmarks import rows
from sparsekit import Budget, certify, compact, export_onnx, measure_latency, trace
from sparsekit.cost import num_macs
from sparsekit.pruners.magnitude import Magnitude

# Li et al. 2023, Table 6: pruned 0.68 of conv1 and conv2 in stages 1 to 3, 0.50 in stage 4; conv3 and shortcuts kept.
WIDTHS = Budget.parse("*=1 and layer[123].*.conv[12]=0.32 and layer4.*.conv[12]=0.5")
REPEATS = 7


def latency(model: nn.Module, x: torch.Tensor) -> None:
    graph = trace(model, x)
    with tempfile.TemporaryDirectory() as folder:
        dense = export_onnx(model, (x,), Path(folder) / "dense.onnx")
        for round_to in (1, 16):
            plan = Magnitude(round_to=round_to)(graph, WIDTHS)
            small = compact(model, plan)
            certificate = certify(model, plan, small, (x,))
            file = export_onnx(small, (x,), Path(folder) / f"small{round_to}.onnx")
            timed = measure_latency([dense.path, file.path], threads=1, max_seconds=180)
            ratio, macs_ratio = timed.ratios[0], num_macs(trace(small, x)) / num_macs(graph)
            rows.append(
                "resnet50_widths",
                {
                    "round_to": round_to,
                    "macs_ratio": macs_ratio,
                    "latency_ratio": ratio.value,
                    "latency_ratio_95": [ratio.low, ratio.high],
                    "quotient": ratio.value / macs_ratio,
                    "p50_ms": [side.p50_ms for side in timed.latencies],
                    "p20_p80_ms": [[side.p20_ms, side.p80_ms] for side in timed.latencies],
                    "cpu_ms": [side.cpu_ms for side in timed.latencies],
                    "num_samples": [side.num_samples for side in timed.latencies],
                    "num_launches": timed.num_launches,
                    "busy": timed.busy,
                    "threads": 1,
                    "batch_size": 1,
                    "dtype": "float32",
                    "runtime": timed.runtime,
                    "onnx_max_relative_error": file.max_relative_error,
                    "mask_max_relative_error": certificate.max_relative_error,
                },
            )


def ours(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return compact(model, Magnitude()(trace(model, x), Budget.parse("keep=0.5")))


def torch_pruning_magnitude(model: nn.Module, x: torch.Tensor) -> nn.Module:
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return model


def planning(factory: Callable[[], nn.Module], x: torch.Tensor) -> None:
    """Each call gets a model of its own, because Torch-Pruning cuts in place."""
    tools = {"sparsekit": ours, "torch_pruning": torch_pruning_magnitude}
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    num_params = {}
    for repeat in range(REPEATS + 1):
        for name, tool in tools.items():
            model = factory()
            start = time.perf_counter()
            small = tool(model, x)
            if repeat:  # the first round warms both up
                seconds[name].append(time.perf_counter() - start)
            num_params[name] = sum(p.numel() for p in small.parameters())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows.append(
        "resnet50_planning",
        {
            "what": "trace + plan + compact, keep=0.5 everywhere",
            "median_s": medians,
            "min_max_s": {name: [min(values), max(values)] for name, values in seconds.items()},
            "ratio": medians["sparsekit"] / medians["torch_pruning"],
            "repeats": REPEATS,
            "num_params": num_params,
            "torch_pruning": version("torch-pruning"),
            "torch_threads": torch.get_num_threads(),
        },
    )


def main() -> None:
    def factory() -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = torchvision.models.resnet50(weights=None).eval()
        return network

    x = torch.randn(2, 3, 224, 224)
    planning(factory, x)
    latency(factory(), x)


if __name__ == "__main__":
    main()
