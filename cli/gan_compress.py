"""sparsekit gan compress: a generator made smaller."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from sparsekit.cli.console import json_option, out, print_json, progress, warn
from sparsekit.cli.options import name_values, numbers, words
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan.schedule import SCHEDULES
from sparsekit.gan_pipeline import compress_gan


@click.command()
@click.option("--model", help=f"One of {', '.join(SCHEDULES)}.")
@click.option("--weights", help="Of the dense generator: safetensors or a torch state dict. Without: train first.")
@click.option("--discriminator-weights", help="Of the discriminator that goes with it; without, it starts anew.")
@click.option("--data", help="digits, fashion-mnist, cifar10, cifar100 or imagefolder:PATH.")
@click.option("--data-root", help="Where torchvision's data sets lie.")
@click.option("--download/--no-download", default=None, help="May data sets be downloaded.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--domains", callback=numbers, help="Of cyclegan: two class numbers, the first becomes the second.")
@click.option("--limit", type=int, help="Train on this many images only.")
@click.option("--z", type=int, help="Features of the noise.")
@click.option("--ch", type=int, help="Width of the generator.")
@click.option("--discriminator-ch", type=int, help="Width of the discriminator.")
@click.option("--num-blocks", type=int, help="Residual blocks of cyclegan's generators.")
@click.option("--method", help="channel_pruning, gan_slimming, or one of compress's that needs no labels.")
@click.option("-o", "--option", "options", multiple=True, callback=name_values, help="Method option, NAME=VALUE.")
@click.option("--budget", help="Like 'macs<=0.5x' or 'params<=1.5M'.")
@click.option("--round-to", type=int, help="Widths are multiples of this; 16 suits ONNX Runtime on AVX-512.")
@click.option("--recover", help="Repair from noise alone: none, bn or lsq.")
@click.option("--num-noises", type=int, help="How many images' worth of it.")
@click.option("--retrain", help="finetune, rewind (to the initial weights: the lottery ticket) or none.")
@click.option("--discriminator", help="What retraining starts with: kept, reset or pruned.")
@click.option("--discriminator-budget", help="For pruned, like --budget.")
@click.option("--dense-epochs", type=int, help="Training of the dense GAN; as its authors trained it unless given.")
@click.option("--epochs", type=int, help="Of the method's training.")
@click.option("--retrain-epochs", type=int, help="As the dense training unless given.")
@click.option("--generator-lr", type=float, help="Of Adam; as its authors set it unless given.")
@click.option("--discriminator-lr", type=float, help="Likewise.")
@click.option("--retrain-lr", type=float, help="The generator's in retraining.")
@click.option("--batch-size", type=int, help="Real images per step of the discriminator.")
@click.option("--generator-batch-size", type=int, help="Images per step of the generator.")
@click.option("--num-critic-steps", type=int, help="Of the discriminator per step of the generator.")
@click.option("--average-decay", type=float, help="Of the averaged generator; 0 for none.")
@click.option("--augment", callback=words, help="What the discriminator sees: color,translation,cutout; '' for none.")
@click.option("--features", help="Network to measure distances by: inception, or one of sparsekit.models.")
@click.option("--feature-weights", help="Its weights.")
@click.option("--feature-layers", callback=words, help="Of it, to distil by; pixels unless given.")
@click.option("--num-samples", type=int, help="Images that distances are measured on.")
@click.option("--target", help="Where latency counts: onnxruntime, openvino, ncnn, torch, ssh://user@host.")
@click.option("--threads", type=int, help="Of the target's runtime.")
@click.option("--seed", type=int, help="Of everything drawn.")
@click.option("--recipe", "recipe_path", type=click.Path(path_type=Path), help="TOML file; flags override its keys.")
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output folder, forget unfinished work.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same recipe.")
@json_option
def compress(
    recipe_path: Path | None, folder: Path, overwrite: bool, resume: bool, as_json: bool, **flags: Any
) -> None:
    """Prune a generator's channels to a budget; retrain, verify and measure the result.

    Without weights the GAN is trained first. The result is a folder: both generators' ONNX files, the small one's
    weights, the plan that cut it, pictures of every epoch, a report and the recipe that repeats the run.

    \b
    sparsekit gan compress --model sngan --data imagefolder:cifar10 --budget 'macs<=0.5x'
    sparsekit gan compress --data digits --z 32 --ch 32 --discriminator-ch 32 --dense-epochs 20 --epochs 4 \\
        --batch-size 16 --generator-batch-size 16 --num-critic-steps 1 --average-decay 0.99
    sparsekit gan compress --weights generator.safetensors --method neuron_merging --recover lsq --retrain none
    sparsekit gan compress --recipe out/recipe.toml --out again
    """
    recipe = GanRecipe.from_toml(recipe_path) if recipe_path else GanRecipe()
    given = {name: value for name, value in flags.items() if value is not None}
    if flags["method"] in (None, recipe.method):  # another method has other options
        given["options"] = {**recipe.options, **flags["options"]}
    recipe = GanRecipe.from_mapping(dataclasses.asdict(recipe) | given, source="flags")
    with progress() as report_progress:
        report = compress_gan(recipe, folder, overwrite=overwrite, resume=resume, progress=report_progress)
    if as_json:
        print_json(report.to_json())
        return
    for row in report.rows():
        out.print("  ".join(filter(None, row)))
    click.echo(report.headline)
    click.echo(f"{folder}/report.html   {folder}/generator.onnx   {folder}/side_by_side.png")
    for warning in report.warnings:
        warn(warning)
