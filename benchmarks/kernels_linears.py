"""Linear layers as cases of the kernels' benchmarks: ours and its baselines on the same random data.

B0 is torch's linear (cuBLASLt), B1 torch's BSR kernel with the best of some settings, and B5 cuSPARSELt. B0 multiplies
with the masked weight, zeros and all: that is what a pruned network runs without sparse kernels, and it draws less
power.
"""

# M samples, N outputs, K inputs
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels_measure import OURS, Case, Goal, Run, Turns
from sparsekit.kernels.formats import NM24, pack
from sparsekit.kernels.group_linear import group_linear
from sparsekit.kernels.masks import group_mask, nm_mask
from sparsekit.kernels.nm24_linear import nm24_linear
from sparsekit.kernels.timing import replay_seconds

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 2e-2, FP16: 2e-3}
ITEMSIZE = 2


def normal(*size: int, seed: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers; images as channels_last."""
    generator = torch.Generator(device).manual_seed(seed)
    numbers = (torch.randn(size, generator=generator, device=device) * scale).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last) if len(size) == 4 else numbers


@dataclass(frozen=True)
class Linear:
    """A layer of K inputs and N outputs on M samples, with a share of the groups of its weight.

    Attributes:
        group: outputs by inputs; more than 64 inputs are stored side by side.
        bsr: also time torch's kernel, whose blocks are square.
    """

    num_samples: int
    num_in: int
    num_out: int
    group: tuple[int, int]
    density: float
    bsr: bool = False

    def turns(self, device: str, seed: int) -> Turns:
        rows, cols = self.group
        draw = partial(normal, device=device, dtype=BF16)
        x_MK = draw(self.num_samples, self.num_in, seed=3 * seed)
        w_NK = draw(self.num_out, self.num_in, seed=3 * seed + 1, scale=self.num_in**-0.5)
        scores_NK = normal(self.num_out, self.num_in, seed=3 * seed + 2, device=device, dtype=torch.float32)
        mask_NK = group_mask(scores_NK, rows=rows, cols=cols, density=self.density)
        w_NK = w_NK * mask_NK
        packed = pack(w_NK, mask_NK, rows=rows, cols=min(cols, 64))
        runs: dict[str, Run] = {OURS: partial(group_linear, x_MK, packed), "B0": partial(linear, x_MK, w_NK)}
        if self.bsr:
            runs["B1"] = bsr_run(x_MK, w_NK, rows, self.density)
        flops = 2 * self.num_samples * self.num_in * self.num_out
        num_flops = {name: flops * (1 if name == "B0" else self.density) for name in runs}
        return Turns(runs, dict.fromkeys(runs, lambda: x_MK.float() @ w_NK.float().T), num_flops)

    def case(self, name: str, *goals: Goal, note: str = "") -> Case:
        weights = self.density * self.num_in * self.num_out
        samples = self.num_samples * (self.num_in + self.num_out)
        return Case(
            name,
            self.turns,
            goals,
            num_bytes=ITEMSIZE * (weights + samples),
            note=note,
        )


def bsr_run(x_MK: Tensor, w_NK: Tensor, block: int, density: float) -> Run:
    """torch's BSR product, as `linear` calls it, with the fastest of some settings on this GPU."""
    settings = bsr_settings(*x_MK.shape, len(w_NK), block, density)
    return partial(_bsr_product, x_MK, w_NK.to_sparse_bsr((block, block)), settings)


def _bsr_product(x_MK: Tensor, weight: Tensor, settings: Mapping[str, int]) -> Tensor:
    from torch.sparse._triton_ops import bsr_dense_addmm

    unread_NM = x_MK.new_empty(()).expand(weight.shape[0], len(x_MK))
    y_NM: Tensor = bsr_dense_addmm(unread_NM, weight, x_MK.mT, beta=0, meta=dict(settings))
    return y_NM.mT


@cache
def bsr_settings(num_samples: int, num_in: int, num_out: int, block: int, density: float) -> Mapping[str, int]:
    """The fastest of six for a shape: torch's own tuner takes minutes."""
    x_MK = normal(num_samples, num_in, seed=0, device="cuda", dtype=BF16)
    w_NK = normal(num_out, num_in, seed=1, device="cuda", dtype=BF16)
    weight = (w_NK * group_mask(w_NK.abs().float(), rows=block, cols=block, density=density)).to_sparse_bsr(
        (block,) * 2
    )
    settings = [
        {"SPLIT_N": num_samples // tile, "GROUP_SIZE_ROW": 4, "num_stages": num_stages, "num_warps": 4}
        for tile in ((32, 64) if num_samples <= 64 else (64, 128))
        for num_stages in (2, 3, 4)
    ]
    seconds = replay_seconds([partial(_bsr_product, x_MK, weight, each) for each in settings], num_rounds=5)
    return settings[min(range(len(settings)), key=lambda number: median(seconds[number]))]


def nm24_turns(num_samples: int, size: int, device: str, seed: int) -> Turns:
    """A square 2:4 layer of few samples, read packed."""
    x_MK = normal(num_samples, size, seed=2 * seed, device=device, dtype=BF16)
    w_NK = normal(size, size, seed=2 * seed + 1, device=device, dtype=BF16, scale=size**-0.5)
    w_NK = w_NK * nm_mask(w_NK.abs())
    runs: dict[str, Run] = {OURS: partial(nm24_linear, x_MK, NM24.pack(w_NK)), "B0": partial(linear, x_MK, w_NK)}
    num_flops = dict.fromkeys(runs, 2 * num_samples * size**2)  # ours multiplies with the zeros as well
    return Turns(runs, dict.fromkeys(runs, lambda: x_MK.float() @ w_NK.float().T), num_flops)


def nm24_case(num_samples: int, size: int) -> Case:
    weight_bytes = ITEMSIZE * size**2 * 9 // 16
    return Case(
        f"k3b/m{num_samples}-{size}",
        partial(nm24_turns, num_samples, size),
        (Goal("B0", 1.3, 1.5), Goal("TB/s", 0.7 * 3.0)),
        num_bytes=weight_bytes + 2 * ITEMSIZE * num_samples * size,
        note="TB/s counts the packed weight and both activations",
    )


def cusparselt_turns(shape: tuple[int, int, int], device: str, seed: int) -> Turns:
    """A 2:4 layer of many samples by cuSPARSELt, its algorithm searched for here."""
    num_samples, num_in, num_out = shape
    x_MK = normal(num_samples, num_in, seed=2 * seed, device=device, dtype=BF16)
    w_NK = normal(num_out, num_in, seed=2 * seed + 1, device=device, dtype=BF16, scale=num_in**-0.5)
    w_NK = w_NK * nm_mask(w_NK.abs())
    packed = torch._cslt_compress(w_NK)
    algorithm = torch._cslt_sparse_mm_search(packed, x_MK.T)
    runs: dict[str, Run] = {
        OURS: lambda: torch._cslt_sparse_mm(packed, x_MK.T, alg_id=algorithm).T,
        "B0": partial(linear, x_MK, w_NK),
    }
    flops = num_samples * num_in * num_out
    return Turns(runs, dict.fromkeys(runs, lambda: x_MK.float() @ w_NK.float().T), {OURS: flops, "B0": 2 * flops})


def cusparselt_case(shape: tuple[int, int, int]) -> Case:
    num_samples, num_in, num_out = shape
    return Case(
        f"k3a/{num_samples}-{num_in}-{num_out}",
        partial(cusparselt_turns, shape),
        (Goal("B0", 1.05, drop_below=1.05),),
        num_bytes=ITEMSIZE * (num_in * num_out * 9 // 16 + num_samples * (num_in + num_out)),
        note="'ours' is cuSPARSELt (B5); a dispatcher takes it only for shapes where it is 1.05 times B0 or more",
    )
