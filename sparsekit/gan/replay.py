"""A history of generated images, so that a discriminator does not forget what it was shown before.

Source: Shrivastava et al. 2017, arXiv:1612.07828; 50 images, one for one with probability one half, as in Zhu et al.
2017 (CycleGAN), arXiv:1703.10593.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ReplayBuffer(nn.Module):
    """Gives back each image it is given, or, once it is full, every second time an earlier one in whose place it goes.

    The images are buffers of the module: a checkpoint holds them, and `to` moves them.

    Args:
        shape: of one image, [C, H, W].
        num_images: how many are kept; 0 gives back all images as they are.
    """

    def __init__(self, shape: Sequence[int], *, num_images: int = 50) -> None:
        super().__init__()
        self.images = nn.Buffer(torch.zeros(num_images, *shape))
        self.num_filled = nn.Buffer(torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, images: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
        """As many images as given, [N, C, H, W], without gradients; `rng` draws on the CPU."""
        returned = images.detach().clone()
        capacity = len(self.images)
        for image in returned:
            filled = int(self.num_filled)
            if filled < capacity:
                self.images[filled] = image
                self.num_filled.add_(1)
            elif capacity and torch.rand((), generator=rng) < 0.5:
                place = int(torch.randint(capacity, (), generator=rng))
                earlier = self.images[place].clone()
                self.images[place] = image
                image.copy_(earlier)
        return returned
