"""What a pruning method is: a callable from graph, budget and task to a plan; and what several methods share."""

# G groups, C channels of the widest group; rows of narrower groups are padded
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.forward import plain as opened
from sparsekit.graph import ChannelGraph
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan, Slot
from sparsekit.selection import allocate
from sparsekit.surgery import copied, plain, tensor_of
from sparsekit.task import Batch, Schedule, Task

Scores = Mapping[ChannelGroup, Tensor]  # float [C] per group, higher is kept
Counts = Mapping[ChannelGroup, int]  # channels that stay, of groups that lose some


class Pruner(Protocol):
    """A method with its options set; data-free ones accept `task=None`."""

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan: ...


def channel_norms(graph: ChannelGraph, *, p: float = 2.0) -> dict[ChannelGroup, Tensor]:
    """The p-norm of each channel's filters: the weights that make it, over all layers that share it.

    Biases and normalisation vectors do not count. Float32 [C] per group, on the CPU.
    """
    norms = {}
    for group in graph.groups:
        total = torch.zeros(group.size)
        for rows in filters(graph.model, group):
            total += rows.abs().pow(p).sum(1)
        norms[group] = total.pow(1 / p)
    return norms


def is_filter(model: nn.Module, slot: Slot) -> bool:
    """Whether the slot lies in a weight that makes the channel; biases and normalisation vectors do not count."""
    return not slot.read and slot.dim != COUNT and tensor_of(model, slot.tensor).dim() >= 2


def filters(model: nn.Module, group: ChannelGroup) -> Iterator[Tensor]:
    """The weights that make each channel, layer by layer: float32 [C, D], on the CPU.

    Biases and normalisation vectors are left out.
    """
    for slot in group.slots:
        if is_filter(model, slot):
            yield slot_rows(model, slot)


def slot_rows(model: nn.Module, slot: Slot) -> Tensor:
    """What `slot` holds of each channel: float32 [C, D], on the CPU. Not for slots of `COUNT`."""
    tensor = tensor_of(model, slot.tensor).detach().float().cpu()
    return tensor.movedim(slot.dim, 0)[slot.index].flatten(1)


def first_images(task: Task, num_images: int) -> Iterator[Batch]:
    """The first epoch's batches up to `num_images` samples, the last batch cut to fit; all where there are fewer."""
    for inputs, targets in task.batches(0):
        yield inputs[:num_images], targets[:num_images]
        num_images -= len(inputs)
        if num_images <= 0:
            return


def squared_gradients(network: nn.Module, valid_GC: Tensor, task: Task, batches: Iterable[Batch]) -> Tensor:
    """The squared gradient of each batch's loss in each gate, all gates open, averaged over `batches`: float64 [G, C].

    Args:
        network: called with gates and inputs, as `gates.GatedNetwork` is; on the device of `valid_GC`.
        valid_GC: bool [G, C], False at padding, where the result is 0.
        task: whose loss it is.
        batches: at least one.
    """
    gates_GC = valid_GC.double().requires_grad_()  # float32 would lose the squares of gradients below 1e-19
    total_GC, num_batches = torch.zeros_like(gates_GC, requires_grad=False), 0
    for inputs, targets in batches:
        output = network(gates_GC, inputs.to(valid_GC.device))
        output = tree_leaves(opened(output))[0]  # auxiliary heads do not count, as in training
        loss = task.loss(output, targets.to(valid_GC.device), 0.0)
        total_GC += torch.autograd.grad(loss, gates_GC)[0].square()
        num_batches += 1
    return total_GC / num_batches


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of every method that trains; the recipe's keys of these names set them.

    Attributes:
        only_optimizer: the one that a method's own rates hold for, where it depends; the recipe may name no other.
        epochs: length of the training.
        lr: peak learning rate of the weights, > 0.
        seed: of everything drawn.
    """

    only_optimizer: ClassVar[str | None] = None

    epochs: int = 10
    lr: float = 0.01
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    precision: str = "auto"
    seed: int = 0

    def schedule(self) -> Schedule:
        """SGD with a cosine over all epochs."""
        return Schedule(
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TrainingOptions(ScheduleOptions):
    """Options of every method that trains and removes channels.

    Attributes:
        round_to: widths are multiples of this, or a group's full size.
    """

    round_to: int = 1


def require_positive(method: str, options: object, *names: str) -> None:
    """Refuse options that must be above 0.

    Raises:
        UsageError: one of `names` is not.
    """
    for name in names:
        if getattr(options, name) <= 0:
            raise UsageError(f"{method}: {name} must be above 0, got {getattr(options, name):g}")


def trainee(
    method: str, graph: ChannelGraph, budget: Budget, task: Task | None, *, round_to: int
) -> tuple[nn.Module, Counts, Task]:
    """What a method that trains starts from.

    Returns:
        A copy of the network, to be trained; how many channels stay of each group that loses some; the task.

    Raises:
        UsageError: no task.
        BudgetError: the budget lies below what the network can reach.
    """
    if task is None:
        raise UsageError(f"{method}: trains the network and needs data; without data choose magnitude")
    counts = {group: count for group, count in allocate(graph, budget, round_to=round_to).items() if count < group.size}
    whole = PruningPlan({group: torch.ones(group.size, dtype=torch.bool) for group in counts})
    return copied(plain(graph.model, whole)), counts, task


def penalised(task: Task, penalty: Callable[[], Tensor]) -> Task:
    """The task with `penalty()` added to the loss, as it stands when the loss is computed."""

    def loss(output: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        return task.loss(output, targets, label_smoothing) + penalty()

    return replace(task, loss=loss)


def trained_plan(
    network: nn.Module, keep: Mapping[ChannelGroup, Tensor], *, folded: Mapping[str, Tensor] | None = None
) -> PruningPlan:
    """Keep `keep`, bool [C] per group, and all weights of the trained network, on the CPU.

    `folded` replaces some by name: with soft gates folded in, the plan's network is the one that was trained.
    """
    weights = dict(network.named_parameters()) | dict(network.named_buffers()) | dict(folded or {})
    return PruningPlan(
        keep={group: row[: group.size].cpu() for group, row in keep.items()},
        weights={name: value.detach().cpu() for name, value in weights.items()},
    )


class ChannelSums(nn.Module):
    """Sums over weights of each channel, for all groups at once and differentiable.

    Attributes:
        valid: bool [G, C], False at padding.

    Args:
        network: whose slots are looked up; it is not kept.
        groups: a row each.
        where: which slots count; they must lie in parameters and not be reads.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[ChannelGroup], *, where: Callable[[nn.Module, Slot], bool]
    ) -> None:
        super().__init__()
        sizes = torch.tensor([[group.size] for group in groups])
        width = int(sizes.max())
        self.valid = nn.Buffer(torch.arange(width) < sizes, persistent=False)
        starts: dict[tuple[str, int], int] = {}
        positions, owners, end = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], 0
        for row, group in enumerate(groups):
            entries_C = row * width + torch.arange(group.size)
            for slot in group.slots:
                if not where(network, slot):
                    continue
                if (slot.tensor, slot.dim) not in starts:
                    starts[slot.tensor, slot.dim] = end
                    end += slot.size
                positions.append((starts[slot.tensor, slot.dim] + slot.index).flatten())
                owners.append(entries_C.repeat_interleave(slot.index.shape[1]))
        self.weights = tuple(starts)
        self.positions = nn.Buffer(torch.cat(positions), persistent=False)
        self.owners = nn.Buffer(torch.cat(owners), persistent=False)

    def forward(self, network: nn.Module, *, p: float) -> Tensor:
        """Sum of |w|^p over each channel's weights in `network`, float32 [G, C]; 0 where none count."""
        sums_GC = torch.zeros(self.valid.shape, device=self.valid.device)
        if not self.weights:
            return sums_GC
        slices = []
        for name, dim in self.weights:
            powers = network.get_parameter(name).float().abs().pow(p)
            slices.append(powers.movedim(dim, 0).flatten(1).sum(1) if powers.dim() > 1 else powers)
        of_channels = torch.cat(slices).index_select(0, self.positions)
        return sums_GC.flatten().index_add(0, self.owners, of_channels).view_as(sums_GC)
