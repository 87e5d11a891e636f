"""Differentiable augmentation of every image that a discriminator sees, real and generated.

Images are [N, C, H, W] in [-1, 1], any float dtype; each draws its own change, and gradients flow through it. Every
function takes an `rng` to draw from, on the device of the images.

Source: Zhao et al. 2020 (DiffAugment), arXiv:2006.10738.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.errors import UsageError, nearest

SHIFT = 0.125  # largest translation, of the image's side
HOLE = 0.5  # side of the square that is cut out, of the image's side


def color(x: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
    """Brightness shifted by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5, in this order."""
    shift, saturation, contrast = _uniform(x, 3, rng)
    x = x + shift - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    contrasted: Tensor = mean + (x - mean) * (contrast + 0.5)
    return contrasted


def translation(x: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
    """Moved by up to an eighth of each side, zeros where nothing was."""
    num_images = len(x)
    rows_NH = _shifted(num_images, x.shape[2], x.device, rng)
    columns_NW = _shifted(num_images, x.shape[3], x.device, rng)
    inside_NH, inside_NW = (
        (source >= 0) & (source < size) for source, size in ((rows_NH, x.shape[2]), (columns_NW, x.shape[3]))
    )
    rows_NH, columns_NW = rows_NH.clamp(0, x.shape[2] - 1), columns_NW.clamp(0, x.shape[3] - 1)
    numbers_N11 = torch.arange(num_images, device=x.device)[:, None, None]
    moved_NHWC = x[numbers_N11, :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return moved_NHWC.movedim(3, 1) * (inside_NH[:, None, :, None] & inside_NW[:, None, None, :])


def cutout(x: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
    """A square of half each side set to zero, centred anywhere in the image, so that it may reach over the border."""
    hidden_NH = _covered(len(x), x.shape[2], x.device, rng)
    hidden_NW = _covered(len(x), x.shape[3], x.device, rng)
    return x * ~(hidden_NH[:, None, :, None] & hidden_NW[:, None, None, :])


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}


def augment(x: Tensor, policy: Sequence[str], *, rng: torch.Generator | None = None) -> Tensor:
    """Images changed by each of `policy`, keys of `AUGMENTATIONS`, in its order.

    Raises:
        UsageError: an unknown name.
    """
    for name in policy:
        if name not in AUGMENTATIONS:
            raise UsageError(f"augmentation {name!r}: unknown{nearest(name, list(AUGMENTATIONS))}")
        x = AUGMENTATIONS[name](x, rng=rng)
    return x


def _uniform(x: Tensor, num_draws: int, rng: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1), [num_draws, N, 1, 1, 1]."""
    return torch.rand((num_draws, len(x), 1, 1, 1), generator=rng, device=x.device, dtype=x.dtype)


def _shifted(num_images: int, size: int, device: torch.device, rng: torch.Generator | None) -> Tensor:
    """Where each position of a moved side comes from, int64 [N, size]; outside [0, size) from nowhere."""
    most = int(size * SHIFT + 0.5)
    shift_N1 = torch.randint(-most, most + 1, (num_images, 1), generator=rng, device=device)
    return torch.arange(size, device=device) - shift_N1


def _covered(num_images: int, size: int, device: torch.device, rng: torch.Generator | None) -> Tensor:
    """Which positions of a side the hole covers, bool [N, size]."""
    hole = int(size * HOLE + 0.5)
    # A hole of an even side has its centre between two positions: one place more.
    centre_N1 = torch.randint(0, size + 1 - hole % 2, (num_images, 1), generator=rng, device=device)
    offset = torch.arange(size, device=device) - (centre_N1 - hole // 2)
    return (offset >= 0) & (offset < hole)
