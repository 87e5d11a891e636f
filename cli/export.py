"""sparsekit export: a network or a finished artifact -> a verified ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from sparsekit.artifact import load
from sparsekit.cli.console import json_option, print_json, progress
from sparsekit.errors import UsageError
from sparsekit.export import export_onnx
from sparsekit.ingredients import build
from sparsekit.recipe import Recipe


@click.command()
@click.argument("source")
@click.option("--weights", help="Weights of the network, where SOURCE is a model name.")
@click.option("--data", help="Data set that says the input's size and the number of classes.")
@click.option("--image-size", type=int, help="Side of the input image in pixels, without data.")
@click.option("--out", "path", type=click.Path(path_type=Path), default=Path("model.onnx"), show_default=True)
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Largest relative error allowed.")
@json_option
def export(
    source: str,
    weights: str | None,
    data: str | None,
    image_size: int | None,
    path: Path,
    tolerance: float,
    as_json: bool,
) -> None:
    """Write a network as ONNX, verified in ONNX Runtime.

    SOURCE is the folder of a finished run or a model name.

    \b
    sparsekit export out/r56 --out small.onnx
    sparsekit export torchvision:resnet50 --out resnet50.onnx
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist")
    folder = Path(source)
    with progress() as report_progress:
        if folder.is_dir():
            recipe = dataclasses.replace(Recipe.from_toml(folder / "recipe.toml"), weights=None)
            dense, _, inputs = build(recipe, progress=report_progress)
            model = load(folder, lambda: dense)
        else:
            recipe = Recipe(model=source, weights=weights, data=data, image_size=image_size)
            model, _, inputs = build(recipe, progress=report_progress)
        report_progress("export", 0, 0, {})
        file = export_onnx(model, inputs, path, tolerance=tolerance)
    if as_json:
        print_json(dataclasses.asdict(file) | {"path": str(file.path)})
        return
    click.echo(
        f"{file.path}: {file.size_bytes / 1e6:.2f} MB, {file.num_nodes} nodes, opset {file.opset}, "
        f"max relative error {file.max_relative_error:.1e} against the network"
    )
