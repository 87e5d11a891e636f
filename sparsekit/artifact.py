"""An Artifact is one finished compression: a folder of plain files, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekit.compaction import compact
from sparsekit.errors import DataError, PlanError, UsageError
from sparsekit.plan import PruningPlan
from sparsekit.recipe import Recipe
from sparsekit.report import Report

FILES = ("plan.json", "weights.safetensors", "model.onnx", "report.json", "report.html", "recipe.toml")


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a run produced.

    Attributes:
        model: the small network, on the CPU.
        plan: which channels it kept; its own weights are `model`'s.
        onnx_path: the verified ONNX file, copied by `save`.
        report: what was measured.
        recipe: what was asked for.
    """

    model: nn.Module
    plan: PruningPlan
    onnx_path: Path
    report: Report
    recipe: Recipe

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder under a temporary name beside it, then rename: a crash leaves no half artifact.

        Raises:
            UsageError: the folder exists and `overwrite` is not given.
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise UsageError(f"{folder}: exists; choose another folder or --overwrite")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self._write(staging)
            staging.chmod(0o777 & ~_umask())
            if folder.exists():
                old = staging.with_name(staging.name + ".old")
                folder.rename(old)
                staging.rename(folder)
                shutil.rmtree(old)
            else:
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        # The cut weights are in weights.safetensors; the plan only has to say what was cut.
        PruningPlan(self.plan.keep).save(folder / "plan.json", folder / "plan.safetensors")
        state = {name: value.contiguous().clone() for name, value in self.model.state_dict().items()}
        save_file(state, folder / "weights.safetensors")
        shutil.copyfile(self.onnx_path, folder / "model.onnx")
        report = json.dumps(self.report.to_json(), indent=1, allow_nan=False)
        (folder / "report.json").write_text(report, encoding="utf-8")
        (folder / "report.html").write_text(self.report.html(), encoding="utf-8")
        (folder / "recipe.toml").write_text(self.recipe.to_toml(), encoding="utf-8")


def load(folder: Path | str, factory: Callable[[], nn.Module]) -> nn.Module:
    """The small network of a saved artifact, in eval mode: the user's own class, cut, with its weights. No pickle.

    Args:
        folder: what `Artifact.save` wrote.
        factory: makes the dense network (its weights do not matter).

    Raises:
        DataError: a file is missing or damaged, or `factory` makes another network than the one that was cut.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such artifact folder")
    try:
        small = compact(factory(), PruningPlan.load(folder / "plan.json"))
        state = load_file(folder / "weights.safetensors")
    except PlanError as error:
        raise DataError(f"{folder}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / 'weights.safetensors'}: {error}") from error
    try:
        small.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise DataError(f"{folder}: the factory makes another network: {reason[0].strip()}") from error
    return small.eval()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
