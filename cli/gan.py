"""sparsekit gan: generators of images, made smaller and looked at."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from sparsekit.cli.console import json_option, print_json
from sparsekit.cli.gan_compress import compress
from sparsekit.cli.options import numbers
from sparsekit.data import folder_pixels
from sparsekit.errors import UsageError
from sparsekit.gan.grids import from_bytes, grid, side_by_side
from sparsekit.gan.sampling import OnnxGenerator, noise, open_generator, strips

_MAX_COLUMNS = 16  # of classes, unless more are asked for


def _grid(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Columns and rows of "8x4"."""
    if text is None:
        return None
    columns, cross, rows = text.partition("x")
    if not (cross and columns.isdecimal() and rows.isdecimal() and int(columns) and int(rows)):
        raise UsageError(f"{parameter.opts[0]} {text!r}: expected COLUMNSxROWS like 8x8")
    return int(columns), int(rows)


def _folder(_: click.Context, parameter: click.Parameter, text: str | None) -> Path | None:
    if text is None:
        return None
    kind, colon, name = text.partition(":")
    if not (colon and name) or kind != "imagefolder":
        raise UsageError(f"{parameter.opts[0]} {text!r}: expected imagefolder:PATH")
    return Path(name)


@click.group()
def gan() -> None:
    """Make generators of images smaller, and look at what they make.

    \b
    sparsekit gan compress --model sngan --data imagefolder:cifar10 --budget 'macs<=0.5x'
    sparsekit gan sample generator.onnx --grid 8x8 --seed 0 --out grid.png
    """


gan.add_command(compress)


@gan.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--grid", "shape", callback=_grid, metavar="COLUMNSxROWS", help="8x8 unless given; with classes, all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise, or of the choice of --images.")
@click.option("--classes", callback=numbers, metavar="0,3,..", help="A column for each; all of the file's by default.")
@click.option("--images", "folder", callback=_folder, metavar="imagefolder:PATH", help="What to translate.")
@click.option("--interpolate", type=click.IntRange(2), metavar="N", help="N steps between two noises in every row.")
@click.option("--beside", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another, same inputs.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("grid.png"), show_default=True)
@json_option
def sample(
    file: Path,
    shape: tuple[int, int] | None,
    seed: int,
    classes: tuple[int, ...] | None,
    folder: Path | None,
    interpolate: int | None,
    beside: Path | None,
    batch_size: int,
    out: Path,
    as_json: bool,
) -> None:
    """Draw images from a generator in an ONNX file, as a grid in a PNG file.

    The file tells what it takes: noise, class numbers, or images to translate, which then stand to the left of what
    it makes of them. With --interpolate every row leads from one noise to another.

    \b
    sparsekit gan sample generator.onnx --grid 8x8 --seed 0 --out grid.png
    sparsekit gan sample dense.onnx --beside generator.onnx
    sparsekit gan sample generator.onnx --interpolate 9 --grid 9x4
    sparsekit gan sample horse2deer.onnx --images imagefolder:horses
    """
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist")
    generators = [open_generator(path) for path in (file, beside) if path]
    first, last = generators[0], generators[-1]
    _check(file, first, folder, interpolate, classes)
    if (first.input_shape, first.labels is None) != (last.input_shape, last.labels is None):
        raise UsageError(f"{beside}: takes {_taken(last)}; {file} takes {_taken(first)}")
    classes = classes or tuple(range(min(generator.num_classes() for generator in generators)))
    columns, rows = shape or (min(len(classes), _MAX_COLUMNS) or 8, 8)
    columns = interpolate or columns
    inputs = _inputs(first, folder, (columns, rows), interpolate, seed)
    labels = _labels(classes, (columns, rows), by_row=interpolate is not None) if classes else None
    blocks = [inputs] if folder else []
    blocks += [generator.images(inputs, labels, batch_size=batch_size) for generator in generators]
    side_by_side([grid(block, columns) for block in blocks]).save(out, "PNG")
    if as_json:
        facts = {"num_images": len(inputs), "image_shape": first.image_shape, "classes": classes, "seed": seed}
        print_json({"path": str(out), "columns": columns, "rows": rows} | facts)
        return
    size = "x".join(map(str, reversed(first.image_shape[1:])))
    click.echo(f"{out}: {len(inputs)} images of {size} pixels from {_taken(first)}, seed {seed}")


def _check(
    file: Path, generator: OnnxGenerator, folder: Path | None, interpolate: int | None, classes: tuple[int, ...] | None
) -> None:
    """Refuse options that mean nothing to this generator."""
    if generator.from_images and not folder:
        raise UsageError(f"{file}: takes {_taken(generator)}; give it some with --images imagefolder:PATH")
    if folder and not generator.from_images:
        raise UsageError(f"--images: {file} takes {_taken(generator)}")
    if interpolate and generator.from_images:
        raise UsageError(f"--interpolate: {file} takes {_taken(generator)}, and no noise")
    if classes and not generator.labels:
        raise UsageError(f"--classes: {file} takes {_taken(generator)}, and no classes")
    for label in classes or ():
        if label < 0 or not generator.takes(label):
            raise UsageError(f"--classes {label}: {file} has no such class")


def _inputs(
    generator: OnnxGenerator, folder: Path | None, shape: tuple[int, int], interpolate: int | None, seed: int
) -> Tensor:
    """What to make images of, row by row."""
    columns, rows = shape
    if interpolate:
        return strips(noise(2 * rows, generator, seed=seed), interpolate)
    if not folder:
        return noise(columns * rows, generator, seed=seed)
    pixels = folder_pixels(folder, image_size=generator.input_shape[1], num_images=columns * rows, seed=seed)
    images = from_bytes(pixels)
    return images.mean(1, keepdim=True) if generator.input_shape[0] == 1 else images


def _labels(classes: tuple[int, ...], shape: tuple[int, int], *, by_row: bool) -> Tensor:
    """A class for each image, int64 [N]: one per column, or per row."""
    columns, rows = shape
    numbers = torch.arange(columns * rows)
    place = numbers // columns if by_row else numbers % columns
    return torch.tensor(classes)[place % len(classes)]


def _taken(generator: OnnxGenerator) -> str:
    kind = "images" if generator.from_images else "noise"
    return f"{kind} {list(generator.input_shape)}" + (" and classes" if generator.labels else "")
