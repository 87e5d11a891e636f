"""The stages of one compression, run one after the other: what is trained, evaluated and timed, and what each said."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from sparsekit import training
from sparsekit.errors import UsageError
from sparsekit.export import OnnxFile
from sparsekit.fitting import Bench
from sparsekit.ingredients import build_schedule, follow
from sparsekit.plan import PruningPlan
from sparsekit.quantization import QuantizedFile, quantize_onnx
from sparsekit.recipe import Recipe
from sparsekit.recovery import RECOVERIES, recover
from sparsekit.targets import parse_target
from sparsekit.task import Progress, Record, Schedule, Task


class Stages:
    """Runs the stages of one compression and keeps what each said: history, accuracies, seconds."""

    def __init__(self, recipe: Recipe, recipe_hash: str, folder: Path, progress: Progress | None) -> None:
        self.recipe, self.recipe_hash = recipe, recipe_hash
        self.folder = folder
        self.progress = progress or (lambda *_: None)
        self.history: dict[str, list[Record]] = {}
        self.accuracies: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.quantized: QuantizedFile | None = None

    def watch(self, task: Task | None) -> Task | None:
        """The task with a training loop that resumes, reports progress and leaves its history here."""
        if task is None:
            return None
        fit = task.fit
        if fit is training.fit:
            fit = partial(training.fit, checkpoint_dir=self.folder, progress=self.progress)

        def recorded(
            model: nn.Module,
            task: Task,
            schedule: Schedule,
            *,
            stage: str,
            observe: Callable[[], Record] | None = None,
        ) -> list[Record]:
            schedule = follow(self.recipe, schedule, stage=stage)
            self.history[stage] = fit(model, task, schedule, stage=stage, observe=observe)
            return self.history[stage]

        return dataclasses.replace(task, fit=recorded)

    def train(self, network: nn.Module, task: Task | None, stage: Literal["dense", "finetune"]) -> None:
        """Train in place, where there is a task and something to do."""
        schedule = build_schedule(self.recipe, stage)
        if task is None or not schedule.epochs:
            return
        with self.timed(stage):
            task.fit(network, task, schedule, stage=stage)

    def recover(self, dense: nn.Module, small: nn.Module, plan: PruningPlan, images: Tensor, task: Task | None) -> None:
        """Repair `small` in place without labels; how accurate each step leaves it is looked at, not chosen by."""
        with self.timed("recover"):
            recover(
                dense,
                small,
                plan,
                images,
                steps=RECOVERIES[self.recipe.recover],
                budget_s=math.inf if self.recipe.recover_budget_s is None else self.recipe.recover_budget_s,
                observe=lambda step: self.evaluate(small, task, f"after {step}"),
                progress=self.progress,
                seed=self.recipe.seed,
            )

    def evaluate(self, network: nn.Module, task: Task | None, name: str) -> None:
        """Accuracy on the held-out data, kept under `name`."""
        if task is not None:
            with self.timed(f"evaluate {name}"):
                self.accuracies[name] = task.evaluate(network)

    @property
    def final_accuracy(self) -> float | None:
        """Of what is shipped."""
        return self.accuracies.get("int8", self.accuracies.get("compact"))

    def bench(self, images: Tensor | None) -> Bench:
        """Where the recipe's files are timed, and how they are finished.

        Args:
            images: unlabelled, which the ranges of integers come from.

        Raises:
            UsageError: an unknown target, or one that takes no ONNX file in int8.
            MeasurementError: one whose runtime is not installed.
        """
        target = parse_target(self.recipe.target)
        if self.recipe.quantize == "none" or images is None:
            return Bench(target, self.recipe.threads, self.folder, self.progress)
        if target.runtime.suffix != ".onnx":
            raise UsageError(f"quantize int8: the target {target.name} takes no ONNX file; choose onnxruntime")
        return Bench(target, self.recipe.threads, self.folder, self.progress, partial(self._in_integers, images))

    def _in_integers(self, images: Tensor, file: OnnxFile) -> OnnxFile:
        """The file in int8; its `max_relative_error` stays that of the float file, its distance is in `quantized`."""
        self.progress("quantize", 0, 0, {})
        self.quantized = quantize_onnx(file.path, images.cpu(), file.path.with_suffix(".int8.onnx"))
        found = self.quantized
        return dataclasses.replace(file, path=found.path, size_bytes=found.size_bytes, num_nodes=found.num_nodes)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Announce a step and keep how long it took."""
        self.progress(step, 0, 0, {})
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
