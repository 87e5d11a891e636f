"""Sinkhorn iterations per batch: accuracy and time of transport against T, as in Figure 4 of the paper.

    python -m benchmarks.transport_inner_steps [T ...]

digits_resnet at a tenth of its MACs, three orders of the batches. All start from the same trained network; accuracy is
after the masks' training and the cut, and after fine-tuning; seconds are CPU time of the masks' training, one thread.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from torch import nn

from benchmarks import rows
from sparsekit.budget import Budget
from sparsekit.compaction import compact
from sparsekit.data import image_task
from sparsekit.graph import trace
from sparsekit.images import load_images
from sparsekit.ingredients import build
from sparsekit.pruners.transport import Transport
from sparsekit.recipe import Recipe
from sparsekit.task import Schedule, Task

INNER_STEPS = (1, 5, 20, 100)
SEEDS = (0, 1, 2)
BUDGET, EPSILON, PRUNE_EPOCHS, FINETUNE_EPOCHS = "macs<=0.1x", 1.0, 4, 2


def pruned(dense: nn.Module, task: Task, *, inner_steps: int, seed: int) -> tuple[float, float, float]:
    """Accuracy before and after fine-tuning, and the seconds that the masks' training took."""
    method = Transport(inner_steps=inner_steps, epsilon=EPSILON, epochs=PRUNE_EPOCHS, seed=seed)
    graph = trace(dense, task.example_inputs)
    start = time.process_time()
    plan = method(graph, Budget.parse(BUDGET), task)
    seconds = time.process_time() - start
    small = compact(dense, plan, task.example_inputs)
    before = task.evaluate(small)
    task.fit(small, task, Schedule(FINETUNE_EPOCHS, lr=0.01, seed=seed), stage="finetune")
    return before, task.evaluate(small), seconds


def main(*inner_steps: str) -> None:
    torch.set_num_threads(1)
    dense, *_ = build(Recipe())
    images = load_images("digits")
    tasks = [image_task(images, batch_size=128, seed=seed) for seed in SEEDS]  # the seed orders the batches
    task = tasks[0]
    task.fit(dense, task, Schedule(epochs=12, lr=0.1), stage="dense")
    dense_accuracy = task.evaluate(dense)
    runs: dict[int, list[tuple[float, float, float]]] = {int(t): [] for t in inner_steps or INNER_STEPS}
    for seed, task in zip(SEEDS, tasks, strict=True):
        for num, done in runs.items():  # in turns, so that a busy machine slows all of them
            done.append(pruned(copy.deepcopy(dense), task, inner_steps=num, seed=seed))
    for num, done in runs.items():
        before, after, seconds = (list(values) for values in zip(*done, strict=True))
        values = {
            "network": "digits_resnet",
            "data": "digits",
            "budget": BUDGET,
            "prune_epochs": PRUNE_EPOCHS,
            "finetune_epochs": FINETUNE_EPOCHS,
            "dense_accuracy": dense_accuracy,
            "inner_steps": num,
            "seeds": list(SEEDS),
            "accuracy_pruned": before,
            "accuracy": after,
            "accuracy_mean": statistics.mean(after),
            "accuracy_std": statistics.stdev(after),
            "cpu_seconds": seconds,
            "epsilon": EPSILON,
        }
        rows.append("transport_inner_steps", values)


if __name__ == "__main__":
    main(*sys.argv[1:])
