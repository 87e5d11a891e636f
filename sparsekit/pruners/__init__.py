"""Channel pruning methods, one file each. `PRUNERS[name](**options)` builds one; see `sparsekit.pruner.Pruner`."""

from __future__ import annotations

from collections.abc import Callable

from sparsekit.pruner import Pruner
from sparsekit.pruners.chipnet import ChipNet
from sparsekit.pruners.column_subset import ColumnSubset
from sparsekit.pruners.fisher import Fisher
from sparsekit.pruners.fpgm import FPGM
from sparsekit.pruners.gmp import GMP
from sparsekit.pruners.greg import GReg1, GReg2
from sparsekit.pruners.group_norm import GroupNorm
from sparsekit.pruners.hard_concrete import HardConcrete
from sparsekit.pruners.hrank import HRank
from sparsekit.pruners.magnitude import Magnitude
from sparsekit.pruners.magnitude_pattern import MagnitudePattern
from sparsekit.pruners.magnitude_unstructured import MagnitudeUnstructured
from sparsekit.pruners.network_slimming import NetworkSlimming
from sparsekit.pruners.neuron_merging import NeuronMerging
from sparsekit.pruners.random import Random
from sparsekit.pruners.residual_subset import ResidualSubset
from sparsekit.pruners.soft_filter import SoftFilter
from sparsekit.pruners.taylor import Taylor
from sparsekit.pruners.transport import Transport
from sparsekit.pruners.transport_unstructured import TransportUnstructured

PRUNERS: dict[str, Callable[..., Pruner]] = {
    "transport": Transport,
    "magnitude": Magnitude,
    "random": Random,
    "fpgm": FPGM,
    "fisher": Fisher,
    "group_norm": GroupNorm,
    "hrank": HRank,
    "column_subset": ColumnSubset,
    "taylor": Taylor,
    "sfp": SoftFilter,
    "network_slimming": NetworkSlimming,
    "greg1": GReg1,
    "greg2": GReg2,
    "chipnet": ChipNet,
    "l0": HardConcrete,
    "neuron_merging": NeuronMerging,
    "gmp": GMP,
    "magnitude_unstructured": MagnitudeUnstructured,
    "magnitude_pattern": MagnitudePattern,
    "residual_subset": ResidualSubset,
    "transport_unstructured": TransportUnstructured,
}

# Methods that zero weights, not channels: their budget is `nonzero`.
UNSTRUCTURED = frozenset(
    {"gmp", "magnitude_unstructured", "magnitude_pattern", "residual_subset", "transport_unstructured"}
)
