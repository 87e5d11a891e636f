"""Networks of a single layer, to time it alone in the layout that it has inside a network.

A convolution stands behind a cheap 1x1 convolution from a few channels, so that it meets its input as the runtime's
own convolutions leave it (ONNX Runtime keeps channels in blocks of 8 or 16 and would reorder a lone convolution's
input), and before one with a stride of the whole image, which reads a few numbers per channel: neither a reordering nor
a copy of the output counts. These neighbours are timed alone and taken off; so with what goes over a convolution's
output.

Weights are a few random rows, expanded: runtimes fold that into constants when they load the file, and files stay
small enough to send a few thousand of them to another machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsekit.layers import Convolution, Layer, MatrixProduct, Pass

OPSET, IR_VERSION = 20, 10  # as torch's exporter writes
NUM_HEAD_CHANNELS, NUM_TAIL_CHANNELS = 4, 16  # what the convolution before reads, and the one behind makes
_BATCH = "batch"
_RANDOM = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
_ACTIVATIONS = {
    "elu": "Elu",
    "gelu": "Gelu",
    "hardsigmoid": "HardSigmoid",
    "hardswish": "HardSwish",
    "leaky_relu": "LeakyRelu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
}
_SUMS = {"add": "Add", "mul": "Mul"}


def micro_model(layer: Layer, sizes: Sequence[int]) -> bytes:
    """An ONNX file with a dynamic batch that runs `layer` once per example, at these sizes of its cost term."""
    graph = _Graph()
    if isinstance(layer, Convolution):
        return graph.model(_convolution(graph, layer, sizes))
    if isinstance(layer, MatrixProduct):
        return graph.model(_product(graph, layer, sizes))
    return graph.model(_pass(graph, layer, layer.shape(sizes)))


def neighbours_model(layer: Layer, sizes: Sequence[int]) -> bytes | None:
    """The layer's neighbours in its micro-model, alone; None where it has none."""
    if isinstance(layer, Convolution):
        shapes = [(layer.num_inputs, layer.channels(sizes)[0], *layer.extent)] if _has_head(layer, sizes) else []
    elif isinstance(layer, Pass) and layer.images:
        shapes = layer.operands(layer.shape(sizes))
    else:
        shapes = []
    graph = _Graph()
    outputs = [_tail(graph, _head(graph, shape), shape[1:]) for shape in shapes]
    return graph.model(*outputs) if outputs else None


@dataclass
class _Graph:
    """An ONNX graph under construction; tensors are names."""

    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def input(self, *shape: int | str) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def floats(self, size: int) -> str:
        return self.constant(np.resize(_RANDOM, size))

    def weight(self, shape: Sequence[int], fan_in: int) -> str:
        """One random row along the first dimension, repeated; outputs have the scale of the inputs."""
        row = np.resize(_RANDOM, (1, *shape[1:])) / np.float32(math.sqrt(fan_in))
        return self.add("Expand", self.constant(row), self.integers(*shape))

    def add(self, op: str, *inputs: str, **attributes: float | Sequence[int]) -> str:
        name = f"y{len(self.nodes)}"
        node = helper.make_node(op, inputs, [name])
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return name

    def model(self, *names: str) -> bytes:
        outputs = [onnx.ValueInfoProto(name=name) for name in names]
        for output in outputs:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
        graph = helper.make_graph(self.nodes, "layer", self.inputs, outputs, self.constants)
        opset = helper.make_opsetid("", OPSET)
        return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION).SerializeToString())


def _has_head(layer: Convolution, sizes: Sequence[int]) -> bool:
    """Only plain 2D convolutions have a layout of their own; what reads a few channels reads the network's input."""
    return len(layer.extent) == 2 and not layer.transposed and layer.channels(sizes)[0] > NUM_HEAD_CHANNELS


def _head(graph: _Graph, shape: Sequence[int]) -> str:
    """Images of this shape per example, as a convolution leaves them."""
    num_images, num_channels, *extent = shape
    weight = graph.weight((num_channels, NUM_HEAD_CHANNELS, *[1] * len(extent)), NUM_HEAD_CHANNELS)
    return graph.add("Conv", _images(graph, (num_images, NUM_HEAD_CHANNELS, *extent)), weight)


def _images(graph: _Graph, shape: Sequence[int]) -> str:
    """An input of images, side by side in the batch where there are several per example."""
    if shape[0] == 1:
        return graph.input(_BATCH, *shape[1:])
    return graph.add("Reshape", graph.input(_BATCH, *shape), graph.integers(-1, *shape[1:]))


def _tail(graph: _Graph, y: str, shape: Sequence[int]) -> str:
    """A convolution that reads a few positions of images of this shape, in the layout convolutions hand each other."""
    num_channels, *extent = shape
    kernel = [min(2, size) for size in extent]  # a stride over a kernel of 1 could be moved into the layer
    weight = graph.weight((NUM_TAIL_CHANNELS, num_channels, *kernel), num_channels * math.prod(kernel))
    return graph.add("Conv", y, weight, kernel_shape=kernel, strides=extent)


def _corner(graph: _Graph, y: str, extent: Sequence[int]) -> str:
    """The first numbers of each channel, whatever the layout."""
    return graph.add("MaxPool", y, kernel_shape=[min(2, size) for size in extent], strides=extent)


def _convolution(graph: _Graph, layer: Convolution, sizes: Sequence[int]) -> str:
    num_in, num_out, groups = layer.channels(sizes)
    inputs, shape = (layer.num_inputs, num_in, *layer.extent), (*sizes, *layer.kernel)
    x = _head(graph, inputs) if _has_head(layer, sizes) else _images(graph, inputs)
    weight = graph.weight(shape, math.prod(shape[1:])) if layer.static else graph.input(*shape)
    shifts: dict[str, Sequence[int]] = {"output_padding": layer.output_padding} if layer.transposed else {}
    y = graph.add(
        "ConvTranspose" if layer.transposed else "Conv",
        x,
        weight,
        graph.floats(num_out),
        kernel_shape=layer.kernel,
        strides=layer.stride,
        pads=(*layer.padding, *layer.padding),
        dilations=layer.dilation,
        group=groups,
        **shifts,
    )
    if _has_head(layer, sizes):
        return _tail(graph, y, (num_out, *layer.output_extent))
    return _corner(graph, y, layer.output_extent)


def _product(graph: _Graph, layer: MatrixProduct, sizes: Sequence[int]) -> str:
    num_matrices, rows, inner, columns = layer.shape(sizes)
    batch = [num_matrices] if num_matrices > 1 else []
    if layer.static == "right" and not batch and rows == 1:  # a classifier
        x, weight = graph.input(_BATCH, inner), graph.weight((inner, columns), inner)
        return graph.add("Gemm", x, weight, graph.floats(columns))
    operands = [
        graph.weight(shape, inner) if layer.static == side else graph.input(_BATCH, *shape)
        for side, shape in (("left", (*batch, rows, inner)), ("right", (*batch, inner, columns)))
    ]
    y = graph.add("MatMul", *operands)
    if layer.static == "right":
        y = graph.add("Add", y, graph.floats(columns))
    # A max pool takes the matrices, or the rows of a single one, for channels.
    return _corner(graph, y, [*([rows] if batch else []), columns])


def _pass(graph: _Graph, layer: Pass, shape: Sequence[int]) -> str:
    shapes = layer.operands(shape)
    if layer.images:
        y = _apply(graph, layer, [_head(graph, operand) for operand in shapes], shape[-1], shift=0)
        return y if layer.reduced else _tail(graph, y, shape[1:])
    first = 1 if shape[0] == 1 else 0  # several tensors per example stand behind the batch
    operands = [graph.input(_BATCH, *operand[first:]) for operand in shapes]
    y = _apply(graph, layer, operands, shape[-1], shift=1 - first)
    return y if layer.reduced else _corner(graph, y, shape[first + 1 :])


def _apply(graph: _Graph, layer: Pass, x: Sequence[str], last: int, *, shift: int) -> str:
    """The op itself, whose `last` dimension has this size; dimensions count from `shift` on."""
    if layer.op in _SUMS:
        return graph.add(_SUMS[layer.op], *x)
    if layer.op == "mean":
        axes = graph.integers(*(dim + shift for dim in layer.reduced))
        return graph.add("ReduceMean", *x, axes, keepdims=1)
    if layer.op == "silu":
        return graph.add("Mul", *x, graph.add("Sigmoid", *x))
    if layer.op == "hardtanh":
        bounds = (graph.constant(np.array(bound, np.float32)) for bound in (0, 6))
        return graph.add("Clip", *x, *bounds)
    if layer.op == "native_layer_norm":
        return graph.add("LayerNormalization", *x, graph.floats(last), graph.floats(last), axis=-1)
    if layer.op == "softmax":
        return graph.add("Softmax", *x, axis=-1)
    return graph.add(_ACTIVATIONS[layer.op], *x)
