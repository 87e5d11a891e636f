"""Channel pruning methods, one file each. `PRUNERS[name](**options)` builds one; see `sparsekit.pruner.Pruner`."""

from __future__ import annotations

from collections.abc import Callable

from sparsekit.pruner import Pruner
from sparsekit.pruners.magnitude import Magnitude
from sparsekit.pruners.random import Random
from sparsekit.pruners.transport import Transport

PRUNERS: dict[str, Callable[..., Pruner]] = {
    "transport": Transport,
    "magnitude": Magnitude,
    "random": Random,
}
