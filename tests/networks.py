"""Networks the laws are tested on: one per structural difficulty, small where the structure allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from sparsekit.models import MODELS
from sparsekit.models.wide_resnet import WideResNet


class SigmoidNet(nn.Module):
    """f(0) is not 0: zeroing a producer is not removal, zeroing the consumer's slice is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.a(x))
        x = torch.nn.functional.avg_pool2d(torch.sigmoid(self.b(x)), 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def _torchvision(name: str, **options: bool) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


# name -> (factory, shape of the example input)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sigmoid": (SigmoidNet, (2, 3, 8, 8)),
    "lenet_300_100": (lambda: MODELS["lenet_300_100"](in_channels=1), (2, 1, 28, 28)),
    "lenet5": (lambda: MODELS["lenet5"](in_channels=1), (2, 1, 28, 28)),
    "resnet20": (MODELS["resnet20"], (2, 3, 32, 32)),
    "resnet20_b": (MODELS["resnet20_b"], (2, 3, 32, 32)),
    "wrn16_2": (lambda: WideResNet(16, 2), (2, 3, 32, 32)),
    "vgg16": (MODELS["vgg16"], (2, 3, 32, 32)),
    "mobilenet_v1": (MODELS["mobilenet_v1"], (2, 3, 32, 32)),
    "mobilenet_v2": (MODELS["mobilenet_v2"], (2, 3, 32, 32)),
    "tv_resnet18": (_torchvision("resnet18"), (2, 3, 64, 64)),
    "tv_resnext50": (_torchvision("resnext50_32x4d"), (2, 3, 64, 64)),
    "tv_vgg11_bn": (_torchvision("vgg11_bn"), (2, 3, 32, 32)),
    "tv_mobilenet_v3": (_torchvision("mobilenet_v3_small"), (2, 3, 64, 64)),
    "tv_densenet121": (_torchvision("densenet121"), (2, 3, 64, 64)),
    "tv_googlenet": (_torchvision("googlenet", init_weights=False), (2, 3, 96, 96)),
    "tv_efficientnet": (_torchvision("efficientnet_b0"), (2, 3, 64, 64)),
    "tv_squeezenet": (_torchvision("squeezenet1_1"), (2, 3, 64, 64)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, its BatchNorms away from their neutral start, and a seeded input."""
    torch.manual_seed(0)
    factory, shape = NETWORKS[name]
    network = factory()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval(), torch.randn(shape)
