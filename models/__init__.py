"""Networks for small images, by name.

Factories of `CLASSIFIERS` take `num_classes` and `in_channels`. Those of `GANS` make generators and discriminators,
named `<gan>_generator` and `<gan>_discriminator`, and take sizes of their own.

>>> sum(parameter.numel() for parameter in MODELS["resnet20"](num_classes=10).parameters())
269722
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from sparsekit.models import gan_autogan
from sparsekit.models import gan_resnet_discriminators as discriminators
from sparsekit.models import gan_resnet_generators as generators
from sparsekit.models.gan_autogan import AutoGANGenerator
from sparsekit.models.gan_biggan import biggan_discriminator, biggan_generator
from sparsekit.models.gan_cyclegan import CycleGANDiscriminator, CycleGANGenerator
from sparsekit.models.gan_dcgan import DCGANDiscriminator, DCGANGenerator
from sparsekit.models.lenet import LeNet5, LeNet300100
from sparsekit.models.mobilenet import MobileNetV1, MobileNetV2
from sparsekit.models.resnet import CifarResNet
from sparsekit.models.vgg import vgg16, vgg19
from sparsekit.models.wide_resnet import WideResNet

__all__ = ["CLASSIFIERS", "GANS", "MODELS"]

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    # 8x8 grey digits. Two stages, since a third at 2x2 pixels would be all overhead; wide enough (61 M MACs) that
    # halving the MACs is felt even at widths that no runtime likes.
    "digits_resnet": partial(CifarResNet, 14, width=96, num_stages=2, projection=True, in_channels=1),
    "lenet_300_100": LeNet300100,
    "lenet5": LeNet5,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    # The suffix _b: option B shortcuts (1x1 convolution) instead of option A (zero padding).
    "resnet20": partial(CifarResNet, 20),
    "resnet20_b": partial(CifarResNet, 20, projection=True),
    "resnet32": partial(CifarResNet, 32),
    "resnet32_b": partial(CifarResNet, 32, projection=True),
    "resnet44": partial(CifarResNet, 44),
    "resnet44_b": partial(CifarResNet, 44, projection=True),
    "resnet56": partial(CifarResNet, 56),
    "resnet56_b": partial(CifarResNet, 56, projection=True),
    "resnet110": partial(CifarResNet, 110),
    "resnet110_b": partial(CifarResNet, 110, projection=True),
    "vgg16": vgg16,
    "vgg19": vgg19,
    # The budget-pruning literature's WRN-26-12 on CIFAR-100 (e.g. ChipNet): twelve times as wide behind a stem of 16,
    # but activated after the convolutions, and 26 counts 24 of them, the stem and the classifier.
    "wrn26_12": partial(CifarResNet, 26, width=16 * 12, stem_width=16, projection=True),
    "wrn28_2": partial(WideResNet, 28, 2),
    "wrn28_10": partial(WideResNet, 28, 10),
    "wrn40_4": partial(WideResNet, 40, 4),
}

GANS: dict[str, Callable[..., nn.Module]] = {
    "acgan_discriminator": discriminators.acgan_discriminator,
    "acgan_generator": generators.conditional_generator,
    "autogan_a_discriminator": discriminators.sngan_discriminator,
    "autogan_a_generator": partial(AutoGANGenerator, gan_autogan.A),
    "autogan_b_discriminator": discriminators.sngan_discriminator,
    "autogan_b_generator": partial(AutoGANGenerator, gan_autogan.B),
    "autogan_c_discriminator": discriminators.sngan_discriminator,
    "autogan_c_generator": partial(AutoGANGenerator, gan_autogan.C),
    "biggan_discriminator": biggan_discriminator,
    "biggan_generator": biggan_generator,
    "cyclegan_discriminator": CycleGANDiscriminator,
    "cyclegan_generator": CycleGANGenerator,
    "dcgan_discriminator": DCGANDiscriminator,
    "dcgan_generator": DCGANGenerator,
    # DCGAN's networks under the hinge loss.
    "ggan_discriminator": DCGANDiscriminator,
    "ggan_generator": DCGANGenerator,
    "projgan_discriminator": discriminators.projgan_discriminator,
    "projgan_generator": generators.conditional_generator,
    "sagan_discriminator": discriminators.attentive_discriminator,
    "sagan_generator": generators.sagan_generator,
    "sngan_discriminator": discriminators.sngan_discriminator,
    "sngan_generator": generators.sngan_generator,
    "wgan_gp_discriminator": discriminators.wgan_gp_discriminator,
    "wgan_gp_generator": generators.wgan_gp_generator,
}

MODELS: dict[str, Callable[..., nn.Module]] = CLASSIFIERS | GANS
