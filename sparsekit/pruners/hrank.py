"""HRank: keep the channels whose feature maps have the highest rank, averaged over images.

A channel's maps are taken where it is read, at the input of every convolution and linear layer that reads it, in eval
mode: behind a ReLU these are the paper's. Where they have two or more spatial dimensions the rank is that of the last
two. Maps that were flattened, tokens and series are laid out in the most nearly square matrix, which for square images
is the map itself. What is left of a channel after global pooling is one pixel, whose rank is 1 unless it is zero.
The paper prunes and trains layer by layer; here all layers are ranked at once, training follows in fine-tuning.

Needs task.batches.

Source: Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map", arXiv:2002.10179.
"""

# N images, C channels, K positions of each channel (pixels of flattened maps, one per conv group), H x W maps
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.pruner import first_images
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import copied
from sparsekit.task import Task


@dataclass(frozen=True)
class HRank:
    """One-shot, per group.

    Attributes:
        num_images: images to average over, at most one epoch.
        round_to: widths are multiples of this.
    """

    num_images: int = 512
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UsageError(f"hrank: num_images must be at least 1, got {self.num_images}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`.

        Raises:
            UsageError: no task; feature maps need data. Or channels that no layer reads as its own input.
            BudgetError: the budget lies below what the network can reach.
        """
        if task is None:
            raise UsageError("hrank: ranks feature maps and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        pruned = [group for group, count in counts.items() if count < group.size]
        return keep_top(map_ranks(graph, pruned, task, num_images=self.num_images), counts)


def map_ranks(
    graph: ChannelGraph, groups: Sequence[ChannelGroup], task: Task, *, num_images: int
) -> dict[ChannelGroup, Tensor]:
    """The rank of each channel's feature maps, averaged over images and readers: float64 [C] per group.

    Raises:
        UsageError: a group that no convolution or linear layer reads.
    """
    network = bake_all(copied(graph.model)).eval()
    ranks: dict[ChannelGroup, list[Tensor]] = {group: [] for group in groups}
    for group in groups:
        for slot in group.slots:
            reader = network.get_submodule(slot.tensor.rpartition(".")[0])
            if slot.read and isinstance(reader, nn.Linear | _ConvNd):
                reader.register_forward_pre_hook(_ranker(slot, ranks[group]))
    device = next(network.parameters()).device
    with torch.no_grad():
        for inputs, _ in first_images(task, num_images):
            network(inputs.to(device))
    for group, rows in ranks.items():
        if not rows:
            advice = f"keep it whole with '{group.name}=1' in the budget, or choose another method"
            raise UsageError(f"hrank: no layer that runs reads group {group.name!r}, so it has no maps; {advice}")
    return {group: torch.cat(rows).mean(0) for group, rows in ranks.items()}


def _ranker(slot: Slot, rows: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook for who reads at `slot`: adds the ranks of the maps it is given, [N, C], to `rows`."""

    def rank(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels_first = inputs[0].movedim(1 if isinstance(layer, _ConvNd) else -1, 1)
        # Where a convolution has conv groups, a position along its weight is read once in each of them.
        size = layer.get_parameter("weight").shape[slot.dim]
        runs = torch.arange(0, channels_first.shape[1], size)
        index_CK = (slot.index[:, :, None] + runs).flatten(1)
        matrices = _matrices(channels_first[:, index_CK].float())
        rows.append(torch.linalg.matrix_rank(matrices).double().mean(2).cpu())

    return rank


def _matrices(maps: Tensor) -> Tensor:
    """[N, C, K, H, W] as it is, [N, C, M, H, W] where there are more dimensions, or one almost square matrix each."""
    if maps.dim() > 4:
        return maps.flatten(2, -3)
    flat = maps.flatten(2)
    num_positions = flat.shape[2]
    height = max(side for side in range(1, math.isqrt(num_positions) + 1) if num_positions % side == 0)
    return flat.reshape(*flat.shape[:2], 1, height, -1)
