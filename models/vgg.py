"""VGG with BatchNorm for small images. Simonyan and Zisserman 2015, arXiv:1409.1556.

Convolutions carry no bias; four poolings and a final average serve any image of at least 16x16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, max pooling between them, then `classifier` on the features of the last.

    Args:
        depths: convolutions per stage.
        classifier: [N, 8 width] -> [N, num_classes].
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        activation: makes what follows every BatchNorm.
        in_channels: image channels; images are [N, in_channels, H, W] with H and W at least 16.
    """

    def __init__(
        self,
        depths: Sequence[int],
        classifier: nn.Module,
        *,
        width: int = 64,
        activation: Activation = nn.ReLU,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, (depth, factor) in enumerate(zip(depths, (1, 2, 4, 8, 8), strict=True)):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                made = factor * width
                layers += [nn.Conv2d(channels, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), activation()]
                channels = made
        self.features = nn.Sequential(*layers)
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(out)
        return logits


def vgg16(*, num_classes: int = 10, in_channels: int = 3, width: int = 64, activation: Activation = nn.ReLU) -> VGG:
    """13 convolutions and a hidden layer as wide as the last: Linear, BatchNorm, activation, Linear.

    Args:
        num_classes: outputs.
        in_channels: image channels.
        width: channels of the first stage.
        activation: makes what follows every BatchNorm, such as `nn.Tanh`.
    """
    features = 8 * width
    classifier = nn.Sequential(
        nn.Linear(features, features), nn.BatchNorm1d(features), activation(), nn.Linear(features, num_classes)
    )
    return VGG((2, 2, 3, 3, 3), classifier, width=width, activation=activation, in_channels=in_channels)


def vgg19(*, num_classes: int = 10, in_channels: int = 3) -> VGG:
    """16 convolutions and one Linear layer."""
    return VGG((2, 2, 4, 4, 4), nn.Linear(512, num_classes), in_channels=in_channels)
