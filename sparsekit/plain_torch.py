"""Torch's own state while a forward pass is recorded; it is the process's, so one recording runs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import TraceError


@contextmanager
def plain_torch() -> Iterator[None]:
    """The same ops whatever the caller's mode: as in training, no fused shortcuts, and nothing saved for backward."""

    def refuse(_: object) -> Tensor:
        raise TraceError("the forward differentiates; only networks that do not can be recorded")

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled parts run as they were written
            torch.autograd.graph.saved_tensors_hooks(lambda _: None, refuse),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def kept_values() -> Iterator[None]:
    """Tensors of the forward's own numbers are made on the CPU: made on the meta device they would have none."""

    def moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
            if device is None or torch.device(device).type != "meta" or isinstance(data, Tensor):
                return make(data, device=device, **kwargs)
            return make(data, **kwargs).to(device)

        return moved

    def picked(x: Tensor, index: Any) -> Tensor:
        if x.is_meta:  # x[:, [2, 1, 0]]
            parts = index if type(index) is tuple else (index,)
            index = tuple(torch.tensor(part) if _are_numbers(part) else part for part in parts)
        return pick(x, index)

    makers, pick = (torch.tensor, torch.as_tensor), Tensor.__getitem__
    torch.tensor, torch.as_tensor = map(moving, makers)
    Tensor.__getitem__ = picked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.tensor, torch.as_tensor = makers
        del Tensor.__getitem__  # it is inherited


def _are_numbers(part: Any) -> bool:
    return type(part) is list and bool(part) and all(type(item) is int or type(item) is bool for item in part)
