"""Where the unfinished work of a run lies, and whose it is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsekit.errors import UsageError
from sparsekit.recipe import TomlRecipe


def work_folder(out: Path, *, overwrite: bool, resume: bool) -> Path:
    """Where unfinished work lies, once it is clear that nothing is in the way of it and of `out`.

    Raises:
        UsageError: something is.
    """
    if overwrite and resume:
        raise UsageError("overwrite and resume: choose one")
    here = Path.cwd()
    if out.resolve() in (here, *here.parents):
        raise UsageError(f"{out}: holds the current folder; choose a new one")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, expected a folder")
    if out.exists() and not (overwrite or resume):
        raise UsageError(f"{out}: exists; choose another folder, or --overwrite")
    work_dir = out.with_name(f"{out.name}.partial")
    if work_dir.exists() and not (overwrite or resume):
        raise UsageError(f"{work_dir}: holds an interrupted run; --resume continues it, --overwrite starts anew")
    return work_dir


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Make the folder; remove it at the end, or on failure while no epoch is complete that could be continued."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)  # a full disk does not say which file it has no room for
        if not any(folder.glob("*.ckpt")):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def check_same(recipe: TomlRecipe, folder: Path, same_hash: bool, *, weights: str | None) -> None:
    """Refuse to continue the work of another recipe, or of other contents of the files that `weights` names.

    Raises:
        UsageError: it is; it names the first key that differs.
    """
    then = type(recipe).from_toml(folder / "recipe.toml")
    for field in dataclasses.fields(recipe):
        old, new = getattr(then, field.name), getattr(recipe, field.name)
        if old != new:
            raise UsageError(f"{folder}: was made with {field.name} = {old!r}, now {new!r}; --overwrite starts anew")
    if not same_hash:
        raise UsageError(f"{folder}: was made with other contents of {weights}; --overwrite starts anew")
