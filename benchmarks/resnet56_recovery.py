"""ResNet-56 on CIFAR-10 without training: what each step of recovery gives back, from unlabelled images.

    python -m benchmarks.resnet56_recovery WEIGHTS.safetensors CIFAR10_FOLDER [--keep RATIO ...] [--ways NAME ...]
        [--num-images N] [--num-test N] [--distill-s SECONDS] [--threads N]

The first convolution of every block keeps a share of its channels. Accuracy is over the test images; the unlabelled
images are training images, as many of each class, whose labels nothing reads; one in eight only serves to find out
which step helped. Seconds are those of selection and repair together; distillation gets what the other steps leave of
its budget. A row per way and keep ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import rows
from sparsekit import Budget, compact, trace
from sparsekit.data import image_task
from sparsekit.images import load_images, stratified_order
from sparsekit.networks import build_network, load_weights
from sparsekit.pruners import PRUNERS
from sparsekit.recovery import recover, unlabelled
from sparsekit.task import Batch, Task

# name -> method, its options, steps of recovery
WAYS: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "l1": ("magnitude", {"norm": "l1"}, ()),
    "neuron merging": ("neuron_merging", {}, ()),
    "l1, bn": ("magnitude", {"norm": "l1"}, ("bn",)),
    "l1, lsq": ("magnitude", {"norm": "l1"}, ("lsq",)),
    "l1, bn + bias + lsq": ("magnitude", {"norm": "l1"}, ("bn", "bias", "lsq")),
    "neuron merging, bn": ("neuron_merging", {}, ("bn",)),
    "column subset without merging": ("column_subset", {"repair": False}, ()),
    "column subset": ("column_subset", {}, ()),
    "column subset, bn": ("column_subset", {}, ("bn",)),
    "column subset, lsq": ("column_subset", {}, ("lsq",)),
    "column subset, bn + bias + lsq": ("column_subset", {}, ("bn", "bias", "lsq")),
    "l1, bn + bias + lsq + distill": ("magnitude", {"norm": "l1"}, ("bn", "bias", "lsq", "distill")),
    "column subset, bn + bias + lsq + distill": ("column_subset", {}, ("bn", "bias", "lsq", "distill")),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet56_recovery", description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("folder")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=10000)
    parser.add_argument("--distill-s", type=float, default=300.0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dense = build_network("resnet56")
    load_weights(dense, Path(chosen.weights))
    task = _task(chosen.folder, num_images=chosen.num_images, num_test=chosen.num_test)
    images, accuracy = unlabelled(task, chosen.num_images), task.evaluate(dense)
    settings = {name: getattr(chosen, name) for name in ("num_images", "num_test", "distill_s", "threads")}
    for keep in chosen.keep:
        for way in chosen.ways:
            values = {"way": way, "keep": keep, "dense_accuracy": accuracy} | settings
            if WAYS[way][0] in PRUNERS:
                rows.append("resnet56_recovery", values | _run(dense, task, images, way, keep, chosen.distill_s))


def _task(folder: str, *, num_images: int, num_test: int) -> Task:
    """Training images as they are, in batches whose targets are no labels, and the first test images of all classes."""
    images = load_images(f"imagefolder:{folder}")
    test = stratified_order(images.test_labels, 0)[:num_test]
    images = dataclasses.replace(images, test_images=images.test_images[test], test_labels=images.test_labels[test])
    task = image_task(images, limit=num_images, batch_size=100, augment=())

    def batches(epoch: int) -> Iterator[Batch]:
        for inputs, _ in task.batches(epoch):
            yield inputs, torch.full((len(inputs),), -1)

    return dataclasses.replace(task, batches=batches)


def _run(dense: nn.Module, task: Task, images: Tensor, way: str, keep: float, distill_s: float) -> dict[str, object]:
    method, options, steps = WAYS[way]
    start = time.perf_counter()
    graph = trace(dense, task.example_inputs)
    plan = PRUNERS[method](**options)(graph, Budget.parse(f"layer*.conv1={keep}"), task)
    small = compact(dense, plan)
    seconds = time.perf_counter() - start
    budget_s = distill_s if "distill" in steps else math.inf
    records = recover(dense, small, plan, images, steps=steps, budget_s=budget_s)
    return {
        "accuracy": task.evaluate(small),
        "seconds": seconds + sum(record.seconds for record in records),
        "steps": [dataclasses.asdict(record) for record in records],
    }


if __name__ == "__main__":
    main()
