"""Distillation without labels: the small network learns to do as the dense one does, on a few unlabelled images.

The loss is the divergence of the class probabilities, and the relative squared difference of what blocks return. Both
networks see the same images, shifted and mirrored anew each time. Both stay in eval mode: BatchNorms keep their
statistics, which a few images and steps would only blur.

Sources: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; Romero et al.
2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, for the features.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves

from sparsekit.errors import QualityError, UsageError
from sparsekit.forward import plain as opened
from sparsekit.images import seeded_generator
from sparsekit.recovery.least_squares import GoOn
from sparsekit.recovery.units import eval_mode
from sparsekit.task import Record


def distill(
    dense: nn.Module,
    small: nn.Module,
    images: Tensor,
    *,
    num_epochs: float = 40,
    budget_s: float = math.inf,
    batch_size: int = 64,
    lr: float = 3e-4,
    feature_weight: float = 10.0,
    seed: int = 0,
    go_on: GoOn = lambda done, total: True,
) -> list[Record]:
    """Train `small`, in place, to return what `dense` returns; the learning rate ends at zero with the time.

    Where the epochs end before the budget the result repeats bit for bit on a CPU.

    Args:
        dense: the teacher, in eval mode; on the device of `small`.
        small: any network of the same outputs, in eval mode meanwhile.
        images: [N, ...], unlabelled; shifted and mirrored where they are [N, C, H, W].
        num_epochs: passes over the images, at most; infinite where only the budget counts.
        budget_s: seconds after which to stop.
        batch_size: images per step.
        lr: of AdamW at the start, on a cosine. A network that least squares have repaired is easily thrown off: on a
            halved ResNet-56, six epochs at 3e-4 gained 0.9 points, at 1e-3 they lost as much.
        feature_weight: of the blocks' outputs beside the divergence; blocks are the modules with submodules of their
            own whose output has the same shape in both networks.
        seed: of order and augmentation.
        go_on: asked before each step.

    Returns:
        Per epoch `epoch` (from 1), `loss`, `lr` and `seconds`.

    Raises:
        UsageError: no images, or `num_epochs` not above 0.
        QualityError: the loss became NaN or infinite.
    """
    if num_epochs <= 0 or not len(images):
        raise UsageError(f"distill: nothing to do with {len(images)} images and {num_epochs:g} epochs")
    start, device = time.perf_counter(), next(small.parameters()).device
    num_batches = math.ceil(len(images) / batch_size)
    num_steps = num_epochs * num_batches
    names = _blocks(dense, small, images[:2].to(device)) if feature_weight else []
    optimizer = AdamW(small.parameters(), lr, weight_decay=1e-4)
    history: list[Record] = []
    losses: list[float] = []
    with eval_mode(dense, small), _channels_last(small), torch.enable_grad():
        for step, batch in enumerate(_batches(images, batch_size, seed)):
            spent = max(step / num_steps, (time.perf_counter() - start) / budget_s)
            if spent >= 1 or not go_on(step, 0 if num_steps == math.inf else int(num_steps)):
                break
            lr_now = optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * spent)) / 2
            losses.append(_step(dense, small, batch.to(device), names, feature_weight, optimizer))
            if len(losses) == num_batches:
                row = {"epoch": len(history) + 1, "loss": sum(losses) / num_batches, "lr": lr_now}
                history.append(row | {"seconds": time.perf_counter() - start})
                losses.clear()
    return history


def _step(
    dense: nn.Module,
    small: nn.Module,
    batch: Tensor,
    names: Sequence[str],
    feature_weight: float,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step of the optimiser; the loss before it."""
    with torch.no_grad(), _outputs_of(dense, names) as expected:
        teacher = tree_leaves(opened(dense(batch)))[0].log_softmax(1)
    with _outputs_of(small, names) as got:
        student = tree_leaves(opened(small(batch)))[0].log_softmax(1)
    loss = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()
    errors = [(got[name] - expected[name]).square().mean() / expected[name].square().mean() for name in names]
    if errors:
        loss = loss + feature_weight * torch.stack(errors).mean()
    if not loss.isfinite():
        raise QualityError(f"distill: the loss became {loss.item()}; try a lower learning rate")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@contextmanager
def _channels_last(network: nn.Module) -> Iterator[None]:
    """Lay 4-D weights out as training does (see `training.fit`), which takes less time; afterwards as usual again."""
    network.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        network.zero_grad()
        network.to(memory_format=torch.contiguous_format)


def _blocks(dense: nn.Module, small: nn.Module, example: Tensor) -> list[str]:
    """Modules with submodules, each run once by both networks, that return a tensor of the same shape in both."""
    shapes = []
    for network in (dense, small):
        names = [name for name, module in network.named_modules() if name and any(True for _ in module.children())]
        with eval_mode(network), _outputs_of(network, names) as outputs:
            network(example)
        shapes.append({name: output.shape for name, output in outputs.items()})
    return [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]


@contextmanager
def _outputs_of(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fills with what each of the modules returns while the network runs, if a tensor and once."""
    outputs: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name in names:

            def note(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                counts[name] += 1
                if isinstance(output, Tensor) and counts[name] == 1:
                    outputs[name] = output
                else:
                    outputs.pop(name, None)

            hooks.callback(network.get_submodule(name).register_forward_hook(note).remove)
        yield outputs


def _batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled batches, epoch after epoch without end."""
    for epoch in count():
        generator = seeded_generator(seed, epoch)
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            yield _moved(images[index.to(images.device)], generator)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of [N, C, H, W] images shifted by up to an eighth, half of them mirrored; other inputs as they are."""
    if images.dim() != 4:
        return images
    num_images, _, height, width = images.shape
    reach_y, reach_x = height // 8, width // 8
    windows = F.pad(images, [reach_x, reach_x, reach_y, reach_y], mode="reflect")
    windows = windows.unfold(2, height, 1).unfold(3, width, 1)
    y = torch.randint(2 * reach_y + 1, (num_images,), generator=generator).to(images.device)
    x = torch.randint(2 * reach_x + 1, (num_images,), generator=generator).to(images.device)
    shifted = windows[torch.arange(num_images, device=images.device), :, y, x]
    mirrored = (torch.rand(num_images, generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted)
