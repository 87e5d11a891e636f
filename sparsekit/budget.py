"""Budgets: what the small network may cost, and which share of its channels each layer keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from sparsekit.errors import BudgetError, nearest

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


class Metric(Enum):
    """What a limit is measured in; the value is the word in a budget's text.

    `NUM_NONZERO` counts single weights, for methods that zero them: those of `cost.prunable_weights`, what layers
    multiply with. Biases and the vectors of normalisation do not count and stay. `SIZE_BYTES` and `LATENCY_MS` are of
    the exported file, the latter on the target.
    """

    CHANNELS = "channels"
    NUM_PARAMS = "params"
    NUM_MACS = "macs"
    NUM_NONZERO = "nonzero"
    SIZE_BYTES = "size"
    LATENCY_MS = "latency"


# What only the exported file can tell, see `closed_loop.py`; the others follow from channel counts.
MEASURED = (Metric.SIZE_BYTES, Metric.LATENCY_MS)
_UNITS = {
    Metric.SIZE_BYTES: {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    Metric.LATENCY_MS: {"us": 1e-3, "ms": 1.0, "s": 1e3},
}


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
        >>> str(Limit(Metric.LATENCY_MS, 4.5, relative=False)), str(Limit(Metric.SIZE_BYTES, 2e6, relative=False))
        ('latency<=4.5ms', 'size<=2MB')
        """
        amount = f"{self.value:g}x" if self.relative else f"{self.value:,.0f}"
        if self.metric is Metric.LATENCY_MS and not self.relative:
            amount = f"{self.value:g}ms"
        if self.metric is Metric.SIZE_BYTES and not self.relative:
            amount = f"{self.value / 1e6:g}MB"
        return f"{self.metric.value}<={amount}"

    def resolve(self, dense: float) -> float:
        """The absolute limit, given what the dense network costs.

        >>> Limit(Metric.NUM_MACS, 0.5, relative=True).resolve(dense=200.0)
        100.0
        """
        return self.value * dense if self.relative else self.value


@dataclass(frozen=True)
class AccuracyFloor:
    """At least `value`, in [0, 1]; with `relative`, `value` is added to the dense network's accuracy."""

    value: float
    relative: bool

    def __str__(self) -> str:
        """As a budget's text has it.

        >>> str(AccuracyFloor(-0.01, relative=True)), str(AccuracyFloor(0.925, relative=False))
        ('accuracy>=-1%', 'accuracy>=92.5%')
        """
        return f"accuracy>={100 * self.value:g}%"

    def resolve(self, dense: float) -> float:
        """The least accuracy, given the dense network's.

        >>> AccuracyFloor(-0.01, relative=True).resolve(dense=0.93)
        0.92
        """
        return dense + self.value if self.relative else self.value


@dataclass(frozen=True)
class Budget:
    """Limits that all must hold, and keep ratios by layer pattern (the last pattern that matches wins).

    `accuracy` is no limit that a plan could be made for: it says which small networks are good enough to be kept.

    >>> Budget.parse("macs<=0.5x").limits
    (Limit(metric=<Metric.NUM_MACS: 'macs'>, value=0.5, relative=True),)
    >>> Budget.parse("params<=1.5M and layer1.*=0.25").keep
    (('layer1.*', 0.25),)
    >>> Budget.parse("keep=0.5").keep
    (('*', 0.5),)
    >>> budget = Budget.parse("latency<=4ms and size<=2MB and accuracy>=-1%")
    >>> [str(limit) for limit in budget.limits], str(budget.accuracy)
    (['latency<=4ms', 'size<=2MB'], 'accuracy>=-1%')
    """

    limits: tuple[Limit, ...] = ()
    keep: tuple[tuple[str, float], ...] = ()
    accuracy: AccuracyFloor | None = None

    @property
    def measured(self) -> tuple[Limit, ...]:
        """The limits that only the exported file can tell."""
        return tuple(limit for limit in self.limits if limit.metric in MEASURED)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `macs<=0.5x`, `params<=120K`, `channels<=0.3x`, `nonzero<=0.1x`, `keep=0.5`, `layer1.*=0.5`.

        `latency<=4ms`, `latency<=0.5x`, `size<=2MB` and `accuracy>=-1%` are for `compress`, which measures. Clauses are
        joined by `and` or `,`.

        Raises:
            BudgetError: an unknown metric or unit, a ratio outside (0, 1], nothing at all.
        """
        limits, keep, accuracy = [], [], None
        for clause in filter(None, (part.strip() for part in re.split(r"\band\b|,", text))):
            if "<=" in clause:
                limits.append(_parse_limit(clause))
            elif ">=" in clause:
                accuracy = _parse_floor(clause)
            elif "=" in clause:
                pattern, _, value = clause.partition("=")
                keep.append(("*" if pattern.strip() == "keep" else pattern.strip(), _ratio(value, clause)))
            else:
                raise BudgetError(f"budget {clause!r}: expected METRIC<=LIMIT or PATTERN=KEEP_RATIO")
        if not limits and not keep:
            raise BudgetError(f"budget {text!r}: empty; try 'macs<=0.5x'")
        return cls(tuple(limits), tuple(keep), accuracy)

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
    metric = Metric(name)
    units = _UNITS.get(metric, _COUNTS)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z]*)", value)
    if not match or match[2] not in (*units, "x"):
        example = {Metric.SIZE_BYTES: "a size like 2MB", Metric.LATENCY_MS: "a time like 4ms"}
        wanted = example.get(metric, "a count like 120M")
        raise BudgetError(f"budget {clause!r}: {value!r} is no limit; use a fraction like 0.5x or {wanted}")
    number, unit = match.groups()
    if unit == "x":
        return Limit(metric, _ratio(number, clause), relative=True)
    if float(number) <= 0:
        raise BudgetError(f"budget {clause!r}: the limit must be above 0")
    return Limit(metric, float(number) * units[unit], relative=False)


def _parse_floor(clause: str) -> AccuracyFloor:
    name, _, value = (part.strip() for part in clause.partition(">="))
    match = re.fullmatch(r"([+-]?)([0-9]*\.?[0-9]+)\s*(%?)", value)
    if name != "accuracy" or not match:
        raise BudgetError(f"budget {clause!r}: expected accuracy>=-1% (beside the dense network) or accuracy>=92%")
    sign, number, percent = match.groups()
    floor = float(sign + number) / (100 if percent else 1)
    if not -1 <= floor <= 1:
        raise BudgetError(f"budget {clause!r}: an accuracy is at most 100%")
    return AccuracyFloor(floor, relative=bool(sign))


def _ratio(text: str, clause: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise BudgetError(f"budget {clause!r}: {text.strip()!r} is no number") from None
    if not 0 < ratio <= 1:
        raise BudgetError(f"budget {clause!r}: a ratio must be in (0, 1], got {ratio:g}")
    return ratio
