"""Where training runs: one CPU, one GPU, or this process's place among many, by Lightning Fabric."""

from __future__ import annotations

import atexit
import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError
from sparsekit.task import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def open_fabric(model: nn.Module, task: Task, precision: str) -> Fabric:
    """One device, or this process's place in the group that a launcher started."""
    place: dict[str, Any] = {"devices": 1}
    with _without_info():
        # Imported late: Lightning takes over a second, and inspecting or exporting a network needs none of it.
        try:
            package = import_module("lightning_fabric")
        except ModuleNotFoundError:
            package = import_module("lightning.fabric")
        if "LOCAL_WORLD_SIZE" in os.environ:  # set by torchrun, which `fabric run` uses
            num_local = int(os.environ["LOCAL_WORLD_SIZE"])
            place = {"devices": num_local, "num_nodes": int(os.environ["WORLD_SIZE"]) // num_local}
            # Each process keeps its own BatchNorm statistics, averaged after the epoch: all data count then, not
            # only rank 0's. Idle weights must be announced, and torch complains where they are without need.
            place["strategy"] = package.strategies.DDPStrategy(
                broadcast_buffers=False, find_unused_parameters=_has_idle_weights(model, task)
            )
            if not torch.distributed.is_initialized():
                atexit.register(_leave_group)
        try:
            fabric: Fabric = package.Fabric(precision=_resolve(precision), **place)
            if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched already
                fabric.launch()
        except ValueError as error:  # flags of `fabric run` that contradict the schedule
            raise UsageError(f"training: {error}") from error
    return fabric


def _resolve(precision: str) -> str:
    """Mixed precision for "auto" where there is a GPU and `fabric run` was not told to leave it alone."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available() or os.environ.get("LT_ACCELERATOR") == "cpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


@contextmanager
def _without_info() -> Iterator[None]:
    """Fabric logs lines like "Using bfloat16 ..." that tell our users nothing they can act on."""
    previous = logging.root.manager.disable
    logging.disable(max(previous, logging.INFO))
    try:
        yield
    finally:
        logging.disable(previous)


def _leave_group() -> None:
    """At exit; without it 4 of 9 finished gloo runs of two processes aborted ("terminate called ...")."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _has_idle_weights(model: nn.Module, task: Task) -> bool:
    """Whether the loss depends not on all trained weights, as with auxiliary heads; tries it on a copy."""
    probe = FirstOutput(deepcopy(model).train())
    trained = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    inputs = torch.cat([task.example_inputs[0]] * 2)  # BatchNorm needs two samples
    with seeded(seed=0, epoch=0, rank=0):
        output = probe(inputs.to(trained[0].device))
    gradients = torch.autograd.grad(output.sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


@contextmanager
def seeded(seed: int, epoch: int, rank: int) -> Iterator[None]:
    """Own random state for one epoch of one process; the caller's is put back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(random.Random(f"{seed}/{epoch}/{rank}").getrandbits(63))
        yield


class FirstOutput(nn.Module):
    """The first tensor that `model` returns, so that a process group sees only what the loss depends on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.model(inputs)
        while not isinstance(output, Tensor):
            if not isinstance(output, (tuple, list, Mapping)) or not output:
                raise DataError(f"model: returned {type(output).__name__}, expected a tensor or a tuple of tensors")
            output = next(iter(output.values() if isinstance(output, Mapping) else output))
        return output
