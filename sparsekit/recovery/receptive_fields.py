"""Convolutions and linear layers as matrix products: what each output position reads, and the weight as a matrix."""

# N images, P positions of each, R = N P rows, K kernel positions; G conv groups, F inputs and O outputs of each group
from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def num_features(layer: nn.Module) -> int:
    """Inputs of one output: channels of a conv group times kernel positions.

    >>> num_features(nn.Conv2d(8, 6, 3, groups=2)), num_features(nn.Linear(5, 7))
    (36, 5)
    """
    return int(as_matrices(layer).shape[1])


def as_matrices(layer: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer as [G, F, O]; F counts channels, and kernel positions inside."""
    weight: Tensor = layer.get_parameter("weight").detach()
    if isinstance(layer, _ConvTransposeNd):
        weight_GIOK = weight.flatten(2).flip(2).unflatten(0, (layer.groups, -1))
        transposed_GFO: Tensor = weight_GIOK.transpose(2, 3).flatten(1, 2)
        return transposed_GFO
    num_conv_groups = layer.groups if isinstance(layer, _ConvNd) else 1
    weight_GFO: Tensor = weight.flatten(1).unflatten(0, (num_conv_groups, -1)).mT
    return weight_GFO


@torch.no_grad()
def write_matrices(layer: nn.Module, weight_GFO: Tensor) -> None:
    """Set the weight to what `as_matrices` is then to return."""
    weight = layer.get_parameter("weight")
    if isinstance(layer, _ConvTransposeNd):
        weight_GIOK = weight_GFO.unflatten(1, (-1, weight[0, 0].numel())).transpose(2, 3).flip(3)
        weight.copy_(weight_GIOK.reshape(weight.shape))
    else:
        weight.copy_(weight_GFO.mT.reshape(weight.shape))


def rows(layer: nn.Module, x: Tensor, y: Tensor, chosen_NP: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer reads at the chosen output positions, and what `y` has there: [G, R, F] and [G, R, O].

    Without its bias, the layer returns the product of the first with `as_matrices(layer)`.

    Args:
        layer: a convolution, plain or transposed, or a linear layer.
        x: its input.
        y: its output or another tensor of that shape.
        chosen_NP: int64 [N, P], numbers of output positions of each image, see `num_positions`.
    """
    if isinstance(layer, _ConvNd):
        read_GRF = _receptive_fields(layer, x, tuple(y.shape[2:]), chosen_NP)
        made_RO = _chosen(y.flatten(2).mT, chosen_NP)
        return read_GRF, made_RO.unflatten(1, (layer.groups, -1)).transpose(0, 1)
    num_images = len(chosen_NP)
    read_RF, made_RO = (_chosen(part.reshape(num_images, -1, part.shape[-1]), chosen_NP) for part in (x, y))
    return read_RF[None], made_RO[None]


def num_positions(layer: nn.Module, y: Tensor, num_images: int) -> int:
    """How many output positions each image of the layer's output `y` has."""
    channels = y.shape[1] if isinstance(layer, _ConvNd) else y.shape[-1]
    return y.numel() // channels // num_images


def _chosen(values_NPC: Tensor, chosen_NP: Tensor) -> Tensor:
    """The chosen rows of every image, [R, C]."""
    index_NPC = chosen_NP[:, :, None].expand(-1, -1, values_NPC.shape[2])
    return values_NPC.gather(1, index_NPC).flatten(0, 1)


def _receptive_fields(layer: _ConvNd, x: Tensor, out_sizes: tuple[int, ...], chosen_NP: Tensor) -> Tensor:
    """[G, R, F]; gathered at the chosen positions alone, where unfolding would copy the image K times."""
    stride: tuple[int, ...] = layer.stride
    if isinstance(layer, _ConvTransposeNd):
        x, stride = _spread(layer, x, out_sizes), (1,) * len(out_sizes)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    # Positions of the flattened image: of each field's corner, and of the K kernel positions from there.
    corner_NP, offset_K, rest_NP, jump = torch.zeros_like(chosen_NP), chosen_NP.new_zeros(1), chosen_NP, 1
    for dim in reversed(range(len(out_sizes))):
        corner_NP = corner_NP + rest_NP % out_sizes[dim] * stride[dim] * jump
        rest_NP = rest_NP // out_sizes[dim]
        steps = torch.arange(layer.kernel_size[dim], device=x.device) * layer.dilation[dim] * jump
        offset_K = (steps[:, None] + offset_K).flatten()
        jump *= x.shape[2 + dim]
    index_NPK = corner_NP[:, :, None] + offset_K
    fields = x.flatten(2).gather(2, index_NPK.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    fields_NGCPK = fields.unflatten(2, index_NPK.shape[1:]).unflatten(1, (layer.groups, -1))
    fields_GRF: Tensor = fields_NGCPK.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    return fields_GRF


def _spread(layer: _ConvTransposeNd, x: Tensor, out_sizes: tuple[int, ...]) -> Tensor:
    """The input of which a plain convolution of stride 1 with the flipped kernel makes the same output."""
    steps: tuple[int, ...] = layer.stride
    padded = cast(tuple[int, ...], layer.padding)  # transposed convolutions know no padding by name
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], steps, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    every_step: list[Any] = [..., *(slice(None, None, step) for step in steps)]
    spread[tuple(every_step)] = x
    padding: list[int] = []
    for dim in reversed(range(len(sizes))):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
        before = reach - padded[dim]
        padding += [before, out_sizes[dim] + reach - before - sizes[dim]]
    return F.pad(spread, padding)
