"""Inputs without data: noise that is optimised until every BatchNorm sees the statistics that it remembers.

Sources: Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", arXiv:1912.08795, for
the loss; Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", arXiv:2001.00281, for calibration with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekit.errors import UsageError
from sparsekit.images import seeded_generator
from sparsekit.recovery.units import eval_mode


def synthesise_inputs(
    dense: nn.Module,
    example: Tensor,
    *,
    num_images: int = 256,
    num_steps: int = 50,
    batch_size: int = 64,
    lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Inputs of `example`'s shape that look to the network's BatchNorms like what it was trained on: [num_images, ...].

    Args:
        dense: the trained network, which stays as it is.
        example: an input, batch first; only its shape counts.
        num_images: how many.
        num_steps: of Adam, per batch.
        batch_size: images that are optimised together, so that their statistics match.
        lr: of Adam, on inputs that begin as standard normal noise.
        seed: of the noise.

    Raises:
        UsageError: the network has no BatchNorm that keeps statistics.
    """
    if not any(_keeps_statistics(module) for module in dense.modules()):
        raise UsageError("synthesise_inputs: the network has no BatchNorm statistics to match; recovery needs images")
    device = next(dense.parameters()).device
    noise = torch.randn(num_images, *example.shape[1:], generator=seeded_generator(seed, 0))
    with eval_mode(dense), torch.enable_grad():
        return torch.cat([_matched(dense, batch.to(device), num_steps, lr) for batch in noise.split(batch_size)])


def _matched(dense: nn.Module, noise: Tensor, num_steps: int, lr: float) -> Tensor:
    inputs = noise.clone().requires_grad_()
    optimizer = torch.optim.Adam([inputs], lr)
    for _ in range(num_steps):
        with _mismatches(dense) as mismatches:
            dense(inputs)
        (inputs.grad,) = torch.autograd.grad(torch.stack(mismatches).sum(), [inputs])
        optimizer.step()
    return inputs.detach()


@contextmanager
def _mismatches(network: nn.Module) -> Iterator[list[Tensor]]:
    """Fills with how far each BatchNorm's input is from its statistics, in units of the remembered deviation."""
    found: list[Tensor] = []

    def measure(norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        values_CR = args[0].transpose(0, 1).flatten(1)
        remembered_C, mean_C = norm.get_buffer("running_var"), norm.get_buffer("running_mean")
        expected = (remembered_C + norm.eps).sqrt()
        deviation = (values_CR.var(1, unbiased=False) + norm.eps).sqrt()
        shift, stretch = (values_CR.mean(1) - mean_C) / expected, deviation / expected - 1
        found.append((shift.square() + stretch.square()).mean())

    with ExitStack() as hooks:
        for module in network.modules():
            if _keeps_statistics(module):
                hooks.callback(module.register_forward_pre_hook(measure).remove)
        yield found


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
