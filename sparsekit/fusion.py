"""A network as torch exports it, with each product and what alone reads it as one layer: BatchNorm, residual, act."""

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
from sparsekit.kernels.modules import Conv2dAct, LinearAct
from sparsekit.surgery import copied

_aten = torch.ops.aten
_CONV2D, _LINEAR = _aten.conv2d.default, _aten.linear.default
_BATCH_NORM = _aten._native_batch_norm_legit_no_training.default
_ACTS: dict[Any, str] = {_aten.relu.default: "relu", _aten.gelu.default: "gelu", _aten.silu.default: "silu"}
# Arguments after the weight, where they are not given.
_REST: dict[Any, tuple[Any, ...]] = {_CONV2D: (None, [1, 1], [0, 0], [1, 1], 1), _LINEAR: (None,)}


def fused(model: nn.Module, example_inputs: tuple[Any, ...]) -> GraphModule:
    """A copy of `model` in eval mode as a graph of `Conv2dAct`, `LinearAct` and what torch has between them.

    Args:
        model: stays as it is.
        example_inputs: positional arguments of a forward pass, the batch first, two at least; later it may change.

    Raises:
        TraceError: torch cannot export the model.
    """
    network = _exported(model, example_inputs)
    for target in (_CONV2D, _LINEAR):
        for product in network.graph.find_nodes(op="call_function", target=target):
            _fuse(network, product)
    network.graph.eliminate_dead_code()
    _forget_unused(network)
    network.recompile()
    return network


def _exported(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """The forward as a graph of functions, nothing in place; its parameters are frozen."""
    shapes = tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, inputs)
    try:
        program = export(copied(model).eval(), inputs, dynamic_shapes=shapes).run_decompositions({})
    except (RuntimeError, ValueError, TypeError) as error:
        raise TraceError(f"accelerate: torch cannot export this network: {str(error).splitlines()[0]}") from error
    network: GraphModule = program.module(check_guards=False).requires_grad_(False)
    return network


def _fuse(network: GraphModule, product: Node) -> None:
    """Make one layer of a product and the BatchNorm, addition and activation after it that nothing else reads."""
    given: tuple[Any, ...] = product.args
    x, weight_node, *rest = (*given, *_REST[product.target][len(given) - 2 :])
    weight, bias = _tensor(network, weight_node), _tensor(network, rest[0])
    if weight is None or (bias is None and rest[0] is not None):
        return  # computed on the way
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    last = product
    norm = _only_reader(product, (_BATCH_NORM,)) if product.target is _CONV2D else None
    output = _only_reader(norm, (operator.getitem,)) if norm else None
    if norm and output:
        weight, bias = _folded(weight, bias, network, norm)
        last = output
    residual, last = _residual(last)
    activation = _only_reader(last, _ACTS)
    act = _ACTS[activation.target] if activation and not activation.kwargs else "none"
    last = activation if activation and act != "none" else last
    tensors = weight.detach().clone(), bias.detach().clone()  # a layer that runs twice is two modules here
    if product.target is _LINEAR:
        layer: nn.Module = LinearAct(*tensors, act=act)
    else:
        stride, padding, dilation, groups = rest[1:]
        layer = Conv2dAct(*tensors, stride=stride, padding=padding, dilation=dilation, groups=groups, act=act)
    path = f"{weight_node.target.rpartition('.')[0]}.{product.name}".lstrip(".")
    _put(network, path, layer, last, (x,) if residual is None else (x, residual))


def _folded(weight: Tensor, bias: Tensor, network: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm after it."""
    arguments: Any = norm.args
    gamma, beta, mean, var = (_tensor(network, argument) for argument in arguments[1:5])
    folded: Any = fuse_conv_bn_weights
    weight, bias = folded(weight, bias, mean, var, arguments[6], gamma, beta)
    return weight, bias


def _residual(last: Node) -> tuple[Node | None, Node]:
    """What is added to a node's output, of the same shape, and where the sum is; or nothing, and the node."""
    add = _only_reader(last, (_aten.add.Tensor,))
    if add is None or add.kwargs:
        return None, last
    other = next((argument for argument in add.args if argument is not last), None)
    if isinstance(other, Node) and other.meta["val"].shape == last.meta["val"].shape:
        return other, add
    return None, last


def _put(network: GraphModule, path: str, layer: nn.Module, last: Node, arguments: tuple[Node, ...]) -> None:
    """Let a layer take the place of what ends in node `last`."""
    network.add_submodule(path, layer)
    with network.graph.inserting_after(last):
        call = network.graph.call_module(path, arguments)
    call.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(call)


def _only_reader(node: Node, targets: Collection[object]) -> Node | None:
    """The one node that reads this one, if it is a call of one of `targets`."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target in targets else None


def _tensor(network: GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that a node stands for; None for none, and for what is computed."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    tensor: Tensor = operator.attrgetter(str(node.target))(network)
    return tensor


def _forget_unused(network: GraphModule) -> None:
    """Drop the tensors that the graph no longer reads."""
    read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in network.graph.nodes if node.op == "call_module")
    for name in list(network.state_dict()):
        if name not in read and not name.startswith(called):
            owner, _, leaf = name.rpartition(".")
            delattr(network.get_submodule(owner), leaf)
    network.delete_all_unused_submodules()
