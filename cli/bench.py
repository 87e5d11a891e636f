"""sparsekit bench: time network files against each other on a target."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Column, Table

from sparsekit.cli.console import json_option, out, print_json, progress, warn
from sparsekit.latency import Latency, LatencyComparison, measure_latency


def _cpus(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """The numbers in "0,1"."""
    if text is None:
        return None
    if not all(word.isdecimal() for word in text.split(",")):
        raise click.BadParameter(f"{text!r}: expected numbers of CPUs such as 0,1")
    return tuple(int(word) for word in text.split(","))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--target", default="onnxruntime", show_default=True, help="Runtime, or ssh://user@host (see above).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Intra-op threads.")
@click.option("--affinity", callback=_cpus, metavar="0,1,..", help="CPUs to run on; any by default.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--resolve", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True, help="See above.")
@click.option("--max-seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="Stop after this long.")
@json_option
def bench(
    files: tuple[Path, ...],
    target: str,
    threads: int,
    affinity: tuple[int, ...] | None,
    batch_size: int,
    resolve: float,
    max_seconds: float,
    as_json: bool,
) -> None:
    """Time network files on a target.

    Each is compared with the first. Every file runs in processes of its own, in short bursts in shuffled turns,
    until an effect of --resolve (5 %) can be told from none. Its outputs are held against ONNX Runtime's in float32.

    \b
    Targets:
      onnxruntime[:PROVIDER]     ONNX files; on the CPU unless another execution provider is named
      openvino[:DEVICE]          ONNX files
      ncnn                       ONNX files, converted by pnnx
      torch[:compile][:cuda]     torch.export archives (.pt2); for the output error, beside their ONNX files
      executorch                 .pte programs, lowered to XNNPACK; for the output error, the same
      ssh://[user@]host[:port]   one of the above (?runtime=NAME) on a machine that ssh reaches without a
                                 password; ?python=PATH says which Python there, ?config=PATH which ssh
                                 configuration here
    Runtimes are held to float32; ?precision=native lets them choose.

    
    cold: from opening the file to the first output.   peak: memory that loading and running it added.
    waited: for a CPU, as a share of the run time.     error: largest output error over the largest output.

    \b
    sparsekit bench dense.onnx out/model.onnx
    sparsekit bench dense.onnx out/model.onnx --target 'openvino?precision=native' --threads 2
    sparsekit bench dense.onnx out/model.onnx --target 'ssh://pi@board?python=/home/pi/venv/bin/python'
    """
    with progress() as report:
        result = measure_latency(
            files,
            target=target,
            threads=threads,
            batch_size=batch_size,
            affinity=affinity,
            resolve=resolve,
            max_seconds=max_seconds,
            progress=lambda done, total: report("latency", done, total, {}),
        )
    if as_json:
        print_json(result.to_json())
        return
    out.print(_times(result))
    out.print(_facts(result.latencies))
    cpus = f", CPUs {','.join(map(str, affinity))}" if affinity else ""
    device = result.device.get("device", result.device["cpu"])
    click.echo(f"{result.runtime}, {threads} thread(s), batch {batch_size}{cpus}, {result.num_launches} launches")
    click.echo(f"{result.target} on {device}")
    for latency, ratio in zip(result.latencies[1:], result.ratios, strict=True):
        if not ratio.resolved:
            warn(f"{latency.path}: not resolved to {resolve:.0%} in the time given (--max-seconds)")
    if result.busy:
        warn("the machine was busy: wall times are upper bounds")


def _times(result: LatencyComparison) -> Table:
    columns = ("p20 ms", "p50 ms", "p80 ms", "p99 ms", "CPU ms", "n", "ratio [95 %]")
    table = _table(*columns)
    ratios = ["1", *(f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" for ratio in result.ratios)]
    for x, ratio in zip(result.latencies, ratios, strict=True):
        times = (x.p20_ms, x.p50_ms, x.p80_ms, x.p99_ms, x.cpu_ms)
        table.add_row(str(x.path), *(f"{ms:.3f}" for ms in times), str(x.num_samples), ratio)
    return table


def _facts(latencies: tuple[Latency, ...]) -> Table:
    noted = ["note"] * any(x.note for x in latencies)
    table = _table("load ms", "cold ms", "peak MB", "waited", "precision", "error", *noted)
    for x in latencies:
        peak = "?" if x.peak_memory_bytes is None else f"{x.peak_memory_bytes / 1e6:.1f}"
        waited = "?" if x.wait_share is None else f"{x.wait_share:.1%}"
        error = "?" if x.output_error is None else f"{x.output_error:.0e}" if x.output_error else "0"
        facts = (f"{x.load_ms:.1f}", f"{x.cold_start_ms:.1f}", peak, waited, x.precision, error)
        table.add_row(str(x.path), *facts, *([x.note] if noted else []))
    return table


def _table(*columns: str) -> Table:
    # The name folds before any number does.
    return Table(Column("file", overflow="fold", min_width=12), *(Column(name, no_wrap=True) for name in columns))
