"""sparsekit bench: time ONNX files against each other."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Column, Table

from sparsekit.cli.console import json_option, out, print_json, progress, warn
from sparsekit.latency import measure_latency


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Intra-op threads.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--max-seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="Stop after this long.")
@json_option
def bench(files: tuple[Path, ...], threads: int, batch_size: int, max_seconds: float, as_json: bool) -> None:
    """Time ONNX files in ONNX Runtime on the CPU.

    Each is compared with the first. Every file runs in processes of its own, in short bursts in shuffled turns,
    until the ratio is known to 2.5 %.

    \b
    sparsekit bench dense.onnx out/model.onnx
    """
    with progress() as report:
        result = measure_latency(
            files,
            threads=threads,
            batch_size=batch_size,
            max_seconds=max_seconds,
            progress=lambda done, total: report("latency", done, total, {}),
        )
    if as_json:
        print_json(result.to_json())
        return
    table = Table(Column("file", overflow="fold"), *("p20 ms", "p50 ms", "p80 ms", "CPU ms", "n", "ratio [95 %]"))
    ratios = ["1", *(f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" for ratio in result.ratios)]
    for latency, ratio in zip(result.latencies, ratios, strict=True):
        times = (latency.p20_ms, latency.p50_ms, latency.p80_ms, latency.cpu_ms)
        table.add_row(str(latency.path), *(f"{ms:.3f}" for ms in times), str(latency.num_samples), ratio)
    out.print(table)
    click.echo(f"{result.runtime}, {threads} thread(s), batch {batch_size}")
    if result.busy:
        warn("the machine was busy: wall times are upper bounds")
