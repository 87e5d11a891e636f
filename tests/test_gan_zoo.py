"""GANs compact without edits to their source: half of every group cut, certified, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from sparsekit import Budget, certify, compact, export_onnx, trace
from sparsekit.cost import num_macs
from sparsekit.models import GANS
from sparsekit.pruners import PRUNERS
from tests.gans import build, inputs_of, stirred

HALF = Budget.parse("keep=0.5")


def num_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", GANS)
def test_half_of_every_group_is_cut_from_the_user_s_own_module_and_certified(name: str) -> None:
    network, inputs = stirred(build(name)), inputs_of(name)
    graph = trace(network, inputs)
    assert graph.refusals == ()
    assert graph.uncounted == ()
    plan = PRUNERS["magnitude"]()(graph, HALF, None)
    small = compact(network, plan, inputs)
    assert type(small) is type(network)
    assert {group.name: int(keep.sum()) for group, keep in plan.keep.items()} == {
        group.name: group.size // 2 for group in graph.groups
    }
    assert num_params(small) < 0.5 * num_params(network)
    certificate = certify(network, plan, small, inputs)
    assert certificate.holds, certificate
    assert certificate.renormalised == ()


@pytest.mark.parametrize("name", GANS)
def test_no_convolution_holds_channels_that_cannot_be_cut(name: str) -> None:
    network, inputs = stirred(build(name, image_channels=1)), inputs_of(name, image_channels=1)
    plan = PRUNERS["magnitude"]()(trace(network, inputs), Budget.parse("keep=0.01"), None)
    for module in compact(network, plan, inputs).modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (1, 1)


@pytest.mark.parametrize("name", ["sngan_generator", "dcgan_generator", "cyclegan_generator"])
def test_a_budget_of_half_the_macs_is_met(name: str) -> None:
    network, inputs = build(name).eval(), inputs_of(name)
    graph = trace(network, inputs)
    small = compact(network, PRUNERS["magnitude"]()(graph, Budget.parse("macs<=0.5x"), None), inputs)
    assert 0.45 * num_macs(graph) < num_macs(trace(small, inputs)) <= 0.5 * num_macs(graph)


# Transposed convolution; InstanceNorm and reflected borders; sums of resized images; attention, noise in parts, and
# labels; labels alone.
@pytest.mark.parametrize(
    "name", ["dcgan_generator", "cyclegan_generator", "autogan_a_generator", "biggan_generator", "acgan_generator"]
)
def test_compact_generators_run_equal_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    network, inputs = stirred(build(name)), inputs_of(name)
    small = compact(network, PRUNERS["magnitude"]()(trace(network, inputs), HALF, None), inputs)
    file = export_onnx(small, inputs, tmp_path / "generator.onnx")
    assert file.max_relative_error < 1e-5
