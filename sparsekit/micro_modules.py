"""Layers as modules, for targets that run PyTorch's own files and not ONNX."""

# N examples; n, k, m as in MatrixProduct
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.layers import Convolution, Layer, MatrixProduct, Pass

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mul": torch.mul,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def micro_module(layer: Layer, sizes: Sequence[int]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module that runs `layer` once per example, at these sizes of its cost term, and inputs of two examples.

    The weight of a convolution that is not known at export is taken for one that is.
    """
    if isinstance(layer, Convolution):
        module, shapes = _convolution(layer, sizes)
    elif isinstance(layer, MatrixProduct):
        module, shapes = _product(layer, sizes)
    else:
        module, shapes = _pass(layer, layer.shape(sizes))
    return module.eval(), tuple(torch.randn(2, *shape) for shape in shapes)


def _convolution(layer: Convolution, sizes: Sequence[int]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    num_in, num_out, groups = layer.channels(sizes)
    family = (_TRANSPOSED if layer.transposed else _CONVOLUTIONS)[len(layer.extent)]
    shifts = {"output_padding": layer.output_padding} if layer.transposed else {}
    convolution = family(
        num_in,
        num_out,
        layer.kernel,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        **shifts,
    )
    if layer.num_inputs == 1:
        return convolution, [(num_in, *layer.extent)]
    return nn.Sequential(nn.Flatten(0, 1), convolution), [(layer.num_inputs, num_in, *layer.extent)]


class _MatMul(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class _FromLeft(nn.Module):
    """A constant times the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


class _FromRight(_FromLeft):
    """The input times a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _product(layer: MatrixProduct, sizes: Sequence[int]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    num_matrices, rows, inner, columns = layer.shape(sizes)
    batch = [num_matrices] if num_matrices > 1 else []
    left, right = (*batch, rows, inner), (*batch, inner, columns)
    if layer.static == "left":
        return _FromLeft(*left), [right]
    if layer.static == "right":
        linear = _FromRight(*right) if batch else nn.Linear(inner, columns)
        return linear, [left if batch or rows > 1 else (inner,)]
    return _MatMul(), [left, right]


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.function(x) if y is None else self.function(x, y)


class _Mean(nn.Module):
    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)


def _pass(layer: Pass, shape: Sequence[int]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    first = 1 if shape[0] == 1 else 0  # several tensors per example stand behind the batch
    shapes = [operand[first:] for operand in layer.operands(shape)]
    if layer.op == "mean":
        return _Mean([dim + 1 - first for dim in layer.reduced]), shapes
    if layer.op == "native_layer_norm":
        return nn.LayerNorm(shape[-1]), shapes
    if layer.op == "softmax":
        return nn.Softmax(-1), shapes
    return _Function(_FUNCTIONS[layer.op]), shapes
