"""Every way to cut a generator that needs no labels, and its repair from noise alone.

The methods of `PRUNERS` were made for networks that read one tensor; a generator's noise and labels are packed into
one for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from sparsekit import recovery
from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.gan.game import Draw
from sparsekit.graph import trace
from sparsekit.images import seeded_generator
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import Pruner
from sparsekit.recovery import RECOVERIES, RecoveryRecord
from sparsekit.surgery import copied
from sparsekit.task import Progress, Task

_INSIDE = "generator."  # where `Packed` keeps the network


class Packed(nn.Module):
    """A generator of noise [N, z] and labels [N] as a network of one tensor [N, z + 1], the label last."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, packed: Tensor) -> Tensor:
        images: Tensor = self.generator(packed[:, :-1], packed[:, -1].long())
        return images


def prune_generator(
    generator: nn.Module, budget: Budget, pruner: Pruner, draw: Draw, *, num_noises: int = 512, seed: int = 0
) -> PruningPlan:
    """What a method that knows nothing of adversaries keeps of a generator.

    Args:
        generator: trained; stays as it is.
        budget: see `Budget`.
        pruner: one of `PRUNERS`, its options set.
        draw: makes inputs; drawn from are `num_noises`, in batches of 64.
        seed: of these.

    Raises:
        UsageError: the method needs labels, a loss or training.
        BudgetError: the budget cannot be met.
    """
    network, noise = _packed(generator, _drawn(draw, num_noises, seed))
    plan = pruner(trace(network, (noise[:2],)), budget, _task(noise))
    return _renamed(plan, lambda name: name.removeprefix(_INSIDE)) if isinstance(network, Packed) else plan


def recover_from_noise(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    draw: Draw,
    *,
    recover: str = "lsq",
    num_noises: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[RecoveryRecord]:
    """Repair `small` in place so that it makes the dense generator's images; returns a record per step.

    A record's score is minus the mean squared difference of pixels, on an eighth of the noises, which are held out.

    Args:
        dense: what `plan` was made for; stays as it is.
        small: what the plan made of it.
        plan: which channels are left.
        draw: makes inputs.
        recover: "bn" or "lsq"; the distillation of `recover` compares class probabilities, which images have none of.
        num_noises: how many inputs.
        seed: of these.
        progress: as for `recovery.recover`.
    """
    # Only what is plain can be compared layer by layer; the small network's weights are.
    theirs, noise = _packed(bake_all(copied(dense)).eval(), _drawn(draw, num_noises, seed))
    ours, _ = _packed(small, _drawn(draw, 2, seed))
    packed_plan = _renamed(plan, lambda name: _INSIDE + name) if isinstance(theirs, Packed) else plan
    held_out = torch.arange(len(noise)) % 8 == 0

    @torch.no_grad()
    def closeness(network: nn.Module) -> float:
        parts = [(network(part) - theirs(part)).square().mean((1, 2, 3)) for part in noise[held_out].split(64)]
        return -float(torch.cat(parts).mean())

    was_training = small.training
    small.eval()
    steps = RECOVERIES[recover]
    records = recovery.recover(
        theirs, ours, packed_plan, noise[~held_out], steps=steps, evaluate=closeness, progress=progress, seed=seed
    )
    small.train(was_training)
    return records


def _drawn(draw: Draw, num: int, seed: int) -> tuple[Tensor, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, 0).initial_seed())
        return draw(num)


def _packed(generator: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Tensor]:
    """The generator, and its inputs, as one network of one tensor."""
    if len(inputs) == 1:
        return generator, inputs[0]
    noise, labels = inputs
    return Packed(generator), torch.cat([noise, labels[:, None].to(noise.dtype)], 1)


def _renamed(plan: PruningPlan, rename: Callable[[str], str]) -> PruningPlan:
    """The plan of a network whose tensors have other names."""
    groups: dict[ChannelGroup, ChannelGroup] = {
        group: replace(
            group,
            name=rename(group.name),
            slots=tuple(replace(slot, tensor=rename(slot.tensor)) for slot in group.slots),
        )
        for group in plan.keep
    }
    return PruningPlan(
        keep={groups[group]: keep for group, keep in plan.keep.items()},
        merge={groups[group]: merge for group, merge in plan.merge.items()},
        nonzero={rename(name): mask for name, mask in plan.nonzero.items()},
        weights={rename(name): value for name, value in plan.weights.items()},
    )


def _task(noise: Tensor) -> Task:
    """Noise without labels; asked for more, it says that there is none."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise UsageError("this method needs labels or a loss, and a generator has none; choose channel_pruning")

    parts = noise.split(64)
    return Task(
        example_inputs=(noise[:2],),
        batches=lambda epoch: [(part, torch.zeros(len(part), dtype=torch.int64)) for part in parts],
        num_batches=len(parts),
        loss=refuse,
        evaluate=refuse,
        fit=refuse,
        name="noise",
    )
