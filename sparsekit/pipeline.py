"""compress(model, recipe, task) -> Artifact: the only place that wires the rest together.

`compress` works on values; `run` starts from a recipe's names and ends with a saved folder.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekit.artifact import Artifact
from sparsekit.budget import Budget, Metric
from sparsekit.compaction import Certificate, certify, compact
from sparsekit.cost import absolute, num_macs
from sparsekit.errors import BudgetError, PlanError, QualityError, UsageError
from sparsekit.fitting import Bench, Fitted, fit
from sparsekit.forward import plain
from sparsekit.graph import trace
from sparsekit.ingredients import build, build_pruner, recovery_images
from sparsekit.latency import width_warning
from sparsekit.onnx_network import OnnxNetwork
from sparsekit.plan import PruningPlan
from sparsekit.pruners import UNSTRUCTURED
from sparsekit.recipe import Recipe
from sparsekit.report import Report
from sparsekit.reporting import Finished, explained, report_of
from sparsekit.selection import allocate, allocate_weights
from sparsekit.sparse import ZerosStay
from sparsekit.stages import Stages
from sparsekit.stock import StockRow, compare_stock, siblings
from sparsekit.task import Progress, Task
from sparsekit.tidy import tidy_plans
from sparsekit.unfinished import check_same, unfinished, work_folder


def compress(
    model: nn.Module,
    recipe: Recipe,
    task: Task | None,
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    images: Tensor | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Prune, cut, certify, fine-tune, export, verify and measure `model`, which stays as it is.

    Args:
        model: the trained network.
        recipe: budget, method and schedules; its names of model, weights and data only document the run.
        task: data and training loop; None for data-free methods, which are then not fine-tuned either.
        example_inputs: one forward's positional inputs, batch first; the task's unless given.
        images: [N, ...], unlabelled inputs to recover with; the recipe's unless given.
        work_dir: an existing folder for checkpoints; with it an interrupted run continues where it was.
        progress: called as stages advance.

    Raises:
        BudgetError: the budget cannot be met; it names the floor.
        PlanError: the small network is not what the plan says.
        ExportError: the ONNX file is not the network.
    """
    inputs = example_inputs or (task.example_inputs if task else ())
    if not inputs:
        raise UsageError("compress: without a task, example_inputs must be given")
    _check_budget(model, recipe, inputs, task)
    with nullcontext(work_dir) if work_dir else TemporaryDirectory(prefix="sparsekit-") as folder:
        stages = Stages(recipe, recipe.fingerprint(), Path(folder), progress)
        return _compress(copy.deepcopy(model).cpu().eval(), recipe, stages.watch(task), inputs, stages, images)


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Build what `recipe` names, train it where it names no weights, compress it and save it as folder `out`.

    Unfinished work lies in `<out>.partial`, which is removed at the end, and on failure while no epoch is complete.

    Args:
        recipe: names of model, weights and data, and how to compress.
        out: the artifact's folder.
        overwrite: replace `out`, and forget unfinished work.
        resume: continue unfinished work of the same recipe; without any, a finished `out` is returned as it is.
        progress: as for `compress`.

    Raises:
        UsageError: `out` or unfinished work is in the way, or the work to resume is of another recipe.
        SparsekitError: whatever the parts raise, before `out` is touched.
    """
    out = Path(out)
    work_dir = work_folder(out, overwrite=overwrite, resume=resume)
    recipe_hash = recipe.fingerprint(*([Path(recipe.weights)] if recipe.weights else []))
    hash_file = work_dir / "recipe_hash"  # written last: without it there is nothing to continue
    continues = resume and hash_file.exists()
    if continues:
        check_same(recipe, work_dir, hash_file.read_text(encoding="utf-8") == recipe_hash, weights=recipe.weights)
    elif resume and out.exists():
        if not (out / "report.json").exists():
            raise UsageError(f"{out}: exists and holds no report; choose another folder, or --overwrite")
        report = Report.read(out / "report.json")
        check_same(recipe, out, report.recipe_hash == recipe_hash, weights=recipe.weights)
        return report
    model, task, inputs = build(recipe, progress=progress)
    _check_budget(model, recipe, inputs, task)
    if work_dir.exists() and not continues:
        shutil.rmtree(work_dir)
    with unfinished(work_dir):
        (work_dir / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        hash_file.write_text(recipe_hash, encoding="utf-8")
        stages = Stages(recipe, recipe_hash, work_dir, progress)
        task = stages.watch(task)
        if recipe.weights is None:
            stages.train(model, task, "dense")
        artifact = _compress(model, recipe, task, inputs, stages)
        # Unfinished work beside a finished folder was started to replace it.
        artifact.save(out, overwrite=overwrite or continues)
    return artifact.report


def _check_budget(model: nn.Module, recipe: Recipe, inputs: tuple[Tensor, ...], task: Task | None) -> None:
    """Fail before any training where the budget cannot be met; limits that are measured are met before any as well."""
    graph, budget = trace(model, inputs, renormalise=recipe.renormalise), Budget.parse(recipe.budget)
    if budget.accuracy and task is None:
        raise BudgetError(f"budget {budget.accuracy}: needs data to measure it on")
    if recipe.method in UNSTRUCTURED:
        allocate_weights(graph, budget, scope="global")
    else:
        counted = tuple(limit for limit in budget.limits if limit not in budget.measured)
        allocate(graph, dataclasses.replace(budget, limits=counted), round_to=recipe.round_to)


def _compress(
    dense: nn.Module,
    recipe: Recipe,
    task: Task | None,
    inputs: tuple[Tensor, ...],
    stages: Stages,
    images: Tensor | None = None,
) -> Artifact:
    """`compress` of a network that is ours, with checkpoints and ONNX files in the stages' folder."""
    stages.evaluate(dense, task, "dense")
    dense_graph = trace(dense, inputs)
    with stages.timed("tidy"):
        before = tidy_plans(dense, inputs)
        tidied = reduce(compact, before, dense)
    graph = trace(tidied, inputs, renormalise=recipe.renormalise)
    if images is None and (recipe.recover != "none" or recipe.quantize != "none"):
        with stages.timed("unlabelled images"):
            images = recovery_images(recipe, tidied, task, inputs, progress=stages.progress)
    bench = stages.bench(images)
    with stages.timed("export dense"):
        dense_files = bench.write(dense, inputs, "dense")
    budget = absolute(Budget.parse(recipe.budget), dense_graph)
    fitted = Fitted(budget)
    if budget.measured:
        with stages.timed("fit the budget"):
            fitted = _fitted(
                stages.folder / "fitted.json",
                budget,
                partial(fit, tidied, graph, inputs, budget, dense_files, bench, task, round_to=recipe.round_to),
            )
    with stages.timed("prune"):
        plan = build_pruner(recipe)(graph, fitted.budget, task)
    small, after, certificate = _cut(tidied, plan, inputs)
    stages.evaluate(small, task, "pruned")
    if recipe.recover != "none" and images is not None:
        stages.recover(tidied, small, plan, images, task)
    stages.train(ZerosStay(small, plan.nonzero) if plan.nonzero else small, task, "finetune")
    stages.evaluate(small, task, "compact")
    with stages.timed("export"):
        small_files = bench.write(small, inputs, "model", finished=True)
    if recipe.quantize != "none":
        stages.evaluate(OnnxNetwork(small_files.onnx.path), task, "int8")
    _check_accuracy(fitted.budget, stages)
    with stages.timed("latency"):
        in_band = Metric.LATENCY_MS in fitted.shares
        timed = bench.compare([dense_files.timed, small_files.timed], "latency", finely=in_band)
    found = Finished(
        dense=dense_graph,
        tidied=graph,
        small=trace(small, inputs),
        plans=(plan, *after),
        certificate=certificate,
        files=(dense_files.onnx, small_files.onnx),
        timed=timed,
        fitted=fitted,
        latencies=bench.latencies(graph) if Metric.LATENCY_MS in fitted.shares else None,
    )
    _check_faster(recipe, found, bench)
    if recipe.compare_stock:
        with stages.timed("stock networks"):
            found = dataclasses.replace(found, stock=_stock(recipe, dense, inputs, found, bench))
    onnx = small_files.onnx.path.read_bytes()
    return Artifact(small.eval(), plan, onnx, report_of(found, stages), recipe, tuple(before), tuple(after))


def _fitted(file: Path, budget: Budget, fit: Callable[[], Fitted]) -> Fitted:
    """`fit()`, once: a run that goes on must go on with the widths whose training it interrupted."""
    if file.exists():
        return Fitted.from_json(json.loads(file.read_text(encoding="utf-8")), budget)
    fitted = fit()
    part = file.with_suffix(".tmp")
    part.write_text(json.dumps(fitted.to_json()), encoding="utf-8")
    part.replace(file)
    return fitted


def _stock(
    recipe: Recipe, dense: nn.Module, inputs: tuple[Tensor, ...], found: Finished, bench: Bench
) -> tuple[StockRow, ...]:
    """Smaller networks of the family, timed beside the dense and the small one."""
    with torch.no_grad():
        num_classes = tree_leaves(plain(dense(*inputs)))[0].shape[-1]
    dense_file, small_file = (latency.path for latency in found.timed.latencies)
    return compare_stock(
        siblings(recipe.model, inputs, num_classes=num_classes),
        dense_file,
        small_file,
        num_macs(found.small),
        inputs,
        num_classes=num_classes,
        target=bench.target,
        threads=bench.threads,
        progress=lambda name: bench.progress(f"stock network {name}", 0, 0, {}),
    )


def _check_accuracy(budget: Budget, stages: Stages) -> None:
    """Refuse a network that is not good enough.

    Raises:
        QualityError: its accuracy lies below the budget's.
    """
    compact = stages.final_accuracy
    if budget.accuracy is None or compact is None:
        return
    dense = stages.accuracies["dense"]
    least = budget.accuracy.resolve(dense)
    if compact < least:
        raise QualityError(
            f"budget {budget.accuracy}: the small network reaches {compact:.2%}, needed {least:.2%} "
            f"(dense {dense:.2%}); train longer, recover, or allow more milliseconds"
        )


def _check_faster(recipe: Recipe, found: Finished, bench: Bench) -> None:
    """Refuse a network that is not faster than the one that came in; zeros alone are not expected to be.

    Raises:
        QualityError: its latency ratio is not below 1 by more than the noise; it says where the time is left.
    """
    ratio = found.timed.ratios[0]
    if recipe.allow_slower or found.plans[0].nonzero or ratio.high < 1:
        return
    takes = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] the dense network's latency"
    why = [explained(found, found.latencies or bench.latencies(found.tidied), bench.peaks())]
    slow = width_warning(found.kept)
    if slow and found.latencies is None:
        why.append(slow)
    raise QualityError(f"the small network takes {takes}, so it is not written: {'; '.join(why)}; --allow-slower does")


def _cut(
    dense: nn.Module, plan: PruningPlan, inputs: tuple[Tensor, ...]
) -> tuple[nn.Module, list[PruningPlan], Certificate]:
    """The small network, the plans that then removed the channels which zeros had emptied, and the evidence for all."""
    small = compact(dense, plan, inputs)
    certificates = [certify(dense, plan, small, inputs)]
    after = tidy_plans(small, inputs) if plan.nonzero else []
    for emptied in after:
        whole, small = small, compact(small, emptied, inputs)
        certificates.append(certify(whole, emptied, small, inputs))
    for certificate in certificates:
        if not certificate.holds:
            raise PlanError(
                f"certificate: mask and compact differ by {certificate.max_relative_error:.1e} "
                f"of {certificate.max_abs_output:.1e}, allowed 1e-9"
            )
    worst = max(certificates, key=lambda certificate: certificate.max_relative_error)
    groups = {name: exact for certificate in certificates for name, exact in certificate.groups.items()}
    return small, after, dataclasses.replace(worst, groups=groups)
