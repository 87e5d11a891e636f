"""What is known of a layer is enough to build it again: the same shapes, the same multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.compaction import compact
from sparsekit.cost import Costs, term_value
from sparsekit.graph import ChannelGraph, trace
from sparsekit.layer_shapes import Shape, shape_of, traffic_bytes, weight_bytes
from sparsekit.layers import Convolution, Layer, MatrixProduct, Pass
from sparsekit.micro_models import micro_model, neighbours_model
from sparsekit.micro_modules import micro_module
from sparsekit.selection import keep_top
from tests.networks import make


class Attention(nn.Module):
    """Heads as torchvision and timm have them; `fused` calls torch's own kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(16, 48), nn.Linear(16, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, scale=0.5)
        else:
            mixed = (query @ key.transpose(-1, -2) * 0.5).softmax(-1) @ value
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, 16))
        return y


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


IMAGE, LINE, VOLUME = (2, 3, 12, 10), (2, 3, 20), (2, 3, 6, 5, 4)
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (chain(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, (1, 3), dilation=2)), IMAGE),
    "1d": (chain(nn.Conv1d(3, 8, 5, 2, 2), nn.Conv1d(8, 6, 3)), LINE),
    "3d": (chain(nn.Conv3d(3, 8, 3, 1, 1), nn.Conv3d(8, 6, (1, 3, 2))), VOLUME),
    "depthwise": (chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 6, 1)), IMAGE),
    "multiplied": (chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 6, 1)), IMAGE),
    "grouped": (chain(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 3, groups=2), nn.Conv2d(64, 6, 1)), IMAGE),
    "transposed": (chain(nn.ConvTranspose2d(3, 8, 4, 2, 1), nn.ConvTranspose2d(8, 6, 3, 2, output_padding=1)), IMAGE),
    "transposed in groups": (chain(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 32, 3, 2, groups=2)), IMAGE),
    "linear": (chain(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)), (2, 6)),
    "linear over tokens": (chain(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)), (2, 7, 6)),
    "attention": (chain(nn.Linear(6, 16), Attention(fused=False)), (2, 7, 6)),
    "fused attention": (chain(nn.Linear(6, 16), Attention(fused=True)), (2, 7, 6)),
}


def traced(name: str) -> tuple[ChannelGraph, Tensor]:
    network, shape = NETWORKS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return trace(network, x), x


def shapes(graph: ChannelGraph) -> list[Shape]:
    dense = Costs(graph).dense
    found = [shape_of(term, dense) for term in graph.macs]
    assert None not in found
    return [shape for shape in found if shape is not None]


def run(model: bytes, batch_size: int = 1) -> list[Any]:
    """The outputs in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {
        value.name: generator.standard_normal([batch_size if size == "batch" else size for size in value.shape])
        for value in session.get_inputs()
    }
    outputs: list[Any] = session.run(None, {name: feed.astype(np.float32) for name, feed in feeds.items()})
    return outputs


def num_macs(model: bytes) -> int:
    """Of the graph's convolutions and matrix products for one example, by ONNX's own shape inference."""
    proto = onnx.load_from_string(model)
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = value.type.tensor_type.shape.dim[0].dim_value or 1
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    total = 0
    for node in inferred.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            positions = sizes[node.input[0] if node.op_type == "ConvTranspose" else node.output[0]]
            total += positions[0] * int(np.prod(positions[2:])) * int(np.prod(sizes[node.input[1]]))
        elif node.op_type in ("MatMul", "Gemm"):
            total += int(np.prod(sizes[node.output[0]])) * sizes[node.input[0]][-1]
    return total


def neighbours_macs(layer: Layer, sizes: Sequence[int]) -> int:
    """Of the head before the layer, and of the tail behind it, which reads 2x2 positions into 16 channels."""
    if not isinstance(layer, Convolution) or neighbours_model(layer, sizes) is None:
        return 0
    num_in, num_out, _ = layer.channels(sizes)
    read = int(np.prod(np.minimum(layer.output_extent, 2)))
    return layer.num_inputs * (4 * num_in * int(np.prod(layer.extent)) + 16 * read * num_out)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_micro_model_runs_and_has_the_layers_multiply_accumulates(name: str) -> None:
    graph, _ = traced(name)
    assert graph.macs
    for shape, term in zip(shapes(graph), graph.macs, strict=True):
        assert shape.layer.macs(shape.sizes) == term_value(term, graph)
        model = micro_model(shape.layer, shape.sizes)
        assert num_macs(model) - neighbours_macs(shape.layer, shape.sizes) == term_value(term, graph)
        (output,) = run(model, batch_size=3)
        assert len(output) == 3
        assert np.isfinite(output).all()
        assert 1e-2 < np.abs(output).max() < 1e2  # no denormals, no overflow
        alone = neighbours_model(shape.layer, shape.sizes)
        assert alone is None or np.isfinite(run(alone)[0]).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_has_the_layers_multiply_accumulates(name: str) -> None:
    graph, _ = traced(name)
    for shape, term in zip(shapes(graph), graph.macs, strict=True):
        module, inputs = micro_module(shape.layer, shape.sizes)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        if isinstance(shape.layer, Convolution) and shape.layer.transposed:
            continue  # torch counts its positions at the output
        assert counter.get_total_flops() == 2 * len(inputs[0]) * term_value(term, graph)


@pytest.mark.parametrize("name", NETWORKS)
def test_at_the_sizes_that_a_plan_leaves_a_layer_is_the_one_of_the_compact_network(name: str) -> None:
    graph, x = traced(name)
    kept = {group: max(1, group.size // 2) for group in graph.groups}
    scores = {group: torch.rand(group.size, generator=torch.Generator().manual_seed(1)) for group in graph.groups}
    small = trace(compact(graph.model, keep_top(scores, kept), x), x)
    counts = Costs(graph).counts(kept)
    assert len(graph.macs) == len(small.macs)
    for cut, term in zip(shapes(small), graph.macs, strict=True):
        expected = shape_of(term, counts)
        assert expected is not None
        assert expected.sizes == cut.sizes
        if isinstance(expected.layer, Convolution) and isinstance(cut.layer, Convolution):
            assert expected.layer.channels(expected.sizes) == cut.layer.channels(cut.sizes)


@pytest.mark.parametrize("name", ["tv_resnext50", "tv_mobilenet_v3", "tv_densenet121"])
def test_every_term_of_a_stock_network_knows_its_layer(name: str) -> None:
    network, x = make(name)
    graph = trace(network, x)
    for shape, term in zip(shapes(graph), graph.macs, strict=True):
        assert shape.layer.macs(shape.sizes) == term_value(term, graph)


def test_layers_do_not_depend_on_the_batch_of_the_example() -> None:
    network, shape = NETWORKS["attention"]
    one, three = (trace(network, torch.randn(size, *shape[1:])) for size in (2, 6))
    for a, b in zip(shapes(one), shapes(three), strict=True):
        assert isinstance(a.layer, MatrixProduct)
        assert isinstance(b.layer, MatrixProduct)
        assert a.layer.shape(a.sizes) == b.layer.shape(b.sizes)


def test_what_is_known_at_export_and_what_has_no_micro_model_is_no_layer() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.left @ self.right)

    graph = trace(Constant().eval(), torch.randn(2, 4))
    assert [term.layer for term in graph.macs] == [None, MatrixProduct("right", num_examples=2)]


PASSES = [
    (nn.SiLU(), "silu", ()),
    (nn.ReLU6(), "hardtanh", ()),
    (nn.Hardswish(inplace=True), "hardswish", ()),
    (nn.AdaptiveAvgPool2d(1), "mean", (2, 3)),
]


@pytest.mark.parametrize(("module", "op", "reduced"), PASSES)
def test_what_goes_over_images_behind_a_convolution_is_a_pass(
    module: nn.Module, op: str, reduced: tuple[int, ...]
) -> None:
    graph = trace(chain(nn.Conv2d(3, 8, 3, padding=1), module, nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 40, 40))
    (term,) = graph.passes
    assert term.layer == Pass(op, images=True, reduced=reduced, num_examples=2)
    shape = shape_of(term, Costs(graph).dense)
    assert shape is not None
    assert shape.sizes == (2, 8, 40, 40)
    assert shape.varies == (False, True, False, False)
    _run_pass(shape)


def test_sums_products_and_norms_are_passes_and_what_runtimes_fuse_or_is_tiny_is_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.bn, self.linear, self.norm = nn.BatchNorm2d(8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.conv(x)))
            x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
            tokens = self.norm((x + x).flatten(2).transpose(1, 2))
            y: Tensor = F.gelu(self.linear(tokens)) + tokens
            return y

    graph = trace(Net().eval(), torch.randn(2, 3, 40, 40), renormalise=True)
    passes = [term.layer for term in graph.passes]
    assert [layer.op for layer in passes if isinstance(layer, Pass)] == [
        "mean",
        "mul",
        "native_layer_norm",
        "gelu",
        "add",
    ]
    assert isinstance(passes[1], Pass)
    assert passes[1].broadcast == (False, False, True, True)
    for term in graph.passes:
        shape = shape_of(term, Costs(graph).dense)
        assert shape is not None
        _run_pass(shape)


def test_a_softmax_over_keys_is_no_pass_over_images() -> None:
    graph = trace(chain(nn.Linear(6, 16), Attention(fused=False)), torch.randn(2, 48, 6))
    assert [term.layer for term in graph.passes] == [Pass("softmax", num_examples=2)]
    shape = shape_of(graph.passes[0], Costs(graph).dense)
    assert shape is not None
    _run_pass(shape)


def _run_pass(shape: Shape) -> None:
    for model in (micro_model(shape.layer, shape.sizes), neighbours_model(shape.layer, shape.sizes)):
        if model is not None:
            assert all(np.isfinite(output).all() for output in run(model, batch_size=2))
    module, inputs = micro_module(shape.layer, shape.sizes)
    with torch.no_grad():
        assert module(*inputs).isfinite().all()


def test_a_convolution_is_timed_in_the_layout_that_it_has_inside_a_network(tmp_path: Path) -> None:
    """ONNX Runtime reorders a few numbers at the end, none before the layer or behind it."""
    conv = Convolution((14, 14), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, 64, False, False, True, 1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(micro_model(conv, (64, 32)), options, providers=["CPUExecutionProvider"])
    ops = [(node.domain, node.op_type) for node in onnx.load(options.optimized_model_filepath).graph.node]
    if ("com.microsoft.nchwc", "Conv") not in ops:
        pytest.skip("this ONNX Runtime has no blocked layout")
    assert [op for _, op in ops] == ["Conv", "Conv", "Conv", "ReorderOutput"]


def test_weights_and_traffic_are_counted_in_bytes_of_float32() -> None:
    conv = Convolution((4, 4), (3, 3), (2, 2), (1, 1), (0, 0), (1, 1), 1, 8, False, False, True, 1)
    assert weight_bytes(conv, (8, 6)) == 4 * 8 * 6 * 9
    assert traffic_bytes(conv, (8, 6)) == 4 * (8 * 6 * 9 + 6 * 16 + 8 * 4)
    assert weight_bytes(MatrixProduct(None), (1, 5, 6, 7)) == 0
    assert weight_bytes(MatrixProduct("left"), (1, 5, 6, 7)) == 4 * 5 * 6
    assert traffic_bytes(Pass("mul", broadcast=(False, False, True)), (1, 8, 5)) == 4 * (2 * 40 + 8)
