"""What each runtime makes of the same networks: time, precision, output error, cold start, memory.

    python -m benchmarks.targets [openvino 'openvino?precision=native' ...]

A row per runtime that is installed and network: ResNet-18 first, MobileNetV2 beside it, one thread, batch 1, random
weights. Runtimes are compared by `cpu_ms`; their rows come from separate runs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torchvision

from benchmarks import rows
from sparsekit import export_onnx, measure_latency
from sparsekit.errors import MeasurementError
from sparsekit.targets import parse_target

NETWORKS = ("resnet18", "mobilenet_v2")
TARGETS = (
    *("onnxruntime", "openvino", "openvino?precision=native", "ncnn", "ncnn?precision=native", "executorch"),
    *("torch", "torch:compile"),
)


def run(name: str, folder: Path) -> None:
    target = parse_target(name)
    files = []
    for network in NETWORKS:
        torch.manual_seed(0)
        model, x = getattr(torchvision.models, network)(weights=None).eval(), (torch.randn(1, 3, 224, 224),)
        onnx_path = folder / f"{network}.onnx"
        if not onnx_path.exists():
            export_onnx(model, x, onnx_path)
        files.append(target.prepare(model, x, onnx_path, folder))
    timed = measure_latency(files, target=target)
    for network, side in zip(NETWORKS, timed.latencies, strict=True):
        rows.append(
            "targets",
            {
                "target": name,
                "network": network,
                "runtime": timed.runtime,
                "precision": side.precision,
                "output_error": side.output_error,
                "cpu_ms": side.cpu_ms,
                "p20_p50_p80_p99_ms": [side.p20_ms, side.p50_ms, side.p80_ms, side.p99_ms],
                "cold_start_ms": side.cold_start_ms,
                "peak_memory_bytes": side.peak_memory_bytes,
                "wait_share": side.wait_share,
                "num_samples": side.num_samples,
                "num_launches": timed.num_launches,
                "threads": side.threads,
                "batch_size": side.batch_size,
                "busy": timed.busy,
            },
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or TARGETS:
            try:
                run(name, Path(folder))
            except MeasurementError as error:
                print(error)


if __name__ == "__main__":
    main()
