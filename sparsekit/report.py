"""What a run measured, as values, and their JSON, terminal table and self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsekit.charts import Bar, Trial, curves, member_curves, search_chart, share_columns
from sparsekit.environment import Environment
from sparsekit.errors import DataError
from sparsekit.flame import flame
from sparsekit.measured import Candidate as Candidate
from sparsekit.measured import LayerTime as LayerTime
from sparsekit.measured import Measurement as Measurement
from sparsekit.measured import SearchStep as SearchStep
from sparsekit.measured import StockNetwork as StockNetwork
from sparsekit.measured import TargetFacts as TargetFacts
from sparsekit.measured import Width as Width
from sparsekit.measured import plain, read_document, row_of
from sparsekit.number_text import interval, percent, si, times
from sparsekit.page import render, toml
from sparsekit.pareto import Point, pareto_charts

SCHEMA_VERSION = 1

_RATIOS = ("accuracy", "num_params", "num_nonzero", "num_macs", "size_bytes", "latency_ms")
_ROWS = {"dense": Measurement, "compact": Measurement, "environment": Environment, "target": TargetFacts}
_TABLES = {
    **{"widths": Width, "layers": LayerTime},
    **{"search": SearchStep, "candidates": Candidate, "stock": StockNetwork},
}
_NOT_DRAWN = ("epoch", "step", "lr", "seconds")

Cell = tuple[str, str]  # what a table cell says, and a detail for smaller print
History = Mapping[str, Sequence[Mapping[str, float | None]]]


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
        layers: in the order of the forward pass, one per call.
        search: the iterations that met a latency budget, within `latency_band` = least and largest ratio to the
            dense network.
        candidates, stock: what stands beside both networks in the chart of accuracy over latency.
        stock_verdict: whether one of `stock` would have done as well, in one line.
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
    target: TargetFacts | None = None
    layers: tuple[LayerTime, ...] = ()
    search: tuple[SearchStep, ...] = ()
    latency_band: tuple[float, float] | None = None
    candidates: tuple[Candidate, ...] = ()
    stock: tuple[StockNetwork, ...] = ()
    stock_verdict: str = ""

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
    def latency_interval(self) -> str:
        """Of the latency ratio, like `[0.50, 0.54]`, "" where it is not known."""
        return interval(self._paired.get("low"), self._paired.get("high"))

    @property
    def target_text(self) -> str:
        """Runtime and device that latency was measured on, "" where it was not."""
        if self.target:
            return f"{self.target.text}, {self.target.device or self.environment.cpu}"
        runtime = (self.latency or {}).get("runtime")
        return f"{runtime}, {self.environment.cpu}" if runtime else ""

    def points(self, label: str, mark: str = "") -> list[Point]:
        """The networks of this run by latency, the small one under `label`; none where latency is not known."""
        latency, macs = self.ratio["latency_ms"], self.ratio["num_macs"]
        if latency is None or macs is None:
            return []
        low, high = self._paired.get("low"), self._paired.get("high")
        return [
            Point("dense", "dense", 1.0, 1.0, self.dense.accuracy),
            *(
                Point("tried", c.label, c.latency_ratio, c.macs_ratio, c.accuracy, c.latency_low, c.latency_high)
                for c in self.candidates
            ),
            *(
                Point("stock", s.name, s.latency_ratio, s.macs_ratio, s.published_accuracy if s.comparable else None)
                for s in self.stock
                if s.latency_ratio is not None
            ),
            Point("compact", label, latency, macs, self.compact.accuracy, low, high, mark),
        ]

    @property
    def headline(self) -> str:
        """One sentence, like `0.49x the MACs at 0.52x the latency [0.50, 0.54], accuracy -0.3 points`."""
        nonzero, macs, latency = (self.ratio[name] for name in ("num_nonzero", "num_macs", "latency_ms"))
        text = "" if nonzero is None else f"{times(nonzero, 2)} the nonzero weights, "
        text += f"{times(macs, 2)} the MACs"
        if latency is not None:
            text += f" at {times(latency, 2)} the latency {self.latency_interval}".rstrip()
        if self.accuracy_change is not None:
            text += f", accuracy {100 * self.accuracy_change:+.1f} points"
        return text

    @property
    def accuracy_change(self) -> float | None:
        """Compact less dense, in [-1, 1]."""
        if self.dense.accuracy is None or self.compact.accuracy is None:
            return None
        return self.compact.accuracy - self.dense.accuracy

    def rows(self) -> list[tuple[str, Cell, Cell, Cell]]:
        """Label, dense, compact and ratio of each quantity, as text."""
        ratio = {name: (times(value, 3), "") for name, value in self.ratio.items()}
        ratio["latency_ms"] = (ratio["latency_ms"][0], self.latency_interval)
        cells = zip(_cells(self.dense), _cells(self.compact), ratio.values(), strict=True)
        labels = ("accuracy", "parameters", "nonzero weights", "MACs", "file size", "latency p50 (p20-p80)")
        rows = [(label, *row) for label, row in zip(labels, cells, strict=True)]
        return [row for row in rows if row[0] != "nonzero weights" or self.compact.num_nonzero is not None]

    def table(self) -> Table:
        """Dense | compact | ratio, for a terminal."""
        table = Table("", caption=self.target_text or None)
        for name in ("dense", "compact", "ratio"):
            table.add_column(name, justify="right")
        for label, *cells in self.rows():
            # The details go below, or 80 columns would not do.
            detailed = any(detail for _, detail in cells)
            texts = ["\n".join(filter(None, cell)) for cell in cells]
            table.add_row(label.replace(" (", "\n(") if detailed else label, *texts)
        return table

    @property
    def _bars(self) -> list[Bar]:
        return [Bar(width.layer, width.dense, width.kept, width.edges) for width in self.widths]

    def html(self) -> str:
        """One self-contained page: no script, no request; for phones, dark screens and paper too."""
        trials = [Trial(step.predicted_ratio, step.measured_ratio, step.low, step.high) for step in self.search]
        return render(
            "report.html.jinja",
            {
                "report": self,
                "pareto_charts": pareto_charts(self.points("this run")),
                "search_chart": search_chart(trials, self.latency_band) if trials else None,
                "width_charts": share_columns(self._bars, title="Kept"),
                "off_edge": [bar for bar in self._bars if bar.off_edge],
                "flame": flame([(x.name, x.dense_ms, x.compact_ms) for x in self.layers]) if self.layers else None,
                "slowest": sorted(self.layers, key=lambda layer: -layer.compact_ms)[:10],
                "curves": {s: curves(rows, _names(rows, masks=False)) for s, rows in self.history.items()},
                "masks": [
                    chart
                    for rows in self.history.values()
                    for chart in curves(rows, _names(rows, masks=True), x="step")
                ],
                "channels": [chart for rows in self.history.values() for chart in member_curves(rows)],
                "environment": plain(self.environment),
                "recipe": toml(self.recipe),
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: tuples become lists, and numbers that are not finite become None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        document: dict[str, Any] = plain({"schema_version": SCHEMA_VERSION, **values, "ratio": self.ratio})
        return document

    @classmethod
    def read(cls, path: Path) -> Report:
        """What a file written from `to_json` says.

        Raises:
            DataError: no such file, or not a report.
        """
        return read_document(path, cls.from_json)

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
            known = [field.name for field in fields(cls) if field.name in document or field.default is MISSING]
            return cls(**{name: _field(name, document[name]) for name in known})
        except (KeyError, TypeError) as error:
            raise DataError(f"report: damaged: {type(error).__name__}: {error}") from error


def _field(name: str, value: Any) -> Any:
    """A field of a report from its JSON value."""
    if name in _TABLES:
        return tuple(row_of(_TABLES[name], row) for row in value)
    if name in _ROWS and value is not None:
        return row_of(_ROWS[name], value)
    return tuple(value) if isinstance(value, list) else value


def _cells(side: Measurement) -> list[Cell]:
    """A network's column of the table, in the order of `_RATIOS`."""
    texts = (
        percent(side.accuracy),
        f"{side.num_params:,}",
        "-" if side.num_nonzero is None else f"{side.num_nonzero:,}",
        si(side.num_macs).rstrip(),
        f"{si(side.size_bytes)}B",
        "-" if side.latency_ms is None else f"{side.latency_ms:.3g} ms",
    )
    spread = ""
    if side.latency_p20_ms is not None and side.latency_p80_ms is not None:
        spread = f"({side.latency_p20_ms:.3g}-{side.latency_p80_ms:.3g})"
    return [*((text, "") for text in texts[:-1]), (texts[-1], spread)]


def _names(records: Sequence[Mapping[str, float | None]], *, masks: bool) -> list[str]:
    """What to draw of a stage, a chart each: the masks' numbers, or all others but time and what the schedule sets."""
    names = dict.fromkeys(name for record in records for name in record if "/" not in name)
    return [name for name in names if name not in _NOT_DRAWN and name.startswith("mask_") == masks]
