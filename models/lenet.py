"""LeNets for 28x28 images, in the sizes of the pruning literature. LeCun et al. 1998."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """Three Linear layers, 300 and 100 hidden units; images are [N, in_channels, 28, 28]."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.ip1 = nn.Linear(28 * 28 * in_channels, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.ip2(F.relu(self.ip1(x.flatten(1)))))
        logits: Tensor = self.ip3(out)
        return logits


class LeNet5(nn.Module):
    """Two 5x5 convolutions (20, 50) and 500 hidden units; images are [N, in_channels, 28, 28]."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(50 * 4 * 4, 500)
        self.ip2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out = F.max_pool2d(F.relu(self.conv2(out)), 2)
        logits: Tensor = self.ip2(F.relu(self.ip1(out.flatten(1))))
        return logits
