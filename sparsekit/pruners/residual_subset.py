"""One-shot pruning of what residual branches add to their stream, in groups of 16 channels. Needs no labels.

A GPU updates a stream in place, and neither reads nor writes the channels that a branch leaves alone; but it moves 16
channels at least. So each branch keeps the groups of 16 in which its filters are strongest, the same share in every
branch, and what it makes of the other channels becomes exactly zero.

First the channels of a stream are put into another order, a balanced clustering into groups of 16 that the same
branches need. Given which groups each branch keeps, pairs of channels swap groups as long as that raises the importance
kept; given the order, each branch keeps its best groups; in turn, as in k-means, until nothing improves. All layers
that write or read the stream follow, so that the order alone changes nothing.

Branches end in a convolution, with a BatchNorm or none, and are added to a stream that comes out of a ReLU, and the sum
goes into one: relu(s + 0) = s then holds. So a stream's first writer and those of blocks that change its size stay
whole, as do linear sums, where pre-activation networks and MobileNet V2 have no ReLU, branches that end in something
else, like squeeze and excitation, and streams that are a part of a wider one or may not be cut.

Needs task.example_inputs, to see what is added to what.

Sources: our own. The importance is that of Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710,
squared and behind the BatchNorm.
"""

# B branches of a stream, C channels of it, G groups of 16 of these
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsekit.budget import Budget
from sparsekit.cost import prunable_weights
from sparsekit.errors import BudgetError, PlanError, UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.kernels.residual_subset import CHANNELS
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan
from sparsekit.program import Program
from sparsekit.recovery.layers import Layer, layers_of
from sparsekit.recovery.lockstep import recorded
from sparsekit.recovery.units import output_scale
from sparsekit.selection import allocate_weights
from sparsekit.steps import Pass, values
from sparsekit.surgery import copied, tensor_of
from sparsekit.task import Task

Streams = Mapping[ChannelGroup, Sequence[Layer]]  # what is added to each


@dataclass(frozen=True)
class ResidualSubset:
    """Keep the groups of 16 channels in which a branch is strongest.

    Attributes:
        density: largest share of its stream's groups that a branch keeps, in (0, 1]; the budget may leave less. One
            group stays at least.
        reorder: cluster the channels of a stream. Without it every layer's channels stay where they are, which repairs
            that compare layer by layer with the dense network rely on.
    """

    density: float = 1.0
    reorder: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(f"residual_subset: density must lie in (0, 1], got {self.density:g}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, a limit on `nonzero`.

        Raises:
            UsageError: no task.
            BudgetError: another kind of budget, or one that these branches cannot meet.
            PlanError: the forward cannot be recorded, or weights are not finite.
        """
        counts = allocate_weights(graph, budget, scope="global")
        if not counts and self.density == 1:
            return PruningPlan()
        if task is None:
            raise UsageError("residual_subset: needs a task, whose example inputs show what is added to what")
        num_weights = sum(weight.numel() for weight in prunable_weights(graph).values())
        allowed = sum(counts.values()) if counts else num_weights
        device = next(graph.model.parameters()).device
        program = recorded(copied(graph.model), task.example_inputs[0].to(device))
        streams = _streams(graph, program)
        nonzero: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for stream, num_kept in _allocated(streams, program, num_weights, allowed, self.density).items():
            importance_BC = torch.stack([_importance(program, layer) for layer in streams[stream]])
            order_C = torch.arange(stream.size)
            if self.reorder:
                order_C = clustered(importance_BC, num_kept)
                _reorder(program, stream, order_C, weights)
            kept_BC = best_groups(importance_BC[:, order_C], num_kept).repeat_interleave(CHANNELS, 1)
            for layer, kept_C in zip(streams[stream], kept_BC, strict=True):
                _zero(program, layer, kept_C, nonzero, weights)
        return PruningPlan(nonzero=nonzero, weights=weights)


def branches(program: Program) -> list[Layer]:
    """The layers that a GPU can let update a part of a stream in place, in the order of the forward pass."""
    return [layer for layer in layers_of(program) if _updates_stream(program.evaluated, layer)]


def best_groups(importance_BC: Tensor, num_kept: int) -> Tensor:
    """Which groups each branch keeps, exactly `num_kept`, equal ones by position: bool [B, G].

    >>> best_groups(torch.arange(48.0)[None], 2).tolist()
    [[False, True, True]]
    """
    sums_BG = importance_BC.unflatten(1, (-1, CHANNELS)).sum(2)
    best = sums_BG.argsort(dim=1, descending=True, stable=True)[:, :num_kept]
    return torch.zeros_like(sums_BG, dtype=torch.bool).scatter(1, best, True)


def kept_importance(importance_BC: Tensor, num_kept: int) -> float:
    """The sum over what all branches keep, channels in this order.

    >>> kept_importance(torch.ones(2, 32), 1)
    32.0
    """
    return float(importance_BC[best_groups(importance_BC, num_kept).repeat_interleave(CHANNELS, 1)].sum())


def clustered(importance_BC: Tensor, num_kept: int) -> Tensor:
    """An order of the channels in which branches that keep `num_kept` groups each keep more: int64 [C].

    Position p gets channel `order[p]`. It is the better one of those found from the order as it is, and from one where
    channels that the same branches want lie side by side. The importance, [B, C], is at least 0, C a multiple of 16.

    >>> odd = torch.tensor([[0.0, 1.0]]).repeat(1, 16).double()
    >>> (clustered(odd, 1)[:16] % 2).tolist() in ([0] * 16, [1] * 16)
    True
    """
    num_channels = importance_BC.shape[1]
    wanted = importance_BC.argsort(dim=1, descending=True, stable=True)[:, : CHANNELS * num_kept]
    wanted_BC = torch.zeros(importance_BC.shape, dtype=torch.int64).scatter(1, wanted, 1)
    # Who wants a channel is a word of bits. In a Gray code's order, where a word stands at the parities of its
    # beginnings, neighbours differ in one branch.
    by_word_C = torch.from_numpy(np.lexsort(wanted_BC.cumsum(0).remainder(2).flip(0).numpy()))
    found = [_improved(importance_BC, start_C, num_kept) for start_C in (torch.arange(num_channels), by_word_C)]
    return max(found, key=lambda order_C: kept_importance(importance_BC[:, order_C], num_kept))


def _improved(importance_BC: Tensor, order_C: Tensor, num_kept: int) -> Tensor:
    """The order after both halves of the clustering in turn, until nothing more is kept."""
    kept = kept_importance(importance_BC[:, order_C], num_kept)
    while True:
        chosen_BG = best_groups(importance_BC[:, order_C], num_kept)
        tried_C = _swapped(importance_BC.T @ chosen_BG.to(importance_BC), order_C)
        now = kept_importance(importance_BC[:, tried_C], num_kept)
        if now <= kept * (1 + 1e-9):
            return order_C
        order_C, kept = tried_C, now


def _swapped(value_CG: Tensor, order_C: Tensor) -> Tensor:
    """The order after swaps of two channels between groups, the best first, until none raises the sum of values."""
    members_GM = order_C.view(-1, CHANNELS).clone()
    num_groups, least = len(members_GM), 1e-9 * float(value_CG.abs().max())
    gain_GG = value_CG.new_zeros(num_groups, num_groups)  # of the member that gains most by a move
    mover_GG = torch.zeros(num_groups, num_groups, dtype=torch.int64)
    changed = list(range(num_groups))
    while True:
        for group in changed:
            members_M = members_GM[group]
            moved_MG = value_CG[members_M] - value_CG[members_M, group][:, None]
            gain_GG[group], mover_GG[group] = moved_MG.max(0)
        both_GG = gain_GG + gain_GG.T
        one, other = divmod(int(both_GG.argmax()), num_groups)
        if both_GG[one, other] <= least:
            return members_GM.sort(1).values.flatten()
        places = [one, other], [int(mover_GG[one, other]), int(mover_GG[other, one])]
        members_GM[places] = members_GM[places].flip(0)
        changed = [one, other]


def _streams(graph: ChannelGraph, program: Program) -> dict[ChannelGroup, list[Layer]]:
    """The branches of each stream, where its channels are all of what they write and can take any order."""
    states = dict(graph.model.named_parameters()) | dict(graph.model.named_buffers())
    owners = {}
    for group in graph.groups:
        whole = torch.arange(group.size)[:, None]
        named = all(slot.dim == COUNT or slot.tensor in states for slot in group.slots)
        if group.residual and group.exact and named and group.size % CHANNELS == 0 and group.size > CHANNELS:
            for slot in group.slots:
                if slot.dim == 0 and not slot.read and torch.equal(slot.index, whole):
                    owners[slot.tensor] = group
    streams: dict[ChannelGroup, list[Layer]] = {}
    for layer in branches(program):
        if layer.weight in owners:
            streams.setdefault(owners[layer.weight], []).append(layer)
    return streams


def _updates_stream(forward: Pass, layer: Layer) -> bool:
    """Whether a layer's output is all that is added to a stream, between two ReLUs, and the stream is done with then.

    Before, only layers may read the stream, for others might hand its memory on; and not this layer itself, which
    reads its neighbours while others write them.
    """
    stream, sliding = layer.stream, layer.convolution
    if stream is None or stream.path or sliding is None or stream.value == layer.input or not layer.is_plain:
        return False
    if layer.inputs_first or sliding.num_conv_groups > 1 or len(sliding.stride) != 2:
        return False
    before = _readers(forward, layer.output, layer.end)
    sums = _readers(forward, layer.made, layer.last)
    made = max((n for n in range(layer.step) if stream.value in forward.steps[n].outputs), default=-1)
    if made < 0 or len(before) != 1 or len(sums) != 1:
        return False
    *others, _ = _readers(forward, stream.value, made + 1)  # the sum comes last: it is no convolution
    rectified = _readers(forward, forward.steps[sums[0]].outputs[0], sums[0] + 1)
    ops = [step.op.split(".")[1].rstrip("_") for step in forward.steps] + ["return"]
    return [ops[made], *(ops[number] for number in rectified)] == ["relu", "relu"] and all(
        ops[number] == "convolution" for number in others
    )


def _readers(forward: Pass, value: int, moment: int) -> list[int]:
    """Steps from `moment` on that read a tensor, until one writes into it; the caller counts as the step after all."""
    found = []
    for number, step in enumerate(forward.steps[moment:], moment):
        if value in values(step.args):
            found.append(number)
            if value in step.outputs:
                return found
    return found + [len(forward.steps)] * (value in values(forward.returned))


def _allocated(
    streams: Streams, program: Program, num_weights: int, allowed: int, density: float
) -> dict[ChannelGroup, int]:
    """How many groups of 16 the branches of each stream keep: the largest share for all that meets the budget.

    Streams whose branches keep all are left out.

    Raises:
        BudgetError: there is no branch, or the least share is too much.
    """
    if not streams:
        raise BudgetError(
            "residual_subset: no branch of this network ends in a convolution that is added to a stream of some "
            f"{CHANNELS} channels between two ReLUs; choose magnitude_pattern"
        )
    sizes = {
        stream: sum(tensor_of(program, layer.weight).numel() for layer in layers) for stream, layers in streams.items()
    }
    totals = {stream: stream.size // CHANNELS for stream in streams}
    shares = {kept / total for total in totals.values() for kept in range(1, total) if kept / total < density}
    for share in [density, *sorted(shares, reverse=True)]:
        kept = {stream: max(1, int(share * total + 1e-9)) for stream, total in totals.items()}
        num_left = num_weights - sum(size - size * kept[stream] // totals[stream] for stream, size in sizes.items())
        if num_left <= allowed:
            return {stream: count for stream, count in kept.items() if count < totals[stream]}
    raise BudgetError(
        f"budget nonzero<={allowed:,} is below the floor of {num_left:,} ({num_left / num_weights:.2g}x of the dense "
        f"network): {sum(map(len, streams.values()))} residual branches are down to {CHANNELS} channels each"
    )


def _importance(program: Program, layer: Layer) -> Tensor:
    """The squared norm of each filter, the BatchNorm folded in: float64 [C], on the CPU.

    Raises:
        PlanError: not finite.
    """
    norms_C = tensor_of(program, layer.weight).detach().double().flatten(1).square().sum(1)
    importance_C = (norms_C * output_scale(program, layer).detach().double().square()).cpu()
    if not importance_C.isfinite().all():
        raise PlanError(f"{layer.weight}: filters and BatchNorms must be finite numbers")
    return importance_C


def _reorder(program: Program, stream: ChannelGroup, order_C: Tensor, weights: dict[str, Tensor]) -> None:
    """Let every layer that writes or reads the stream have channel `order_C[p]` where p was."""
    for slot in stream.slots:
        if slot.dim != COUNT:
            old = weights.get(slot.tensor, tensor_of(program, slot.tensor).detach().cpu())
            moved = old.index_select(slot.dim, slot.index[order_C].flatten())
            weights[slot.tensor] = old.index_copy(slot.dim, slot.index.flatten(), moved)


def _zero(
    program: Program, layer: Layer, kept_C: Tensor, nonzero: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    """Let a branch make exactly 0 of all other channels.

    Parameters go into `nonzero`, so that training leaves them zero too; a BatchNorm without them has only its mean.
    """
    states = layer.norm.states if layer.norm else {}
    for name in filter(None, (layer.weight, layer.bias, states.get("weight"), states.get("bias"))):
        parameter = tensor_of(program, name)
        nonzero[name] = kept_C.view(-1, *[1] * (parameter.dim() - 1)).repeat(1, *parameter.shape[1:])
    if "running_mean" in states:
        name = states["running_mean"]
        weights[name] = weights.get(name, tensor_of(program, name).detach().cpu()) * kept_C
