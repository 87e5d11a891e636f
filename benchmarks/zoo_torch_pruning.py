"""Torch-Pruning on one network at its defaults: half of every layer, random importance, and what comes out of it.

The layers that make the outputs are ignored, so that outputs keep their shapes: the only help it gets.
"""

from __future__ import annotations

import copy
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_flatten, tree_map_only

TIMEOUT_S = 30  # of CPU
MEMORY_BYTES = 8 * 2**30  # beyond what the process holds already: Swin alone asks for more than 12 GB


@dataclass(frozen=True, eq=False)
class Pruned:
    """What Torch-Pruning made.

    Attributes:
        network: the network it was given, cut in place.
        seconds: of CPU, for its dependency graph and all its groups.
        cuts: layer name and the input positions it lost, numbered as they stood at that moment.
    """

    network: nn.Module
    seconds: float
    cuts: tuple[tuple[str, list[int]], ...]


def prune(network: nn.Module, inputs: tuple[Any, ...], seed: int) -> Pruned:
    """Half of the channels of every group of `network`, cut in place; raises whatever Torch-Pruning raises."""
    torch.manual_seed(seed)
    ignored = output_layers(network, inputs)
    names = {module: name for name, module in network.named_modules()}
    cuts = []
    start = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        network,
        inputs,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored,
    )
    for group in pruner.step(interactive=True):
        for dependency, index in group:
            layer = dependency.target.module
            if isinstance(layer, nn.Linear | _ConvNd) and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                cuts.append((names[layer], list(index)))
        group.prune()
    return Pruned(network, time.process_time() - start, tuple(cuts))


def output_layers(network: nn.Module, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """Convolutions and linear layers with no other between them and an output, found in the autograd graph."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    owners = {id(weight): layer for layer in layers for weight in layer.parameters(recurse=False) if weight.dim() > 1}
    outputs = [leaf for leaf in tree_flatten(network(*inputs))[0] if isinstance(leaf, Tensor)]
    stack = [leaf.grad_fn for leaf in outputs if leaf.grad_fn is not None]
    found: dict[int, nn.Module] = {}
    seen = set(stack)
    while stack:
        parents = [parent for parent, _ in stack.pop().next_functions if parent is not None]
        weights = [owners[key] for key in map(_leaf, parents) if key in owners]
        found |= {id(layer): layer for layer in weights}
        if not weights:
            stack += [parent for parent in parents if parent not in seen]
            seen.update(parents)
    return list(found.values())


def _leaf(node: Any) -> int | None:
    """The id of the parameter behind an autograd node, through the views that layers take of their weights."""
    while node is not None and node.name() != "torch::autograd::AccumulateGrad":
        parents = node.next_functions
        node = parents[0][0] if len(parents) == 1 else None
    return None if node is None else id(node.variable)


def verdict(model: nn.Module, pruned: Pruned, inputs: tuple[Any, ...]) -> str:
    """ "equal" to the original whose cut input slices are zero (1e-9 in float64), or in what it differs."""
    inputs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    reference = _masked(model, pruned.cuts).double().eval()
    with torch.no_grad():
        expected, got = (
            [leaf for leaf in tree_flatten(network(*inputs))[0] if isinstance(leaf, Tensor)]
            for network in (reference, pruned.network.double().eval())
        )
    shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (expected, got)]
    if shapes[0] != shapes[1]:
        return f"wrong shape: {shapes[1]} instead of {shapes[0]}"
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True) if b.numel() > 0]
    # A tensor's maximum keeps a NaN, where Python's may drop it; an output of zeros is compared absolutely.
    error = torch.stack([(a - b).abs().max() / (b.abs().max() or 1.0) for a, b in pairs]).max()
    return "equal" if error <= 1e-9 else f"runs, off by {error:.0e}"


def _masked(model: nn.Module, cuts: tuple[tuple[str, list[int]], ...]) -> nn.Module:
    masked = copy.deepcopy(model)
    layers = {name: layer for name, layer in masked.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}
    alive: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, gone in cuts:
            layer = layers[name]
            if isinstance(layer, _ConvNd) and 1 < layer.groups == layer.out_channels:
                continue  # depthwise: its consumers read what it makes
            num_inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            stay = alive.setdefault(name, torch.arange(num_inputs))
            _zero_inputs(layer, stay[gone])
            left = torch.ones(len(stay), dtype=torch.bool)
            left[gone] = False
            alive[name] = stay[left]
    return masked


def _zero_inputs(layer: nn.Linear | _ConvNd, channels: Tensor) -> None:
    if isinstance(layer, _ConvTransposeNd):
        layer.weight[channels] = 0
        return
    num_conv_groups = layer.groups if isinstance(layer, _ConvNd) else 1
    weight_GOI = layer.weight.view(num_conv_groups, -1, *layer.weight.shape[1:])
    width = weight_GOI.shape[2]
    weight_GOI[channels // width, :, channels % width] = 0


@contextmanager
def limits() -> Iterator[None]:
    """Ends what runs inside after `TIMEOUT_S` of CPU or `MEMORY_BYTES` of growth, by an exception."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {TIMEOUT_S} s of CPU")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, stop)
    # Again every second: Torch-Pruning catches whatever a forward raises and tries once more.
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def status_bytes(field: str) -> int:
    """A memory field of this process, such as VmHWM, the peak of its resident memory; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
