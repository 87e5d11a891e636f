"""A trained network as it should run on a GPU: BatchNorms folded, what follows a layer fused, zeros skipped.

torch exports the network, so its forward needs no edits. What comes out is an ordinary module: it compiles without
graph breaks, can be exported again, and its state dict is plain tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from sparsekit.errors import UsageError, nearest
from sparsekit.fusion import fused
from sparsekit.kernels.choice import choose, gpu_of
from sparsekit.kernels.modules import (
    Conv2dAct,
    CusparseltLinear,
    LinearAct,
    NM24Linear,
    ResidualSubset,
    SparseConv2d,
    SparseLinear,
)

_MADE = Conv2dAct | CusparseltLinear | NM24Linear | ResidualSubset | SparseConv2d | SparseLinear

Backend = Literal["auto", "dense", "sparse"]


def accelerate(model: nn.Module, example_inputs: tuple[Any, ...], *, backend: Backend = "auto") -> GraphModule:
    """A copy of `model` for inference, the same function up to rounding, with its zeros skipped where that pays.

    Args:
        model: on the device, and in the dtype, that it will run in; stays as it is.
        example_inputs: positional arguments of a forward pass, the batch first, two at least; later it may change, but
            what pays is decided at this one.
        backend: "auto" takes a sparse kernel where the roofline of the GPU, and then a stopwatch on it, say that it is
            faster, and never without a GPU; "sparse" wherever zeros have a pattern; "dense" nowhere.

    Raises:
        TraceError: torch cannot export the model.
        UsageError: an unknown backend.
    """
    if backend not in (known := list(get_args(Backend))):
        raise UsageError(f"accelerate: unknown backend {backend!r}{nearest(backend, known)}")
    network = fused(model, example_inputs)
    if backend == "dense":
        return network
    device = next(
        (leaf.device for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)), torch.device("cpu")
    )
    seen = _calls(network, example_inputs)
    choices = []
    for node in network.graph.nodes:
        if node.target in seen:
            layer: Any = network.get_submodule(node.target)
            inputs, output = seen[node.target]
            choice, chosen = choose(
                node.target,
                layer,
                inputs,
                output,
                gpu=gpu_of(device),
                in_place=_may_overwrite(network, node),
                timed=backend == "auto" and device.type == "cuda",
                forced=backend == "sparse",
            )
            if backend == "auto" and device.type != "cuda":
                choice, chosen = replace(choice, taken=False), layer
            network.set_submodule(node.target, chosen)
            choices.append(choice)
    network.meta["choices"] = tuple(choices)
    return network


def explain(network: GraphModule) -> str:
    """What `accelerate` chose for each layer of its network, and why, as a table.

    Expected and measured are how many times faster than dense; * marks what runs.
    """
    rows = [("layer", "weight", "MACs", "bound", "kernel", "density", "expected", "measured", "")]
    for choice in network.meta["choices"]:
        rows.append(
            (
                choice.layer.rpartition(".")[0],
                "x".join(map(str, choice.size)),
                f"{choice.num_macs:,}",
                choice.bound,
                choice.best,
                f"{choice.density:.2f}",
                f"{choice.expected:.2f}x",
                "" if choice.measured is None else f"{choice.measured:.2f}x",
                "*" if choice.taken else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def densify(network: GraphModule) -> GraphModule:
    """The same network of torch's own ops alone, for exporters that know no others; dense weights are shared."""
    dense = GraphModule(network, network.graph)
    for name, module in list(dense.named_modules()):
        if isinstance(module, _MADE):
            dense.set_submodule(name, module.densify())
    return dense


def _calls(network: GraphModule, inputs: tuple[Any, ...]) -> dict[str, tuple[list[Tensor], Tensor]]:
    """By name of each fused layer what it is called with and what it returns, on the meta device."""
    seen: dict[str, tuple[list[Tensor], Tensor]] = {}

    def note(name: str, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = [argument.to("meta") for argument in arguments], output.to("meta")

    hooks = [
        module.register_forward_hook(lambda _, arguments, output, name=name: note(name, arguments, output))
        for name, module in network.named_modules()
        if isinstance(module, Conv2dAct | LinearAct)
    ]
    with torch.no_grad():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def _may_overwrite(network: GraphModule, node: Node) -> bool:
    """Whether a layer's residual comes out of a ReLU and is not read after the layer."""
    if len(node.args) < 2:
        return False
    x, source = node.args[:2]
    if not isinstance(x, Node) or not isinstance(source, Node) or x is source or x.op != "call_module":
        return False
    made = network.get_submodule(str(source.target)) if source.op == "call_module" else None
    rectified = isinstance(made, Conv2dAct | SparseConv2d) and made.act == "relu"
    order = {each: number for number, each in enumerate(network.graph.nodes)}
    # A reader that is no layer might hand the same memory on.
    readers_are_done = all(reader.op == "call_module" and order[reader] <= order[node] for reader in source.users)
    return (rectified or isinstance(made, ResidualSubset)) and readers_are_done
