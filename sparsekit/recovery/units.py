"""The layers of a small network that can be repaired, each beside the dense network's layer of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.plan import COUNT, PruningPlan
from sparsekit.program import Program
from sparsekit.recovery.layers import Layer, layers_of
from sparsekit.recovery.receptive_fields import num_outputs
from sparsekit.surgery import tensor_of

Kept = Mapping[tuple[str, int], Tensor]  # (tensor, dim) -> int64, the dense positions that are left


@dataclass(frozen=True, eq=False)
class Unit:
    """A layer that the forward runs once, and the BatchNorm that reads its very output.

    Attributes:
        small: the layer as the small network runs it.
        dense: as the dense one does.
        kept: int64 [K], which of the dense layer's outputs the small layer has.
    """

    small: Layer
    dense: Layer
    kept: Tensor

    @property
    def name(self) -> str:
        """The layer's path."""
        return self.small.name

    @property
    def holds_constant(self) -> bool:
        """Whether there is a bias, or statistics of a BatchNorm, to which a constant of the output can be added."""
        return self.small.bias is not None or self.small.norm is not None


def units(dense: Program, small: Program, plan: PruningPlan) -> list[Unit]:
    """The layers of `small` that can be repaired, in the order of its forward pass.

    Left out are layers whose factors have other uses too or are computed, and those of which the plan does not say
    what is left.

    Args:
        dense: the network that the plan was made for.
        small: what the plan made of it.
        plan: empty where nothing was cut.
    """
    kept, twins, found = kept_positions(plan), {layer.weight: layer for layer in layers_of(dense)}, []
    for layer in layers_of(small):
        twin = twins.get(layer.weight)
        if twin is None or not layer.is_plain:
            continue
        outputs = _kept_outputs(twin, tensor_of(dense, twin.weight), kept)
        if len(outputs) == num_outputs(layer, tensor_of(small, layer.weight)):
            found.append(Unit(layer, twin, outputs))
    return found


def kept_positions(plan: PruningPlan) -> Kept:
    """Which positions along each dimension that the plan cuts are left: (tensor, dim) -> int64."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group, keep in plan.keep.items():
        for slot in group.slots:
            if slot.dim != COUNT:
                mask = stays.setdefault((slot.tensor, slot.dim), torch.ones(slot.size, dtype=torch.bool))
                mask[slot.index[~keep].flatten()] = False
    return {place: mask.nonzero().flatten() for place, mask in stays.items()}


@torch.no_grad()
def shift_output(program: Program, layer: Layer, delta_K: Tensor) -> None:
    """Let what follows see the layer's output larger by `delta_K`, if anything holds such a constant."""
    if layer.bias is not None:
        tensor_of(program, layer.bias).add_(delta_K)
    elif layer.norm is not None:
        tensor_of(program, layer.norm.states["running_mean"]).sub_(delta_K)


def output_scale(program: Program, layer: Layer) -> Tensor:
    """What each of the layer's outputs is multiplied with by the BatchNorm behind it; 1 where there is none."""
    if layer.norm is None:
        weight = tensor_of(program, layer.weight)
        return weight.new_ones(num_outputs(layer, weight))
    states = layer.norm.states
    scale_K = (tensor_of(program, states["running_var"]) + layer.norm.eps).rsqrt()
    return scale_K * tensor_of(program, states["weight"]) if "weight" in states else scale_K


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """The networks in eval mode and without gradients; afterwards every module's mode as it was."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def split(images: Tensor, batch_size: int, network: nn.Module) -> Sequence[Tensor]:
    """The images in batches, on the network's device."""
    device = next((parameter.device for parameter in network.parameters()), images.device)
    return [batch.to(device) for batch in images.split(batch_size)]


def _kept_outputs(layer: Layer, weight: Tensor, kept: Kept) -> Tensor:
    places = [(layer.bias, 0)] if layer.bias else []
    if not layer.inputs_first:
        places.append((layer.weight, 0))
    elif layer.convolution is None or layer.convolution.num_conv_groups == 1:  # else it counts those of one conv group
        places.append((layer.weight, 1))
    if layer.norm:
        places += [(name, 0) for name in layer.norm.states.values()]
    return next((kept[place] for place in places if place in kept), torch.arange(num_outputs(layer, weight)))
