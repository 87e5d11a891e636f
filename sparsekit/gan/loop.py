"""The epochs of adversarial training, whatever networks play: seeded, resumable, stopped where they diverge.

Every epoch is seeded anew, so on the CPU it depends on nothing but the networks, buffers and optimisers before it, and
these are what a checkpoint holds: a run that goes on ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekit import checkpoint
from sparsekit.errors import QualityError
from sparsekit.fabric import seeded
from sparsekit.gan.schedule import DECAYS
from sparsekit.task import Progress, Record

Losses = Mapping[str, Tensor]  # name -> scalar of one step, without gradients
Observe = Callable[[int, nn.Module], Record]  # epoch (from 1), averaged generator in eval mode -> numbers to record

# Of the images' variance. Generators that work have most of it from early on; one image for all noise has none.
COLLAPSED = 0.01
_STEPS_PER_CHECK = 50  # looking at a loss makes the CPU wait for the GPU, so it is done for many at a time


@dataclass(frozen=True, eq=False)
class Players:
    """All that training changes.

    Attributes:
        networks: by name, with averages and replay buffers among them.
        optimizers: by name, each with the key in `DECAYS` that its learning rates follow.
    """

    networks: nn.ModuleDict
    optimizers: Mapping[str, tuple[Optimizer, str]]

    def state(self) -> dict[str, Any]:
        """A copy of all of it."""
        optimizers = {name: optimizer.state_dict() for name, (optimizer, _) in self.optimizers.items()}
        return deepcopy({"networks": self.networks.state_dict(), "optimizers": optimizers})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.networks.load_state_dict(state["networks"])
        for name, (optimizer, _) in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


@dataclass(frozen=True)
class Epochs:
    """How many, and what must be the same for a run to be continued.

    Attributes:
        stage: names the run in checkpoints, progress and errors.
        num_epochs: in all.
        num_batches: steps of an epoch.
        seed: of everything drawn.
        settings: JSON values that the result depends on.
    """

    stage: str
    num_epochs: int
    num_batches: int
    seed: int
    settings: Mapping[str, Any]

    def fingerprint(self, players: Players) -> str:
        """Hash of the settings and of the networks' shapes."""
        shapes = {name: list(value.shape) for name, value in players.networks.state_dict().items()}
        text = json.dumps([self.stage, self.num_epochs, self.num_batches, self.seed, dict(self.settings), shapes])
        return hashlib.sha256(text.encode()).hexdigest()


def play(
    players: Players,
    epochs: Epochs,
    steps: Callable[[int], Iterator[Losses]],
    look: Callable[[int], Record],
    *,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Run all epochs behind the last checkpoint; returns a record per epoch, those before it included.

    Args:
        players: trained in place.
        epochs: how many.
        steps: epoch number, from 0, -> iterator that makes one training step at a time and yields its losses.
        look: epoch number, from 0, -> what is observed after it; `variance_ratio` in it, the variance of generated
            images over that of real ones, is watched.
        checkpoint_dir: holds `<stage>.ckpt`, the state after the last epoch that did not look collapsed.
        progress: called after each step.

    Returns:
        Per epoch `epoch` (from 1), the means of the losses, what `look` returned, and `seconds`.

    Raises:
        QualityError: a loss became NaN or infinite, or `variance_ratio` fell below `COLLAPSED`, twice in a row or in
            the last epoch; the players are back in the last good state, which the checkpoint holds.
        DataError: a damaged checkpoint, or one of another run.
    """
    path = checkpoint_dir / f"{epochs.stage}.ckpt" if checkpoint_dir else None
    fingerprint = epochs.fingerprint(players)
    history: list[Record] = []
    saved = checkpoint.read(path, fingerprint) if path else None
    if saved:
        players.load({"networks": saved.model, "optimizers": saved.optimizer})
        history += saved.history
    good, good_epoch, was_low = players.state(), len(history), False
    for epoch in range(len(history), epochs.num_epochs):
        start = time.perf_counter()
        for optimizer, decay in players.optimizers.values():
            for group in optimizer.param_groups:
                first = group.setdefault("initial_lr", group["lr"])
                group["lr"] = first * DECAYS[decay](epoch / epochs.num_epochs)

        def advance(num_steps: int, before: int = epoch * epochs.num_batches) -> None:
            if progress:
                latest = history[-1] if history else {}
                progress(epochs.stage, before + num_steps, epochs.num_epochs * epochs.num_batches, latest)

        try:
            with seeded(epochs.seed, epoch, 0):
                record = _means(steps(epoch), advance)
                record |= look(epoch)
            is_low = record.get("variance_ratio", 1.0) < COLLAPSED
            if is_low and (was_low or epoch + 1 == epochs.num_epochs):
                raise QualityError(f"the generator collapsed, its images vary {record['variance_ratio']:.1%} as much")
        except QualityError as error:
            players.load(good)
            raise QualityError(_stopped(epochs.stage, epoch + 1, str(error), good_epoch, path)) from error
        was_low = is_low
        history.append({"epoch": epoch + 1} | record | {"seconds": time.perf_counter() - start})
        if not is_low:
            good, good_epoch = players.state(), epoch + 1
            if path:
                states = good["networks"], good["optimizers"]
                checkpoint.write(path, checkpoint.Checkpoint(fingerprint, list(history), *states, precision={}))
    return history


@contextmanager
def training_place(networks: nn.ModuleDict) -> Iterator[torch.device]:
    """The networks on the GPU, if there is one; afterwards where they were, modules' training flags as before."""
    home = next(chain(networks.parameters(), networks.buffers()), torch.empty(0)).device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = [(module, module.training) for module in networks.modules()]
    networks.to(device)
    try:
        yield device
    finally:
        networks.zero_grad()
        networks.to(home)
        for module, training in flags:
            module.training = training


def _stopped(stage: str, epoch: int, reason: str, good_epoch: int, path: Path | None) -> str:
    kept = f"the state after epoch {good_epoch} is kept" if good_epoch else "nothing before it is worth keeping"
    where = f" in {path}" if good_epoch and path else ""
    return f"{stage}: epoch {epoch}: {reason}; {kept}{where}; try lower learning rates or another seed"


def _means(steps: Iterator[Losses], advance: Callable[[int], None]) -> Record:
    """The mean of each loss over the steps that have it."""
    sums: dict[str, list[float]] = {}
    pending: list[Losses] = []

    def drain() -> None:
        for losses in pending:
            for name, loss in losses.items():
                value = float(loss)
                if not math.isfinite(value):
                    raise QualityError(f"the {name.replace('_', ' ')} became {value}")
                sums.setdefault(name, []).append(value)
        pending.clear()

    for number, losses in enumerate(steps, start=1):
        pending.append(losses)
        if len(pending) == _STEPS_PER_CHECK:
            drain()
        advance(number)
    drain()
    return {name: math.fsum(values) / len(values) for name, values in sums.items()}
