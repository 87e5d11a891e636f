"""`accelerate` computes what the network did, for any batch; what it makes compiles, exports and saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from sparsekit.acceleration import accelerate, densify, explain
from sparsekit.budget import Budget
from sparsekit.compaction import compact
from sparsekit.errors import TraceError, UsageError
from sparsekit.export import export_onnx
from sparsekit.graph import trace
from sparsekit.kernels.modules import Conv2dAct
from sparsekit.pruners.magnitude_pattern import MagnitudePattern


class Block(nn.Module):
    """A residual block, whose pieces may be fused, among others that may not."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x
        return relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.twice = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.twice(relu(self.twice(x)))
        x = self.norm(x) + x  # the convolution is read twice: nothing may be folded into it
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return net.eval()


def images(num: int) -> Tensor:
    return torch.randn(num, 3, 9, 11, generator=torch.Generator().manual_seed(num))


def test_it_computes_the_same_for_other_batches_and_leaves_the_network_alone(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fast = accelerate(network.train(), (images(2),))
    network.eval()
    for num in (2, 5):
        torch.testing.assert_close(fast(images(num)), network(images(num)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_batch_norms_relus_and_residuals_go_into_the_convolutions_that_alone_they_read(network: nn.Module) -> None:
    fast = accelerate(network, (images(2),))
    targets = [str(node.target) for node in fast.graph.nodes]
    modules = [module for module in fast.modules() if isinstance(module, Conv2dAct)]
    assert sum("batch_norm" in target for target in targets) == 1
    assert sum("relu" in target for target in targets) == 0
    # stem, two blocks of two, and one that runs twice
    assert [module.act for module in modules] == ["none", "relu", "relu", "relu", "relu", "relu", "none"]
    residual = [node for node in fast.graph.nodes if node.op == "call_module" and len(node.args) == 2]
    assert len(residual) == 2


def test_it_compiles_whole_and_exports_again(network: nn.Module) -> None:
    fast = accelerate(network, (images(2),))
    expected = network(images(3))
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(images(3)), expected)
    torch.testing.assert_close(torch.export.export(fast, (images(3),)).module()(images(3)), expected)


def test_the_state_is_plain_tensors(network: nn.Module) -> None:
    fast, again = (accelerate(network, (images(2),)) for _ in range(2))
    for value in again.state_dict().values():
        value.zero_()
    again.load_state_dict(load(save(fast.state_dict())))
    assert torch.equal(again(images(2)), fast(images(2)))
    assert len(fast.state_dict()) == 2 * 7 + 4 + 2  # convolutions, one BatchNorm, the head


def test_the_dense_twin_has_an_onnx_file(network: nn.Module, tmp_path: Path) -> None:
    dense = densify(accelerate(network, (images(2),)))
    assert not any("sparsekit" in str(node.target) for node in torch.export.export(dense, (images(2),)).graph.nodes)
    file = export_onnx(dense, (images(2),), tmp_path / "net.onnx")
    assert file.max_relative_error < 1e-4


def test_a_network_that_torch_cannot_export_is_named() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="accelerate: torch cannot export this network"):
        accelerate(Branches(), (images(2),))


class Wide(nn.Module):
    """A bottleneck and a linear layer that are wide enough for groups of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.reduce, self.bn1 = nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.expand, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.wide = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.hidden, self.head = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        stream = relu(self.stem(x))
        stream = relu(stream + self.bn2(self.expand(relu(self.bn1(self.reduce(stream))))))
        features = stream.mean((2, 3))
        logits: Tensor = features + self.head(gelu(self.hidden(features)))
        return logits


def wide(*, pattern: str = "", branch_groups: int = 4) -> nn.Module:
    """With weights zeroed in a pattern, and a branch that touches some groups of 16 channels of the stream."""
    torch.manual_seed(0)
    network = Wide().eval()
    with torch.no_grad():
        for tensor in (network.wide.weight, network.expand.weight, network.bn2.weight, network.bn2.bias):
            tensor[16 * branch_groups :] = 0
    if not pattern:
        return network
    return compact(network, MagnitudePattern(pattern)(trace(network, images(2)), Budget.parse("nonzero<=0.6x")))


def kinds(network: nn.Module) -> set[str]:
    return {type(module).__name__ for module in network.modules()} - {"Module", "GraphModule"}


def test_weights_in_groups_run_on_the_kernels_that_skip_them_and_can_be_densified(tmp_path: Path) -> None:
    network, x = wide(pattern="block:32x16"), images(4)
    fast = accelerate(network, (x,), backend="sparse")
    assert {"SparseConv2d", "SparseLinear"} <= kinds(fast)
    dense = densify(fast)
    assert kinds(dense).isdisjoint({"SparseConv2d", "SparseLinear", "ResidualSubset"})
    for each in (fast, dense, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(each(x), network(x), rtol=1e-4, atol=1e-5)
    assert export_onnx(fast, (x,), tmp_path / "net.onnx").max_relative_error < 1e-4
    load(save(fast.state_dict()))


def test_a_linear_layer_of_few_samples_keeps_a_2_to_4_weight_packed() -> None:
    network, x = wide(pattern="2:4"), images(4)
    fast = accelerate(network, (x,), backend="sparse")
    assert "NM24Linear" in kinds(fast)
    for each in (fast, densify(fast)):
        torch.testing.assert_close(each(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_branch_that_touches_some_channels_updates_the_stream_in_place() -> None:
    network, x = wide(branch_groups=1), images(4)
    fast = accelerate(network, (x,), backend="sparse")
    assert "ResidualSubset" in kinds(fast)
    before = x.clone()
    for each in (fast, densify(fast), torch.compile(fast, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(each(x), network(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_a_stream_that_is_read_later_or_beside_or_may_be_negative_is_not_overwritten() -> None:
    class ReadLater(Wide):
        def forward(self, x: Tensor) -> Tensor:
            stream = relu(self.stem(x))
            out: Tensor = relu(stream + self.bn2(self.expand(relu(self.bn1(self.reduce(stream)))))) + stream
            return out

    class Negative(Wide):
        def forward(self, x: Tensor) -> Tensor:
            stream = self.stem(x)
            out: Tensor = relu(stream + self.bn2(self.expand(relu(self.bn1(self.reduce(stream))))))
            return out

    class ReadAroundEachPixel(Wide):
        def forward(self, x: Tensor) -> Tensor:
            stream = relu(self.stem(x))
            out: Tensor = relu(stream + self.bn2(self.wide(stream)))
            return out

    for make in (ReadLater, Negative, ReadAroundEachPixel):
        network, x = make().eval(), images(4)
        network.load_state_dict(wide(branch_groups=1).state_dict())
        fast = accelerate(network, (x,), backend="sparse")
        assert "ResidualSubset" not in kinds(fast)
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


def test_without_a_gpu_all_stays_dense_and_the_table_says_what_one_would_gain() -> None:
    network, x = wide(pattern="block:32x16"), images(4)
    fast = accelerate(network, (x,))
    assert kinds(fast) == {"Conv2dAct", "LinearAct"}
    lines = explain(fast).splitlines()
    assert lines[0].split() == ["layer", "weight", "MACs", "bound", "kernel", "density", "expected", "measured"]
    assert [line.split()[0] for line in lines[1:]] == ["stem", "reduce", "expand", "hidden", "head"]
    assert "*" not in explain(fast)
    assert "*" in explain(accelerate(network, (x,), backend="sparse"))


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UsageError, match="accelerate: unknown backend 'triton'"):
        accelerate(wide(), (images(2),), backend="triton")  # type: ignore[arg-type]
