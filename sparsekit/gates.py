"""A network in which what every channel contributes to its readers is scaled by a gate: how methods see importance.

The gate scales every place that reads a channel (the `read` slots), not the filters that make it: followed by
train-mode BatchNorm, a scaled filter is the same filter. Behind a ReLU this equals a gate after BatchNorm; at zero it
is what cutting the channel means.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.plan import ChannelGroup

Positions = dict[tuple[str, int], Tensor]  # (weight, dim) -> int64, one entry per position along dim


class GatedNetwork(nn.Module):
    """`network`, called with gates.

    Attributes:
        valid: bool [G, C], False at padding.

    Args:
        network: owned and trained from here on.
        groups: what is gated, a row of the gates each.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        super().__init__()
        self.network, self.groups = network, tuple(groups)
        sizes = torch.tensor([[group.size] for group in groups])
        width = int(sizes.max())
        self.valid = nn.Buffer(torch.arange(width) < sizes, persistent=False)
        positions = _factor_positions(network, self.groups, width)
        self.reads = {read: len(where) for read, where in positions.items()}
        self.positions = nn.Buffer(torch.cat([*positions.values()]), persistent=False)

    def forward(self, gates_GC: Tensor, *inputs: Any) -> Any:
        """What the network returns with channel c of group g scaled by `gates_GC[g, c]`."""
        return functional_call(self.network, self.weights(gates_GC), inputs)

    def weights(self, gates_GC: Tensor) -> dict[str, Tensor]:
        """Name -> weight, for every weight that reads a gated channel, with that channel's slices scaled."""
        flat = torch.cat([gates_GC.flatten(), gates_GC.new_ones(1)])
        factors = torch.split(flat.index_select(0, self.positions), [*self.reads.values()])
        weights: dict[str, Tensor] = {}
        for (name, dim), factor in zip(self.reads, factors, strict=True):
            weight = weights[name] if name in weights else self.network.get_parameter(name)
            shape = [-1 if axis == dim else 1 for axis in range(weight.dim())]
            weights[name] = weight * factor.to(weight.dtype).view(shape)
        return weights


def _factor_positions(network: nn.Module, groups: Sequence[ChannelGroup], width: int) -> Positions:
    """Where in the flat [G * width] gates each position along a read dim finds its factor.

    Positions that belong to no group find the constant 1 behind the gates' end.
    """
    positions: Positions = {}
    for row, group in enumerate(groups):
        entries_C = row * width + torch.arange(group.size)
        for slot in group.slots:
            if slot.read:
                size = network.get_parameter(slot.tensor).shape[slot.dim]
                ungated = torch.full((size,), len(groups) * width)
                positions.setdefault((slot.tensor, slot.dim), ungated)[slot.index] = entries_C[:, None]
    return positions
