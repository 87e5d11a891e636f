"""compress(model, recipe, task) -> Artifact: the only place that wires the rest together.

`compress` works on values; `run` starts from a recipe's names and ends with a saved folder.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit import training
from sparsekit.artifact import Artifact
from sparsekit.budget import Budget
from sparsekit.compaction import Certificate, certify, compact
from sparsekit.cost import num_macs
from sparsekit.data import image_task, load_task
from sparsekit.environment import Environment
from sparsekit.errors import PlanError, UsageError, nearest
from sparsekit.export import export_onnx
from sparsekit.graph import ChannelGraph, trace
from sparsekit.images import load_images
from sparsekit.latency import LatencyComparison, measure_latency, width_warning
from sparsekit.networks import build_network, load_weights
from sparsekit.plan import PruningPlan
from sparsekit.pruner import Pruner
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe
from sparsekit.report import Measurement, Report, Width
from sparsekit.selection import allocate
from sparsekit.task import Record, Schedule, Task

Progress = Callable[[str, int, int, Record], None]  # stage, steps done, steps in all (0: unknown), latest record


def compress(
    model: nn.Module,
    recipe: Recipe,
    task: Task | None,
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Prune, cut, certify, fine-tune, export, verify and measure `model`, which stays as it is.

    Args:
        model: the dense network; trained first when the recipe names no weights and there is a task.
        recipe: budget, method and schedules; its names of model and data only document the run.
        task: data and training loop; None for data-free methods, which are then not fine-tuned either.
        example_inputs: one forward's positional inputs, batch first; the task's unless given.
        work_dir: where checkpoints and ONNX files go; with it an interrupted run continues where it was.
        progress: called as stages advance.

    Raises:
        BudgetError: the budget cannot be met; it names the floor.
        PlanError: the small network is not what the plan says.
        ExportError: the ONNX file is not the network.
    """
    inputs = example_inputs or (task.example_inputs if task else ())
    if not inputs:
        raise UsageError("compress: without a task, example_inputs must be given")
    folder = work_dir or Path(tempfile.mkdtemp(prefix="sparsekit-"))
    stages = _Stages(recipe, folder, progress or (lambda *_: None))
    task = stages.watch(task)
    pruner, budget = build_pruner(recipe), Budget.parse(recipe.budget)
    allocate(trace(model, inputs), budget, round_to=recipe.round_to)  # an impossible budget fails before training

    dense = copy.deepcopy(model).eval()
    if recipe.weights is None:
        stages.train(dense, task, "dense", epochs=recipe.dense_epochs, lr=recipe.dense_lr)
    stages.evaluate(dense, task, "dense")
    graph = trace(dense, inputs)
    with stages.timed("prune"):
        plan = pruner(graph, budget, task)
    small, certificate = _cut(dense, plan, inputs)
    stages.evaluate(small, task, "pruned")
    stages.train(small, task, "finetune", epochs=recipe.epochs, lr=recipe.finetune_lr)
    stages.evaluate(small, task, "compact")

    with stages.timed("export"):
        dense_file = export_onnx(dense, inputs, folder / "dense.onnx")
        file = export_onnx(small, inputs, folder / "model.onnx")
    certificate = dataclasses.replace(certificate, onnx_max_relative_error=file.max_relative_error)
    with stages.timed("latency"):
        timed = measure_latency(
            [dense_file.path, file.path], threads=recipe.threads, progress=lambda *n: stages.progress("latency", *n, {})
        )
    networks = ("dense", dense, graph, dense_file.size_bytes), ("compact", small, trace(small, inputs), file.size_bytes)
    measured = [
        Measurement(
            accuracy=stages.accuracies.get(name),
            num_params=sum(p.numel() for p in network.parameters()),
            num_macs=num_macs(graph_),
            size_bytes=size_bytes,
            latency_ms=latency.p50_ms,
            latency_p20_ms=latency.p20_ms,
            latency_p80_ms=latency.p80_ms,
        )
        for (name, network, graph_, size_bytes), latency in zip(networks, timed.latencies, strict=True)
    ]
    report = _report(recipe, measured, graph, plan, certificate, timed, stages)
    return Artifact(small.eval(), plan, file.path, report, recipe)


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Build what `recipe` names, compress it and save the artifact as folder `out`.

    Unfinished work lies in `<out>.partial` and is removed at the end.

    Args:
        recipe: names of model, weights and data, and how to compress.
        out: the artifact's folder.
        overwrite: replace `out`, and forget unfinished work.
        resume: continue unfinished work of the same recipe; a finished `out` is returned as it is.
        progress: as for `compress`.

    Raises:
        UsageError: `out` or unfinished work is in the way, or the work to resume is of another recipe.
        SparsekitError: whatever the parts raise, before `out` is touched.
    """
    out = Path(out)
    work_dir = out.with_name(f"{out.name}.partial")
    if out.exists() and resume:
        _check_same(recipe, out)
        return Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists; choose another --out, or --overwrite")
    if work_dir.exists() and not (overwrite or resume):
        raise UsageError(f"{work_dir}: holds an interrupted run; --resume continues it, --overwrite starts anew")
    model, task, example_inputs = build(recipe)
    if work_dir.exists() and resume:
        _check_same(recipe, work_dir)
    else:
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        (work_dir / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    artifact = compress(model, recipe, task, example_inputs=example_inputs, work_dir=work_dir, progress=progress)
    artifact.save(out, overwrite=overwrite)
    shutil.rmtree(work_dir)
    return artifact.report


def build_pruner(recipe: Recipe) -> Pruner:
    """The recipe's method, its options set; options of the same name as a recipe key come from there.

    Raises:
        UsageError: an unknown method or option, or an option of the wrong type.
    """
    if recipe.method not in PRUNERS:
        raise UsageError(f"method {recipe.method!r}: unknown{nearest(recipe.method, list(PRUNERS))}")
    factory = PRUNERS[recipe.method]
    parameters = inspect.signature(factory).parameters
    shared = [field.name for field in dataclasses.fields(Recipe) if field.name in parameters]
    own = [name for name in parameters if name not in shared]
    for name, value in recipe.options.items():
        if name not in own:
            raise UsageError(f"{recipe.method}: unknown option {name!r}{nearest(name, own)}")
        kind = type(parameters[name].default)
        if not isinstance(value, (float, int) if kind is float else kind):
            raise UsageError(f"{recipe.method}: option {name} must be {kind.__name__}, got {value!r}")
    return factory(**{name: getattr(recipe, name) for name in shared} | dict(recipe.options))


def build_task(recipe: Recipe) -> tuple[Task | None, dict[str, int]]:
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
        seed=recipe.seed,
    )
    task = image_task(images, batch_size=recipe.batch_size, seed=recipe.seed, limit=recipe.limit)
    return task, {"num_classes": images.num_classes, "in_channels": images.train_images.shape[1]}


def build(recipe: Recipe) -> tuple[nn.Module, Task | None, tuple[Tensor, ...]]:
    """The dense network with its weights, the task, and example inputs, from the recipe's names.

    Without data the example is seeded noise of `image_size` pixels (224 for networks named `source:name`, else 32).
    """
    build_pruner(recipe)
    Budget.parse(recipe.budget)
    task, sizes = build_task(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_network(recipe.model, **sizes)
        side = recipe.image_size or (224 if ":" in recipe.model else 32)
        inputs = task.example_inputs if task else (torch.randn(2, sizes["in_channels"], side, side),)
    if recipe.weights is not None:
        load_weights(model, Path(recipe.weights))
    return model, task, inputs


def _check_same(recipe: Recipe, folder: Path) -> None:
    """Refuse to continue the work of another recipe."""
    then, now = Recipe.from_toml(folder / "recipe.toml"), recipe
    for field in dataclasses.fields(Recipe):
        old, new = getattr(then, field.name), getattr(now, field.name)
        if old != new:
            raise UsageError(f"{folder}: was made with {field.name} = {old!r}, now {new!r}; --overwrite starts anew")


def _cut(dense: nn.Module, plan: PruningPlan, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Certificate]:
    small = compact(dense, plan)
    certificate = certify(dense, plan, small, inputs)
    if not certificate.holds:
        raise PlanError(
            f"certificate: mask and compact differ by {certificate.max_relative_error:.1e} "
            f"of {certificate.max_abs_output:.1e}, allowed 1e-9"
        )
    return small, certificate


def _report(
    recipe: Recipe,
    measured: list[Measurement],
    graph: ChannelGraph,
    plan: PruningPlan,
    certificate: Certificate,
    timed: LatencyComparison,
    stages: _Stages,
) -> Report:
    kept = {group.name: int(keep.sum()) for group, keep in plan.keep.items()}
    widths = {group.name: kept.get(group.name, group.size) for group in graph.groups}
    ratio = timed.ratios[0]
    warnings = [width_warning(widths)]
    if ratio.low > 1 / 1.05:
        warnings.append(f"the small network is not clearly faster: latency ratio {ratio.value:.2f}; try --round-to 16")
    if graph.uncounted:
        warnings.append(f"MACs leave out ops without a rule: {', '.join(graph.uncounted)}")
    return Report(
        dense=measured[0],
        compact=measured[1],
        environment=Environment.collect(),
        recipe=dataclasses.asdict(recipe),
        recipe_hash=recipe.fingerprint(Path(recipe.weights) if recipe.weights else None),
        certificate=certificate.to_json(),
        latency=timed.to_json() | {"ratio": dataclasses.asdict(ratio)},
        widths=tuple(Width(group.name, group.size, widths[group.name]) for group in graph.groups),
        history=stages.history,
        accuracies=stages.accuracies,
        refusals=tuple(dataclasses.asdict(refusal) for refusal in graph.refusals),
        warnings=tuple(filter(None, warnings)),
        seconds=stages.seconds,
    )


class _Stages:
    """Runs the stages of one compression and keeps what each said: history, accuracies, seconds."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress) -> None:
        self.progress = progress
        self.history: dict[str, list[Record]] = {}
        self.accuracies: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._recipe = recipe
        self._folder = folder

    def watch(self, task: Task | None) -> Task | None:
        """The task with a training loop that resumes, reports progress and leaves its history here."""
        if task is None:
            return None
        fit = task.fit
        if fit is training.fit:
            fit = partial(training.fit, checkpoint_dir=self._folder, progress=self.progress)

        def recorded(*args: Any, stage: str, **options: Any) -> list[Record]:
            self.history[stage] = fit(*args, stage=stage, **options)
            return self.history[stage]

        return dataclasses.replace(task, fit=recorded)

    def train(self, network: nn.Module, task: Task | None, stage: str, *, epochs: int, lr: float) -> None:
        """Train in place, where there is a task and something to do."""
        if task is None or not epochs:
            return
        recipe = self._recipe
        schedule = Schedule(
            epochs=epochs,
            lr=lr,
            weight_decay=recipe.weight_decay,
            label_smoothing=recipe.label_smoothing,
            precision=recipe.precision,
            seed=recipe.seed,
        )
        with self.timed(stage):
            task.fit(network, task, schedule, stage=stage)

    def evaluate(self, network: nn.Module, task: Task | None, name: str) -> None:
        """Accuracy on the held-out data, kept under `name`."""
        if task is not None:
            with self.timed(f"evaluate {name}"):
                self.accuracies[name] = task.evaluate(network)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Announce a step and keep how long it took."""
        self.progress(step, 0, 0, {})
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
