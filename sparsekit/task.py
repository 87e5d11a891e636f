"""A Task is all that a method may know of the user's problem: inputs, batches, loss, score, a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs [N, ...] float, targets [N]
Record = dict[str, float]  # what one epoch measured: epoch, loss, lr, seconds and whatever the stage observes
Progress = Callable[[str, int, int, Record], None]  # stage, steps done, steps in all (0: unknown), latest record


@dataclass(frozen=True)
class Schedule:
    """How to train: one stage of optimisation.

    Attributes:
        epochs: passes over the training batches.
        lr: peak learning rate.
        optimizer: "sgd" (Nesterov off) or "adamw".
        momentum: in [0, 1); of AdamW the first beta.
        decay: "cosine" to zero over all steps, or "multistep": times `gamma` at each of `milestones` (epochs).
        warmup_epochs: linear warm-up from zero, may be fractional.
        label_smoothing: in [0, 1), for the task's loss.
        precision: a Fabric precision, e.g. "32-true", "16-mixed", "bf16-mixed"; "auto" mixes where a GPU is.
        seed: fixes batch order, augmentation and dropout, so that a CPU run repeats bit for bit.
    """

    epochs: int
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    precision: str = "auto"
    seed: int = 0


class Fit(Protocol):
    """A training loop: changes `model` in place and returns its records, one per epoch and what was observed between.

    `stage` names the run ("dense", "prune", "finetune") in checkpoints and progress; `observe`, when given, is
    called after each epoch, and within it if the loop likes, and its numbers join the record.
    """

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]: ...


@dataclass(frozen=True)
class Task:
    """What the network is for, as plain callables.

    Attributes:
        example_inputs: positional inputs of one forward pass, batch first.
        batches: epoch number -> that epoch's training batches, the same for the same number.
        num_batches: how many batches an epoch has.
        loss: (output, targets, label_smoothing) -> scalar tensor to minimise, the mean over the batch.
        evaluate: model -> accuracy in [0, 1] on held-out data; leaves the model's mode as it was.
        fit: the training loop for methods that train.
        name: what reports call the data.
    """

    example_inputs: tuple[Tensor, ...]
    batches: Callable[[int], Iterable[Batch]]
    num_batches: int
    loss: Callable[[Tensor, Tensor, float], Tensor]
    evaluate: Callable[[nn.Module], float]
    fit: Fit
    name: str = "data"
