"""Every GAN's networks, small enough to train in a blink, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.models import GANS

Z, NUM_CLASSES = 24, 5
GENERATORS = sorted(name for name in GANS if name.endswith("_generator"))
DISCRIMINATORS = sorted(name for name in GANS if name.endswith("_discriminator"))
CONDITIONAL = {"acgan_generator"} | {
    f"{gan}_{part}" for gan in ("projgan", "sagan", "biggan") for part in ("generator", "discriminator")
}


def build(name: str, *, ch: int = 16, image_size: int = 28, image_channels: int = 1) -> nn.Module:
    """The network in training mode, seeded."""
    torch.manual_seed(0)
    gan = name.rpartition("_")[0]
    sizes = {"ch": ch, "image_channels": image_channels}
    if gan == "cyclegan":
        sizes |= {"num_blocks": 2} if name.endswith("generator") else {}
    elif name.endswith("generator"):
        sizes |= {"z": Z, "image_size": image_size}
    if gan in ("acgan", "projgan", "sagan", "biggan"):
        sizes["num_classes"] = NUM_CLASSES
    return GANS[name](**sizes)


def inputs_of(name: str, *, image_size: int = 28, image_channels: int = 1) -> tuple[Tensor, ...]:
    """Three seeded examples."""
    torch.manual_seed(1)
    images = torch.rand(3, image_channels, image_size, image_size) * 2 - 1
    from_noise = name.endswith("generator") and not name.startswith("cyclegan")
    labels = (torch.tensor([0, 4, 2]),) if name in CONDITIONAL else ()
    return (torch.randn(3, Z) if from_noise else images, *labels)


def stirred(network: nn.Module) -> nn.Module:
    """In eval mode, in place: no parameter a constant and no BatchNorm neutral, so that every channel counts."""
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()
