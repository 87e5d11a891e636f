"""An Artifact is one finished compression: a folder of plain files, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sparsekit.compaction import compact
from sparsekit.errors import DataError, PlanError, SparsekitError, UsageError
from sparsekit.plan import PruningPlan
from sparsekit.program import Program
from sparsekit.recipe import Recipe
from sparsekit.report import Report

# And program.json where the network is a recorded program, tidy-0.json ... where the dense one was tidied first, and
# emptied-0.json ... where zeros of single weights emptied channels.
FILES = ("plan.json", "weights.safetensors", "model.onnx", "report.json", "report.html", "recipe.toml")


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a run produced.

    Attributes:
        model: the small network, on the CPU.
        plan: which channels it kept; its own weights and zeros are `model`'s.
        onnx: the verified ONNX file's bytes.
        report: what was measured.
        recipe: what was asked for.
        before: plans that were applied before `plan`, see `tidy`.
        after: plans that were applied after `plan`, to channels that its zeros had emptied.
    """

    model: nn.Module
    plan: PruningPlan
    onnx: bytes
    report: Report
    recipe: Recipe
    before: tuple[PruningPlan, ...] = ()
    after: tuple[PruningPlan, ...] = ()

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder under a temporary name beside it, then rename: a crash leaves no half artifact.

        Raises:
            UsageError: the folder exists and `overwrite` is not given.
            SparsekitError: it cannot be written, say on a full disk; an older one is then as it was.
        """
        return write_whole(folder, self._write, overwrite=overwrite)

    def _write(self, folder: Path) -> None:
        if isinstance(self.model, Program):
            (folder / "program.json").write_text(json.dumps(self.model.to_json()), encoding="utf-8")
        # The cut weights are in weights.safetensors; the plan only has to say what was cut.
        names = _plan_names(len(self.before), len(self.after))
        for name, plan in zip(names, (*self.before, self.plan, *self.after), strict=True):
            PruningPlan(plan.keep).save(folder / name, folder / "plan.safetensors")
        # Clones, because safetensors refuses two names for one memory, as tied weights have.
        state = {name: value.contiguous().clone() for name, value in self.model.state_dict().items()}
        (folder / "weights.safetensors").write_bytes(save(state))
        (folder / "model.onnx").write_bytes(self.onnx)
        report = json.dumps(self.report.to_json(), indent=1, allow_nan=False)
        (folder / "report.json").write_text(report, encoding="utf-8")
        (folder / "report.html").write_text(self.report.html(), encoding="utf-8")
        (folder / "recipe.toml").write_text(self.recipe.to_toml(), encoding="utf-8")


def write_whole(folder: Path | str, write: Callable[[Path], None], *, overwrite: bool) -> Path:
    """Let `write` fill an empty folder, which then becomes `folder`; returns it.

    Raises:
        UsageError: the folder exists and `overwrite` is not given.
        SparsekitError: it cannot be written, say on a full disk; an older one is then as it was.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder}: exists; choose another folder, or overwrite it")
    # A link stays one: what it points to is replaced.
    target = folder.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as staging:
            new = Path(staging) / "new"
            new.mkdir()
            write(new)
            _replace(target, new, old=Path(staging) / "old")
    except OSError as error:
        raise SparsekitError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _replace(target: Path, new: Path, *, old: Path) -> None:
    """Move `new` to where `target` is, and `target`, if there is one, to `old`; or leave both."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)


def load(folder: Path | str, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The small network of a saved artifact, in eval mode, with its weights: the user's own class, cut. No pickle.

    Where the user's forward fixed the sizes, it is a `Program`, which needs no factory.

    Args:
        folder: what `Artifact.save` wrote.
        factory: makes the dense network (its weights do not matter).

    Raises:
        DataError: a file is missing or damaged, or `factory` makes another network than the one that was cut.
        UsageError: no factory, and the artifact is not a program.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such artifact folder")
    try:
        names = _plan_names(*(len(list(folder.glob(f"{name}-*.json"))) for name in ("tidy", "emptied")))
        plans = [PruningPlan.load(folder / name) for name in names]
        state = load_file(folder / "weights.safetensors")
    except PlanError as error:
        raise DataError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / 'weights.safetensors'}: missing or damaged: {error}") from error
    program = folder / "program.json"
    if program.exists():
        return _load_program(program, state)
    if factory is None:
        raise UsageError(f"{folder}: holds a cut network of the user's own class; give its factory")
    network = factory()
    if not isinstance(network, nn.Module):
        raise DataError(f"{folder}: expected the factory to return an nn.Module, got {type(network).__name__}")
    try:
        small = reduce(compact, plans, network)
        small.load_state_dict(state)
    except PlanError as error:
        raise DataError(f"{folder}: the factory makes another network: {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise DataError(f"{folder}: the factory makes another network: {reason[0].strip()}") from error
    return small.eval()


def _plan_names(num_before: int, num_after: int) -> list[str]:
    """In the order in which the plans apply."""
    tidied, emptied = (f"tidy-{n}.json" for n in range(num_before)), (f"emptied-{n}.json" for n in range(num_after))
    return [*tidied, "plan.json", *emptied]


def _load_program(path: Path, state: dict[str, Tensor]) -> Program:
    try:
        return Program.from_json(json.loads(path.read_text(encoding="utf-8")), state)
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{path}: {error}") from error
