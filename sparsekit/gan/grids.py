"""Images as bytes, and as pictures that many of them stand in.

>>> grid(torch.zeros(5, 3, 28, 28), columns=3).size
(92, 62)
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsekit.errors import DataError

BORDER = 2  # pixels around each image
GREY = 128  # of the borders: told from black images and white ones, on light pages and dark ones


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to 0, ..., 255, rounded; uint8 of the same shape. What lies outside is cut off.

    >>> to_bytes(torch.tensor([-1.5, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return ((images.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """Inverse of `to_bytes`: uint8 to float32 in [-1, 1].

    >>> bool((to_bytes(from_bytes(torch.arange(256, dtype=torch.uint8))) == torch.arange(256)).all())
    True
    """
    return pixels.float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of `images`, row by row; borders of `BORDER` pixels around and between them.

    Args:
        images: [N, C, H, W] with C 1 or 3, in [-1, 1].
        columns: images per row; the last row may have fewer.

    Raises:
        DataError: images of another shape, or none.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise DataError(f"images: expected [N, 1 or 3, H, W], got {list(images.shape)}")
    num_images, num_channels, height, width = images.shape
    rows = math.ceil(num_images / columns)
    cell = (height + BORDER, width + BORDER)
    canvas = np.full((rows * cell[0] + BORDER, columns * cell[1] + BORDER, num_channels), GREY, np.uint8)
    for number, image in enumerate(to_bytes(images).cpu().permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, columns)
        top, left = row * cell[0] + BORDER, column * cell[1] + BORDER
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(2) if num_channels == 1 else canvas)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right, aligned at their tops, with a gap of eight borders.

    >>> side_by_side([Image.new("L", (10, 8)), Image.new("RGB", (20, 9))]).size
    (46, 9)
    """
    gap = 8 * BORDER
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    joined = Image.new(mode, (width, max(picture.height for picture in pictures)), GREY if mode == "L" else (GREY,) * 3)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    return joined


def data_uri(picture: Image.Image) -> str:
    """The picture as a PNG file that a page holds in itself.

    >>> data_uri(Image.new("L", (1, 1)))[:30]
    'data:image/png;base64,iVBORw0K'
    """
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
