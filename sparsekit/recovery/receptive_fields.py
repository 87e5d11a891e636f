"""Convolutions and linear layers as matrix products: what each output position reads, and the weight as a matrix."""

# N examples, P positions of each, R = N P rows, K kernel positions; G conv groups, F inputs and O outputs of each group
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekit.recovery.layers import Convolution, Layer


def num_features(layer: Layer, weight: Tensor) -> int:
    """Inputs of one output: channels of a conv group times kernel positions."""
    return int(as_matrices(layer, weight).shape[1])


def num_outputs(layer: Layer, weight: Tensor) -> int:
    """Output channels of a convolution, output features of a linear layer."""
    num_conv_groups, _, num_of_each = as_matrices(layer, weight).shape
    return num_conv_groups * num_of_each


def as_matrices(layer: Layer, weight: Tensor) -> Tensor:
    """The layer's weight as [G, F, O]; F counts channels, and kernel positions inside."""
    num_conv_groups = layer.convolution.num_conv_groups if layer.convolution else 1
    if layer.inputs_first:
        if layer.convolution is None:
            return weight.detach()[None]
        weight_GIOK = weight.detach().flatten(2).unflatten(0, (num_conv_groups, -1))
        # As a plain convolution of what the input is spread to, the kernel is mirrored.
        mirrored_GFO: Tensor = weight_GIOK.flip(3).transpose(2, 3).flatten(1, 2)
        return mirrored_GFO
    weight_GFO: Tensor = weight.detach().flatten(1).unflatten(0, (num_conv_groups, -1)).mT
    return weight_GFO


@torch.no_grad()
def write_matrices(layer: Layer, weight: Tensor, weight_GFO: Tensor) -> None:
    """Set the weight to what `as_matrices` is then to return."""
    if not layer.inputs_first:
        weight_GFO = weight_GFO.mT
    elif layer.convolution:
        weight_GFO = weight_GFO.unflatten(1, (-1, weight[0, 0].numel())).transpose(2, 3).flip(3)
    weight.copy_(weight_GFO.reshape(weight.shape))


def rows(layer: Layer, weight: Tensor, x: Tensor, y: Tensor, chosen_NP: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer reads at the chosen output positions, and what `y` has there: [G, R, F] and [G, R, O].

    Without its bias, the layer returns the product of the first with `as_matrices(layer, weight)`.

    Args:
        layer: a convolution, plain or transposed, or a linear layer.
        weight: its weight.
        x: its input.
        y: its output or another tensor of that shape.
        chosen_NP: int64 [N, P], numbers of output positions of each example, see `num_examples`.
    """
    if layer.convolution:
        kernel, out_sizes = tuple(weight.shape[2:]), tuple(y.shape[2:])
        if layer.inputs_first:
            x, sliding = _spread(layer.convolution, kernel, x, out_sizes)
        else:
            x, sliding = _padded(layer.convolution, x), layer.convolution
        made_RO = _chosen(y.flatten(2).mT, chosen_NP)
        made_GRO = made_RO.unflatten(1, (sliding.num_conv_groups, -1)).transpose(0, 1)
        return _receptive_fields(sliding, kernel, x, out_sizes, chosen_NP), made_GRO
    num_examples = len(chosen_NP)
    read_RF, made_RO = (_chosen(part.reshape(num_examples, -1, part.shape[-1]), chosen_NP) for part in (x, y))
    return read_RF[None], made_RO[None]


def num_examples(layer: Layer, y: Tensor, num_images: int) -> int:
    """Of how many examples the layer's output `y` is, all with the same number of output positions.

    A convolution may run over windows or regions instead of images. The rows of a linear layer are those of its images,
    unless their number does not go up with that of the images.
    """
    if layer.convolution:
        return len(y)
    num_rows = y.numel() // y.shape[-1]
    return num_rows if num_rows % num_images else num_images


def num_positions(layer: Layer, y: Tensor, num_examples: int) -> int:
    """How many output positions each example has."""
    return y.numel() // y.shape[layer.channel_dim] // num_examples


def _chosen(values_NPC: Tensor, chosen_NP: Tensor) -> Tensor:
    """The chosen rows of every example, [R, C]."""
    index_NPC = chosen_NP[:, :, None].expand(-1, -1, values_NPC.shape[2])
    return values_NPC.gather(1, index_NPC).flatten(0, 1)


def _padded(sliding: Convolution, x: Tensor) -> Tensor:
    return F.pad(x, [size for size in reversed(sliding.padding) for _ in range(2)])


def _receptive_fields(
    sliding: Convolution, kernel: tuple[int, ...], x: Tensor, out_sizes: tuple[int, ...], chosen_NP: Tensor
) -> Tensor:
    """[G, R, F]; gathered at the chosen positions alone, where unfolding would copy the image K times."""
    # Positions of the flattened image: of each field's corner, and of the K kernel positions from there.
    corner_NP, offset_K, rest_NP, jump = torch.zeros_like(chosen_NP), chosen_NP.new_zeros(1), chosen_NP, 1
    for dim in reversed(range(len(out_sizes))):
        corner_NP = corner_NP + rest_NP % out_sizes[dim] * sliding.stride[dim] * jump
        rest_NP = rest_NP // out_sizes[dim]
        steps = torch.arange(kernel[dim], device=x.device) * sliding.dilation[dim] * jump
        offset_K = (steps[:, None] + offset_K).flatten()
        jump *= x.shape[2 + dim]
    index_NPK = corner_NP[:, :, None] + offset_K
    fields = x.flatten(2).gather(2, index_NPK.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    fields_NGCPK = fields.unflatten(2, index_NPK.shape[1:]).unflatten(1, (sliding.num_conv_groups, -1))
    fields_GRF: Tensor = fields_NGCPK.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    return fields_GRF


def _spread(
    sliding: Convolution, kernel: tuple[int, ...], x: Tensor, out_sizes: tuple[int, ...]
) -> tuple[Tensor, Convolution]:
    """The input of which a plain convolution, the other thing returned, makes the same with the mirrored kernel."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], sliding.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    every_step: list[Any] = [..., *(slice(None, None, step) for step in sliding.stride)]
    spread[tuple(every_step)] = x
    padding: list[int] = []
    for dim in reversed(range(len(sizes))):
        reach = sliding.dilation[dim] * (kernel[dim] - 1)
        before = reach - sliding.padding[dim]
        padding += [before, out_sizes[dim] + reach - before - sizes[dim]]
    once = (1,) * len(sizes)
    return F.pad(spread, padding), Convolution(once, (0,) * len(sizes), sliding.dilation, sliding.num_conv_groups)
