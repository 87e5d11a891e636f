"""How far a generator's images are from those it should make: by pixels, or by what a classifier sees in them.

Source: Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer", arXiv:1603.08155.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import UsageError, nearest
from sparsekit.surgery import copied

Maps = Callable[[Tensor], Sequence[Tensor]]  # images in [-1, 1] -> feature maps [N, C, H, W], differentiable


def distance(images: Tensor, wanted: Tensor, maps: Maps | None, *, gram_weight: float) -> Tensor:
    """How far images are from what they should be, a scalar.

    By feature maps the mean absolute difference of the first and `gram_weight` times the squared ones of the Gram
    matrices of all, divided by C H W; without maps the mean squared difference of pixels.
    """
    if maps is None:
        return F.mse_loss(images, wanted)
    pairs = list(zip(maps(images), maps(wanted), strict=True))
    grams = sum((F.mse_loss(_gram(mine), _gram(theirs)) for mine, theirs in pairs), images.new_zeros(()))
    return F.l1_loss(*pairs[0]) + gram_weight * grams


def feature_maps(network: nn.Module, layers: Sequence[str], *, mean: Sequence[float], std: Sequence[float]) -> Maps:
    """What `layers` of a classifier make of images in [-1, 1], to compare images by.

    Args:
        network: trained; copied, and never trained here.
        layers: paths of modules that return [N, C, H, W].
        mean: per channel, of pixels in [0, 1], that the network expects to be subtracted.
        std: likewise, what they are divided by.

    Raises:
        UsageError: no such layer.
    """
    network = copied(network).eval().requires_grad_(False)
    network.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    modules = dict(network.named_modules())
    for layer in layers:
        if layer not in modules:
            raise UsageError(f"feature layer {layer!r}: no such module{nearest(layer, [*filter(None, modules)])}")
    mean_C11, std_C11 = (torch.tensor(list(values))[:, None, None] for values in (mean, std))

    def maps(images: Tensor) -> list[Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, arguments, output: seen.__setitem__(name, output)

        hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
        pixels = ((images + 1) / 2).expand(-1, len(mean_C11), -1, -1)
        network((pixels - mean_C11.to(images)) / std_C11.to(images))
        for hook in hooks:
            hook.remove()
        return [seen[name] for name in layers]

    return maps


def _gram(maps: Tensor) -> Tensor:
    """[N, C, C], divided by C H W."""
    flat_NCP = maps.flatten(2)
    return flat_NCP @ flat_NCP.transpose(1, 2) / (flat_NCP.shape[1] * flat_NCP.shape[2])
