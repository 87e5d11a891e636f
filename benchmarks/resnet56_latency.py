"""ResNet-56 on CIFAR-10 at a latency budget, beside MACs budgets that reach the same latency: accuracy of each.

    python -m benchmarks.resnet56_latency WEIGHTS.safetensors CIFAR10_FOLDER [--budget TEXT] [--num-test N]

Filters by their norms, batch statistics and least squares from 1,000 training images, no fine-tuning, ONNX Runtime on
one thread. A row with three networks, all timed in turns in one run at the end:

- `latency`: what the closed loop makes of the latency budget;
- `macs`: `macs<=r`, one keep ratio for all groups;
- `inner`: one keep ratio for the first convolutions of the blocks, residual streams whole, as `latency` leaves them;

the last two cut until their files take the latency of the first to 1 %.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import rows
from sparsekit import Budget, compact, compress, export_onnx, measure_latency, trace
from sparsekit.artifact import Artifact
from sparsekit.cost import num_macs
from sparsekit.data import image_task
from sparsekit.images import load_images, stratified_order
from sparsekit.networks import build_network, load_weights
from sparsekit.pruners.magnitude import Magnitude
from sparsekit.recipe import Recipe
from sparsekit.task import Task

NUM_IMAGES, TOLERANCE, MAX_TRIES = 1000, 0.01, 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet56_latency", description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("folder")
    parser.add_argument("--budget", default="latency<=0.6x")
    parser.add_argument("--num-test", type=int, default=10000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dense = build_network("resnet56")
    load_weights(dense, Path(chosen.weights))
    dense.eval()
    images = load_images(f"imagefolder:{chosen.folder}")
    test = stratified_order(images.test_labels, 0)[: chosen.num_test]
    images = dataclasses.replace(images, test_images=images.test_images[test], test_labels=images.test_labels[test])
    task = image_task(images, limit=NUM_IMAGES, batch_size=100, augment=())
    with tempfile.TemporaryDirectory() as folder:
        rows.append("resnet56_latency", _measure(dense, task, chosen.budget, Path(folder)))


def _measure(dense: nn.Module, task: Task, budget: str, folder: Path) -> dict[str, object]:
    inputs = task.example_inputs
    graph = trace(dense, inputs)

    def made(budget: str) -> Artifact:
        recipe = Recipe(
            model="resnet56",
            method="magnitude",
            options={"norm": "l1"},
            budget=budget,
            recover="lsq",
            num_images=NUM_IMAGES,
            finetune_epochs=0,
            allow_slower=True,
        )
        return compress(dense, recipe, task)

    def equally_fast(budget_of: Callable[[float], str]) -> str:
        """The budget whose file takes as long as ours."""
        low, high = 0.05, 1.0
        for _ in range(MAX_TRIES):
            middle = (low + high) / 2
            small = compact(dense, Magnitude(norm="l1")(graph, Budget.parse(budget_of(middle))))
            path = export_onnx(small, inputs, folder / "tried.onnx").path
            ratio = measure_latency([files[1], path], threads=1, resolve=TOLERANCE, max_seconds=60).ratios[0].value
            if abs(ratio - 1) < TOLERANCE:
                break
            low, high = (low, middle) if ratio > 1 else (middle, high)
        return budget_of(middle)

    files = [export_onnx(copy.deepcopy(dense), inputs, folder / "dense.onnx").path]
    found: dict[str, dict[str, object]] = {}
    budgets: dict[str, Callable[[float], str]] = {
        "latency": lambda _: budget,
        "macs": lambda ratio: f"macs<={ratio:.4f}x",
        "inner": lambda ratio: f"layer*.conv1={ratio:.4f}",
    }
    for name, budget_of in budgets.items():
        start = time.perf_counter()
        text = equally_fast(budget_of) if len(files) > 1 else budget
        artifact = made(text)
        path = folder / f"{name}.onnx"
        path.write_bytes(artifact.onnx)
        files.append(path)
        found[name] = {
            "budget": text,
            "accuracy": artifact.report.compact.accuracy,
            "macs_ratio": artifact.report.compact.num_macs / num_macs(graph),
            "widths": [(row.layer, row.kept, row.dense) for row in artifact.report.widths],
            "seconds": time.perf_counter() - start,
        }
    timed = measure_latency(files, threads=1, resolve=TOLERANCE, max_seconds=180)
    for row, ratio in zip(found.values(), timed.ratios, strict=True):
        row |= {"latency_ratio": ratio.value, "latency_ratio_95": [ratio.low, ratio.high]}
    return {
        "budget": budget,
        "dense_accuracy": task.evaluate(dense),
        "num_images": NUM_IMAGES,
        "networks": found,
        "threads": 1,
        "batch_size": 1,
        "cpu_ms": [side.cpu_ms for side in timed.latencies],
        "num_launches": timed.num_launches,
        "busy": timed.busy,
        "runtime": timed.runtime,
    }


if __name__ == "__main__":
    main()
