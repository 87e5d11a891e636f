"""From a budget of milliseconds or bytes to exact widths: importance, width tables and the closed loop put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekit.baking import bake_all
from sparsekit.budget import Budget, Limit, Metric
from sparsekit.closed_loop import Candidate, Measured, meet
from sparsekit.compaction import compact
from sparsekit.cost import Costs
from sparsekit.errors import BudgetError
from sparsekit.export import OnnxFile, export_onnx
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.latency import LatencyComparison, measure_latency
from sparsekit.latency_model import Latencies
from sparsekit.layer_times import Peaks, measure_peaks
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import channel_norms, first_images, squared_gradients
from sparsekit.selection import kept_count
from sparsekit.surgery import copied
from sparsekit.targets import Target
from sparsekit.task import Progress, Task
from sparsekit.tradeoff import CostOfCounts, damage_curve
from sparsekit.width_tables import measure_tables

# Images whose gradients say how important channels are; each is a forward and a backward pass of its own.
NUM_IMAGES = 64
# The smallest effect to tell from none, and how many launches and seconds that may take: of a file that shall lie
# within a budget's band, and of others.
_FINE, _COARSE = (0.02, 40, 120.0), (0.05, 10, 60.0)


@dataclass(frozen=True)
class Fitted:
    """A budget that channel counts can meet.

    Attributes:
        budget: keep ratios that are exact counts, in the place of measured limits.
        shares: the measured limits, as shares of what the dense file takes.
        candidates: the networks that were measured on the way, see `Candidate`.
    """

    budget: Budget
    shares: Mapping[Metric, float] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "keep": self.budget.keep,
            "shares": {metric.value: share for metric, share in self.shares.items()},
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], budget: Budget) -> Fitted:
        """What was fitted of `budget`."""
        keep = tuple((pattern, ratio) for pattern, ratio in values["keep"])
        shares = {Metric(name): share for name, share in values["shares"].items()}
        candidates = tuple(Candidate(**row) for row in values["candidates"])
        return cls(replace(budget, limits=(), keep=keep), shares, candidates)


@dataclass(frozen=True)
class Exported:
    """A network's ONNX file, and the file that the target runs of it, which may be the same."""

    onnx: OnnxFile
    timed: Path


@dataclass(frozen=True)
class Bench:
    """Where files are timed, and how.

    Attributes:
        target: the runtime and the machine.
        threads: of the runtime.
        folder: where candidates' files are written.
        progress: told of every launch.
        finish: makes what is shipped of a small network's float file, in integers, say.
    """

    target: Target
    threads: int
    folder: Path
    progress: Progress
    finish: Callable[[OnnxFile], OnnxFile] | None = None

    def write(self, network: nn.Module, inputs: tuple[Tensor, ...], name: str, *, finished: bool = False) -> Exported:
        """The network as verified ONNX file, and what the target runs of it.

        Raises:
            ExportError: the network cannot be exported, or not for this target.
        """
        file = export_onnx(network, inputs, self.folder / f"{name}.onnx")
        if finished and self.finish:
            file = self.finish(file)
        return Exported(file, self.target.prepare(network, inputs, file.path, self.folder))

    def compare(self, paths: Sequence[Path], stage: str, *, finely: bool = False) -> LatencyComparison:
        """Time files against the first."""
        resolve, max_launches, max_seconds = _FINE if finely else _COARSE
        return measure_latency(
            paths,
            target=self.target,
            threads=self.threads,
            resolve=resolve,
            max_launches=max_launches,
            max_seconds=max_seconds,
            progress=lambda done, total: self.progress(stage, done, total, {}),
        )

    def peaks(self) -> Peaks:
        """What the target does at best."""
        return measure_peaks(self.target, threads=self.threads)

    def latencies(self, graph: ChannelGraph) -> Latencies:
        """The times of a network's layers by their widths, from tables that are measured once per machine."""
        tables = measure_tables(
            graph,
            self.target,
            threads=self.threads,
            progress=lambda done, total: self.progress("width tables", done, total, {}),
        )
        return Latencies(graph, tables)


def fit(
    network: nn.Module,
    graph: ChannelGraph,
    inputs: tuple[Tensor, ...],
    budget: Budget,
    dense: Exported,
    bench: Bench,
    task: Task | None,
    *,
    round_to: int = 1,
) -> Fitted:
    """The budget with its measured limits turned into a keep ratio per group, exactly.

    Args:
        network: what is cut.
        graph: its channel groups.
        inputs: of one forward pass.
        budget: other limits absolute, see `cost.absolute`.
        dense: the files that fractions are of.
        bench: where candidates are timed.
        task: tells which layers matter; without it every layer matters the same.
        round_to: widths are multiples of this.

    Raises:
        BudgetError: the limits lie below the floor.
    """
    costs = _costs(graph, budget, bench)
    try_out = _TryOut(network, inputs, dense, bench, timed=Metric.LATENCY_MS in costs)
    relative = (_relative(limit, dense, try_out) for limit in budget.limits)
    limits = [limit for limit in relative if not (limit.relative and limit.value >= 1)]  # the dense file meets those
    start = Costs(graph).dense
    for number, group in enumerate(graph.groups):
        ratio = budget.keep_ratio(group.name)
        if ratio is not None:
            start[number] = kept_count(group.size, ratio, round_to=round_to)
    every = [number for number, group in enumerate(graph.groups) if budget.keep_ratio(group.name) is None]
    inner = [number for number in every if not (graph.groups[number].residual or graph.groups[number].fixed_by)]
    scores = importance(graph, [graph.groups[number] for number in every], task)
    damages = {group: damage_curve(score, weight) for group, (score, weight) in scores.items()}
    channel_scores = channel_norms(graph)
    for free in (inner, every):
        try:
            counts, candidates = meet(
                graph,
                limits,
                costs,
                try_out,
                scores=channel_scores,
                damages=damages,
                start=start,
                free=free,
                round_to=round_to,
            )
        except BudgetError:
            if free == every:
                raise
            continue  # residual streams, and what turns the network into a program, are cut where nothing else will do
        break
    sizes = zip(graph.groups, counts.tolist(), strict=True)
    keep = tuple((escape(group.name), count / group.size) for group, count in sizes)
    shares = {limit.metric: limit.value for limit in limits if limit.relative}
    return Fitted(replace(budget, limits=(), keep=keep), shares, tuple(candidates))


def importance(
    graph: ChannelGraph, groups: list[ChannelGroup], task: Task | None
) -> dict[ChannelGroup, tuple[Tensor, float]]:
    """How important each channel is within its group, float64 [C], and the group among the others, 1 on average.

    With data, the squared gradient of the loss in each channel's gate (to second order, what the loss rises by without
    it); else the squared norm of its filters, every group the same.
    """
    if task is None or not groups:
        return {group: (norm.double().square(), 1.0) for group, norm in channel_norms(graph).items() if group in groups}
    gated = GatedNetwork(bake_all(copied(graph.model)).eval(), groups)
    pairs = chain.from_iterable(zip(*batch, strict=True) for batch in first_images(task, NUM_IMAGES))
    singles = ((image[None], target[None]) for image, target in pairs)
    squares_GC = squared_gradients(gated, gated.valid, task, singles).cpu()
    mean = float(squares_GC.sum()) / len(groups)
    return {
        group: (row[: group.size], float(row.sum()) / mean if mean else 1.0)
        for group, row in zip(groups, squares_GC, strict=True)
    }


def _costs(graph: ChannelGraph, budget: Budget, bench: Bench) -> dict[Metric, CostOfCounts]:
    """What says how each limited metric grows with the widths."""
    costs = Costs(graph)
    found: dict[Metric, CostOfCounts] = {}
    for limit in budget.limits:
        if limit.metric is Metric.LATENCY_MS:
            found[limit.metric] = bench.latencies(graph)
        else:  # a file is little but its parameters
            found[limit.metric] = costs[Metric.NUM_PARAMS if limit.metric is Metric.SIZE_BYTES else limit.metric]
    return found


class _TryOut:
    """Cuts a plan's network, exports it and times the file beside the dense one."""

    def __init__(
        self, network: nn.Module, inputs: tuple[Tensor, ...], dense: Exported, bench: Bench, *, timed: bool
    ) -> None:
        self._network, self._inputs, self._dense, self._bench, self._timed = network, inputs, dense, bench, timed
        self._num_tried = 0

    def __call__(self, plan: PruningPlan) -> Measured:
        self._num_tried += 1
        stage = f"candidate {self._num_tried}"
        self._bench.progress(stage, 0, 0, {})
        small = compact(self._network, plan, self._inputs)
        files = self._bench.write(small, self._inputs, "candidate", finished=True)
        shares = {Metric.SIZE_BYTES: files.onnx.size_bytes / self._dense.onnx.size_bytes}
        if not self._timed:
            return Measured(shares)
        ratio = self._bench.compare([self._dense.timed, files.timed], stage, finely=True).ratios[0]
        return Measured(shares | {Metric.LATENCY_MS: ratio.value}, (ratio.low, ratio.high))

    def dense_ms(self) -> float:
        """The dense file's latency, in the same terms as the ratio: CPU time on one thread, else wall time."""
        latency = self._bench.compare([self._dense.timed], "latency of the dense network").latencies[0]
        return latency.cpu_ms if self._bench.threads == 1 else latency.p50_ms


def _relative(limit: Limit, dense: Exported, try_out: _TryOut) -> Limit:
    """A measured limit as a fraction of the dense file's; others as they are."""
    if limit.relative:
        return limit
    if limit.metric is Metric.LATENCY_MS:
        return Limit(limit.metric, limit.value / try_out.dense_ms(), relative=True)
    if limit.metric is Metric.SIZE_BYTES:
        return Limit(limit.metric, limit.value / dense.onnx.size_bytes, relative=True)
    return limit
