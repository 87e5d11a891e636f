"""The state of a training stage after an epoch, on disk: whole or not there, plain tensors and numbers, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.task import Record, Schedule, Task


@dataclass(frozen=True)
class Checkpoint:
    """All that the epochs after `history` depend on; `precision` is the loss scale of 16-mixed."""

    fingerprint: str
    history: list[Record]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    precision: dict[str, Any]


def fingerprint(model: nn.Module, task: Task, schedule: Schedule, stage: str) -> str:
    """Hash of what must not change between a run and its continuation."""
    state = [(name, list(value.shape)) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    text = json.dumps([stage, asdict(schedule), task.num_batches, state, trained])
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path, expected: str) -> Checkpoint | None:
    """The checkpoint, or None where there is no file yet."""
    if not path.exists():
        return None
    advice = "delete it or use another output folder"
    unreadable = (zipfile.BadZipFile, pickle.UnpicklingError, OSError, EOFError, RuntimeError)
    malformed = (TypeError, ValueError, LookupError)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no sums, and flipped bits would go unseen
            damaged = archive.testzip() is not None
        checkpoint = None if damaged else Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except (*unreadable, *malformed) as error:
        raise DataError(f"{path}: damaged checkpoint; {advice}") from error
    if checkpoint is None:
        raise DataError(f"{path}: damaged checkpoint; {advice}")
    if checkpoint.fingerprint != expected:
        raise DataError(f"{path}: checkpoint of another run, its network or schedule differs; {advice}")
    return checkpoint


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file in one go, so that a kill at any moment leaves the last complete one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(vars(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(f"{path}: the checkpoint cannot be written: {error}") from error
