"""The user's own code by the name `path/to/file.py:factory`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError, nearest


def load_factory(spec: str) -> Callable[..., Any]:
    """The function `factory` of `path/to/file.py:factory`; `sys.path` stays as it is.

    Raises:
        DataError: no such file or function, or a file that cannot be imported.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise DataError(f"{spec}: expected path/to/file.py:factory, but {file!r} is no Python file")
    # Dataclasses look their module up by name, so it needs one that no other module has.
    module_name = f"sparsekit_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise DataError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[module_name]
        raise DataError(f"{path}: cannot be imported: {error}") from error
    factory: Callable[..., Any] | None = vars(module).get(name)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise DataError(f"{spec}: no function {name!r} in {path}{nearest(name, functions)}")
    return factory
