"""Torch-Pruning's magnitude pruning at the widths of a plan of ours, and what it kept as a plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
import torch_pruning
from timm.layers.attention import Attention
from torch import Tensor, nn

from sparsekit import PruningPlan
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup
from sparsekit.recovery.units import kept_positions


def torch_pruned(
    graph: ChannelGraph, inputs: tuple[Tensor, ...], counts: Mapping[ChannelGroup, int]
) -> tuple[nn.Module, PruningPlan]:
    """A copy of the graph's network, pruned by Torch-Pruning's magnitude importance, and the plan of what it kept.

    Args:
        graph: of the network; a group's name is that of the layer that makes its channels.
        inputs: of one forward pass.
        counts: how many channels each group keeps.

    Raises:
        ValueError: what it cut is no union of channels of the groups.
    """
    network = copy.deepcopy(graph.model)
    attention = [module for module in network.modules() if isinstance(module, Attention)]
    names = {module: name for name, module in network.named_modules()}
    ratios = {  # the half keeps its truncation of the number kept from a rounding error
        network.get_submodule(group.name.partition("#")[0]): 1 - (count + 0.5) / group.size
        for group, count in counts.items()
        if count < group.size
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")
        pruner = torch_pruning.pruner.BasePruner(
            network,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            num_heads={module.qkv: module.num_heads for module in attention},
            in_channel_groups={},
            out_channel_groups={},
        )
    gone: dict[str, Tensor] = {}
    for group in pruner.step(interactive=True):
        for dependency, index in group:
            if pruner.DG.is_out_channel_pruning_fn(dependency.handler) and dependency.target.module in names:
                gone[f"{names[dependency.target.module]}.weight"] = torch.tensor(sorted(index))
        group.prune()
    for module in attention:
        module.attn_dim = module.proj.in_features
        module.head_dim = module.attn_dim // module.num_heads
    return network.eval(), _plan(graph, gone)


def _plan(graph: ChannelGraph, gone: Mapping[str, Tensor]) -> PruningPlan:
    """The plan that cuts the rows `gone` of weights, and what goes with them."""
    keep = {}
    for group in graph.groups:
        made = [slot for slot in group.slots if slot.dim == 0 and not slot.read and slot.tensor in gone]
        lost = [torch.isin(slot.index, gone[slot.tensor]).all(1) for slot in made]
        if any(mask.any() for mask in lost):
            keep[group] = ~torch.stack(lost).all(0)
    plan = PruningPlan(keep)
    left = kept_positions(plan)
    for name, index in gone.items():
        if torch.isin(index, left[name, 0]).any():
            raise ValueError(f"{name}: Torch-Pruning cut rows that are no channels of a group")
    return plan
