"""What a run measured, as values, and their JSON, terminal table and self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from sparsekit.charts import curves, member_curves, share_columns
from sparsekit.environment import Environment
from sparsekit.errors import DataError

SCHEMA_VERSION = 1

_RATIOS = ("accuracy", "num_params", "num_nonzero", "num_macs", "size_bytes", "latency_ms")
_NOT_DRAWN = ("epoch", "step", "lr", "seconds")

Cell = tuple[str, str]  # what a table cell says, and a detail for smaller print
History = Mapping[str, Sequence[Mapping[str, float | None]]]


@dataclass(frozen=True)
class Measurement:
    """One network, measured.

    Attributes:
        accuracy: in [0, 1] on held-out data, None without data.
        num_macs: multiply-accumulates of one forward pass at batch 1.
        size_bytes: of the exported file.
        latency_ms: wall time per run, p50 beside its p20 and p80; None where it was not measured.
        num_nonzero: of the weights that layers multiply with; None where the method removes channels only.
    """

    accuracy: float | None
    num_params: int
    num_macs: int
    size_bytes: int
    latency_ms: float | None = None
    latency_p20_ms: float | None = None
    latency_p80_ms: float | None = None
    num_nonzero: int | None = None


@dataclass(frozen=True)
class Width:
    """A channel group's `dense` channels and how many of them were `kept`; `layer` is the group's name."""

    layer: str
    dense: int
    kept: int


@dataclass(frozen=True)
class Report:
    """All that one run says about itself. Mappings hold JSON values only.

    Attributes:
        certificate: what was checked, and how far it differed.
        latency: the paired comparison; its `ratio` holds `value`, `low` and `high` of compact / dense.
        history: stage -> one record per epoch: `epoch`, `loss`, `train_accuracy`, `lr`, `seconds`, `mask_*`;
            names like "mask/conv1/7", quantity, layer and channel, share a chart.
        accuracies: held-out accuracy in [0, 1] by point of the run, e.g. `dense`, `pruned`, `compact`.
        refusals: per frozen layer its `module`, `source` line, `op`, `reason` and `macs_share` in [0, 1].
        seconds: wall time per step of the run.
    """

    dense: Measurement
    compact: Measurement
    environment: Environment
    recipe: Mapping[str, object]
    recipe_hash: str
    certificate: Mapping[str, object]
    latency: Mapping[str, Any] | None
    widths: tuple[Width, ...]
    history: History
    accuracies: Mapping[str, float]
    refusals: tuple[Mapping[str, object], ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]

    @property
    def ratio(self) -> dict[str, float | None]:
        """Compact / dense by quantity, None where a side is unknown; latency from the paired comparison, if any."""
        ratio: dict[str, float | None] = {}
        for name in _RATIOS:
            dense, compact = getattr(self.dense, name), getattr(self.compact, name)
            ratio[name] = compact / dense if dense and compact is not None else None
        paired = self._paired.get("value")
        return ratio if paired is None else ratio | {"latency_ms": paired}

    @property
    def _paired(self) -> Mapping[str, float | None]:
        return (self.latency or {}).get("ratio") or {}

    @property
    def headline(self) -> str:
        """One sentence, like `0.49x the MACs at 0.52x the latency [0.50, 0.54], accuracy -0.3 points`."""
        nonzero, macs, latency = (self.ratio[name] for name in ("num_nonzero", "num_macs", "latency_ms"))
        text = "" if nonzero is None else f"{_times(nonzero, 2)} the nonzero weights, "
        text += f"{_times(macs, 2)} the MACs"
        if latency is not None:
            text += f" at {_times(latency, 2)} the latency {_interval(self._paired)}".rstrip()
        if self.dense.accuracy is not None and self.compact.accuracy is not None:
            text += f", accuracy {100 * (self.compact.accuracy - self.dense.accuracy):+.1f} points"
        return text

    def rows(self) -> list[tuple[str, Cell, Cell, Cell]]:
        """Label, dense, compact and ratio of each quantity, as text."""
        ratio = {name: (_times(value, 3), "") for name, value in self.ratio.items()}
        ratio["latency_ms"] = (ratio["latency_ms"][0], _interval(self._paired))
        cells = zip(_cells(self.dense), _cells(self.compact), ratio.values(), strict=True)
        labels = ("accuracy", "parameters", "nonzero weights", "MACs", "file size", "latency p50 (p20-p80)")
        rows = [(label, *row) for label, row in zip(labels, cells, strict=True)]
        return [row for row in rows if row[0] != "nonzero weights" or self.compact.num_nonzero is not None]

    def table(self) -> Table:
        """Dense | compact | ratio, for a terminal."""
        table = Table("")
        for name in ("dense", "compact", "ratio"):
            table.add_column(name, justify="right")
        for label, *cells in self.rows():
            # The details go below, or 80 columns would not do.
            detailed = any(detail for _, detail in cells)
            texts = ["\n".join(filter(None, cell)) for cell in cells]
            table.add_row(label.replace(" (", "\n(") if detailed else label, *texts)
        return table

    def html(self) -> str:
        """One self-contained page: no script, no request; for phones, dark screens and paper too."""
        page = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        page.filters |= {"value": _value, "percent": _percent}
        source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
        return page.from_string(source).render(
            report=self,
            width_charts=share_columns([(w.layer, w.dense, w.kept) for w in self.widths], title="Kept"),
            curves={stage: curves(rows, _names(rows, masks=False)) for stage, rows in self.history.items()},
            masks=[
                chart for rows in self.history.values() for chart in curves(rows, _names(rows, masks=True), x="step")
            ],
            channels=[chart for rows in self.history.values() for chart in member_curves(rows)],
            environment=_plain(self.environment),
            recipe=_toml(self.recipe),
        )

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: tuples become lists, and numbers that are not finite become None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain: dict[str, Any] = _plain({"schema_version": SCHEMA_VERSION, **values, "ratio": self.ratio})
        return plain

    @classmethod
    def read(cls, path: Path) -> Report:
        """What a file written from `to_json` says.

        Raises:
            DataError: no such file, or not a report.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path}: damaged: {error}") from error
        try:
            return cls.from_json(document if isinstance(document, dict) else {})
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`.

        Raises:
            DataError: another schema version, a missing or an unknown field.
        """
        if document.get("schema_version") != SCHEMA_VERSION:
            found = document.get("schema_version")
            raise DataError(f"report: schema_version must be {SCHEMA_VERSION}, got {found!r}")
        try:
            values = {field.name: document[field.name] for field in fields(cls)}
            environment = values["environment"]
            return cls(
                **values
                | {
                    "dense": Measurement(**values["dense"]),
                    "compact": Measurement(**values["compact"]),
                    "environment": Environment(**environment | {"cpu_flags": tuple(environment["cpu_flags"])}),
                    "widths": tuple(Width(**row) for row in values["widths"]),
                    "refusals": tuple(values["refusals"]),
                    "warnings": tuple(values["warnings"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"report: damaged: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(side: Measurement) -> list[Cell]:
    """A network's column of the table, in the order of `_RATIOS`."""
    texts = (
        _percent(side.accuracy),
        f"{side.num_params:,}",
        "-" if side.num_nonzero is None else f"{side.num_nonzero:,}",
        _si(side.num_macs).rstrip(),
        f"{_si(side.size_bytes)}B",
        "-" if side.latency_ms is None else f"{side.latency_ms:.3g} ms",
    )
    spread = ""
    if side.latency_p20_ms is not None and side.latency_p80_ms is not None:
        spread = f"({side.latency_p20_ms:.3g}-{side.latency_p80_ms:.3g})"
    return [*((text, "") for text in texts[:-1]), (texts[-1], spread)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _si(count: float) -> str:
    """One decimal and the prefix, which the caller's unit may follow.

    >>> _si(125_485_696), _si(512)
    ('125.5 M', '512 ')
    """
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.1f} {prefix}"
    return f"{count:.0f} "


def _times(ratio: float | None, digits: int) -> str:
    """A ratio to so many significant digits.

    >>> _times(0.4912, 2), _times(1.0, 3), _times(10.4, 2), _times(None, 2)
    ('0.49x', '1.00x', '10x', '-')
    """
    return "-" if ratio is None else f"{ratio:#.{digits}g}".rstrip(".") + "x"


def _interval(ratio: Mapping[str, float | None]) -> str:
    low, high = ratio.get("low"), ratio.get("high")
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def _value(value: object) -> str:
    """One JSON value as a reader wants it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item) for item in value)
    return "-" if value is None else str(value)


def _names(records: Sequence[Mapping[str, float | None]], *, masks: bool) -> list[str]:
    """What to draw of a stage, a chart each: the masks' numbers, or all others but time and what the schedule sets."""
    names = dict.fromkeys(name for record in records for name in record if "/" not in name)
    return [name for name in names if name not in _NOT_DRAWN and name.startswith("mask_") == masks]


def _toml(table: Mapping[str, object], path: str = "") -> str:
    """The recipe's text as TOML writes it; None is left out, since TOML has no word for it."""
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in table.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{path}{key}]", _toml(value, f"{path}{key}.")]
    return "\n".join(lines).strip()
