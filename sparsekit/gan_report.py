"""What the compression of a generator measured, as values, and their JSON and self-contained HTML page.

>>> report = GanReport(
...     dense=Measurement(None, 200, 1000, 900),
...     compact=Measurement(None, 110, 490, 500),
...     environment=Environment.collect(),
...     recipe={"model": "sngan"},
...     recipe_hash="3fa9c1d2",
...     metrics={"dense": {"fd_resnet56": 14.2}, "compact": {"fd_resnet56": 15.0}},
... )
>>> report.headline
'0.49x the MACs, fd_resnet56 from 14.2 to 15'
>>> GanReport.from_json(report.to_json()) == report
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from markupsafe import Markup

from sparsekit.charts import curves, lines_chart
from sparsekit.environment import Environment
from sparsekit.errors import DataError
from sparsekit.measured import Measurement, TargetFacts, plain, row_of
from sparsekit.number_text import interval, si, times, value
from sparsekit.page import render, toml
from sparsekit.svg import shortened

SCHEMA_VERSION = 1
KIND = "gan"  # told from other reports by this word in the JSON

_RATIOS = ("num_params", "num_macs", "size_bytes", "latency_ms")
_ROWS = {"dense": Measurement, "compact": Measurement, "environment": Environment, "target": TargetFacts}
_NOT_DRAWN = ("epoch", "step", "lr", "seconds")
_LEGEND_CHARS = 16  # that fit a legend of two

Record = Mapping[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """What both generators make of the same inputs, as pictures: data URIs, from `gan.grids.data_uri`.

    Attributes:
        title: what they show, such as "Samples" or "From one noise to another".
        inputs: what they were given, where those are images.
    """

    title: str
    dense: str
    compact: str
    inputs: str = ""

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Caption and picture, from left to right."""
        named = (("given", self.inputs), ("dense", self.dense), ("compact", self.compact))
        return [(caption, picture) for caption, picture in named if picture]


@dataclass(frozen=True)
class GanReport:
    """All that one run says about itself. Mappings hold JSON values only; only the first fields are needed.

    Attributes:
        dense: the generator that came in; it has no accuracy.
        compact: the one that came out.
        metrics: point of the run -> what `gan.metrics.evaluate` says there. "dense" and "compact" are the networks
            above, others, such as "pruned", stand between them in this order.
        history: stage -> one record per epoch: `epoch`, losses named `*_loss`, and what else was observed.
        pictures: in the order of the page.
        latency: the paired comparison; its `ratio` holds `value`, `low` and `high` of compact / dense.
        target: what latency was measured on.
        certificate: what was checked, and how far it differed.
        seconds: wall time per step of the run.
    """

    dense: Measurement
    compact: Measurement
    environment: Environment
    recipe: Mapping[str, object]
    recipe_hash: str
    metrics: Mapping[str, Mapping[str, float]]
    history: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    pictures: tuple[Comparison, ...] = ()
    latency: Mapping[str, Any] | None = None
    target: TargetFacts | None = None
    certificate: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

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
        """One sentence, like `0.49x the MACs at 0.52x the latency [0.50, 0.54], fd_resnet56 from 14.2 to 15`."""
        text = f"{times(self.ratio['num_macs'], 2)} the MACs"
        if self.ratio["latency_ms"] is not None:
            text += f" at {times(self.ratio['latency_ms'], 2)} the latency {self.latency_interval}".rstrip()
        dense, compact = (self.metrics.get(side, {}) for side in ("dense", "compact"))
        first = next((name for name in dense if name in compact), None)
        return text if first is None else f"{text}, {first} from {dense[first]:.4g} to {compact[first]:.4g}"

    @property
    def latency_interval(self) -> str:
        """Of the latency ratio, like `[0.50, 0.54]`, "" where it is not known."""
        return interval(self._paired.get("low"), self._paired.get("high"))

    @property
    def target_text(self) -> str:
        """Runtime and device that latency was measured on, "" where it was not."""
        return f"{self.target.text}, {self.target.device or self.environment.cpu}" if self.target else ""

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Label, dense, compact, ratio, and the interval of the ratio, of each quantity, as text."""
        labels = ("parameters", "MACs", "file size", "latency p50")
        details = ("", "", "", self.latency_interval)
        ratios = map(times, self.ratio.values())
        return list(zip(labels, _cells(self.dense), _cells(self.compact), ratios, details, strict=True))

    def metric_rows(self) -> list[tuple[str, list[str]]]:
        """Name of each metric and its value at each point of the run, as text."""
        names = dict.fromkeys(name for found in self.metrics.values() for name in found)
        return [(name, [value(found.get(name)) for found in self.metrics.values()]) for name in names]

    def html(self) -> str:
        """One self-contained page: no script, no request; for phones, dark screens and paper too."""
        return render(
            "gan_report.html.jinja",
            {
                "report": self,
                "curves": {stage: _charts(records) for stage, records in self.history.items()},
                "environment": plain(self.environment),
                "recipe": toml(self.recipe),
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: tuples become lists, and numbers that are not finite become None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        document: dict[str, Any] = plain(
            {"kind": KIND, "schema_version": SCHEMA_VERSION, **values, "ratio": self.ratio}
        )
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GanReport:
        """Inverse of `to_json`.

        Raises:
            DataError: another kind of report or schema version, a missing or an unknown field.
        """
        found = (document.get("kind"), document.get("schema_version"))
        if found != (KIND, SCHEMA_VERSION):
            raise DataError(f"report: kind and schema_version must be {KIND!r} and {SCHEMA_VERSION}, got {found}")
        try:
            return cls(**{x.name: _field(x.name, document[x.name]) for x in fields(cls) if _needed(x, document)})
        except (KeyError, TypeError) as error:
            raise DataError(f"report: damaged: {type(error).__name__}: {error}") from error


def _needed(declared: Any, document: Mapping[str, Any]) -> bool:
    return declared.name in document or (declared.default is MISSING and declared.default_factory is MISSING)


def _field(name: str, found: Any) -> Any:
    """A field of a report from its JSON value."""
    if name == "pictures":
        return tuple(row_of(Comparison, row) for row in found)
    if name in _ROWS and found is not None:
        return row_of(_ROWS[name], found)
    return tuple(found) if isinstance(found, list) else found


def _cells(side: Measurement) -> list[str]:
    """A network's column of the table, in the order of `_RATIOS`."""
    latency = "-" if side.latency_ms is None else f"{side.latency_ms:.3g} ms"
    return [f"{side.num_params:,}", si(side.num_macs).rstrip(), f"{si(side.size_bytes)}B", latency]


def _charts(records: Sequence[Record]) -> list[Markup]:
    """The losses of a stage two by two, in their order, as both players' stand; then every other quantity."""
    names = [name for name in dict.fromkeys(n for record in records for n in record) if name not in _NOT_DRAWN]
    losses = [name for name in names if name.endswith("_loss")]
    drawn: list[Markup] = []
    for pair in (losses[start : start + 2] for start in range(0, len(losses), 2)):
        lines = {shortened(name.removesuffix("_loss"), _LEGEND_CHARS): _line(records, name) for name in pair}
        if len(lines) == 2 and all(len(line) > 1 for line in lines.values()):
            drawn.append(lines_chart(lines, title="losses", x_label="epoch"))
        else:  # a line through one point is not seen, and a dot is
            drawn += curves(records, pair)
    return drawn + curves(records, [name for name in names if name not in losses])


def _line(records: Sequence[Record], name: str) -> list[tuple[int, float]]:
    values = plain([(record.get("epoch"), record.get(name)) for record in records])
    return [(int(epoch), y) for epoch, y in values if epoch is not None and y is not None]
