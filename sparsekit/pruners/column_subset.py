"""Column-subset selection: keep the channels from which the others can best be rebuilt, where they are read.

With X [R, C] what a group's channels are at R positions of some images, and W what its readers make of them, keeping
the set S and rebuilding the rest from it by least squares leaves |(X - X_S A) W|^2. From all channels on, the one whose
loss increases this least is dropped, until the budget's number is left. With M = X^T X / R, H = M^-1 and E = W W^T,
dropping channel c costs E_cc / H_cc; then the others take over (W += ..., here in E) and H loses c. The map A goes into
the plan's `merge`, so that the compact network is repaired as soon as it is cut.

M is uncentred, for `merge` has no constant; where several layers read a group both M and E are theirs together, and
positions of kernels and of flattened maps count as independent.

Needs task.batches; labels are not looked at.

Sources: Hassibi, Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 5, for the
elimination; Boutsidis, Mahoney, Drineas 2009, "An improved approximation algorithm for the column subset selection
problem", arXiv:0812.4293, for the problem.
"""

# R rows (images x positions), C channels, K of them kept, S steps that drop one; D what a channel is multiplied with
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.recovery import unlabelled
from sparsekit.recovery.layers import layers_of
from sparsekit.recovery.lockstep import recorded, visit
from sparsekit.selection import allocate
from sparsekit.surgery import copied, tensor_of
from sparsekit.task import Task

_BATCH_SIZE = 128


@dataclass(frozen=True)
class ColumnSubset:
    """One-shot, per group.

    Attributes:
        num_images: images to look at, at most one epoch.
        ridge: added to M, relative to its mean diagonal.
        repair: put the least-squares map into the plan's `merge`.
        round_to: widths are multiples of this.
    """

    num_images: int = 512
    ridge: float = 1e-3
    repair: bool = True
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.ridge <= 0:
            raise UsageError(
                f"column_subset: num_images must be at least 1 and ridge above 0, got {self.num_images}, {self.ridge:g}"
            )

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`.

        Raises:
            UsageError: no task; activations need data. Or channels that no layer reads as its own input.
            BudgetError: the budget lies below what the network can reach.
        """
        if task is None:
            raise UsageError("column_subset: looks at activations and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        pruned = [group for group, count in counts.items() if count < group.size]
        if not pruned:
            return PruningPlan()
        keep, merge = {}, {}
        for group, (moment_CC, metric_CC) in _moments(graph, pruned, unlabelled(task, self.num_images)).items():
            damping = self.ridge * moment_CC.diagonal().mean().clamp(min=1e-12)
            damped_CC = moment_CC + damping * torch.eye(group.size, dtype=torch.float64)
            keep[group] = best_subset(damped_CC, metric_CC, counts[group])
            merge[group] = rebuilding(damped_CC, keep[group]).float()
        return PruningPlan(keep, merge if self.repair else {})


def best_subset(moment_CC: Tensor, metric_CC: Tensor, count: int) -> Tensor:
    """Which `count` channels rebuild the others best, by greedy elimination: bool [C].

    Args:
        moment_CC: second moments of the channels, positive definite, float64.
        metric_CC: what errors in them cost their readers, positive semi-definite.
        count: channels to keep, at least 1.

    >>> x = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 2.001], [1, 0, 1]], dtype=torch.float64)
    >>> best_subset(x.T @ x + 1e-9 * torch.eye(3), torch.diag(torch.tensor([1.0, 9, 1])).double(), 2).tolist()
    [False, True, True]
    """
    inverse_CC = torch.linalg.inv(moment_CC)
    spread_C, cost_C = inverse_CC.diagonal().clone(), metric_CC.diagonal().clone()
    keep = torch.ones(len(moment_CC), dtype=torch.bool)
    # Each elimination changes both matrices by products of the vectors kept here. Only their diagonals and one column
    # per step are needed: with C^2 numbers to update, the 3,072 channels of a ViT-B layer would take minutes.
    taken_SC, rest_SC = torch.zeros(2, len(keep) - count, len(keep), dtype=torch.float64)
    pivot_S = torch.zeros(len(keep) - count, dtype=torch.float64)
    for step in range(len(keep) - count):
        gone = int(torch.where(keep, cost_C / spread_C, torch.inf).argmin())
        before = slice(step)
        taken_S, rest_S = taken_SC[before, gone], rest_SC[before, gone]
        column_C = inverse_CC[gone] - (pivot_S[before] * taken_S) @ taken_SC[before]
        metric_C = metric_CC[gone] - rest_S @ taken_SC[before] - taken_S @ rest_SC[before]
        # W becomes (I - u e^T) W: by u the others take over what channel `gone` did, which then has none.
        taken_C = column_C / column_C[gone]
        rest_C = metric_C - metric_C[gone] / 2 * taken_C
        taken_SC[step], rest_SC[step], pivot_S[step] = taken_C, rest_C, column_C[gone]
        spread_C -= column_C[gone] * taken_C.square()
        cost_C -= 2 * taken_C * rest_C
        keep[gone] = False
    return keep


def rebuilding(moment_CC: Tensor, keep: Tensor) -> Tensor:
    """How each channel is best rebuilt from those kept: [C, K], the identity on them.

    >>> rebuilding(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([True, False])).tolist()
    [[1.0], [0.5]]
    """
    merge_CK: Tensor = torch.linalg.solve(moment_CC[keep][:, keep], moment_CC[keep]).T.contiguous()
    merge_CK[keep] = torch.eye(int(keep.sum()), dtype=merge_CK.dtype)
    return merge_CK


def _moments(
    graph: ChannelGraph, groups: list[ChannelGroup], images: Tensor
) -> dict[ChannelGroup, tuple[Tensor, Tensor]]:
    """M and E of each group, float64 [C, C] on the CPU.

    Raises:
        UsageError: a group that no convolution or linear layer reads.
        PlanError: the forward follows the values of tensors, so that it cannot be recorded.
    """
    network = bake_all(copied(graph.model))
    device = next(network.parameters()).device
    program = recorded(network, images[:2].to(device))
    readings = [
        (layer, group, slot)
        for layer in layers_of(program)
        for group in groups
        for slot in group.slots
        if slot.read and slot.tensor == layer.weight
    ]
    metrics = {group: torch.zeros(group.size, group.size, dtype=torch.float64) for group in groups}
    for layer, group, slot in readings:
        weight_CD = tensor_of(program, layer.weight).detach().double().movedim(slot.dim, 0)[slot.index].flatten(1)
        metrics[group] += (weight_CD @ weight_CD.T).cpu()
    moments: dict[ChannelGroup, list[Tensor]] = {group: [] for group in groups}
    for batch in images.split(_BATCH_SIZE):
        passes = visit(program, [batch.to(device)], [layer.step for layer, _, _ in readings])
        for (layer, group, slot), (run,) in zip(readings, passes, strict=True):
            moments[group].append(_second_moments(run.tensors[layer.input].movedim(layer.channel_dim, 0), slot))
    for group, found in moments.items():
        if not found:
            advice = f"keep it whole with '{group.name}=1' in the budget, or choose another method"
            raise UsageError(f"column_subset: no layer that runs reads group {group.name!r}; {advice}")
    return {group: (torch.stack(found).mean(0), metrics[group]) for group, found in moments.items()}


def _second_moments(channels_first: Tensor, slot: Slot) -> Tensor:
    """Those of a group's channels, [C, C], in what its reader at `slot` is given."""
    # Where a convolution has conv groups, a position along its weight is read once in each of them.
    runs = torch.arange(0, len(channels_first), slot.size)
    index_CK = (slot.index[:, :, None] + runs).flatten(1)
    rows_CR = channels_first[index_CK.to(channels_first.device)].flatten(1).double()
    return (rows_CR @ rows_CR.T / rows_CR.shape[1]).cpu()
