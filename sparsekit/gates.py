"""A network in which what every channel contributes to its readers is scaled by a gate: how methods see importance.

The gate scales every place that reads a channel (the `read` slots), not the filters that make it: followed by
train-mode BatchNorm, a scaled filter is the same filter. Behind a ReLU this equals a gate after BatchNorm; at zero it
is what cutting the channel means.

Gates on the filters, `at="filter"`, exist to show that difference.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.plan import COUNT, ChannelGroup, Slot
from sparsekit.surgery import tensor_of

Place = Literal["reads", "filter"]
Positions = dict[tuple[str, int, int], Tensor]  # (weight, dim, 0 or 1 ..) -> int64, one entry per position along dim


class GatedNetwork(nn.Module):
    """`network`, called with gates.

    Attributes:
        valid: bool [G, C], False at padding.

    Args:
        network: owned and trained from here on.
        groups: what is gated, a row of the gates each.
        at: "reads" scales what reads a channel; "filter" the weights that make it and their biases.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup], *, at: Place = "reads") -> None:
        super().__init__()
        self.network, self.groups = network, tuple(groups)
        sizes = torch.tensor([[group.size] for group in groups])
        width = int(sizes.max())
        self.valid = nn.Buffer(torch.arange(width) < sizes, persistent=False)
        positions = _factor_positions(network, self.groups, width, at)
        self.places = {place: len(where) for place, where in positions.items()}
        self.positions = nn.Buffer(torch.cat([*positions.values()]), persistent=False)
        self.aliases = {name: _names(network, tensor_of(network, name)) for name, _, _ in positions}

    def forward(self, gates_GC: Tensor, *inputs: Any) -> Any:
        """What the network returns with channel c of group g scaled by `gates_GC[g, c]`."""
        weights = self.weights(gates_GC)
        named = {alias: weight for name, weight in weights.items() for alias in self.aliases[name]}
        return functional_call(self.network, named, inputs, tie_weights=False)

    def weights(self, gates_GC: Tensor) -> dict[str, Tensor]:
        """Name -> parameter, for every one that a gate acts on, with the channels' slices scaled."""
        flat = torch.cat([gates_GC.flatten(), gates_GC.new_ones(1)])
        factors = torch.split(flat.index_select(0, self.positions), [*self.places.values()])
        weights: dict[str, Tensor] = {}
        for (name, dim, _), factor in zip(self.places, factors, strict=True):
            weight = weights[name] if name in weights else tensor_of(self.network, name)
            shape = [-1 if axis == dim else 1 for axis in range(weight.dim())]
            weights[name] = weight * factor.to(weight.dtype).view(shape)
        return weights


def _factor_positions(network: nn.Module, groups: Sequence[ChannelGroup], width: int, at: Place) -> Positions:
    """Where in the flat [G * width] gates each position along a gated dim finds its factor.

    Positions that belong to no group find the constant 1 behind the gates' end.
    """
    positions: Positions = {}
    for row, group in enumerate(groups):
        entries_C = row * width + torch.arange(group.size)
        for slot in _gated_slots(network, group, at):
            size = tensor_of(network, slot.tensor).shape[slot.dim]
            ungated = len(groups) * width
            for layer in count():  # heads x head dims are in two groups, whose factors multiply
                where = positions.setdefault((slot.tensor, slot.dim, layer), torch.full((size,), ungated))
                if (where[slot.index] == ungated).all():
                    where[slot.index] = entries_C[:, None]
                    break
    return positions


def _gated_slots(network: nn.Module, group: ChannelGroup, at: Place) -> list[Slot]:
    if at == "reads":
        return [slot for slot in group.slots if slot.dim != COUNT and (slot.read or group.silent)]
    parameters = dict(network.named_parameters(remove_duplicate=False))
    made = [slot for slot in group.slots if not slot.read and slot.dim != COUNT and slot.tensor in parameters]
    # A layer with a matrix makes channels; normalisation, which has none, only scales what was made.
    makers = {_module(slot) for slot in made if parameters[slot.tensor].dim() > 1}
    return [slot for slot in made if _module(slot) in makers]


def _module(slot: Slot) -> str:
    return slot.tensor.rpartition(".")[0]


def _names(network: nn.Module, tensor: Tensor) -> list[str]:
    """Where `tensor` is found, once per module: given two names of it, functional_call puts back the wrong one."""
    return [
        f"{path}.{leaf}".removeprefix(".")
        for path, module in network.named_modules()
        for leaf, value in (module._parameters | module._buffers).items()
        if value is tensor
    ]
