"""Real networks, one per difficulty, at half of every group: what `benchmarks/zoo.py` does to all of them."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.zoo_models import cases, redraw
from sparsekit.compaction import certify, compact
from sparsekit.graph import trace
from sparsekit.plan import PruningPlan
from sparsekit.program import Program
from sparsekit.selection import keep_top

CASES = {case.name: case for case in cases()}
# name -> whether half of every group takes a recorded program; what makes the network difficult
NETWORKS = {
    "torchvision:squeezenet1_1": False,  # concat of expansions, convolutional head
    "torchvision:shufflenet_v2_x0_5": False,  # channel shuffles
    "torchvision:lraspp_mobilenet_v3_large": False,  # segmentation, dictionary output
    "torchvision:ssdlite320_mobilenet_v3_large": False,  # detection, post-processing included
    "torchvision:raft_small": True,  # optical flow, recurrent
    "timm:starnet_s050": False,  # products of branches
    "timm:edgenext_xx_small": True,  # cross-covariance attention, splits
    "timm:convnextv2_atto": False,  # global response normalisation
    "timm:vit_tiny_patch16_224": True,  # packed attention
    "timm:eva02_tiny_patch14_224": True,  # rotary embedding, gated MLP
    "timm:vit_tiny_patch16_dinov3_qkvb": True,  # register tokens
    "timm:deit_tiny_distilled_patch16_224": True,  # two heads
    "timm:mobilevit_xxs": True,  # unfolding into patches
    "timm:mobilevitv2_050": False,  # separable attention
    "timm:efficientvit_m0": True,  # cascaded group attention
    "timm:levit_128s": False,  # attention biases kept for inference
    "timm:pvt_v2_b0": True,  # spatial reduction
    "timm:coat_lite_tiny": True,  # convolutional position encoding
    "timm:xcit_nano_12_p8_224": True,  # attention over channels
    "timm:swiftformer_xs": False,  # additive attention
    "timm:ghostnet_050": False,  # cheap features, cut to width
    "timm:mixnet_s": True,  # kernels of several sizes, split by literals
    "timm:cs3darknet_focus_s": True,  # cross-stage partial
    "timm:resnest14d": False,  # split attention
    "timm:dpn48b": False,  # dual paths
    "timm:dla46x_c": False,  # trees of aggregation
    "timm:fasternet_t0": False,  # partial convolution
    "timm:repvgg_a0": False,  # parallel branches
    "timm:nf_regnet_b0": False,  # weights standardised in the forward
    "timm:gmlp_ti16_224": False,  # spatial gating
    "own:cyclegan": False,  # in-place ReLU after InstanceNorm
    "own:sagan": False,  # self-attention generator
    "own:edsr": False,  # PixelShuffle
    "own:dcgan": False,  # transposed convolutions
}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_group_is_cut_and_certified(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="timm")  # of overwritten names in its own registry
        network = CASES[name].build().eval()
    inputs = CASES[name].inputs()
    redraw(network, inputs)
    graph = trace(network, inputs, renormalise=True)
    generator = torch.Generator().manual_seed(1)
    scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
    plan = keep_top(scores, {group: max(1, group.size // 2) for group in graph.groups})
    small = compact(network, plan, inputs)
    assert isinstance(small, Program) == NETWORKS[name]
    num_params = [sum(parameter.numel() for parameter in net.parameters()) for net in (network, small)]
    assert num_params[1] < 0.7 * num_params[0]
    certificate = certify(network, plan, small, inputs)
    assert certificate.holds, certificate
    assert set(certificate.renormalised) == {group.name for group in graph.groups if not group.exact}


@pytest.mark.parametrize("name", ["timm:coat_lite_tiny", "timm:xcit_nano_12_p8_224"])
def test_a_program_recorded_on_one_example_runs_on_any_number(name: str) -> None:
    torch.manual_seed(0)
    network = CASES[name].build().eval()
    (x,) = CASES[name].inputs()
    program = compact(network, PruningPlan(), x, as_="graph")
    batch = torch.cat([x, torch.randn_like(x), torch.randn_like(x)])
    torch.testing.assert_close(program(batch), network(batch))
