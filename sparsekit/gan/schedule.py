"""How each GAN trains: loss, steps, rates and what is done to images, as its authors or their successors set them.

Sources: Miyato et al. 2018 (SNGAN), arXiv:1802.05957, and Chen et al. 2021, arXiv:2106.00134, for SNGAN and AutoGAN;
the 2020 configurations of StudioGAN, arXiv:2206.09479, for the other GANs from noise; Zhu et al. 2017,
arXiv:1703.10593, for CycleGAN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsekit.errors import UsageError, nearest
from sparsekit.gan.augment import AUGMENTATIONS
from sparsekit.gan.losses import GRADIENT_PENALTY_WEIGHT, LOSSES

# Share of the epochs done -> share of the first learning rate, both in [0, 1].
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: min(1.0, 2 * (1 - done)),  # from half of the epochs
    "steps": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
}


@dataclass(frozen=True)
class GanSchedule:
    """How to train a generator and a discriminator against each other.

    Attributes:
        epochs: passes of the discriminator over the images.
        loss: a key of `LOSSES`.
        generator_lr: of Adam.
        discriminator_lr: of Adam.
        betas: of both.
        decay: a key of `DECAYS`, by epoch.
        batch_size: real images per step of the discriminator, and as many generated ones.
        generator_batch_size: images per step of the generator.
        num_critic_steps: of the discriminator per step of the generator.
        penalty_weight: of the gradient penalty, 0 for none.
        average_decay: of the averaged generator, per step; 0 takes the generator as it is.
        average_start: steps of the generator before which the average follows it without delay.
        augment: keys of `AUGMENTATIONS`, of all that the discriminator sees.
        flip: mirror half of the real images.
        seed: of everything drawn.

    Raises:
        UsageError: a number out of its range, an unknown name.
    """

    epochs: int
    loss: str = "hinge"
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    decay: str = "constant"
    batch_size: int = 64
    generator_batch_size: int = 128
    num_critic_steps: int = 5
    penalty_weight: float = 0.0
    average_decay: float = 0.999
    average_start: int = 0
    augment: tuple[str, ...] = ()
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for key, names in (("loss", (self.loss,)), ("decay", (self.decay,)), ("augment", self.augment)):
            for name in names:
                if name not in _KNOWN[key]:
                    raise UsageError(f"{key} {name!r}: unknown{nearest(name, _KNOWN[key])}")
        for key, least in _LEAST.items():
            if getattr(self, key) < least:
                raise UsageError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if not 0 <= self.average_decay < 1:
            raise UsageError(f"average_decay must be in [0, 1), got {self.average_decay:g}")


_KNOWN = {"loss": list(LOSSES), "decay": list(DECAYS), "augment": list(AUGMENTATIONS)}
_LEAST = {
    **{"epochs": 0, "generator_lr": 0, "discriminator_lr": 0, "penalty_weight": 0, "average_start": 0, "seed": 0},
    **{"batch_size": 1, "generator_batch_size": 1, "num_critic_steps": 1},
}

_SNGAN = GanSchedule(epochs=320)
_STUDIO = replace(
    _SNGAN, betas=(0.5, 0.999), generator_batch_size=64, average_decay=0.0, flip=True
)  # of 782 batches of CIFAR-10; StudioGAN counts steps of the generator: 100,000 are 640 epochs at 5 critic steps
_DCGAN = replace(_STUDIO, epochs=512, num_critic_steps=2)
_LONG = replace(_STUDIO, epochs=640)

SCHEDULES: dict[str, GanSchedule] = {
    "acgan": _LONG,
    "autogan_a": _SNGAN,
    "autogan_b": _SNGAN,
    "autogan_c": _SNGAN,
    "biggan": replace(
        _LONG, epochs=1280, average_decay=0.9999, average_start=1000, augment=("color", "translation", "cutout")
    ),
    "cyclegan": GanSchedule(
        epochs=200,
        loss="least_squares",
        betas=(0.5, 0.999),
        decay="linear",
        batch_size=1,
        generator_batch_size=1,
        num_critic_steps=1,
        average_decay=0.0,
        flip=True,
    ),
    "dcgan": replace(_DCGAN, loss="non_saturating"),
    "ggan": _DCGAN,
    "projgan": _LONG,
    "sagan": _LONG,
    "sngan": _SNGAN,
    "wgan_gp": replace(_LONG, loss="wasserstein", penalty_weight=GRADIENT_PENALTY_WEIGHT),
}
