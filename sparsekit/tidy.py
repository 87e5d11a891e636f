"""tidy(model, example_inputs): remove the channels that do nothing, without changing what the network computes.

A channel can go where every layer that reads it multiplies it by zero, or where it is one number for all inputs and
positions, which the reader's bias takes up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.baking import bake_all, is_computed
from sparsekit.compaction import compact
from sparsekit.constant_rules import BATCH_NORM, DATA, constant_reads, sees_border
from sparsekit.constants import Constant, aliases, kernel, occupied, per_channel, weighted_sum
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan, Slot
from sparsekit.record import Op, Recording, Ref, check_inputs
from sparsekit.surgery import copied
from sparsekit.survey import survey


def tidy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of `model` without channels that are read by zero weights only, or constant; in eval mode it is equal.

    Constant are channels whose filter is zero, whose BatchNorm gamma is zero, and what only such channels make. A
    reader takes up a constant in its bias, or in the running mean of the BatchNorm that alone follows it; a channel
    whose reader has neither stays, as does one that is not zero under zero padding, where the border would differ.
    Every group keeps a channel. Numbers that the forward derives from the size of its inputs count as fixed.

    Cutting makes no new constants, but dropping a channel may empty those that made it: groups are swept from the
    last to the first until a sweep finds nothing, two sweeps on a chain, at most one per group and one more. Then the
    smaller network is looked at again, because where convolution groups went others may be cut now: two rounds for
    most networks, and never more than channels, since every round but the last removes some.

    Args:
        model: any nn.Module, left as it is.
        example_inputs: the forward's positional inputs, a tensor or a tuple; batch first.

    Raises:
        TraceError: the forward fails on the example inputs.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    small = copied(model)
    for plan in tidy_plans(model, inputs):
        small = compact(small, plan)
    return small


def tidy_plans(model: nn.Module, inputs: tuple[Any, ...]) -> list[PruningPlan]:
    """The plans that `tidy` applies one after the other; none where nothing can go."""
    plans = []
    while (plan := _plan(model, inputs)).keep:
        plans.append(plan)
        model = compact(model, plan)
    return plans


def _plan(model: nn.Module, inputs: tuple[Any, ...]) -> PruningPlan:
    """What one trace finds that can go; the biases in it take up what the channels added."""
    plain = _plain(model)
    named = dict(plain.named_parameters()) | dict(plain.named_buffers())
    if not any(_has_zeros(name, tensor.detach()) for name, tensor in named.items()):
        return PruningPlan()
    check_inputs(model, inputs)
    found = survey(plain, inputs, renormalise=False)
    recording = found.recordings[0]
    states = {name: named[name].detach().cpu() for name in _settled(recording, named)}
    reads = _reads(recording, states)
    groups = [group for group in found.groups.values() if group.exact and not group.fixed_by]
    keep = {group: torch.ones(group.size, dtype=torch.bool) for group in groups}
    weights, shifts = dict(states), dict[str, Tensor]()
    while any([_drop(group, keep[group], weights, shifts, reads) for group in reversed(groups)]):  # noqa: C419
        pass
    shifted = {name: (states[name].double() + shift).to(states[name].dtype) for name, shift in shifts.items()}
    return PruningPlan({group: kept for group, kept in keep.items() if not kept.all()}, weights=shifted)


def _plain(model: nn.Module) -> nn.Module:
    """The model, or a copy where modules compute weights from others: their zeros show only in what they compute."""
    if not any(is_computed(module) for module in model.modules()):
        return model
    return bake_all(copied(model))


def _has_zeros(name: str, tensor: Tensor) -> bool:
    """Whether some slice is all zero, so that tracing may pay. Biases start at zero and say nothing."""
    if not tensor.is_floating_point() or name.rpartition(".")[2] in ("bias", "running_mean"):
        return False
    if tensor.all():
        return False
    return not all(occupied(tensor, dim).all() for dim, size in enumerate(tensor.shape) if size > 1)


def _settled(recording: Recording, named: Mapping[str, Tensor]) -> list[str]:
    """Parameters and buffers that the pass does not write into and that share no memory."""
    _, written = aliases(recording)
    owners = Counter(tensor.data_ptr() for tensor in named.values())
    return [
        name
        for name, tensor in named.items()
        if owners[tensor.data_ptr()] == 1 and recording.states[name].index not in written
    ]


@dataclass(frozen=True, eq=False)
class Read:
    """One convolution or matrix product that reads channels through a weight.

    Attributes:
        num_conv_groups: G, 1 but for grouped convolutions.
        transposed: the weight is [I, O/G, ...] instead of [O, I/G, ...].
        value: float64 [G, I/G], what each input channel constantly is, 0 where it is not constant.
        removable: bool [G, I/G], whether the channel is constant and what it adds has a place to go to.
        target: name of the bias or running mean that takes up what is removed, if any.
        sign: +1 for a bias, -1 for a running mean.
    """

    num_conv_groups: int
    transposed: bool
    value: Tensor
    removable: Tensor
    target: str | None
    sign: int

    @property
    def dim(self) -> int:
        """The weight's dimension that reads."""
        return 0 if self.transposed else 1

    def positions(self, per_input: Tensor) -> Tensor:
        """[G, I/G] -> whether it holds at each position of the weight's reading dimension."""
        return per_input.flatten() if self.transposed else per_input.all(0)

    def added(self, weight: Tensor, gone: Tensor) -> Tensor:
        """float64 [O], what the input at these positions (bool) constantly adds to each output."""
        value = self.value * (gone.view_as(self.value) if self.transposed else gone)
        return weighted_sum(self.kernel(weight), value)

    def kernel(self, weight: Tensor) -> Tensor:
        """[G, O/G, I/G, k] of this reader's weight."""
        return kernel(weight, self.num_conv_groups, transposed=self.transposed)


def _reads(recording: Recording, states: Mapping[str, Tensor]) -> dict[str, list[Read]]:
    """Weight -> who reads through it, for weights that do nothing else."""
    names = {recording.states[name].index: name for name in states}
    turns = {op: names[op.args["self"].index] for op in recording.ops if _turns(op, names)}
    weight_of = names | {op.outputs[0].index: name for op, name in turns.items()}
    users: dict[int, set[Op | None]] = {ref.index: {None} for ref in recording.outputs}
    calls: dict[str, list[Op]] = {}
    busy = set()
    for op in recording.ops:
        for ref in op.tensors:
            users.setdefault(ref.index, set()).add(op)
            name = weight_of.get(ref.index)
            if name is not None and ref == _weight(op) and op.tensors.count(ref) == 1:
                calls.setdefault(name, []).append(op)
            elif name is not None and op not in turns:
                busy.add(name)
    inputs = constant_reads(recording, states)
    reads = {}
    for name in calls.keys() - busy:
        places = [_place(op, users) for op in calls[name]]
        hosts = {place[1] for place in places if place is not None}
        # Somebody else who uses the bias or the running mean would be shifted too.
        own = [place if place and users[place[0].index] <= hosts else None for place in places]
        reads[name] = _agreed([_read(op, inputs[op], place, names) for op, place in zip(calls[name], own, strict=True)])
    return reads


def _turns(op: Op, names: Mapping[int, str]) -> bool:
    """Whether the op transposes a parameter, as a linear layer does."""
    return op.name in ("t", "transpose") and len(op.outputs[0].shape) == 2 and op.args["self"].index in names


def _weight(op: Op) -> Ref | None:
    if op.name not in DATA:
        return None
    weight: Ref = op.args["weight" if op.name == "convolution" else "mat2"]
    return weight


def _place(op: Op, users: Mapping[int, set[Op | None]]) -> tuple[Ref, Op, int] | None:
    """What can take up a constant that `op` reads: the tensor, the op that uses it, and the sign to add it with."""
    bias: Ref | None = op.args.get("bias", op.args["self"] if op.name == "addmm" else None)
    (out,) = op.outputs
    if bias is not None:
        scaled = op.name == "addmm" and (op.args["alpha"], op.args["beta"]) != (1, 1)
        return None if scaled or len(bias.shape) != 1 or bias.shape[0] != out.shape[1] else (bias, op, 1)
    followers = users.get(out.index, set())
    norm = next((user for user in followers if user is not None and user.name in BATCH_NORM), None)
    if norm is None or len(followers) > 1 or norm.args["training"]:
        return None
    return norm.args["running_mean"], norm, -1


def _read(op: Op, data: Constant, place: tuple[Ref, Op, int] | None, names: Mapping[int, str]) -> Read:
    weight = _weight(op)
    num_conv_groups = op.args.get("groups", 1)
    # x @ w, where a linear layer would have transposed w, reads along the first dimension.
    transposed = op.args["transposed"] if op.name == "convolution" else weight is not None and weight.index in names
    source = op.args[DATA[op.name]]
    value, known = per_channel(data, 1, source.shape[1])
    target = None if place is None else names.get(place[0].index)
    easy = value == 0
    if target is not None and not sees_border(op):
        easy = torch.ones_like(known)
    shape = (num_conv_groups, -1)
    sign = 1 if place is None else place[2]
    return Read(num_conv_groups, transposed, value.reshape(shape), (known & easy).reshape(shape), target, sign)


def _agreed(reads: list[Read]) -> list[Read]:
    """Several readers through one weight: a channel can go where it can for all of them, and is the same for all."""
    first = reads[0]
    if any((read.dim, read.value.shape) != (first.dim, first.value.shape) for read in reads):
        return []
    removable = torch.stack([read.removable & (read.value == first.value) for read in reads]).all(0)
    return [replace(read, removable=removable) for read in reads]


def _drop(
    group: ChannelGroup,
    keep: Tensor,
    weights: dict[str, Tensor],
    shifts: dict[str, Tensor],
    reads: Mapping[str, list[Read]],
) -> bool:
    """Drop what can go from `group`: note it in `keep` and `shifts`, and let its weights be zero from here on."""
    slots = [slot for slot in group.slots if slot.dim != COUNT]
    # Channels without a reader of their own vanish once all that makes them is zero.
    readers = slots if group.silent else [slot for slot in slots if slot.read]
    gone = keep.clone()
    for slot in readers:
        if not gone.any():
            return False
        constants = [] if group.silent else reads.get(slot.tensor, [])
        gone &= _idle(slot, weights.get(slot.tensor), constants)
    if torch.equal(gone, keep):
        gone[keep.nonzero()[0]] = False
    if not gone.any():
        return False
    keep &= ~gone
    for slot in slots:
        if slot.tensor not in weights:
            continue
        weight, positions = weights[slot.tensor], slot.index[gone].flatten()
        erased = torch.zeros(weight.shape[slot.dim], dtype=torch.bool).index_fill(0, positions, True)
        places = {read.target: read for read in reads.get(slot.tensor, []) if slot.read and read.dim == slot.dim}
        for target, read in places.items():
            if target is not None:
                shifts[target] = shifts.get(target, 0) + read.sign * read.added(weight, erased)
        weights[slot.tensor] = weight.index_fill(slot.dim, positions, 0)
    return True


def _idle(slot: Slot, weight: Tensor | None, reads: Iterable[Read]) -> Tensor:
    """bool [C], whether this place reads nothing of a channel, or a constant that can be taken up."""
    if weight is None:
        return torch.zeros(slot.index.shape[0], dtype=torch.bool)
    idle = ~occupied(weight, slot.dim)
    for read in reads:
        if read.dim == slot.dim and read.removable.any():
            used = read.kernel(weight).any((1, 3))
            idle = idle | read.positions(~used | read.removable)
    return idle[slot.index].all(1)
