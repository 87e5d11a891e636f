"""Networks for small images, by name; every factory takes `num_classes` and `in_channels`.

>>> sum(parameter.numel() for parameter in MODELS["resnet20"](num_classes=10).parameters())
269722
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from sparsekit.models.lenet import LeNet5, LeNet300100
from sparsekit.models.mobilenet import MobileNetV1, MobileNetV2
from sparsekit.models.resnet import CifarResNet
from sparsekit.models.vgg import vgg16, vgg19
from sparsekit.models.wide_resnet import WideResNet

__all__ = ["MODELS"]

MODELS: dict[str, Callable[..., nn.Module]] = {
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
