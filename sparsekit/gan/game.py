"""A GAN as values: two networks, what the generator is given, and what the discriminator is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.errors import UsageError, nearest
from sparsekit.gan.augment import augment
from sparsekit.gan.grids import from_bytes
from sparsekit.models import GANS

# Labels go into these discriminators; "acgan"'s names them instead, in a second output.
_TOLD_LABELS = ("biggan", "projgan", "sagan")

Draw = Callable[[int], tuple[Tensor, ...]]  # number of images -> the generator's inputs, on the CPU


@dataclass(frozen=True)
class Noise:
    """Standard normal noise [N, z] and, where there are classes, their indices int64 [N], all alike.

    Both are drawn from torch's own generator on the CPU, so that they repeat wherever the networks run.

    >>> [list(part.shape) for part in Noise(z=8, num_classes=3)(5)]
    [[5, 8], [5]]
    """

    z: int
    num_classes: int = 0

    def __call__(self, num_images: int) -> tuple[Tensor, ...]:
        noise = torch.randn(num_images, self.z)
        return (noise, torch.randint(self.num_classes, (num_images,))) if self.num_classes else (noise,)


@dataclass(frozen=True, eq=False)
class Sources:
    """Images to translate, drawn with replacement from uint8 [M, C, H, W]: float32 [N, C, H, W] in [-1, 1]."""

    images: Tensor

    def __call__(self, num_images: int) -> tuple[Tensor, ...]:
        return (from_bytes(self.images[torch.randint(len(self.images), (num_images,))]),)


@dataclass(frozen=True, eq=False)
class Gan:
    """Two networks that train against each other.

    Attributes:
        generator: what `draw` returns -> images [N, C, H, W] in [-1, 1].
        discriminator: images, and labels where `told_labels`, -> logits [N], higher for real; where `names_labels`
            also class logits [N, num_classes].
        draw: makes inputs of the generator; the second of them are the labels, if there are any.
        told_labels: the discriminator takes class indices.
        names_labels: the discriminator returns class logits.
    """

    generator: nn.Module
    discriminator: nn.Module
    draw: Draw
    told_labels: bool = False
    names_labels: bool = False

    def judge(
        self, images: Tensor, labels: Tensor | None, policy: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N] of images, augmented by `policy`, and class logits where the discriminator returns some."""
        seen = augment(images, policy)
        verdict = self.discriminator(seen, labels) if self.told_labels else self.discriminator(seen)
        return verdict if self.names_labels else (verdict, None)


def build_gan(
    name: str,
    *,
    image_size: int,
    image_channels: int,
    num_classes: int,
    z: int | None = None,
    ch: int | None = None,
    discriminator_ch: int | None = None,
) -> Gan:
    """A built-in GAN from noise, freshly initialised from torch's random state, in training mode.

    Args:
        name: as in `sngan_generator`.
        image_size: height and width.
        image_channels: 1 or 3.
        num_classes: of the labels, which GANs without conditions do not look at.
        z: features of the noise; None is the GAN's own.
        ch: the generator's width; None is the GAN's own.
        discriminator_ch: the discriminator's.

    Raises:
        UsageError: no such GAN, or not of these sizes.
    """
    names = sorted(key.removesuffix("_generator") for key in GANS if key.endswith("_generator"))
    if name not in names:
        raise UsageError(f"model {name!r}: no such GAN{nearest(name, names)}")
    if name == "cyclegan":
        raise UsageError(
            "model 'cyclegan': has two generators, from images to images; see sparsekit.gan.cycle_training"
        )
    sizes = {"image_size": image_size, "image_channels": image_channels, "num_classes": num_classes}
    try:
        generator = build_part(f"{name}_generator", sizes | {"z": z, "ch": ch})
        discriminator = build_part(f"{name}_discriminator", sizes | {"ch": discriminator_ch})
    except ValueError as error:
        raise UsageError(f"model {name!r}: {error}") from error
    conditional = "num_classes" in inspect.signature(GANS[f"{name}_generator"]).parameters
    draw = Noise(z or inspect.signature(GANS[f"{name}_generator"]).parameters["z"].default, num_classes * conditional)
    return Gan(generator, discriminator, draw, told_labels=name in _TOLD_LABELS, names_labels=name == "acgan")


def build_part(name: str, sizes: Mapping[str, int | None]) -> nn.Module:
    """A network of `GANS`, with those of `sizes` that are given and that it knows."""
    known = inspect.signature(GANS[name]).parameters
    return GANS[name](**{key: size for key, size in sizes.items() if size is not None and key in known})
