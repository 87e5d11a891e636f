"""LeNet-300-100 on Fashion-MNIST: pruning alone, neuron merging and the NMF foil, beside the authors' numbers.

    python -m benchmarks.neuron_merging_lenet WEIGHTS.safetensors FASHION_MNIST_ROOT

The weights are the authors' own, and the accuracies are over all 10,000 test images: merging by l1 must give theirs to
the last digit. They print one number for the foil, the average over the pruning ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import rows
from sparsekit import Budget, compact, trace
from sparsekit.data import image_task
from sparsekit.images import load_images
from sparsekit.models import MODELS
from sparsekit.networks import load_weights
from sparsekit.plan import PruningPlan
from sparsekit.pruners.neuron_merging import NeuronMerging

# Kim et al. 2020, README of the code: percent pruned -> accuracy in percent alone and merged, by l1.
PUBLISHED = {50: (88.40, 88.69), 60: (85.17, 86.92), 70: (71.26, 82.75), 80: (66.76, 80.02)}
PUBLISHED_DENSE, PUBLISHED_NMF = 89.80, 15.80


def main(weights: str, root: str) -> None:
    torch.set_num_threads(1)
    network = MODELS["lenet_300_100"]().eval()
    load_weights(network, Path(weights))
    images = load_images("fashion-mnist", data_root=Path(root), download=False)
    evaluate = image_task(replace(images, mean=(0.5,), std=(0.5,))).evaluate
    rows.append(
        "neuron_merging_lenet",
        {
            "num_images": len(images.test_images),
            "dense_percent": _percent(evaluate, network),
            "published_dense_percent": PUBLISHED_DENSE,
            "published_nmf_mean_percent": PUBLISHED_NMF,
            "rows": [_row(network, percent, evaluate) for percent in PUBLISHED],
        },
    )


def _row(network: nn.Module, percent: int, evaluate: Callable[[nn.Module], float]) -> dict[str, Any]:
    graph = trace(network, torch.zeros(2, 1, 28, 28))
    budget = Budget(keep=(("*", 1 - percent / 100),))
    values: dict[str, Any] = {"pruned_percent": percent, "published_l1": PUBLISHED[percent]}
    for criterion in ("l1", "l2", "l2-gm"):
        plan = NeuronMerging(criterion=criterion, threshold=0.45)(graph, budget)
        alone = compact(network, PruningPlan(plan.keep))
        values[criterion] = (_percent(evaluate, alone), _percent(evaluate, compact(network, plan)))
        values[f"{criterion}_merged"] = [
            int(merge[~plan.keep[group]].count_nonzero()) for group, merge in plan.merge.items()
        ]
    foil = NeuronMerging(decomposition="nmf")(graph, budget)
    return values | {"nmf": _percent(evaluate, compact(network, foil))}


def _percent(evaluate: Callable[[nn.Module], float], network: nn.Module) -> float:
    return round(100 * evaluate(network), 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
