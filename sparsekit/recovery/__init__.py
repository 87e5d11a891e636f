"""Recovery without labels, after any method: BatchNorm re-estimation, bias repair, least squares, distillation.

`recover` runs the steps in order within a budget of seconds and keeps the best state; each step is a function by
itself. The two networks belong together by the names of their parameters; the plan says which channels are left. All
steps but distillation look at recordings of the forward, whose ops are the same for a module and a recorded program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekit.errors import UsageError, nearest
from sparsekit.forward import plain as opened
from sparsekit.plan import PruningPlan
from sparsekit.recovery.distillation import distill
from sparsekit.recovery.layers import batch_norms_of
from sparsekit.recovery.least_squares import GoOn, reconstruct
from sparsekit.recovery.lockstep import recorded, visit
from sparsekit.recovery.units import eval_mode, output_scale, shift_output, split, units
from sparsekit.surgery import tensor_of
from sparsekit.task import Progress, Task

# What `recover` does under each name of --recover.
RECOVERIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "bn": ("bn",),
    "lsq": ("bn", "bias", "lsq"),
    "distill": ("bn", "bias", "lsq", "distill"),
}
_STEPS = ("bn", "bias", "lsq", "distill")


@dataclass(frozen=True)
class RecoveryRecord:
    """What one step did.

    Attributes:
        step: "pruned" before all steps, then "bn", "bias", "lsq" or "distill".
        score: accuracy, or whatever `evaluate` returned; without it the agreement with the dense network in [0, 1].
        seconds: the step's own, without evaluation.
        finished: False where the budget cut it short.
    """

    step: str
    score: float
    seconds: float
    finished: bool


def recover(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    *,
    steps: Sequence[str] = RECOVERIES["lsq"],
    budget_s: float = math.inf,
    evaluate: Callable[[nn.Module], float] | None = None,
    observe: Callable[[str], object] = lambda step: None,
    progress: Progress | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> list[RecoveryRecord]:
    """Repair `small` in place; returns a record per step.

    Every step begins with the best state before it, and the network is left in the best of all: what a step made
    worse is taken back.

    Args:
        dense: the network that the plan was made for, which stays as it is; on the device of `small`.
        small: what the plan made of it.
        plan: which channels are left; empty where all are.
        images: [N, ...], unlabelled inputs as the network wants them, some hundreds; or `synthesise_inputs`.
        steps: of "bn", "bias", "lsq" and "distill"; `RECOVERIES` has the usual ones.
        budget_s: for all steps together, evaluation apart. A step that is cut short counts as far as it came;
            distillation takes what is left, and without a budget its default number of epochs.
        evaluate: network -> score, higher is better. Without it an eighth of the images is held out, and the score is
            the `agreement` of both networks on them.
        observe: called after each step, when `small` is in the best state so far; it is not part of the budget.
        progress: called with the step, its layers or batches done, how many there are (0: unknown), and no record.
        batch_size: images per forward pass.
        seed: of distillation.

    Raises:
        UsageError: an unknown step, or too few images.
        PlanError: the forward of either network follows the values of tensors, so that it cannot be recorded.
    """
    for step in steps:
        if step not in _STEPS:
            raise UsageError(f"recovery: unknown step {step!r}{nearest(step, list(_STEPS))}")
    if len(images) < 4:
        raise UsageError(f"recovery: needs at least 4 images, got {len(images)}")
    if evaluate is None:
        # Every eighth: images that come sorted by class are held out evenly.
        held_out = torch.arange(len(images)) % 8 == 0
        evaluate = partial(agreement, dense, images=images[held_out], batch_size=batch_size)
        images = images[~held_out]
    records = [RecoveryRecord("pruned", evaluate(small), 0.0, finished=True)]
    best, left_s = _copied_state(small), budget_s
    for step in steps:
        if left_s <= 0:
            break
        clock = _Clock(f"recover {step}", left_s, progress or (lambda *_: None))
        _run(step, dense, small, plan, images, batch_size, seed, clock)
        seconds = clock.seconds
        left_s -= seconds
        score = evaluate(small)
        if score >= max(record.score for record in records):
            best = _copied_state(small)
        else:
            small.load_state_dict(best)
        records.append(RecoveryRecord(step, score, seconds, finished=not clock.has_stopped))
        observe(step)
    return records


class _Clock:
    """Says whether to go on, and tells `progress`."""

    def __init__(self, stage: str, budget_s: float, progress: Progress) -> None:
        self.budget_s, self.has_stopped = budget_s, False
        self._stage, self._progress, self._start = stage, progress, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def __call__(self, num_done: int, num_all: int) -> bool:
        self._progress(self._stage, num_done, num_all, {})
        self.has_stopped = self.seconds >= self.budget_s
        return not self.has_stopped


def _run(
    step: str,
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    batch_size: int,
    seed: int,
    clock: _Clock,
) -> None:
    if step == "bn":
        reestimate_batchnorm(small, images, batch_size=batch_size, go_on=clock)
    elif step == "bias":
        repair_bias(dense, small, plan, images, batch_size=batch_size, go_on=clock)
    elif step == "lsq":
        reconstruct(dense, small, plan, images, batch_size=batch_size, go_on=clock)
    elif clock.budget_s < math.inf:
        distill(dense, small, images, num_epochs=math.inf, budget_s=clock.budget_s, seed=seed, go_on=clock)
    else:
        distill(dense, small, images, seed=seed, go_on=clock)


@torch.no_grad()
def reestimate_batchnorm(
    network: nn.Module, images: Tensor, *, batch_size: int = 128, go_on: GoOn = lambda done, total: True
) -> list[str]:
    """Set every BatchNorm's statistics, in place, to the mean and variance of what it is given; returns their names.

    One after another in the order of the forward pass, each behind those that are set already, in eval mode: the
    statistics are those of all images together whatever `batch_size`. A BatchNorm that runs several times stays as
    it is.

    Args:
        network: left in the modes it was in.
        images: [N, ...], unlabelled.
        batch_size: images per forward pass.
        go_on: asked before each BatchNorm.

    Raises:
        PlanError: the forward follows the values of tensors, so that it cannot be recorded.

    >>> norm = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batchnorm(norm, torch.tensor([[1.0], [2.0], [3.0]]))
    ['0']
    >>> norm[0].running_mean.item(), norm[0].running_var.item()
    (2.0, 1.0)
    """
    program, batches = recorded(network, _example(network, images)), split(images, batch_size, network)
    norms = batch_norms_of(program)
    done: list[str] = []
    for norm, runs in zip(norms, visit(program, batches, [norm.step for norm in norms]), strict=True):
        if not go_on(len(done), len(norms)):
            break
        parts = [run.tensors[norm.input].transpose(0, 1).flatten(1).double() for run in runs]
        count = sum(part.shape[1] for part in parts)
        mean_C = torch.stack([part.sum(1) for part in parts]).sum(0) / count
        squares_C = torch.stack([(part - mean_C[:, None]).square().sum(1) for part in parts]).sum(0)
        tensor_of(program, norm.states["running_mean"]).copy_(mean_C)
        tensor_of(program, norm.states["running_var"]).copy_(squares_C / max(1, count - 1))
        done.append(norm.name)
    return done


@torch.no_grad()
def repair_bias(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    *,
    batch_size: int = 128,
    go_on: GoOn = lambda done, total: True,
) -> list[str]:
    """Let every layer's output have the dense layer's mean, in place; returns the layers' names.

    Means are compared behind the BatchNorm that follows, if any. The difference goes into the layer's bias or, where
    there is none, into the running mean of that BatchNorm; layers with neither stay as they are. Where much has been
    cut this alone can do harm: means are right again, while what varies about them goes on shrinking.

    Args:
        dense: the network that the plan was made for; on the same device.
        small: what the plan made of it.
        plan: which channels are left.
        images: [N, ...], unlabelled.
        batch_size: images per forward pass.
        go_on: asked before each layer.

    Raises:
        PlanError: the forward of either network follows the values of tensors, so that it cannot be recorded.
    """
    example, batches = _example(small, images), split(images, batch_size, small)
    theirs, ours = recorded(dense, example), recorded(small, example)
    found = [unit for unit in units(theirs, ours, plan) if unit.holds_constant]
    found.sort(key=lambda unit: unit.small.last)
    outputs = visit(ours, batches, [unit.small.last for unit in found])
    targets = visit(theirs, batches, [unit.dense.last for unit in found])
    done: list[str] = []
    for unit, our_runs, their_runs in zip(found, outputs, targets, strict=True):
        if not go_on(len(done), len(found)):
            break
        dim = unit.small.channel_dim
        ys = [run.tensors[unit.small.made].movedim(dim, 0) for run in our_runs]
        wanted = [run.tensors[unit.dense.made].movedim(dim, 0) for run in their_runs]
        delta_K = _mean([y[unit.kept.to(y.device)] for y in wanted]) - _mean(ys)
        scale_K = output_scale(ours, unit.small).double()
        shift_output(ours, unit.small, torch.where(scale_K == 0, 0, delta_K / scale_K))
        for y in ys:  # what runs behind is to see it already
            y.movedim(0, -1).add_(delta_K)
        done.append(unit.name)
    return done


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Of [K, ...] parts over all but the first dimension, float64 [K]."""
    sums = torch.stack([part.flatten(1).double().sum(1) for part in parts]).sum(0)
    return sums / sum(part[0].numel() for part in parts)


def _example(network: nn.Module, images: Tensor) -> Tensor:
    return split(images[:2], 2, network)[0]


def agreement(dense: nn.Module, small: nn.Module, images: Tensor, *, batch_size: int = 128) -> float:
    """How much of their class probabilities two networks share, sum of min(p, q), in [0, 1]; classes along dimension 1.

    The share of images that both put into the same class says less: of some hundred images that the dense network was
    trained on it is nearly all, long before the small network is as good on others.
    """
    shared = total = 0.0
    with eval_mode(dense, small):
        for batch in split(images, batch_size, small):
            p, q = (tree_leaves(opened(network(batch)))[0].softmax(1) for network in (dense, small))
            shared += float(torch.minimum(p, q).sum())
            total += p.numel() / p.shape[1]
    return shared / total


def unlabelled(task: Task, num_images: int) -> Tensor:
    """The first inputs of the task's first epoch, at most `num_images`: [N, ...]. Targets are not looked at."""
    found: list[Tensor] = []
    for batch in task.batches(0):
        found.append(batch[0])
        if sum(map(len, found)) >= num_images:
            break
    return torch.cat(found)[:num_images]


def _copied_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
