"""`sparsekit gan`: pictures from ONNX files of all kinds of generators, and one line for what is none."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sparsekit import export_onnx
from sparsekit.cli import main
from sparsekit.errors import ExportError, UsageError
from sparsekit.gan.grids import BORDER, from_bytes, grid, side_by_side, to_bytes
from sparsekit.gan.sampling import noise, open_generator
from tests.gans import NUM_CLASSES, Z, build, inputs_of, stirred

SIZE = 28


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """`sparsekit gan <arguments>` in an empty folder; also what C++ printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sparsekit", "gan", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        assert isinstance(code, int | None)
        return Result(code or 0, *capfd.readouterr())

    return call


Cli = Callable[..., Result]


class Made(NamedTuple):
    """A network in an ONNX file."""

    network: nn.Module
    path: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("onnx")
    networks = {
        "noise": (stirred(build("dcgan_generator", ch=8)), inputs_of("dcgan_generator")),
        "larger": (stirred(build("dcgan_generator", ch=12)), inputs_of("dcgan_generator")),
        "classes": (stirred(build("acgan_generator", ch=8)), inputs_of("acgan_generator")),
        "images": (stirred(build("cyclegan_generator", ch=4)), inputs_of("cyclegan_generator")),
        "discriminator": (stirred(build("sngan_discriminator", ch=8)), inputs_of("sngan_discriminator")),
    }
    for name, (network, inputs) in networks.items():
        export_onnx(network, inputs, folder / f"{name}.onnx")
    return {name: Made(network, folder / f"{name}.onnx") for name, (network, _) in networks.items()}


def picture(path: Path | str) -> NDArray[np.int16]:
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened).astype(np.int16)


@torch.no_grad()
def expected(network: nn.Module, *inputs: Tensor) -> Tensor:
    images: Tensor = network(*inputs)
    return images


def assert_same(path: Path | str, blocks: Sequence[tuple[Tensor, int]]) -> None:
    """The picture holds these blocks of images; ONNX Runtime may round another way."""
    drawn = np.asarray(side_by_side([grid(*block) for block in blocks])).astype(np.int16)
    found = picture(path)
    assert found.shape == drawn.shape
    assert np.abs(found - drawn).max() <= 1


def test_a_grid_is_what_the_network_makes_of_the_seed_s_noise(cli: Cli, files: dict[str, Made]) -> None:
    network, path = files["noise"]
    result = cli("sample", path, "--grid", "5x3", "--seed", 7, "--out", "mine.png")
    assert result == Result(0, f"mine.png: 15 images of 28x28 pixels from noise [{Z}], seed 7\n", "")
    z = noise(15, open_generator(path), seed=7)
    assert_same("mine.png", [(expected(network, z), 5)])


def test_the_default_grid_has_64_images(cli: Cli, files: dict[str, Made]) -> None:
    assert cli("sample", files["noise"].path).code == 0
    assert picture("grid.png").shape == (8 * (SIZE + BORDER) + BORDER,) * 2


def test_noise_is_standard_normal_and_a_larger_grid_begins_like_a_smaller_one(files: dict[str, Made]) -> None:
    generator = open_generator(files["noise"].path)
    many = noise(2000, generator, seed=3)
    assert many.mean().abs() < 0.02
    assert (many.std() - 1).abs() < 0.02
    assert torch.equal(noise(5, generator, seed=3), many[:5])
    assert not torch.equal(noise(5, generator, seed=4), many[:5])


@pytest.mark.parametrize("batch_size", [1, 4, 15, 100])
def test_the_batch_size_changes_nothing(batch_size: int, cli: Cli, files: dict[str, Made]) -> None:
    cli("sample", files["noise"].path, "--grid", "5x3", "--out", "all.png")
    cli("sample", files["noise"].path, "--grid", "5x3", "--batch-size", batch_size, "--out", "parts.png")
    assert np.abs(picture("all.png") - picture("parts.png")).max() <= 1


def test_classes_stand_in_columns(cli: Cli, files: dict[str, Made]) -> None:
    network, path = files["classes"]
    assert cli("sample", path).code == 0
    z = noise(8 * NUM_CLASSES, open_generator(path), seed=0)
    assert_same("grid.png", [(expected(network, z, torch.arange(NUM_CLASSES).repeat(8)), NUM_CLASSES)])
    assert cli("sample", path, "--classes", "4,1", "--grid", "3x2", "--batch-size", 4).code == 0
    z = noise(6, open_generator(path), seed=0)
    assert_same("grid.png", [(expected(network, z, torch.tensor([4, 1, 4, 4, 1, 4])), 3)])


def test_the_file_is_asked_how_many_classes_it_knows(files: dict[str, Made]) -> None:
    assert open_generator(files["classes"].path).num_classes() == NUM_CLASSES
    assert open_generator(files["noise"].path).num_classes() == 0


def test_another_generator_stands_beside_with_the_same_noise(cli: Cli, files: dict[str, Made]) -> None:
    one, other = files["noise"], files["larger"]
    assert cli("sample", one.path, "--beside", other.path, "--grid", "4x4").code == 0
    z = noise(16, open_generator(one.path), seed=0)
    assert_same("grid.png", [(expected(made.network, z), 4) for made in (one, other)])


def test_rows_lead_from_one_noise_to_another(cli: Cli, files: dict[str, Made]) -> None:
    network, path = files["noise"]
    assert cli("sample", path, "--interpolate", 5, "--grid", "8x3").code == 0
    found = picture("grid.png")
    assert found.shape == (3 * (SIZE + BORDER) + BORDER, 5 * (SIZE + BORDER) + BORDER)
    ends = to_bytes(expected(network, noise(6, open_generator(path), seed=0)))[:, 0].numpy()
    for row in range(3):
        top = row * (SIZE + BORDER) + BORDER
        strip = found[top : top + SIZE]
        assert np.abs(strip[:, BORDER : BORDER + SIZE] - ends[2 * row]).max() <= 1
        assert np.abs(strip[:, -BORDER - SIZE : -BORDER] - ends[2 * row + 1]).max() <= 1


def test_a_row_that_leads_somewhere_keeps_its_class(cli: Cli, files: dict[str, Made]) -> None:
    network, path = files["classes"]
    assert cli("sample", path, "--interpolate", 2, "--grid", "1x3", "--classes", "3,0").code == 0
    z = noise(6, open_generator(path), seed=0)
    assert_same("grid.png", [(expected(network, z, torch.tensor([3, 3, 0, 0, 3, 3])), 2)])


def test_images_are_translated_beside_themselves(cli: Cli, files: dict[str, Made], tmp_path: Path) -> None:
    network, path = files["images"]
    folder = tmp_path / "given" / "some class"
    folder.mkdir(parents=True)
    pixels = torch.randint(256, (4, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    result = cli("sample", path, "--images", f"imagefolder:{folder.parent}", "--grid", "2x2")
    assert result.code == 0
    inputs = from_bytes(pixels[:, None])
    assert_same("grid.png", [(inputs, 2), (expected(network, inputs), 2)])


@pytest.mark.parametrize("verb", ["compress", "sample"])
def test_the_help_of_every_verb_has_an_example(verb: str, cli: Cli) -> None:
    result = cli(verb, "--help")
    assert result.code == 0
    assert re.search(rf"^ +sparsekit gan {verb}\b", result.out, re.MULTILINE)
    assert re.search(rf"^ +sparsekit gan {verb}\b", cli("--help").out, re.MULTILINE)


def test_json_is_all_that_is_printed(cli: Cli, files: dict[str, Made]) -> None:
    result = cli("sample", files["classes"].path, "--json", "--grid", "3x2")
    assert result.err == ""
    assert json.loads(result.out) == {
        **{"path": "grid.png", "columns": 3, "rows": 2, "num_images": 6},
        **{"image_shape": [1, 28, 28], "classes": [0, 1, 2, 3, 4], "seed": 0},
    }


REFUSED = {
    "classes, of noise": (["noise", "--classes", "1"], r"--classes: \S+ takes noise \[24\], and no classes"),
    "a class too high": (["classes", "--classes", "1,5"], r"--classes 5: \S+ has no such class"),
    "a class below none": (["classes", "--classes", "-1"], r"--classes -1: \S+ has no such class"),
    "no images": (["images"], r"\S+: takes images \[1, 28, 28\]; give it some with --images imagefolder:PATH"),
    "images, of noise": (["noise", "--images", "imagefolder:."], r"--images: \S+ takes noise \[24\]"),
    "no folder": (["images", "--images", "imagefolder:nowhere"], "nowhere: no such folder"),
    "no such kind": (["images", "--images", "cifar10"], "--images 'cifar10': expected imagefolder:PATH"),
    "a way between images": (
        ["images", "--images", "imagefolder:.", "--interpolate", "3"],
        r"--interpolate: \S+ takes images \[1, 28, 28\], and no noise",
    ),
    "other inputs": (
        ["noise", "--beside", "classes"],
        r"\S+: takes noise \[24\] and classes; \S+ takes noise \[24\]",
    ),
    "a grid of what": (["noise", "--grid", "8"], "--grid '8': expected COLUMNSxROWS like 8x8"),
    "an empty grid": (["noise", "--grid", "0x8"], "--grid '0x8': expected COLUMNSxROWS like 8x8"),
    "classes by name": (["classes", "--classes", "cat"], "--classes 'cat': expected numbers like .*"),
    "a discriminator": (
        ["discriminator"],
        r"\S+: no generator: makes \[N\] of x \[N, 1, 28, 28\] \(float\); expected \[N, 1 or 3, H, W\]",
    ),
    "no folder to write to": (["noise", "--out", "no/where.png"], "no/where.png: the folder no does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str, cli: Cli, files: dict[str, Made]) -> None:
    named = [files[word].path if word in files else word for word in arguments]
    result = cli("sample", *named)
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(f"error: {message}\n", result.err), result.err


def test_a_file_that_is_no_onnx_is_one_line(cli: Cli) -> None:
    Path("broken.onnx").write_bytes(b"nothing")
    result = cli("sample", "broken.onnx")
    assert result.code == 4
    assert result.err.startswith("error: broken.onnx: ONNX Runtime cannot load it")
    assert result.err.count("\n") == 1


class Odd(nn.Module):
    """Makes images of `z`, by way of whatever is asked for."""

    def __init__(self, shape: tuple[int, ...], num_classes: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(4, int(np.prod(shape)))
        self.classes = nn.Embedding(num_classes, 4) if num_classes else None

    def forward(self, labels: Tensor, z: Tensor) -> Tensor:
        condition = self.classes(labels) if self.classes else labels[:, None].float()
        made: Tensor = self.linear(z.flatten(1) + condition).tanh().unflatten(1, self.shape)
        return made


def odd(folder: Path, *, shape: tuple[int, ...] = (3, 4, 4), num_classes: int | None = 11, z: Tensor) -> Made:
    torch.manual_seed(0)
    network = Odd(shape, num_classes).eval()
    export_onnx(network, (torch.zeros(len(z), dtype=torch.int64), z), folder / "odd.onnx")
    return Made(network, folder / "odd.onnx")


def test_labels_may_come_first_and_noise_may_have_two_more_dimensions(tmp_path: Path) -> None:
    network, path = odd(tmp_path, z=torch.zeros(2, 4, 1, 1))
    generator = open_generator(path)
    assert not generator.from_images
    assert generator.num_classes() == 11
    z, labels = noise(3, generator, seed=0), torch.tensor([1, 0, 10])
    assert z.shape == (3, 4, 1, 1)
    assert torch.allclose(generator.images(z, labels), expected(network, labels, z), atol=1e-6)


def test_classes_without_end_must_be_named(tmp_path: Path, cli: Cli) -> None:
    path = odd(tmp_path, num_classes=None, z=torch.zeros(2, 4)).path
    with pytest.raises(ExportError, match="takes every class index; say which classes"):
        open_generator(path).num_classes()
    assert cli("sample", path, "--classes", "0,70").code == 0


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4)])
def test_what_makes_no_images_is_no_generator(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no generator: makes \[N, [\d, ]+\] of z \[N, 4\] \(float\)"):
        open_generator(odd(tmp_path, shape=shape, z=torch.zeros(2, 4)).path)


def test_what_takes_two_noises_is_no_generator(tmp_path: Path) -> None:
    export_onnx(nn.Bilinear(3, 4, 2), (torch.zeros(2, 3), torch.zeros(2, 4)), tmp_path / "two.onnx")
    with pytest.raises(UsageError, match=r"takes input1 \[N, 3\] \(float\), input2 \[N, 4\] \(float\); expected noise"):
        open_generator(tmp_path / "two.onnx")


def test_a_file_of_one_batch_size_gets_full_batches(tmp_path: Path) -> None:
    network = stirred(build("dcgan_generator", ch=8))
    program = torch.onnx.export(network, (torch.zeros(4, Z),), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "fixed.onnx")
    generator = open_generator(tmp_path / "fixed.onnx")
    assert generator.batch_size == 4
    z = noise(6, generator, seed=0)
    assert torch.allclose(generator.images(z), expected(network, z), atol=1e-5)
