"""Which channels a generator's normalisation can switch off, and which of them a budget leaves.

Scales speak for a group of channels where zero scales and biases are what cutting is, which is tried out. A stream that
a shortcut reads beside the normalisation is not such a group: it keeps all its channels where the others can meet the
budget alone, else what `allocate` leaves it, those with the largest filters. BatchNorm with a gain per class has a
scale per class, 1 + gain, and a channel counts by the l2 norm of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparsekit.budget import Budget
from sparsekit.cost import Costs
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.models.gan_blocks import ConditionalBatchNorm2d
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan, Slot
from sparsekit.pruner import channel_norms
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import copied, mask, tensor_of

LEAST = 0.25  # of a group's channels, see `keep_counts`


@dataclass(frozen=True)
class Scale:
    """What channels are multiplied by.

    Attributes:
        slot: where it is; the channels lie along its dimension.
        offset: added to the parameter: conditional BatchNorm multiplies by 1 + gain.
        bias: name of what is added to the channels behind it, of the same shape.
    """

    slot: Slot
    offset: float
    bias: str


def scales_of(graph: ChannelGraph, example_inputs: tuple[Tensor, ...]) -> dict[ChannelGroup, list[Scale]]:
    """The groups that scales speak for, and these: with them and their biases at zero the channels are as good as cut.

    Raises:
        UsageError: there are none.
    """
    found = {group: list(_scales(graph.model, group)) for group in graph.groups}
    speaking = {
        group: scales
        for group, scales in found.items()
        if scales and _same_as_cut(graph.model, group, scales, example_inputs)
    }
    if not speaking:
        raise UsageError(
            "channel_pruning: no normalisation scales channels that could be cut by it; choose another method"
        )
    return speaking


def choose(
    graph: ChannelGraph, scales: Mapping[ChannelGroup, Sequence[Scale]], budget: Budget, *, round_to: int = 1
) -> PruningPlan:
    """The plan with the counts of `keep_counts`: of groups of `scales` the channels with the largest |gamma| stay.

    Of other groups those with the largest filters do.
    """
    of_scales = {group: magnitudes(graph.model, found) for group, found in scales.items()}
    return keep_top(channel_norms(graph) | of_scales, keep_counts(graph, scales, budget, round_to=round_to))


def magnitudes(generator: nn.Module, scales: Iterable[Scale]) -> Tensor:
    """|gamma| of every channel of a group, l2 norm where there are several, float32 [C] on the CPU."""
    squares = []
    for scale in scales:
        values = tensor_of(generator, scale.slot.tensor).detach().float().cpu() + scale.offset
        squares.append(values.movedim(scale.slot.dim, 0)[scale.slot.index].flatten(1).square().sum(1))
    return torch.stack(squares).sum(0).sqrt()


def keep_counts(
    graph: ChannelGraph, scales: Mapping[ChannelGroup, Sequence[Scale]], budget: Budget, *, round_to: int = 1
) -> dict[ChannelGroup, int]:
    """How many channels each group keeps.

    Steps of `round_to` channels are added in the order of their largest |gamma|, over all groups of `scales` that the
    budget names no keep ratio for, as long as one fits; scales of 0 are never added. Every group keeps a step and,
    where the budget allows it, the share `LEAST` of its channels: how large scales are differs from layer to layer, and
    one threshold for all left a single channel in front of a CycleGAN's colours.

    Raises:
        BudgetError: the budget cannot be met.
    """
    least = allocate(graph, budget, round_to=round_to)
    open_groups = {group for group in scales if budget.keep_ratio(group.name) is None}
    ranks = {group: magnitudes(graph.model, scales[group]).sort(descending=True).values for group in open_groups}

    def start_at(share: float) -> dict[ChannelGroup, int]:
        """What the others are pinned to, and of open groups a share of the channels whose scale is not 0."""
        found = dict(least)
        for group, values in ranks.items():
            wanted = max(1, min(math.ceil(share * group.size), int(values.count_nonzero())))
            found[group] = min(group.size, math.ceil(wanted / round_to) * round_to)
        return found

    costs = Costs(graph)
    limits = [(limit.metric, limit.resolve(costs(limit.metric, costs.dense))) for limit in budget.limits]

    def fits(counts: Mapping[ChannelGroup, int]) -> bool:
        return all(costs(metric, costs.counts(counts)) <= limit for metric, limit in limits)

    whole = {
        group: group.size if budget.keep_ratio(group.name) is None else least[group]
        for group in graph.groups
        if group not in open_groups
    }
    starts = [start_at(LEAST) | whole, start_at(0) | whole, start_at(LEAST), start_at(0)]
    counts = next((start for start in starts if fits(start)), starts[-1])
    ranked = [
        (float(score), group)
        for group in graph.groups
        if group in open_groups
        for score in ranks[group][counts[group] :: round_to]
    ]
    for score, group in sorted(ranked, key=lambda step: -step[0]):
        tried = counts | {group: min(group.size, counts[group] + round_to)}
        # Costs only grow with counts: what does not fit now never will.
        if score > 0 and group in open_groups and fits(tried):
            counts = tried
        else:
            open_groups.discard(group)
    return counts


def _scales(model: nn.Module, group: ChannelGroup) -> Iterator[Scale]:
    parameters = dict(model.named_parameters())
    for slot in group.slots:
        path, _, leaf = slot.tensor.rpartition(".")
        if slot.read or slot.dim == COUNT or leaf != "weight" or slot.tensor not in parameters:
            continue
        if isinstance(model.get_submodule(path), _NormBase):
            yield Scale(slot, 0.0, f"{path}.bias")
        above, _, name = path.rpartition(".")
        of_classes = isinstance(model.get_submodule(path), nn.Embedding) and name == "gain"
        if of_classes and isinstance(model.get_submodule(above), ConditionalBatchNorm2d):
            yield Scale(slot, 1.0, f"{above}.bias.weight")


@torch.no_grad()
def _same_as_cut(
    model: nn.Module, group: ChannelGroup, scales: Sequence[Scale], example_inputs: tuple[Tensor, ...]
) -> bool:
    """Whether the network with half of the group's scales and biases at zero is the one without these channels."""
    model = copied(model).double().eval()
    inputs = tuple(part.double() if part.is_floating_point() else part for part in example_inputs)
    keep = torch.arange(group.size) >= (group.size + 1) // 2
    expected = mask(model, PruningPlan({group: keep}))(*inputs) if keep.any() else None
    for scale in scales:
        index = scale.slot.index[~keep].flatten()
        tensor_of(model, scale.slot.tensor).index_fill_(scale.slot.dim, index, -scale.offset)
        tensor_of(model, scale.bias).index_fill_(scale.slot.dim, index, 0.0)
    return expected is not None and torch.allclose(model(*inputs), expected, rtol=0, atol=1e-9)
