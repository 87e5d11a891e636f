"""A network and a task that train in a blink; `tests/tiny.py:network` and `:task` name them on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.data import image_task
from sparsekit.images import load_images
from sparsekit.latency import LatencyComparison, measure_latency
from sparsekit.task import Task

FILE = Path(__file__)


def quick_latency(
    paths: Sequence[Path | str], *, max_launches: int = 0, max_seconds: float = 0, **options: Any
) -> LatencyComparison:
    """`measure_latency` in a blink: what is timed here does not matter, only that it is."""
    return measure_latency(paths, min_launches=2, max_launches=2, max_seconds=1.0, **options)


class Net(nn.Module):
    """Two convolutions for 8x8 digits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def network() -> nn.Module:
    return Net()


def task() -> Task:
    return image_task(load_images("digits"), limit=64, batch_size=16)
