"""sparsekit inspect: what can be cut, what cannot, and what each layer costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import click
from rich.table import Column, Table

from sparsekit.cli.console import json_option, out, print_json, progress
from sparsekit.cost import num_macs, num_params, term_value
from sparsekit.graph import ChannelGraph, Refusal, trace
from sparsekit.ingredients import build
from sparsekit.latency_model import Latencies
from sparsekit.layer_times import LayerTime, layer_times, measure_peaks
from sparsekit.recipe import Recipe
from sparsekit.targets import parse_target
from sparsekit.width_tables import measure_tables


@click.command()
@click.argument("model")
@click.option("--weights", help="Trained weights; groups and costs do not depend on them.")
@click.option("--data", help="Data set that says the input's size and the number of classes.")
@click.option("--image-size", type=int, help="Side of the input image in pixels, without data.")
@click.option("--renormalise", is_flag=True, help="Also list channels that LayerNorm and its like run over.")
@click.option("--latency", is_flag=True, help="Measure each layer at all widths; minutes the first time.")
@click.option("--target", default="onnxruntime", show_default=True, help="Where, as for sparsekit bench.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Intra-op threads.")
@json_option
def inspect(
    model: str,
    weights: str | None,
    data: str | None,
    image_size: int | None,
    renormalise: bool,
    latency: bool,
    target: str,
    threads: int,
    as_json: bool,
) -> None:
    """List channel groups, refusals with reasons, MACs and parameters per layer.

    A group is cut exactly unless it is re-normalised: then what is left is normalised anew. A group whose number the
    forward fixes is cut in a recorded program instead of the network's own class.

    With --latency each layer's time on the target too, timed alone; what bounds it: multiplying at the speed of a large
    matrix product there, moving its bytes at the speed of one with a weight too large for any cache, or neither; the
    next lower number of channels worth keeping, which is the end of a plateau of all layers that the group touches; and
    what the network gains when a tenth of the channels goes.

    \b
    sparsekit inspect resnet56
    sparsekit inspect lenet5 --data fashion-mnist
    sparsekit inspect torchvision:resnet50 --latency --threads 2
    sparsekit inspect torchvision:densenet121 --json
    """
    recipe = Recipe(model=model, weights=weights, data=data, image_size=image_size)
    network, _, inputs = build(recipe)
    graph = trace(network, inputs, renormalise=renormalise)
    times = _times(graph, target, threads) if latency else []
    if as_json:
        document = _document(graph)
        if latency:
            document["latency"] = {
                "target": target,
                "threads": threads,
                "batch_size": 1,
                "sum_ms": sum(row.time_ms for row in times),
                "layers": [dataclasses.asdict(row) for row in times],
            }
        print_json(document)
        return
    out.print(_groups(graph))
    if latency:
        out.print(_latency(times))
        click.echo(f"{sum(row.time_ms for row in times):.3f} ms in layers, {target}, {threads} thread(s), batch 1")
    else:
        out.print(_layers(graph))
    for rows in _alike(graph.refusals):
        row = rows[0]
        where = row.module if len(rows) == 1 else f"{row.module} and {len(rows) - 1} like it, each"
        click.echo(f"kept: {where} ({row.source}, aten::{row.op}): {row.reason}; {row.macs_share:.1%} of MACs")
    click.echo(f"{num_macs(graph):,} MACs, {num_params(graph):,} parameters, {len(graph.groups)} groups")


def _times(graph: ChannelGraph, target: str, threads: int) -> list[LayerTime]:
    on = parse_target(target)
    with progress() as report:
        tables = measure_tables(
            graph, on, threads=threads, progress=lambda done, total: report("measure layers", done, total, {})
        )
    return layer_times(graph, Latencies(graph, tables), measure_peaks(on, threads=threads))


def _document(graph: ChannelGraph) -> dict[str, object]:
    return {
        "num_macs": num_macs(graph),
        "num_params": num_params(graph),
        "groups": [
            {
                "name": g.name,
                "size": g.size,
                "exact": g.exact,
                "residual": g.residual,
                "fixed_by": g.fixed_by,
            }
            for g in graph.groups
        ],
        "refusals": [dataclasses.asdict(refusal) for refusal in graph.refusals],
        "layers": [{"name": name, "num_macs": macs, "num_params": params} for name, macs, params in _costs(graph)],
        "uncounted": list(graph.uncounted),
    }


def _costs(graph: ChannelGraph) -> list[tuple[str, int, int]]:
    """Name, MACs and parameters of each layer."""
    weights_of: Counter[str] = Counter()
    for term in graph.params:
        weights_of[term.name.rpartition(".")[0]] += term_value(term, graph)
    return [(term.name, term_value(term, graph), weights_of[term.name]) for term in graph.macs]


def _groups(graph: ChannelGraph) -> Table:
    table = Table("channel group", "channels", "tensors", "residual stream", "re-normalised", "fixed by the forward")
    for group in graph.groups:
        flags = ("yes" if flag else "" for flag in (group.residual, not group.exact))
        table.add_row(group.name, str(group.size), str(len(group.slots)), *flags, group.fixed_by)
    return table


def _layers(graph: ChannelGraph) -> Table:
    table = Table("layer", "MACs", "share", "parameters")
    total = num_macs(graph)
    for name, macs, params in _costs(graph):
        table.add_row(name, f"{macs:,}", f"{macs / total:.1%}", f"{params:,}")
    return table


def _latency(times: Sequence[LayerTime]) -> Table:
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("MACs", "ms", "share"))
    rest = (Column(name, no_wrap=True) for name in ("bound", "next plateau", "-10 %"))
    table = Table(Column("layer", overflow="fold"), *numbers, *rest)
    for row in times:
        plateau = f"{row.edge} of {row.width}: {row.edge_change:+.0%}" if row.edge_change is not None else ""
        gain = "" if row.gain_ms is None else f"{-row.gain_ms:+.3f} ms"
        macs = f"{row.num_macs:,}" if row.num_macs else ""
        name = f"{row.name} ({row.what})".strip() if row.what else row.name
        table.add_row(name, macs, f"{row.time_ms:.3f}", f"{row.share:.1%}", row.bound, plateau, gain)
    return table


def _alike(refusals: Iterable[Refusal]) -> list[list[Refusal]]:
    """Refusals of the same line for the same reason and share, as the blocks of a network have them."""
    alike: dict[tuple[str, str, str, str], list[Refusal]] = {}
    for row in refusals:
        alike.setdefault((row.source, row.op, row.reason, f"{row.macs_share:.1%}"), []).append(row)
    return list(alike.values())
