"""A network whose single weights are scaled or zeroed: how methods train with zeros, and how zeros outlive training."""

# W weights of all the tensors concerned, one after the other
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class SparseNetwork(nn.Module):
    """`network`, called with a factor for every single weight of the tensors `names`.

    Args:
        network: owned and trained from here on.
        names: parameters of it.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)
        self.sizes = [network.get_parameter(name).numel() for name in self.names]

    def forward(self, factors_W: Tensor, *inputs: Any) -> Any:
        """What the network returns with its weights times `factors_W`."""
        return functional_call(self.network, self.weights(factors_W), inputs)

    def weights(self, factors_W: Tensor) -> dict[str, Tensor]:
        """Name -> weight times its factors; a bool factor of False is an exact zero, which has no gradient."""
        tensors = {name: self.network.get_parameter(name) for name in self.names}
        return {name: tensors[name] * factor.to(tensors[name]) for name, factor in self.shaped(factors_W).items()}

    def magnitudes(self) -> Tensor:
        """Absolute values, float [W], differentiable."""
        return torch.cat([self.network.get_parameter(name).flatten() for name in self.names]).abs()

    def shaped(self, values_W: Tensor) -> dict[str, Tensor]:
        """Name -> its part of `values_W`, in the weight's shape."""
        parts = zip(self.names, values_W.split(self.sizes), strict=True)
        return {name: part.view(self.network.get_parameter(name).shape) for name, part in parts}

    def trained(self, factors_W: Tensor) -> dict[str, Tensor]:
        """All parameters and buffers with the factors folded in, on the CPU, as `PruningPlan.weights` has them."""
        states = dict(self.network.named_parameters()) | dict(self.network.named_buffers()) | self.weights(factors_W)
        return {name: value.detach().cpu() for name, value in states.items()}


class ZerosStay(nn.Module):
    """`network`, in training which the zeros that the tensors `names` have now stay exactly zero.

    Their gradient is zero, so that neither momentum nor weight decay has anything to move.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.sparse = SparseNetwork(network, names)
        self.nonzero = nn.Buffer(self.sparse.magnitudes().detach() > 0)

    def forward(self, *inputs: Any) -> Any:
        return self.sparse(self.nonzero, *inputs)
