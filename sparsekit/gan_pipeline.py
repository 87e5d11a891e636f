"""compress_gan(recipe, out): train or load a GAN, cut its generator, retrain, export, measure and save it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.artifact import write_whole
from sparsekit.environment import Environment
from sparsekit.errors import UsageError
from sparsekit.gan.grids import data_uri, grid, side_by_side
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan.sampling import strips
from sparsekit.gan.training import samples
from sparsekit.gan_report import Comparison, GanReport
from sparsekit.gan_stages import Finished, GanStages
from sparsekit.graph import trace
from sparsekit.measured import read_document
from sparsekit.plan import PruningPlan
from sparsekit.program import Program
from sparsekit.reporting import measurement, target_facts
from sparsekit.task import Progress
from sparsekit.unfinished import check_same, unfinished, work_folder

_COLUMNS = 8  # of pictures
_NUM_STRIPS = 4  # each from one noise to another


def compress_gan(
    recipe: GanRecipe,
    out: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> GanReport:
    """Build what `recipe` names, compress its generator and save the result as folder `out`.

    The folder holds generator.onnx, dense.onnx, weights.safetensors, plan.json, recipe.toml, report.json, report.html,
    side_by_side.png (both generators from the same noise, dense on the left) and samples/<stage>/epoch-*.png.
    Unfinished work lies in `<out>.partial`, which is removed at the end, and on failure while no epoch is complete.

    Args:
        recipe: names of model, weights and data, and how to compress.
        out: the folder.
        overwrite: replace `out`, and forget unfinished work.
        resume: continue unfinished work of the same recipe; without any, a finished `out` is returned as it is.
        progress: called as stages advance.

    Raises:
        UsageError: `out` or unfinished work is in the way, or the work to resume is of another recipe.
        QualityError: training diverged; the last good state stays in `<out>.partial`.
        SparsekitError: whatever the parts raise, before `out` is touched.
    """
    out = Path(out)
    work_dir = work_folder(out, overwrite=overwrite, resume=resume)
    recipe_hash, weights = recipe.fingerprint(*recipe.weight_files), ", ".join(map(str, recipe.weight_files))
    hash_file = work_dir / "recipe_hash"  # written last: without it there is nothing to continue
    continues = resume and hash_file.exists()
    if continues:
        check_same(recipe, work_dir, hash_file.read_text(encoding="utf-8") == recipe_hash, weights=weights)
    elif resume and out.exists():
        if not (out / "report.json").exists():
            raise UsageError(f"{out}: exists and holds no report; choose another folder, or --overwrite")
        report = read_document(out / "report.json", GanReport.from_json)
        check_same(recipe, out, report.recipe_hash == recipe_hash, weights=weights)
        return report
    stages = GanStages(recipe, work_dir, progress or (lambda *_: None))
    stages.check_budget()
    if work_dir.exists() and not continues:
        shutil.rmtree(work_dir)
    with unfinished(work_dir):
        (work_dir / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        hash_file.write_text(recipe_hash, encoding="utf-8")
        finished = stages.finish(stages.compress())
        report = _report(stages, finished, recipe_hash)
        # Unfinished work beside a finished folder was started to replace it.
        write_whole(out, partial(_write, stages, finished, report), overwrite=overwrite or continues)
    return report


def _report(stages: GanStages, finished: Finished, recipe_hash: str) -> GanReport:
    # The files lie in a folder that is gone when someone reads this.
    latencies = tuple(replace(latency, path=Path(latency.path.name)) for latency in finished.timed.latencies)
    timed = replace(finished.timed, latencies=latencies)
    graphs = (trace(network, stages.example) for network in (finished.networks.dense, finished.networks.small))
    sides = zip(graphs, finished.files, latencies, strict=True)
    dense, compact = (measurement(graph, None, file.onnx, latency) for graph, file, latency in sides)
    error = finished.files[1].onnx.max_relative_error
    return GanReport(
        dense=dense,
        compact=compact,
        environment=Environment.collect(),
        recipe={name: value for name, value in asdict(stages.recipe).items() if value is not None},
        recipe_hash=recipe_hash,
        metrics=stages.metrics,
        history=stages.history,
        pictures=tuple(_comparisons(stages, finished)),
        latency=timed.to_json() | {"ratio": asdict(timed.ratios[0])},
        target=target_facts(timed),
        certificate=replace(finished.networks.certificate, onnx_max_relative_error=error).to_json(),
        warnings=tuple(_warnings(finished)),
        seconds=stages.seconds,
    )


def _comparisons(stages: GanStages, finished: Finished) -> Iterator[Comparison]:
    """Of the same inputs and, where those are noise, of what lies between some of them."""
    given, *labels = stages.shown
    dense, small = map(data_uri, _pictures(finished, stages.shown))
    if given.dim() == 4:
        yield Comparison("From the same images", dense, small, inputs=data_uri(grid(given, _COLUMNS)))
        return
    yield Comparison("From the same noise", dense, small)
    between = (
        strips(given[: 2 * _NUM_STRIPS], _COLUMNS),
        *(row[:_NUM_STRIPS].repeat_interleave(_COLUMNS) for row in labels),
    )
    yield Comparison("From one noise to another", *map(data_uri, _pictures(finished, between)))


def _pictures(finished: Finished, inputs: tuple[Tensor, ...]) -> tuple[Image, Image]:
    """What both generators make of them, the dense one first."""
    dense, small = (samples(network, inputs) for network in (finished.networks.dense, finished.networks.small))
    return grid(dense, _COLUMNS), grid(small, _COLUMNS)


def _warnings(finished: Finished) -> Iterator[str]:
    ratio = finished.timed.ratios[0]
    if ratio.value > 1 / 1.05:
        yield f"the small generator is not clearly faster: latency ratio {ratio.value:.2f}"
    if finished.timed.busy:
        yield "the machine was busy while latency was measured: wall times are upper bounds"


def _write(stages: GanStages, finished: Finished, report: GanReport, folder: Path) -> None:
    if isinstance(finished.networks.small, Program):
        (folder / "program.json").write_text(json.dumps(finished.networks.small.to_json()), encoding="utf-8")
    PruningPlan(finished.networks.plan.keep).save(folder / "plan.json", folder / "plan.safetensors")
    # Clones, because safetensors refuses two names for one memory, as tied weights have.
    state = {name: value.contiguous().clone() for name, value in finished.networks.small.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    for exported in finished.files:
        shutil.copyfile(exported.onnx.path, folder / exported.onnx.path.name)
    side_by_side(_pictures(finished, stages.shown)).save(folder / "side_by_side.png")
    if (stages.folder / "samples").exists():
        shutil.copytree(stages.folder / "samples", folder / "samples")
    document = json.dumps(report.to_json(), indent=1, allow_nan=False)
    (folder / "report.json").write_text(document, encoding="utf-8")
    (folder / "report.html").write_text(report.html(), encoding="utf-8")
    (folder / "recipe.toml").write_text(stages.recipe.to_toml(), encoding="utf-8")
