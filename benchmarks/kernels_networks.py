"""Whole networks on a GPU: dense, compacted, and with zeros that kernels skip, at the same share of the arithmetic.

    PYTHONPATH=. python -m benchmarks.kernels_networks [--only NAME ...] [--out DIR] [--max-seconds N]

A row per network goes to `kernels_networks.jsonl`. All are compiled by torch, channels_last, and run as a CUDA graph:

- dense: in bfloat16, BatchNorms frozen into convolutions, its weights with the zeros that "masked" has;
- compacted: narrower layers, widths multiples of 16, likewise;
- compacted, fused: the same through `accelerate`, in float16 where cuDNN then fuses what follows a convolution;
- masked: zeros in groups of 128 x 16, as many as leave the multiplications of "compacted", through `accelerate`,
  which takes a sparse kernel where a stopwatch says so;
- stream subset (ResNet-50): "compacted, fused" with residual branches that read and write half of the stream.

Networks have random weights. `torch.compile` does not autotune, which takes minutes for each network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from benchmarks.kernels_linears import BF16, FP16, normal
from benchmarks.kernels_measure import OURS, Case, Goal, Run, Turns, gpu_clock, measure
from benchmarks.kernels_run import arguments, run_all
from sparsekit.acceleration import Backend, accelerate
from sparsekit.kernels.masks import group_mask
from sparsekit.kernels.residual_subset import CHANNELS

MAX_SECONDS = 480
TOLERANCE = 5e-2  # of logits, after the rounding of some fifty layers in bfloat16
DENSE, COMPACTED, FUSED, MASKED, SUBSET = "dense", "compacted", "compacted, fused", "masked", "stream subset"


class Generator(nn.Module):
    """The size of StyleGAN2's: two 3 x 3 convolutions at each of 4 to 64 pixels a side."""

    def __init__(self, width: int, *, num_in: int = 512, num_sizes: int = 5) -> None:
        super().__init__()
        self.sizes = nn.ModuleList()
        for number in range(num_sizes):
            convs = [nn.Conv2d(each, width, 3, padding=1) for each in (width if number else num_in, width)]
            for conv in convs:
                nn.init.kaiming_normal_(conv.weight)
            self.sizes.append(nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, num_in, 4, 4]."""
        for number, size in enumerate(self.sizes):
            x = size(interpolate(x, scale_factor=2.0, mode="nearest") if number else x)
        return x


def resnet50(compact: bool, *, inner: int = 32) -> nn.Module:
    """Of bottlenecks `inner`/64 as wide inside; the stream keeps its width."""
    network: nn.Module = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=inner if compact else 64)
    return network


def vgg16(compact: bool) -> nn.Module:
    """Every convolution some 0.7 as wide, for half the arithmetic."""
    widths = [48, 96, 176, 368, 368] if compact else [64, 128, 256, 512, 512]
    plan: list[str | int] = []
    for width, num_convs in zip(widths, (2, 2, 3, 3, 3), strict=True):
        plan += [*[width] * num_convs, "M"]
    network = VGG(make_layers(plan))
    network.classifier = nn.Sequential(nn.Linear(widths[-1] * 49, 4096), *network.classifier[1:])
    return cast(nn.Module, network)


def vit_b(compact: bool) -> nn.Module:
    """A quarter of the MLPs' width is half the arithmetic."""
    network: nn.Module = VisionTransformer(224, 16, 12, 12, 768, 768 if compact else 3072)
    nn.init.normal_(network.get_parameter("heads.head.weight"), std=0.02)  # zeros would make any network right
    return network


def generator(compact: bool) -> nn.Module:
    return Generator(368 if compact else 512)


@dataclass(frozen=True)
class Network:
    """What is measured.

    Attributes:
        make: the network, dense or compacted.
        size: of the input.
        dtype: of what `accelerate` returns.
        subset: also with residual branches on half of the stream.
    """

    make: Callable[[bool], nn.Module]
    size: tuple[int, int, int, int]
    dtype: torch.dtype = BF16
    subset: bool = False

    def turns(self, device: str, seed: int) -> Turns:
        torch.manual_seed(seed)
        torch.compiler.reset()
        x = normal(*self.size, seed=seed, device=device, dtype=torch.float32)
        dense, compacted = (prepared(self.make(compact), x) for compact in (False, True))
        flops = {DENSE: num_flops(dense, x), COMPACTED: num_flops(compacted, x)}
        share = flops[COMPACTED] / flops[DENSE]
        masked = masked_copy(dense, share)
        x16, xa = x.to(BF16), x.to(self.dtype)
        runs = {
            DENSE: frozen(in_dtype(masked, BF16), x16),
            COMPACTED: frozen(in_dtype(compacted, BF16), x16),
            FUSED: compiled(accelerated(compacted, xa, "dense"), xa),
            MASKED: compiled(accelerated(masked, xa, "auto"), xa),
        }
        networks = {DENSE: masked, COMPACTED: compacted, FUSED: compacted, MASKED: masked}
        if self.subset:
            networks[SUBSET] = subset_copy(compacted)
            runs[SUBSET] = compiled(accelerated(networks[SUBSET], xa, "sparse"), xa)
        flops |= {FUSED: flops[COMPACTED], MASKED: share * flops[DENSE]}
        expected = {name: partial(inferred, network, x) for name, network in networks.items()}
        return Turns(runs, expected, flops, quantities={"share of arithmetic": share})

    def case(self, name: str, *goals: Goal) -> Case:
        pairs = [(COMPACTED, DENSE), (FUSED, DENSE), (FUSED, COMPACTED), (MASKED, DENSE), (MASKED, FUSED)]
        if self.subset:
            pairs += [(SUBSET, DENSE), (SUBSET, FUSED)]
        note = "dtype is what accelerate runs in, dense and compacted are bfloat16; torch.compile without autotuning"
        return Case(name, self.turns, goals, self.dtype, tolerance=TOLERANCE, pairs=tuple(pairs), note=note)


def prepared(network: nn.Module, x: Tensor) -> nn.Module:
    """In eval mode on x's device, float32, with the BatchNorm statistics of one batch."""
    network = network.to(x.device).to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    inferred(network, x if len(x) > 1 else x.expand(2, -1, -1, -1))
    return network.eval()


def inferred(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(x)
    return output


def num_flops(network: nn.Module, x: Tensor) -> float:
    """Of products, for the batch of x; with gradients on, as attention has a fused op without a count otherwise."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).to("meta")(x[:1].to("meta"))
    return float(counter.get_total_flops() * len(x))


def compiled(network: nn.Module, x: Tensor) -> Run:
    """Compiles when it is first called."""
    made: Any = torch.compile(network)
    return partial(inferred, made, x)


def frozen(network: nn.Module, x: Tensor) -> Run:
    """Likewise, with weights as constants, so that BatchNorms go into convolutions."""
    run = compiled(network, x)

    def run_frozen() -> Tensor:
        with torch._inductor.config.patch(freezing=True):  # given to torch.compile as an option it does nothing
            return run()

    return run_frozen


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy."""
    return copy.deepcopy(network).to(dtype)


def accelerated(network: nn.Module, x: Tensor, backend: Backend) -> nn.Module:
    """Through `accelerate` in x's dtype, which wants two samples to leave their number open."""
    batch = x if len(x) > 1 else torch.cat([x, x])
    with torch.no_grad():
        return accelerate(in_dtype(network, x.dtype), (batch,), backend=backend)


def masked_copy(network: nn.Module, density: float) -> nn.Module:
    """With this share of the groups of 128 x 16 in all weights but the first layer's, the largest ones."""
    network = copy.deepcopy(network)
    for weight in network.parameters():
        if weight.dim() not in (2, 4) or weight.shape[1] % 16:
            continue
        num_out, num_in, *kernel = weight.shape
        taps = kernel[0] * kernel[1] if kernel else 1
        flat_NK = weight.detach().movedim(1, -1).flatten(1)
        mask_NK = group_mask(flat_NK.abs(), rows=128, cols=16, density=density, taps=taps)
        weight.data *= mask_NK.view(num_out, *kernel, num_in).movedim(-1, 1)
    return network


def subset_copy(network: nn.Module) -> nn.Module:
    """A ResNet whose identity blocks read and write half of the stream, by 16 channels, the same half in a stage."""
    network = copy.deepcopy(network)
    for number in (1, 2, 3, 4):
        _, *blocks = network.get_submodule(f"layer{number}").children()
        for block in blocks:
            reads, writes = (cast(Tensor, block.get_parameter(name)) for name in ("conv1.weight", "bn3.weight"))
            order = torch.randperm(len(writes) // CHANNELS, generator=torch.Generator().manual_seed(number))
            dropped = (order[: len(order) // 2, None] * CHANNELS + torch.arange(CHANNELS)).flatten()
            for tensor in (reads.data.movedim(1, 0), writes.data, block.get_parameter("bn3.bias").data):
                tensor[dropped] = 0
    return network


def k0_turns(device: str, seed: int) -> Turns:
    """ResNet-50 at four widths as `accelerate` makes it, and one of them as torch compiles it."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    x = normal(32, 3, 224, 224, seed=seed, device=device, dtype=torch.float32)
    inner = {"unpruned": 64, "keep 75 %": 48, OURS: 32, "keep 25 %": 16}
    networks = {name: prepared(resnet50(True, inner=width), x) for name, width in inner.items()}
    runs: dict[str, Run] = {
        name: partial(inferred, accelerated(network, x.half(), "dense"), x.half()) for name, network in networks.items()
    }
    runs["torch.compile"] = compiled(in_dtype(networks[OURS], FP16), x.half())
    networks["torch.compile"] = networks[OURS]
    expected = {name: partial(inferred, network, x) for name, network in networks.items()}
    return Turns(runs, expected, {name: num_flops(network, x) for name, network in networks.items()})


_PRUNED = ("keep 75 %", OURS, "keep 25 %")
K0_CASE = Case(
    "k0/resnet50-b32",
    k0_turns,
    (Goal("torch.compile", 1.3), *(Goal("unpruned", 1.0, of=name) for name in _PRUNED)),
    FP16,
    tolerance=TOLERANCE,
    pairs=((OURS, "torch.compile"), *((name, "unpruned") for name in _PRUNED)),
    note="ours keeps 50 % inside the bottlenecks; torch.compile with its defaults",
)
_SUBSET_GOALS = Goal(DENSE, 2.0, 2.5, of=SUBSET), Goal(FUSED, 1.2, 1.33, of=SUBSET)
CASES = (
    Network(resnet50, (256, 3, 224, 224), FP16, subset=True).case("resnet50/b256", *_SUBSET_GOALS),
    Network(generator, (8, 512, 4, 4)).case("stylegan2/b8"),
    Network(vgg16, (32, 3, 224, 224), FP16).case("vgg16/b32"),
    Network(vit_b, (32, 3, 224, 224)).case("vit_b/b32"),
    Network(resnet50, (1, 3, 224, 224), FP16).case("resnet50/b1"),
)


def _measured(case: Case) -> dict[str, Any]:
    return measure(case, gpu_clock())


def main() -> None:
    chosen = arguments("python -m benchmarks.kernels_networks", __doc__, MAX_SECONDS)
    run_all("benchmarks.kernels_networks", {case.name: partial(_measured, case) for case in CASES}, chosen)


if __name__ == "__main__":
    main()
