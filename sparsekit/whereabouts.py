"""Where in the user's code an op runs: the module path and the source line."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from sparsekit.copying import modules_by_path

_OURS = (os.path.join(os.path.dirname(__file__), name) for name in ("record.py", "plain_torch.py", "whereabouts.py"))
_FOREIGN = (os.path.dirname(torch.__file__) + os.sep, *_OURS, "<")


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules now running and their paths, innermost last; the model is untouched.

    Torch's own hooks for all modules would do, at ten times the time, and compiled modules warn of them.
    """
    paths: dict[int, str] = {}
    for path, module in modules_by_path(model).items():
        paths.setdefault(id(module), path)
    stack = [("", model)]
    call: Callable[..., Any] = nn.Module._call_impl

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        stack.append(stack[-1] if path is None else (path, module))
        try:
            return call(module, *args, **kwargs)
        finally:
            stack.pop()

    nn.Module._call_impl = called  # type: ignore[method-assign, assignment]
    try:
        yield stack
    finally:
        nn.Module._call_impl = call  # type: ignore[method-assign]


class Frames:
    """Reads the call stack below an op."""

    def __init__(self) -> None:
        self._names: dict[str, str | None] = {}  # of files; None where the search for the line goes on

    def line(self, frame: FrameType | None) -> str:
        """The first line that is neither torch's nor the recorder's: "file.py:147"."""
        while frame is not None:
            path = frame.f_code.co_filename
            if path not in self._names:
                self._names[path] = None if path.startswith(_FOREIGN) else _short(path)
            name = self._names[path]
            if name is not None:
                return f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"

    def function(self, frame: FrameType | None) -> str | None:
        """The `torch.autograd.Function` it runs in, "" for one of torch's own such as checkpoints, or None."""
        while frame is not None:
            function = self._forwards.get(frame.f_code)
            if function is not None:
                return "" if function.__module__.startswith("torch.") else function.__name__
            frame = frame.f_back
        return None

    @cached_property
    def _forwards(self) -> dict[CodeType, type]:
        """The code of every autograd function's forward, which torch calls without a Python frame of its own."""
        found: dict[CodeType, type] = {}
        classes: list[type] = [torch.autograd.Function]
        while classes:
            function = classes.pop()
            classes += function.__subclasses__()
            forward = inspect.getattr_static(function, "forward")
            if isinstance(forward, staticmethod) and isinstance(forward.__func__, FunctionType):
                found.setdefault(forward.__func__.__code__, function)
        return found


def _short(path: str) -> str:
    """Relative to site-packages or the working directory where it lies in one, so that reports name no home."""
    _, installed, inside = path.rpartition("site-packages" + os.sep)
    if installed:
        return inside
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
