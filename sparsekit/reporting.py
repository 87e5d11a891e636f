"""The report of a finished compression, put together from what its stages found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsekit.budget import Metric
from sparsekit.closed_loop import BAND
from sparsekit.compaction import Certificate
from sparsekit.cost import Cost, Costs, num_macs, num_nonzero
from sparsekit.environment import Environment
from sparsekit.export import OnnxFile
from sparsekit.fitting import Fitted
from sparsekit.graph import ChannelGraph
from sparsekit.latency import Latency, LatencyComparison, width_warning
from sparsekit.latency_model import Latencies
from sparsekit.layer_times import Peaks, layer_times
from sparsekit.layers import Pass
from sparsekit.measured import LayerTime, Measurement, SearchStep, StockNetwork, TargetFacts, Width
from sparsekit.plan import PruningPlan
from sparsekit.quantization import QuantizedFile
from sparsekit.report import Report
from sparsekit.stages import Stages
from sparsekit.staircase import edges
from sparsekit.stock import StockRow, verdict


@dataclass(frozen=True, eq=False)
class Finished:
    """What is known when the small network's file has been timed.

    Attributes:
        dense: the network that came in.
        tidied: it without what does nothing; the plans are for this one.
        small: what came of it.
        plans: the method's, then those that removed what its zeros had emptied.
        files: of the dense and the small network, as `timed`.
        fitted: how the budget was met.
        latencies: times of the tidied network's layers, where they limit the budget.
        stock: other networks that were timed.
    """

    dense: ChannelGraph
    tidied: ChannelGraph
    small: ChannelGraph
    plans: tuple[PruningPlan, ...]
    certificate: Certificate
    files: tuple[OnnxFile, OnnxFile]
    timed: LatencyComparison
    fitted: Fitted
    latencies: Latencies | None
    stock: tuple[StockRow, ...] = ()

    @property
    def kept(self) -> dict[str, int]:
        """Channels that are left of each group of the tidied network."""
        cut = {name: count for plan in self.plans for name, count in plan.kept.items()}
        return {group.name: cut.get(group.name, group.size) for group in self.tidied.groups}


def report_of(found: Finished, stages: Stages) -> Report:
    """All of it, as values."""
    # The files lie in a folder that is gone when someone reads this.
    latencies = tuple(dataclasses.replace(latency, path=Path(latency.path.name)) for latency in found.timed.latencies)
    timed = dataclasses.replace(found.timed, latencies=latencies)
    accuracies = (stages.accuracies.get("dense"), stages.final_accuracy)
    sides = zip((found.dense, found.small), accuracies, found.files, latencies, strict=True)
    dense, compact = (measurement(*side, sparse=bool(found.plans[0].nonzero)) for side in sides)
    certificate = dataclasses.replace(found.certificate, onnx_max_relative_error=found.files[1].max_relative_error)
    limit = found.fitted.shares.get(Metric.LATENCY_MS)
    return Report(
        dense=dense,
        compact=compact,
        environment=Environment.collect(),
        recipe=dataclasses.asdict(stages.recipe),
        recipe_hash=stages.recipe_hash,
        certificate=certificate.to_json() | _integers(stages.quantized),
        latency=timed.to_json() | {"ratio": dataclasses.asdict(timed.ratios[0])},
        widths=tuple(_widths(found)),
        history=stages.history,
        accuracies=stages.accuracies,
        refusals=tuple(dataclasses.asdict(refusal) for refusal in found.tidied.refusals),
        warnings=tuple(_warnings(found, certificate)),
        seconds=stages.seconds,
        target=target_facts(timed),
        layers=() if found.latencies is None else tuple(_layers(found, found.latencies)),
        search=tuple(_search(found)) if limit else (),
        latency_band=(BAND * limit, limit) if limit else None,
        stock=tuple(_stock(found, stages.recipe.data)),
        stock_verdict=verdict(found.stock, stages.final_accuracy, stages.recipe.data)
        if stages.recipe.compare_stock
        else "",
    )


def measurement(
    graph: ChannelGraph, accuracy: float | None, file: OnnxFile, latency: Latency, *, sparse: bool = False
) -> Measurement:
    """One network and its file; with `sparse` also how many weights are not zero."""
    return Measurement(
        accuracy=accuracy,
        num_params=sum(parameter.numel() for parameter in graph.model.parameters()),
        num_macs=num_macs(graph),
        size_bytes=file.size_bytes,
        latency_ms=latency.p50_ms,
        latency_p20_ms=latency.p20_ms,
        latency_p80_ms=latency.p80_ms,
        num_nonzero=num_nonzero(graph) if sparse else None,
    )


def _integers(file: QuantizedFile | None) -> dict[str, object]:
    """How far the file in int8 is from the float one, on the images that its ranges come from."""
    if file is None:
        return {}
    return {"int8": dataclasses.asdict(file.difference) | {"float_layers": list(file.float_layers)}}


def target_facts(timed: LatencyComparison) -> TargetFacts:
    """What the files were timed on."""
    latency = timed.latencies[-1]
    runtime, version = (timed.runtime.split(maxsplit=1) + [""])[:2]
    return TargetFacts(
        name=timed.target,
        runtime=runtime,
        version=version,
        precision=latency.precision,
        threads=latency.threads,
        device=", ".join(timed.device.values()),
        output_error=latency.output_error,
    )


def _widths(found: Finished) -> Iterator[Width]:
    counts = Costs(found.tidied).dense
    for number, group in enumerate(found.tidied.groups):
        steps = () if found.latencies is None else tuple(edges(found.latencies.along(counts, number)))
        yield Width(group.name, group.size, found.kept[group.name], steps)


def explained(found: Finished, latencies: Latencies, peaks: Peaks) -> str:
    """The three layers that take most of what is left: their time before and after, and what they are bound by.

    >>> _change(LayerTime("conv1", 0.5, 0.25, 100, 50), "compute")
    'conv1 0.5 -> 0.25 ms, bound by compute'
    """
    bounds = {row.name: row.bound for row in layer_times(found.tidied, latencies, peaks)}
    slowest = sorted(_layers(found, latencies), key=lambda layer: -layer.compact_ms)[:3]
    return "; ".join(_change(layer, bounds.get(layer.name, "")) for layer in slowest)


def _change(layer: LayerTime, bound: str) -> str:
    cause = f", bound by {bound}" if bound else ""
    return f"{layer.name} {layer.dense_ms:.3g} -> {layer.compact_ms:.3g} ms{cause}"


def _layers(found: Finished, latencies: Latencies) -> Iterator[LayerTime]:
    costs, kept = Costs(found.tidied), found.kept
    counts = costs.counts({group: kept[group.name] for group in found.tidied.groups})
    times = zip(latencies.per_layer(costs.dense), latencies.per_layer(counts), strict=True)
    for term, (dense_ms, compact_ms) in zip(found.tidied.timed, times, strict=True):
        macs = Cost((term,), costs.dense)
        num_macs = (0, 0) if isinstance(term.layer, Pass) else (round(macs(costs.dense)), round(macs(counts)))
        yield LayerTime(term.name, float(dense_ms), float(compact_ms), *num_macs)


def _stock(found: Finished, data: str | None) -> Iterator[StockNetwork]:
    for row in found.stock:
        stock = row.stock
        yield StockNetwork(
            stock.name,
            stock.num_macs / num_macs(found.dense),
            row.latency_ratio,
            published_accuracy=stock.accuracy,
            data=stock.data,
            comparable=stock.accuracy is not None and stock.data == data,
            note=row.note,
        )


def _search(found: Finished) -> Iterator[SearchStep]:
    latency = Metric.LATENCY_MS.value
    for candidate in found.fitted.candidates:
        measured = candidate.measured[latency]
        low, high = candidate.interval or (measured, measured)
        yield SearchStep(candidate.predicted[latency], measured, low, high, candidate.macs_ratio, candidate.in_band)


def _warnings(found: Finished, certificate: Certificate) -> Iterator[str]:
    ratio, plan = found.timed.ratios[0], found.plans[0]
    if found.latencies is None:  # else the widths are measured ones
        slow = width_warning(found.kept)
        if slow:
            yield slow
    if ratio.value > 1 / 1.05:
        yield f"the small network is not clearly faster: latency ratio {ratio.value:.2f}"
    limit = found.fitted.shares.get(Metric.LATENCY_MS)
    if limit and ratio.low > limit:
        yield f"the finished file takes {ratio.value:.3f}x, more than the budget's {limit:.3f}x"
    if found.fitted.candidates and not any(candidate.in_band for candidate in found.fitted.candidates):
        yield "no candidate lies within 5 % of the budget: widths come in coarser steps, or the machine is busy"
    if found.timed.busy:
        yield "the machine was busy while latency was measured: wall times are upper bounds"
    fixed = next((group.fixed_by for group, keep in plan.keep.items() if group.fixed_by and not keep.all()), None)
    if fixed:
        yield f"the small network is a recorded program, not the network's own class: {fixed}"
    if certificate.renormalised:
        yield f"{len(certificate.renormalised)} channel groups are normalised anew over what is left of them"
    if found.tidied.uncounted:
        yield f"MACs leave out ops without a rule: {', '.join(found.tidied.uncounted)}"
