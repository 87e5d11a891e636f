"""Forward passes that wait at every layer, so that a layer can be changed before the passes run on through it.

Repairing a network from its first layer to its last needs at each layer what all images make of the layers before, as
repaired. Running the network anew for every layer would cost its depth squared. Here every batch of images has a
forward pass of its own, on a thread, and all of them wait where the next layer is called. One pass runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsekit.errors import TraceError


@dataclass(frozen=True)
class Stop:
    """A point of the forward pass.

    Attributes:
        name: path of a module that the forward calls once.
        place: "input", its first argument before it runs, or "output", the tensor that it returned.
    """

    name: str
    place: Literal["input", "output"]


def visit(network: nn.Module, batches: Sequence[Tensor], stops: Sequence[Stop]) -> Generator[list[Tensor], None, None]:
    """What is there at each stop, one stop after another: a tensor per batch.

    While the caller holds these, no pass runs. A weight that it changes then, of the module ahead or of a later one,
    counts for all batches, and so does a tensor that it changes in place. Memory holds what a forward pass of all
    batches holds at that point, but working space for one batch only.

    Behind the last stop the passes end. Close the iterator (`contextlib.closing`) where it may be left before.

    Args:
        network: run in its present mode, without gradients.
        batches: inputs, one forward pass each.
        stops: in the order in which the forward comes by.

    Raises:
        TraceError: the forward of some batch does not come by a stop.

    >>> network = nn.Sequential(nn.Identity(), nn.Identity())
    >>> for (x,) in visit(network, [torch.zeros(1)], [Stop("0", "output"), Stop("1", "output")]):
    ...     print(x.add_(1).item())
    1.0
    2.0
    """
    here = threading.local()

    def stop(tensor: Tensor) -> None:
        here.current.stop(tensor)

    def run(current: _Pass, batch: Tensor) -> None:
        here.current = current
        current.wait()
        with torch.no_grad():
            network(batch)

    passes = [_Pass() for _ in batches]
    with _hooked(network, stops, stop), ThreadPoolExecutor(max(1, len(batches))) as pool:
        try:
            for current, batch in zip(passes, batches, strict=True):
                current.start(pool.submit(run, current, batch))
            for at in stops:
                yield [current.advance(at) for current in passes]
        finally:
            for current in passes:
                current.abandon()


class _Abandoned(BaseException):
    """Ends a pass that nobody needs; not an Exception, which a user's forward may catch."""


class _Pass:
    """One forward pass and the caller, of whom one waits while the other runs."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._future: Future[None] = Future()

    def start(self, future: Future[None]) -> None:
        self._future = future
        future.add_done_callback(lambda _: self._has_stopped.release())

    def wait(self) -> None:
        """On the pass's thread."""
        self._may_run.acquire()
        if self._abandoned:
            raise _Abandoned

    def stop(self, tensor: Tensor) -> None:
        """On the pass's thread."""
        self._tensors.append(tensor)
        self._has_stopped.release()
        self.wait()

    def advance(self, stop: Stop) -> Tensor:
        """The tensor at the next stop, which is this one; raises what the forward raised."""
        self._may_run.release()
        self._has_stopped.acquire()
        if self._future.done():
            self._future.result()
        if not self._tensors:
            raise TraceError(f"{stop.name}: the forward calls it for some inputs only, so it cannot be visited")
        return self._tensors.pop()

    def abandon(self) -> None:
        self._abandoned = True
        self._may_run.release()


@contextmanager
def _hooked(network: nn.Module, stops: Sequence[Stop], stop: Callable[[Tensor], None]) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        stop((*args, *kwargs.values())[0])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        stop(output)

    handles = []
    for at in stops:
        module = network.get_submodule(at.name)
        if at.place == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
