"""A trained network as it should run on a GPU: BatchNorms folded, activations and residuals fused, zeros skipped.

torch exports the network, so its forward needs no edits. What comes out is an ordinary module: it compiles without
graph breaks, can be exported again, and its state dict is plain tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_map_only

from sparsekit.errors import TraceError
from sparsekit.kernels.modules import Conv2dAct
from sparsekit.surgery import copied

_aten = torch.ops.aten
_CONV2D = _aten.conv2d.default
_BATCH_NORM = _aten._native_batch_norm_legit_no_training.default


def accelerate(model: nn.Module, example_inputs: tuple[Any, ...]) -> GraphModule:
    """A copy of `model` for inference, the same function up to rounding.

    Args:
        model: on the device that it will run on; stays as it is.
        example_inputs: positional arguments of a forward pass, the batch first, two at least; later it may change.

    Raises:
        TraceError: torch cannot export the model.
    """
    network = _exported(model, example_inputs)
    for conv in network.graph.find_nodes(op="call_function", target=_CONV2D):
        _fuse(network, conv)
    network.graph.eliminate_dead_code()
    _forget_unused(network)
    network.recompile()
    return network


def densify(network: GraphModule) -> GraphModule:
    """The same network of torch's own ops alone, for exporters that know no others; the weights are shared."""
    dense = GraphModule(network, network.graph)
    for name, module in list(dense.named_modules()):
        if isinstance(module, Conv2dAct):
            dense.set_submodule(name, module.densify())
    return dense


def _exported(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """The forward in eval mode as a graph of functions, nothing in place; its parameters are frozen."""
    shapes = tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, inputs)
    try:
        program = export(copied(model).eval(), inputs, dynamic_shapes=shapes).run_decompositions({})
    except (RuntimeError, ValueError, TypeError) as error:
        raise TraceError(f"accelerate: torch cannot export this network: {str(error).splitlines()[0]}") from error
    network: GraphModule = program.module(check_guards=False).requires_grad_(False)
    return network


def _fuse(network: GraphModule, conv: Node) -> None:
    """Make one module of a convolution and the BatchNorm, addition and ReLU after it that nothing else reads."""
    x, weight, bias, stride, padding, dilation, groups = (*conv.args, *_DEFAULTS[len(conv.args) :])
    kernel, shift, last = _tensor(network, weight), _tensor(network, bias), conv
    norm = _only_reader(conv, (_BATCH_NORM,))
    if norm and (output := _only_reader(norm, (operator.getitem,))):
        mean, var, gamma, beta = (_tensor(network, norm.args[number]) for number in (3, 4, 1, 2))
        kernel, shift = fuse_conv_bn_weights(kernel, shift, mean, var, norm.args[6], gamma, beta)
        last = output
    residual = None
    add = _only_reader(last, (_aten.add.Tensor,))
    if add and not add.kwargs and _only_reader(add, (_aten.relu.default,)):
        other = next((argument for argument in add.args if argument is not last), None)
        if isinstance(other, Node) and _shape(other) == _shape(last):
            residual, last = other, add
    relu = _only_reader(last, (_aten.relu.default,))
    module = Conv2dAct(  # clones, because a layer that runs twice is two modules here
        kernel.detach().clone(),
        kernel.new_zeros(len(kernel)) if shift is None else shift.detach().clone(),
        stride=list(stride),
        padding=list(padding),
        dilation=list(dilation),
        groups=groups,
        act="relu" if relu else "none",
    )
    last = relu or last
    name = f"{str(weight.target).rpartition('.')[0]}.{conv.name}".lstrip(".")
    network.add_submodule(name, module)
    with network.graph.inserting_after(last):
        call = network.graph.call_module(name, (x,) if residual is None else (x, residual))
    call.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(call)


_DEFAULTS = (None, None, None, [1, 1], [0, 0], [1, 1], 1)  # of conv2d's arguments


def _forget_unused(network: GraphModule) -> None:
    """Drop the tensors that the graph no longer reads."""
    read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in network.graph.nodes if node.op == "call_module")
    for name in list(network.state_dict()):
        if name not in read and not name.startswith(called):
            owner, _, leaf = name.rpartition(".")
            delattr(network.get_submodule(owner), leaf)
    network.delete_all_unused_submodules()


def _only_reader(node: Node, targets: Collection[object]) -> Node | None:
    """The one node that reads this one, if it is a call of one of `targets`."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target in targets else None


def _tensor(network: GraphModule, node: Node | None) -> Tensor | None:
    """The parameter or buffer that a node stands for."""
    return None if node is None else operator.attrgetter(str(node.target))(network)


def _shape(node: Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape
