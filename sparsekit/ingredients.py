"""What a recipe names, as values: pruner, task, network with its weights, example inputs."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.data import image_task, load_task, unlabelled_images
from sparsekit.errors import UsageError, nearest
from sparsekit.images import load_images
from sparsekit.networks import build_network, load_weights
from sparsekit.pruner import Pruner, ScheduleOptions
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe
from sparsekit.recovery import unlabelled
from sparsekit.recovery.synthesis import synthesise_inputs
from sparsekit.task import Progress, Schedule, Task

# Keys that mean the same to the recipe and to every method; `gamma` or `momentum`, say, may be others' words too.
_SHARED = ("epochs", "lr", "weight_decay", "label_smoothing", "precision", "seed", "round_to")


def build_pruner(recipe: Recipe) -> Pruner:
    """The recipe's method, its options set; those in `_SHARED` come from the recipe's keys of the same name.

    Raises:
        UsageError: an unknown method or option, an option of the wrong type, or an optimizer other than the only one
            that the method's own rates hold for.
    """
    if recipe.method not in PRUNERS:
        raise UsageError(f"method {recipe.method!r}: unknown{nearest(recipe.method, list(PRUNERS))}")
    factory = PRUNERS[recipe.method]
    parameters = inspect.signature(factory).parameters
    shared = [name for name in _SHARED if name in parameters]
    own = [name for name in parameters if name not in shared]
    for name, value in recipe.options.items():
        if name not in own:
            advice = nearest(name, own) if own else "; it has none"
            raise UsageError(f"{recipe.method}: unknown option {name!r}{advice}")
        kind = type(parameters[name].default)
        right = isinstance(value, (float, int) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{recipe.method}: option {name} must be {kind.__name__}, got {value!r}")
    pruner = factory(**{name: getattr(recipe, name) for name in shared} | dict(recipe.options))
    only = pruner.only_optimizer if isinstance(pruner, ScheduleOptions) else None
    if only and recipe.optimizer not in (None, only):
        raise UsageError(
            f"{recipe.method}: optimizer {recipe.optimizer!r} would train the method's own parameters at wrong rates; "
            f"choose {only!r}, or none"
        )
    return pruner


def build_schedule(recipe: Recipe, stage: Literal["dense", "finetune"]) -> Schedule:
    """How the recipe trains the dense network, or fine-tunes the small one, before `follow`."""
    epochs, lr = recipe.dense_epochs, recipe.dense_lr
    if stage == "finetune":
        epochs = recipe.epochs if recipe.finetune_epochs is None else recipe.finetune_epochs
        lr = recipe.finetune_lr
    return Schedule(
        epochs=epochs,
        lr=lr,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
        precision=recipe.precision,
        seed=recipe.seed,
    )


def follow(recipe: Recipe, schedule: Schedule, *, stage: str) -> Schedule:
    """A stage's schedule with the recipe's optimiser and decay; what the recipe leaves open stays as it is.

    Methods make their own schedules, and this is how the recipe reaches them all alike: every stage other than
    "dense" and "finetune" is the method's.
    """
    outside = {"dense": recipe.dense_milestones, "finetune": recipe.finetune_milestones}
    milestones = outside.get(stage, recipe.milestones)
    if milestones is not None:
        schedule = dataclasses.replace(schedule, decay="multistep", milestones=milestones, gamma=recipe.gamma)
    return dataclasses.replace(
        schedule,
        optimizer=recipe.optimizer or schedule.optimizer,
        momentum=recipe.momentum,
        warmup_epochs=recipe.warmup_epochs,
    )


def build_task(recipe: Recipe, *, progress: Progress | None = None) -> tuple[Task | None, dict[str, int]]:
    """The recipe's task, None without data, and what a network must fit: num_classes and in_channels."""
    if recipe.data is None:
        return None, {"num_classes": 1000 if ":" in recipe.model else 10, "in_channels": 3}
    if ".py:" in recipe.data:
        task = load_task(recipe.data)
        return task, {"in_channels": task.example_inputs[0].shape[1]}
    images = load_images(
        recipe.data,
        data_root=Path(recipe.data_root) if recipe.data_root else None,
        download=recipe.download,
        image_size=recipe.image_size,
        crop_pct=recipe.crop_pct,
        seed=recipe.seed,
        progress=partial(_decoding, progress) if progress else None,
    )
    task = image_task(
        images, batch_size=recipe.batch_size, seed=recipe.seed, augment=recipe.augment, limit=recipe.limit
    )
    return task, {"num_classes": images.num_classes, "in_channels": images.train_images.shape[1]}


def build(recipe: Recipe, *, progress: Progress | None = None) -> tuple[nn.Module, Task | None, tuple[Tensor, ...]]:
    """The dense network with its weights, the task, and example inputs, from the recipe's names.

    Without data the example is seeded noise of `image_size` pixels (224 for networks named `source:name`, else 32).
    """
    build_pruner(recipe)
    Budget.parse(recipe.budget)
    task, sizes = build_task(recipe, progress=progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_network(recipe.model, **sizes)
        side = recipe.image_size or (224 if ":" in recipe.model else 32)
        inputs = task.example_inputs if task else (torch.randn(2, sizes["in_channels"], side, side),)
    if recipe.weights is not None:
        load_weights(model, Path(recipe.weights))
    return model, task, inputs


def recovery_images(
    recipe: Recipe, model: nn.Module, task: Task | None, inputs: tuple[Tensor, ...], *, progress: Progress | None = None
) -> Tensor:
    """What to recover with: the recipe's folder, training images without labels, or made ones.

    Raises:
        UsageError: neither images nor BatchNorm statistics to make some of.
        DataError: the folder holds no images.
    """
    if recipe.calibrate is not None:
        return unlabelled_images(
            recipe.calibrate,
            image_size=inputs[0].shape[-1],
            crop_pct=recipe.crop_pct,
            num_images=recipe.num_images,
            seed=recipe.seed,
            progress=partial(_decoding, progress) if progress else None,
        )
    if task is not None:
        return unlabelled(task, recipe.num_images)
    return synthesise_inputs(model, inputs[0], num_images=recipe.num_images, seed=recipe.seed)


def _decoding(progress: Progress, done: int, total: int) -> None:
    progress("decode images", done, total, {})
