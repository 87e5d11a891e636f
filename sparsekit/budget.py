"""Budgets: what the small network may cost, and which share of its channels each layer keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from sparsekit.errors import BudgetError, nearest

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


class Metric(Enum):
    """What a limit is measured in; the value is the word in a budget's text.

    `NUM_NONZERO` counts single weights, for methods that zero them: those of `cost.prunable_weights`, what layers
    multiply with. Biases and the vectors of normalisation do not count and stay.
    """

    CHANNELS = "channels"
    NUM_PARAMS = "params"
    NUM_MACS = "macs"
    NUM_NONZERO = "nonzero"


@dataclass(frozen=True)
class Limit:
    """At most `value` of `metric`; with `relative`, `value` is a fraction of the dense network's."""

    metric: Metric
    value: float
    relative: bool

    def __str__(self) -> str:
        """As a budget's text has it.

        >>> str(Limit(Metric.NUM_MACS, 0.5, relative=True)), str(Limit(Metric.NUM_NONZERO, 2700, relative=False))
        ('macs<=0.5x', 'nonzero<=2,700')
        """
        return f"{self.metric.value}<=" + (f"{self.value:g}x" if self.relative else f"{self.value:,.0f}")

    def resolve(self, dense: float) -> float:
        """The absolute limit, given what the dense network costs.

        >>> Limit(Metric.NUM_MACS, 0.5, relative=True).resolve(dense=200.0)
        100.0
        """
        return self.value * dense if self.relative else self.value


@dataclass(frozen=True)
class Budget:
    """Limits that all must hold, and keep ratios by layer pattern (the last pattern that matches wins).

    >>> Budget.parse("macs<=0.5x").limits
    (Limit(metric=<Metric.NUM_MACS: 'macs'>, value=0.5, relative=True),)
    >>> Budget.parse("params<=1.5M and layer1.*=0.25").keep
    (('layer1.*', 0.25),)
    >>> Budget.parse("keep=0.5").keep
    (('*', 0.5),)
    """

    limits: tuple[Limit, ...] = ()
    keep: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `macs<=0.5x`, `params<=120K`, `channels<=0.3x`, `nonzero<=0.1x`, `keep=0.5`, `layer1.*=0.5`.

        Clauses are joined by `and` or `,`.

        Raises:
            BudgetError: an unknown metric or unit, a ratio outside (0, 1], nothing at all.
        """
        limits, keep = [], []
        for clause in filter(None, (part.strip() for part in re.split(r"\band\b|,", text))):
            if "<=" in clause:
                limits.append(_parse_limit(clause))
            elif "=" in clause:
                pattern, _, value = clause.partition("=")
                keep.append(("*" if pattern.strip() == "keep" else pattern.strip(), _ratio(value, clause)))
            else:
                raise BudgetError(f"budget {clause!r}: expected METRIC<=LIMIT or PATTERN=KEEP_RATIO")
        if not limits and not keep:
            raise BudgetError(f"budget {text!r}: empty; try 'macs<=0.5x'")
        return cls(tuple(limits), tuple(keep))

    def keep_ratio(self, group_name: str) -> float | None:
        """The keep ratio of the last pattern that matches, or None where no pattern does.

        >>> Budget.parse("keep=0.5 and layer1.*=1").keep_ratio("layer1.0.conv1")
        1.0
        """
        matches = [ratio for pattern, ratio in self.keep if fnmatchcase(group_name, pattern)]
        return matches[-1] if matches else None


def _parse_limit(clause: str) -> Limit:
    name, _, value = (part.strip() for part in clause.partition("<="))
    words = [metric.value for metric in Metric]
    if name not in words:
        raise BudgetError(f"budget {clause!r}: unknown metric {name!r}{nearest(name, words)}")
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMGx]?)", value)
    if not match:
        raise BudgetError(f"budget {clause!r}: {value!r} is no limit; use a fraction like 0.5x or a count like 120M")
    number, unit = match.groups()
    if unit == "x":
        return Limit(Metric(name), _ratio(number, clause), relative=True)
    if float(number) <= 0:
        raise BudgetError(f"budget {clause!r}: the limit must be above 0")
    return Limit(Metric(name), float(number) * _UNITS[unit], relative=False)


def _ratio(text: str, clause: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise BudgetError(f"budget {clause!r}: {text.strip()!r} is no number") from None
    if not 0 < ratio <= 1:
        raise BudgetError(f"budget {clause!r}: a ratio must be in (0, 1], got {ratio:g}")
    return ratio
