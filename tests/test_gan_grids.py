"""Pictures of many images, and the noise that they are drawn from."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.gan.grids import BORDER, GREY, data_uri, from_bytes, grid, side_by_side, to_bytes
from sparsekit.gan.sampling import strip, strips


def images(num: int, channels: int, height: int = 4, width: int = 6) -> Tensor:
    return torch.rand(num, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_image_stands_at_its_place_row_by_row(channels: int, mode: str) -> None:
    batch = images(5, channels)
    picture = grid(batch, columns=2)
    assert picture.mode == mode
    assert picture.size == (2 * (6 + BORDER) + BORDER, 3 * (4 + BORDER) + BORDER)
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    seen = np.full(pixels.shape[:2], False)
    for number, image in enumerate(to_bytes(batch).permute(0, 2, 3, 1)):
        top, left = number // 2 * (4 + BORDER) + BORDER, number % 2 * (6 + BORDER) + BORDER
        place = slice(top, top + 4), slice(left, left + 6)
        assert np.array_equal(pixels[place], image)
        seen[place] = True
    assert (pixels[~seen] == GREY).all()


def test_pixels_are_rounded_and_cut_off_at_their_ends() -> None:
    values = torch.tensor([-9.0, -1.0, -0.999, -0.0118, 0.0118, 0.999, 1.0, 9.0])
    assert to_bytes(values).tolist() == [0, 0, 0, 126, 129, 255, 255, 255]
    assert from_bytes(to_bytes(values)).abs().max() == 1


def test_a_grid_takes_what_a_generator_gives() -> None:
    assert grid(images(2, 1).requires_grad_(), columns=2).size == grid(images(2, 1), columns=2).size
    for wrong in (images(2, 2), torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(DataError, match=r"expected \[N, 1 or 3, H, W\], got"):
            grid(wrong, columns=1)


def test_pictures_stand_from_left_to_right_whatever_their_modes() -> None:
    grey, colour = grid(images(4, 1), columns=2), grid(images(2, 3), columns=1)
    joined = side_by_side([grey, colour])
    assert joined.mode == "RGB"
    assert joined.size == (grey.width + 8 * BORDER + colour.width, max(grey.height, colour.height))
    assert joined.crop((0, 0, *grey.size)).convert("L").tobytes() == grey.tobytes()
    left = grey.width + 8 * BORDER
    assert joined.crop((left, 0, joined.width, colour.height)).tobytes() == colour.tobytes()
    assert joined.getpixel((grey.width + 1, 0)) == (GREY,) * 3
    assert side_by_side([grey, grey]).mode == "L"


def test_a_data_uri_is_the_picture_without_loss() -> None:
    picture = grid(images(4, 3), columns=2)
    kind, _, content = data_uri(picture).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as read:
        assert read.tobytes() == picture.tobytes()


def test_the_way_between_noises_keeps_to_the_sphere_in_even_steps() -> None:
    start, end = torch.zeros(2, 8).double()
    start[0], end[1] = 3, 3
    way = strip(start, end, 7).double()
    assert torch.allclose(way.norm(dim=1), torch.full((7,), 3.0).double())
    cosines = (way[:-1] * way[1:]).sum(1) / 9
    assert torch.allclose(cosines.acos(), torch.full((6,), torch.pi / 12).double(), atol=1e-4)


@pytest.mark.parametrize("shape", [(16,), (16, 1, 1)])
def test_the_ends_of_a_strip_are_the_noises_given(shape: tuple[int, ...]) -> None:
    start, end = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    way = strip(start, end, 4)
    assert way.shape == (4, *shape)
    assert torch.allclose(way[0], start, atol=1e-6)
    assert torch.allclose(way[-1], end, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_noises_on_one_line_are_joined_by_it(factor: float) -> None:
    start = torch.tensor([1.0, 2.0, 3.0])
    way = strip(start, factor * start, 3)
    assert torch.allclose(way[1], start * (1 + factor) / 2)


def test_strips_join_every_two() -> None:
    ends = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    joined = strips(ends, 3)
    assert torch.equal(joined, torch.cat([strip(ends[0], ends[1], 3), strip(ends[2], ends[3], 3)]))
