"""The generator that is kept: an exponential moving average of the one that trains.

>>> generator = torch.nn.Linear(1, 1, bias=False)
>>> _ = generator.weight.data.fill_(0.0)
>>> average = averaged(generator)
>>> _ = generator.weight.data.fill_(1.0)
>>> update_average(average, generator, decay=0.75)
>>> average.weight.item()
0.25
"""

from __future__ import annotations

import torch
from torch import nn

from sparsekit.surgery import copied


def averaged(generator: nn.Module) -> nn.Module:
    """The average's start: a copy in eval mode that takes no gradients."""
    return copied(generator).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, generator: nn.Module, *, decay: float) -> None:
    """Move `average` towards `generator`, in place, once per step of the generator.

    Parameters are averaged, buffers taken as they are: BatchNorm's statistics average already, and the vectors of
    spectral norm belong to the latest weight.

    Args:
        decay: share of the old average, in [0, 1]; 0 makes it a copy, as before an average is to start.
    """
    for mean, parameter in zip(average.parameters(), generator.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)
    for kept, buffer in zip(average.buffers(), generator.buffers(), strict=True):
        kept.copy_(buffer)
