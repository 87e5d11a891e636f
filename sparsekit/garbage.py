"""Python's cyclic collector, paused while much is made that is kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """A recording makes tens of thousands of objects, few of them garbage. They alone make the collector walk the whole
    heap, torch's and the user's included: a third of a second, several times what the recording takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
