"""fit(model, task, ...): the one training loop, for one CPU, one GPU, or many processes.

Written on Lightning Fabric: alone it takes the GPU if there is one; under `torchrun` or `fabric run` each of the
W processes trains on its slice of every batch. Slices may differ in size by one sample, so a process weighs its
mean loss by W * slice / batch; the average that the processes form of their gradients is then exactly the gradient
of the whole batch's mean. (BatchNorm still normalises each slice by itself.)

On the CPU a run repeats bit for bit: every epoch is seeded anew, so it depends on nothing but the weights and the
optimiser's state before it, and these are what a checkpoint holds.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer

from sparsekit import checkpoint
from sparsekit.errors import DataError, QualityError, UsageError, nearest
from sparsekit.fabric import FirstOutput, open_fabric, seeded
from sparsekit.task import Batch, Progress, Record, Schedule, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_CHOICES = {
    "optimizer": ["sgd", "adamw"],
    "decay": ["cosine", "multistep"],
    # Others that Fabric knows, such as "bf16-true", would hand the weights back in another dtype.
    "precision": ["auto", "32-true", "16-mixed", "bf16-mixed"],
}
_OBSERVATIONS = 20  # per epoch: masks harden within the first one
_STEPS_PER_CHECK = 50  # looking at a loss makes the CPU wait for the GPU, so it is done for many at a time


def fit(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    *,
    stage: str,
    observe: Callable[[], Record] | None = None,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Train `model` in place on `task` and return one record per epoch.

    Trains every parameter that requires grad. The model may return a tensor, or a tuple, list or mapping whose
    first tensor is the output and whose others (auxiliary heads) are ignored. A batch too small to train on, one
    sample per process where there is BatchNorm, is skipped by all. The model's device, its modules' training flags
    and the caller's random state are afterwards as they were.

    Args:
        model: trained in place; its 4-D weights are channels-last meanwhile.
        task: where batches and loss come from; the loss is the mean over a batch.
        schedule: how long and how fast.
        stage: names the run in checkpoints, progress and errors.
        observe: called after each epoch and up to 20 times within, on every process.
        checkpoint_dir: holds `<stage>.ckpt`, written after each epoch. A run that finds one continues behind its
            last epoch and ends with the same weights and records, seconds aside; a finished one returns at once.
        progress: called after each step with stage, steps done, steps in all and the latest epoch's record
            (empty during the first epoch), on the first process only.

    Returns:
        Per epoch `epoch` (from 1), `step` (steps so far), `loss` (mean over samples), `train_accuracy` in [0, 1] if
        targets are class numbers, `lr` (of the last step), `seconds`, and what `observe` returned. Before each
        epoch's record stand up to 20 that hold only `step` and what `observe` returned meanwhile.

    Raises:
        UsageError: a schedule that cannot be followed, or nothing to train.
        DataError: a damaged checkpoint or one of another run, a checkpoint that cannot be written, or batches
            that are not as the task says.
        QualityError: the loss became NaN or infinite.

    >>> inputs, targets = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> def loss(output, targets, smoothing):
    ...     return nn.functional.cross_entropy(output, targets, label_smoothing=smoothing)
    >>> task = Task((inputs,), lambda epoch: [(inputs, targets)], 1, loss, lambda model: 1.0, fit)
    >>> records = fit(nn.Linear(1, 2), task, Schedule(epochs=20, lr=1.0), stage="dense")
    >>> len(records), records[-1]["train_accuracy"]
    (20, 1.0)
    """
    if schedule.epochs <= 0:
        return []
    _check(model, schedule, stage)
    fabric = open_fabric(model, task, schedule.precision)
    path = checkpoint_dir / f"{stage}.ckpt" if checkpoint_dir else None
    fingerprint = checkpoint.fingerprint(model, task, schedule, stage)
    history: list[Record] = []
    look = observe or dict

    def advance(num_steps: int) -> None:
        if progress and fabric.is_global_zero:
            progress(stage, num_steps, schedule.epochs * task.num_batches, history[-1] if history else {})

    with _borrowed(model, fabric.device):
        optimizer = _optimizer(model, schedule)
        saved = fabric.broadcast(checkpoint.read(path, fingerprint) if path and fabric.is_global_zero else None)
        if saved:
            model.load_state_dict(saved.model)
            optimizer.load_state_dict(saved.optimizer)
            fabric.strategy.precision.load_state_dict(saved.precision)
            history += saved.history
        num_done = int(history[-1]["epoch"]) if history else 0
        advance(num_done * task.num_batches)
        with warnings.catch_warnings():
            # torch 2.15 renames the option, 2.11 does not know the new name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            network, stepper = fabric.setup(FirstOutput(model), optimizer)
        run = _Run(fabric, network, stepper, task, schedule, stage)
        for epoch in range(num_done, schedule.epochs):
            between: list[Record] = []

            def after_step(step: int, between: list[Record] = between) -> None:
                advance(step)
                if observe and _OBSERVATIONS * step % task.num_batches < _OBSERVATIONS and step % task.num_batches:
                    between.append({"step": step} | look())
                    network.train()  # an observer may have evaluated

            with seeded(schedule.seed, epoch, fabric.global_rank):
                record = _train_epoch(run, epoch, after_step)
            _average_buffers(model, fabric)
            history += [*between, record | look()]
            if path and fabric.is_global_zero:
                states = model.state_dict(), optimizer.state_dict(), fabric.strategy.precision.state_dict()
                checkpoint.write(path, checkpoint.Checkpoint(fingerprint, history, *states))
            advance((epoch + 1) * task.num_batches)
    return history


def lr_factor(step: int, schedule: Schedule, *, num_batches: int) -> float:
    """The learning rate of one step as a fraction of the peak, in [0, 1].

    Warm-up reaches 1 with its last step; the cosine then falls from 1 towards 0, which it would reach one step
    after the last. Milestones count epochs from the start, warm-up included.

    Args:
        step: optimisation steps before this one, over all epochs.
        schedule: how the learning rate moves.
        num_batches: steps per epoch.

    >>> [round(lr_factor(step, Schedule(epochs=4), num_batches=1), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    >>> steps = Schedule(epochs=3, decay="multistep", milestones=(1, 2), gamma=0.5, warmup_epochs=0.5)
    >>> [lr_factor(step, steps, num_batches=4) for step in (0, 1, 3, 4, 8)]
    [0.5, 1.0, 1.0, 0.5, 0.25]
    """
    num_warmup = schedule.warmup_epochs * num_batches
    warmup = min(1.0, (step + 1) / num_warmup) if num_warmup else 1.0
    if schedule.decay == "multistep":
        return warmup * math.prod(
            schedule.gamma for milestone in schedule.milestones if step >= milestone * num_batches
        )
    done = max(0.0, step - num_warmup) / (schedule.epochs * num_batches - num_warmup)
    return warmup * (1 + math.cos(math.pi * done)) / 2


def _check(model: nn.Module, schedule: Schedule, stage: str) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{stage}: nothing to train, no parameter requires grad")
    for name, choices in _CHOICES.items():
        value = getattr(schedule, name)
        if value not in choices:
            raise UsageError(f"{stage}: unknown {name} {value!r}{nearest(value, choices)}")
    if not 0 <= schedule.warmup_epochs < schedule.epochs:
        raise UsageError(
            f"{stage}: warmup_epochs must be in [0, {schedule.epochs} epochs), got {schedule.warmup_epochs:g}"
        )


@contextmanager
def _borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` with channels-last weights; afterwards back home, training flags as before."""
    home = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    flags = [(module, module.training) for module in model.modules()]
    model.to(device)
    # CPU time per training step, two runs each, AMD EPYC with AVX-512, one thread, torch 2.15, batch 128:
    # 0.69 and 0.85 of contiguous (ResNet-20, 32x32), 0.88 and 0.84 (14 layers, 32 wide, 8x8), 0.98 and 1.02 (64 wide).
    _lay_out(model, torch.channels_last)
    try:
        yield
    finally:
        model.zero_grad()
        model.to(home)
        _lay_out(model, torch.contiguous_format)
        for module, training in flags:
            module.training = training


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # clone, not contiguous(): a 1x1 weight counts as laid out either way, and would keep strides that its
            # gradients do not have
            parameter.data = parameter.data.clone(memory_format=memory_format)


def _optimizer(model: nn.Module, schedule: Schedule) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if schedule.optimizer == "adamw":
        betas = (schedule.momentum, 0.999)
        return AdamW(parameters, schedule.lr, betas=betas, weight_decay=schedule.weight_decay)
    return SGD(parameters, schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay)


@dataclass(frozen=True)
class _Run:
    """What stays the same over the epochs; `network` and `optimizer` are as Fabric wrapped them."""

    fabric: Fabric
    network: nn.Module
    optimizer: Optimizer
    task: Task
    schedule: Schedule
    stage: str


def _train_epoch(run: _Run, epoch: int, advance: Callable[[int], None]) -> Record:
    """One pass over the batches; the record is the same on every process but for the seconds."""
    start, fabric = time.perf_counter(), run.fabric
    batch_norm = any(isinstance(module, _BatchNorm) for module in run.network.modules())
    smallest = (2 if batch_norm else 1) * fabric.world_size
    sums, pending, lr = torch.zeros(4, dtype=torch.float64), [], 0.0
    run.network.train()
    for step, (inputs, targets) in _numbered_batches(run, epoch):
        if len(inputs) >= smallest:
            lr = run.schedule.lr * lr_factor(step, run.schedule, num_batches=run.task.num_batches)
            pending.append((step, _train_step(run, inputs, targets, lr=lr)))
        if len(pending) == _STEPS_PER_CHECK:
            sums += _drain(pending, run, epoch)
        advance(step + 1)
    sums += _drain(pending, run, epoch)
    if fabric.world_size > 1:
        sums = cast(Tensor, fabric.all_reduce(sums, reduce_op="sum"))
    loss_sum, num_samples, num_right, num_targets = sums.tolist()
    if not num_samples:
        raise DataError(f"{run.stage}: no batch has the {smallest} samples that a training step needs")
    record = {"epoch": epoch + 1, "step": (epoch + 1) * run.task.num_batches, "loss": loss_sum / num_samples, "lr": lr}
    if num_targets:
        record["train_accuracy"] = num_right / num_targets
    return record | {"seconds": time.perf_counter() - start}


def _numbered_batches(run: _Run, epoch: int) -> Iterator[tuple[int, Batch]]:
    """The epoch's batches with their step numbers, of which there must be as many as the task says."""
    num_batches, num_seen = run.task.num_batches, 0
    where = f"{run.stage}: task.batches({epoch}) yields"
    for batch in run.task.batches(epoch):
        if num_seen == num_batches:
            raise DataError(f"{where} more batches than task.num_batches = {num_batches}")
        yield epoch * num_batches + num_seen, batch
        num_seen += 1
    if num_seen < num_batches:
        raise DataError(f"{where} {num_seen} batches, task.num_batches says {num_batches}")


def _train_step(run: _Run, inputs: Tensor, targets: Tensor, *, lr: float) -> Tensor:
    """One step on this process's slice; returns loss sum, samples, right predictions and targets, float [4]."""
    fabric, num_total = run.fabric, len(inputs)
    own = slice(fabric.global_rank, None, fabric.world_size)
    inputs, targets = fabric.to_device((inputs[own], targets[own]))
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad()
    output = run.network(inputs)
    loss = run.task.loss(output, targets, run.schedule.label_smoothing)
    fabric.backward(loss * (fabric.world_size * len(inputs) / num_total))
    run.optimizer.step()
    sums = torch.zeros(4, device=loss.device)
    sums[0], sums[1] = loss.detach() * len(inputs), len(inputs)
    if targets.dtype == torch.int64 and targets.dim() == output.dim() - 1:
        sums[2], sums[3] = (output.argmax(1) == targets).sum(), targets.numel()
    return sums


def _drain(pending: list[tuple[int, Tensor]], run: _Run, epoch: int) -> Tensor:
    """The sum of what the pending steps returned, float64 [4] on the CPU; empties the list."""
    if not pending:
        return torch.zeros(4, dtype=torch.float64)
    rows = torch.stack([sums for _, sums in pending]).cpu().double()
    for (step, _), loss in zip(pending, rows[:, 0].tolist(), strict=True):
        if not math.isfinite(loss):
            raise QualityError(
                f"{run.stage}: the loss became {loss} in epoch {epoch + 1}, "
                f"step {step - epoch * run.task.num_batches + 1}; try a lower learning rate"
            )
    pending.clear()
    return rows.sum(0)


@torch.no_grad()
def _average_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Let all processes agree on running statistics, which each gathered from its own slices."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(cast(Tensor, fabric.all_reduce(buffer, reduce_op="mean")))
