"""What discriminators and generators minimise: plain functions of logits [N], higher for real images.

>>> LOSSES["hinge"].discriminator(torch.tensor([2.0]), torch.tensor([0.5]))
tensor(1.5000)
>>> LOSSES["hinge"].generator(torch.tensor([0.5]))
tensor(-0.5000)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRADIENT_PENALTY_WEIGHT = 10.0  # Gulrajani et al. 2017, arXiv:1704.00028
CYCLE_WEIGHT = 10.0  # both Zhu et al. 2017, arXiv:1703.10593
IDENTITY_WEIGHT = 5.0


@dataclass(frozen=True)
class AdversarialLoss:
    """A game of two.

    Attributes:
        discriminator: logits of real and of fake images, which may differ in number, -> scalar to minimise.
        generator: logits of fake images -> scalar to minimise.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Real logits are pushed above 1, fake ones below -1. Lim and Ye 2017, arXiv:1705.02894."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of telling real from fake. Goodfellow et al. 2014, arXiv:1406.2661."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """Cross-entropy of passing for real, whose gradient stays where the discriminator is sure of the fake."""
    return F.softplus(-fake).mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Fake above real on average; a distance only with a bound on the slope, as `gradient_penalty` sets one."""
    return fake.mean() - real.mean()


def higher_logits(fake: Tensor) -> Tensor:
    """The generator's part of the hinge and the Wasserstein game."""
    return -fake.mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half the squared distances, of real logits to 1 and of fake ones to 0. Mao et al. 2017, arXiv:1611.04076."""
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def least_squares_generator(fake: Tensor) -> Tensor:
    """Squared distance of fake logits to 1, not halved, as in CycleGAN."""
    return (fake - 1).square().mean()


LOSSES: dict[str, AdversarialLoss] = {
    "hinge": AdversarialLoss(hinge_discriminator, higher_logits),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "non_saturating": AdversarialLoss(non_saturating_discriminator, non_saturating_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, higher_logits),
}


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, rng: torch.Generator | None = None
) -> Tensor:
    """How far from 1 the slope of the discriminator is between real and fake images: mean (|gradient| - 1)^2.

    Args:
        discriminator: images -> logits [N]; what else it needs, such as labels, is bound.
        real: images [N, C, H, W].
        fake: as many, no gradient flows into them.
        rng: draws a point on the line between each real image and its fake.

    Returns:
        A scalar to be weighted by `GRADIENT_PENALTY_WEIGHT`; its gradient reaches the discriminator's parameters.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, equation 3.
    """
    share_N111 = torch.rand((len(real), 1, 1, 1), generator=rng, device=real.device, dtype=real.dtype)
    between = torch.lerp(fake.detach(), real.detach(), share_N111).requires_grad_()
    (slopes,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    penalty: Tensor = (slopes.flatten(1).norm(dim=1) - 1).square().mean()
    return penalty


def class_term(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the auxiliary classifier; ACGAN adds it to both losses, of real and of fake images alike.

    Args:
        class_logits: [N, num_classes].
        labels: int64 [N], of fake images the classes that were asked for.

    Source: Odena et al. 2017, arXiv:1610.09585.
    """
    return F.cross_entropy(class_logits, labels)


def cycle_term(images: Tensor, returned: Tensor) -> Tensor:
    """Mean absolute difference of images and what comes back through both generators, times `CYCLE_WEIGHT`."""
    return CYCLE_WEIGHT * F.l1_loss(returned, images)


def identity_term(images: Tensor, translated: Tensor) -> Tensor:
    """The same of images that a generator is given of its own target domain, times `IDENTITY_WEIGHT`."""
    return IDENTITY_WEIGHT * F.l1_loss(translated, images)
