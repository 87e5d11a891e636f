"""sparsekit compress: the main job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from sparsekit.cli.console import json_option, out, print_json, progress, warn
from sparsekit.cli.options import name_values, words
from sparsekit.errors import UsageError
from sparsekit.pipeline import run
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe


def _epochs(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    parts = words(context, parameter, text)
    try:
        return None if parts is None else tuple(map(int, parts))
    except ValueError:
        raise UsageError(f"{parameter.opts[0]} {text!r}: expected epochs like 60,90") from None


def _seconds(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """ "60s", "5m" or a number of seconds."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m") else (text, "s")
    try:
        return float(number) * {"s": 1, "m": 60}[unit]
    except ValueError:
        raise UsageError(f"{parameter.opts[0]} {text!r}: expected a time like 60s or 5m") from None


def _without_pattern(*, pattern: str | None, density: float | None, **flags: Any) -> dict[str, Any]:
    """`--pattern` and `--density` in terms of a method, its option and a budget."""
    if pattern is None:
        if density is not None:
            raise UsageError("--density: needs --pattern, like block:128x16")
        return flags
    for name, other in (("method", "--method"), ("budget", "--budget")):
        if flags[name] is not None:
            raise UsageError(f"--pattern and {other} {flags[name]}: choose one")
    density = 0.5 if density is None else density
    if pattern == "residual:16":
        options = {**flags["options"], "density": density}
        return flags | {"method": "residual_subset", "options": options, "budget": "nonzero<=1x"}
    options = {**flags["options"], "pattern": pattern}
    return flags | {"method": "magnitude_pattern", "options": options, "budget": f"nonzero<={density:g}x"}


@click.command()
@click.option("--model", help="A built-in name, torchvision:NAME, timm:NAME or FILE.py:FACTORY.")
@click.option("--weights", help="Trained weights: safetensors or a torch state dict. Without: train first.")
@click.option("--data", help="digits, fashion-mnist, cifar10, cifar100, imagefolder:PATH or FILE.py:FACTORY.")
@click.option("--no-data", is_flag=True, help="Run without data: no training, no accuracy.")
@click.option("--data-root", help="Where torchvision's data sets lie.")
@click.option("--download/--no-download", default=None, help="May data sets be downloaded.")
@click.option("--image-size", type=int, help="Side of the input image in pixels.")
@click.option("--crop-pct", type=float, help="Share of a test image's shorter side that its centre cut leaves.")
@click.option("--limit", type=int, help="Train on this many images only.")
@click.option("--batch-size", type=int, help="Images per training batch.")
@click.option("--augment", callback=words, help="Any of shift,crop,flip,trivial,erase,mixup,cutmix; '' for none.")
@click.option("--method", help=f"One of {', '.join(PRUNERS)}.")
@click.option("-o", "--option", "options", multiple=True, callback=name_values, help="Method option, NAME=VALUE.")
@click.option("--budget", help="Like 'latency<=4ms', 'latency<=0.5x and accuracy>=-1%', 'macs<=0.5x'.")
@click.option(
    "--pattern", help="Zeros that a GPU can skip, in place of fewer channels: block:128x16, 2:4, residual:16."
)
@click.option(
    "--density", type=float, help="Share that it leaves of the weights, or of the stream; a half unless given."
)
@click.option("--round-to", type=int, help="Widths are multiples of this; 16 suits ONNX Runtime on AVX-512.")
@click.option("--renormalise/--no-renormalise", default=None, help="Also prune channels that LayerNorm runs over.")
@click.option("--recover", help="Repair without labels: none, bn, lsq or distill, each with those before it.")
@click.option("--recover-budget", "recover_budget_s", callback=_seconds, help="Time that it may take, like 60s or 5m.")
@click.option("--calibrate", help="imagefolder:PATH, unlabelled images for it; else the training images, or noise.")
@click.option("--num-images", type=int, help="How many of them.")
@click.option("--dense-epochs", type=int, help="Training of the dense network where no weights are given.")
@click.option("--dense-lr", type=float, help="Its peak learning rate.")
@click.option("--dense-milestones", callback=_epochs, help="Where it falls by gamma, like 100,150; '' for never.")
@click.option("--epochs", type=int, help="Of the method's training.")
@click.option("--lr", type=float, help="Peak learning rate of the method's training.")
@click.option("--milestones", callback=_epochs, help="Where it falls by gamma.")
@click.option("--finetune-epochs", type=int, help="Of fine-tuning; as the method's unless given.")
@click.option("--finetune-lr", type=float, help="Peak learning rate of fine-tuning.")
@click.option("--finetune-milestones", callback=_epochs, help="Where it falls by gamma, instead of along a cosine.")
@click.option("--gamma", type=float, help="What learning rates are multiplied by at milestones.")
@click.option("--warmup-epochs", type=float, help="Linear warm-up at the start of all training.")
@click.option("--optimizer", help="sgd or adamw, in all training; the method's own choice unless given.")
@click.option("--momentum", type=float, help="In all training.")
@click.option("--weight-decay", type=float, help="In all training.")
@click.option("--label-smoothing", type=float, help="In all training.")
@click.option("--precision", help="auto, 32-true, bf16-mixed or 16-mixed.")
@click.option("--target", help="Where latency counts: onnxruntime, openvino, ncnn, torch, ssh://user@host.")
@click.option("--threads", type=int, help="Of the target's runtime.")
@click.option("--quantize", help="int8: integers in the finished file; none by default.")
@click.option("--compare-stock/--no-compare-stock", default=None, help="Also time smaller networks of the family.")
@click.option("--allow-slower/--no-allow-slower", default=None, help="Write a small network that is no faster, too.")
@click.option("--seed", type=int, help="Of everything drawn.")
@click.option("--recipe", "recipe_path", type=click.Path(path_type=Path), help="TOML file; flags override its keys.")
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output folder, forget unfinished work.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same recipe.")
@json_option
def compress(
    recipe_path: Path | None, folder: Path, overwrite: bool, resume: bool, as_json: bool, no_data: bool, **flags: Any
) -> None:
    """Prune a network to a budget; verify and measure the result.

    Without weights the network is trained first. The result is a folder: the small network's weights and ONNX
    file, the plan that cut it, a report and the recipe that repeats the run.

    \b
    sparsekit compress
    sparsekit compress --model resnet56 --weights resnet56.safetensors --data imagefolder:cifar10 --epochs 1
    sparsekit compress --model torchvision:resnet50 --method magnitude --no-data --out out/r50
    sparsekit compress --recipe out/recipe.toml --out again
    """
    recipe = Recipe.from_toml(recipe_path) if recipe_path else Recipe()
    if no_data and flags["data"]:
        raise UsageError(f"--no-data and --data {flags['data']}: choose one")
    flags = _without_pattern(**flags)
    given = {name: value for name, value in flags.items() if value is not None}
    if flags["method"] in (None, recipe.method):  # another method has other options
        given["options"] = {**recipe.options, **flags["options"]}
    if no_data:
        given["data"] = "none"
    recipe = Recipe.from_mapping(dataclasses.asdict(recipe) | given, source="flags")
    with progress() as report_progress:
        report = run(recipe, folder, overwrite=overwrite, resume=resume, progress=report_progress)
    if as_json:
        print_json(report.to_json())
        return
    out.print(report.table())
    click.echo(report.headline)
    if report.stock_verdict:
        click.echo(report.stock_verdict)
    click.echo(f"{folder}/report.html   {folder}/model.onnx   {folder}/recipe.toml")
    for warning in report.warnings:
        warn(warning)
