"""Spectral norm on a compacted discriminator: `compact` leaves plain weights, which would train without the bound."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


def restore_spectral_norm(small: nn.Module, dense: nn.Module) -> None:
    """Norm the layers of `small`, in place, that are normed in `dense`, the network that it was compacted from.

    A part of a normed weight has a smaller norm, and is scaled up to 1: from here on `small` computes something else,
    within the bound that `dense` was trained under.

    Raises:
        AttributeError: `small` has no layer of that name.
    """
    for name, layer in dense.named_modules():
        if parametrize.is_parametrized(layer, "weight") and any(map(_is_spectral, layer.parametrizations.weight)):
            spectral_norm(small.get_submodule(name))


def _is_spectral(computation: nn.Module) -> bool:
    return isinstance(computation, nn.utils.parametrizations._SpectralNorm)
