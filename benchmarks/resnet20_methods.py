"""All methods on ResNet-20, CIFAR-10: the same channels kept, the same images, the same number of epochs.

    python -m benchmarks.resnet20_methods WEIGHTS.safetensors CIFAR10_FOLDER [--methods NAME ...] [--keep RATIO ...]
        [--seeds N] [--limit IMAGES] [--epochs N] [--finetune-epochs N]

The first convolution of every block is pruned, its option A shortcuts stay. A method that trains has `--epochs` and
then `--finetune-epochs`; one that selects at once is fine-tuned for all of them. Accuracy is over all 10,000 test
images. Runs that have a row are left out, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import torch
from torch import nn

from benchmarks import rows
from sparsekit import Budget, compact, trace
from sparsekit.ingredients import build
from sparsekit.pruners import PRUNERS, UNSTRUCTURED
from sparsekit.recipe import Recipe
from sparsekit.task import Schedule, Task

LR, WEIGHT_DECAY, BATCH_SIZE = 0.01, 5e-4, 64
OWN = {  # what a method needs to be itself in so few steps
    "sfp": {"lr": 0.001},  # its zero filters behind BatchNorm get gradients that explode at 0.01
    "chipnet": {"lr": 0.001},  # AdamW
    "greg1": {"update_every": 5, "step": 0.05},  # the paper's penalty grows over 100,000 steps
    "greg2": {"update_every": 5, "step": 0.05},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet20_methods", description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("folder")
    parser.add_argument("--methods", nargs="+", default=[name for name in PRUNERS if name not in UNSTRUCTURED])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--finetune-epochs", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(chosen.seeds):
        recipe = Recipe(
            model="resnet20",
            weights=chosen.weights,
            data=f"imagefolder:{chosen.folder}",
            limit=chosen.limit,
            batch_size=BATCH_SIZE,
            seed=seed,
        )
        model, task, _ = build(recipe)
        assert task is not None
        for keep in chosen.keep:
            for method in chosen.methods:
                settings = {
                    "method": method,
                    "keep": keep,
                    "seed": seed,
                    "limit": chosen.limit,
                    "epochs": chosen.epochs,
                    "finetune_epochs": chosen.finetune_epochs,
                }
                if not _known(settings):
                    rows.append("resnet20_methods", settings | _run(model.eval(), task, settings))


def _known(settings: dict[str, Any]) -> bool:
    path = rows.RESULTS / "resnet20_methods.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(settings.items() <= json.loads(line).items() for line in lines)


def _run(model: nn.Module, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Accuracy after fine-tuning."""
    stages: list[str] = []

    def fit(*args: Any, stage: str, **options: Any) -> Any:
        stages.append(stage)
        return task.fit(*args, stage=stage, **options)

    start = time.process_time()
    options = {name: value for name, value in _options(settings).items() if name in _fields(settings["method"])}
    graph = trace(model, task.example_inputs)
    budget = Budget.parse(f"layer*.conv1={settings['keep']}")
    watched = dataclasses.replace(task, fit=fit)
    plan = PRUNERS[settings["method"]](**options)(graph, budget, watched)
    small = compact(model, plan)
    trains = "prune" in stages
    epochs = settings["finetune_epochs"] + (0 if trains else settings["epochs"])
    schedule = Schedule(epochs=epochs, lr=LR, weight_decay=WEIGHT_DECAY, seed=settings["seed"])
    task.fit(small, task, schedule, stage="finetune")
    return {
        "trains": trains,
        "kept": plan.kept,
        "accuracy": task.evaluate(small),
        "cpu_s": time.process_time() - start,
    }


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    return {"epochs": settings["epochs"], "lr": LR, "weight_decay": WEIGHT_DECAY, "seed": settings["seed"]} | OWN.get(
        settings["method"], {}
    )


def _fields(method: str) -> set[str]:
    built = PRUNERS[method]()
    assert dataclasses.is_dataclass(built)
    return {field.name for field in dataclasses.fields(built)}


if __name__ == "__main__":
    main()
