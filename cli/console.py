"""What the verbs share: progress on stderr, one JSON document on stdout, options that several verbs take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int, Mapping[str, float]], None]

# No markup: file names may hold brackets.
out = Console(markup=False, highlight=False)
err = Console(markup=False, highlight=False, stderr=True)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def print_json(document: Any) -> None:
    """The only thing on stdout when `--json` is given."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def warn(message: str) -> None:
    """One line on stderr."""
    click.secho(f"warning: {message}", err=True, fg="yellow")


@contextmanager
def progress() -> Iterator[Report]:
    """A callback for stages: bars on a terminal, one line per stage elsewhere (logs, CI)."""
    if not err.is_terminal:
        yield _lines()
        return
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as bars:
        rows: dict[str, TaskID] = {}

        def finish() -> None:
            for row in rows.values():
                bars.update(row, total=1, completed=1)

        def report(stage: str, done: int, total: int, record: Mapping[str, float]) -> None:
            if stage not in rows:
                finish()
                rows[stage] = bars.add_task(stage, total=None, note="")
            bars.update(rows[stage], total=total or None, completed=done, note=_note(record))

        yield report
        finish()


def _lines() -> Report:
    seen: set[str] = set()
    start = time.perf_counter()

    def report(stage: str, done: int, total: int, record: Mapping[str, float]) -> None:
        if stage not in seen:
            seen.add(stage)
            click.echo(f"[{time.perf_counter() - start:6.1f} s] {stage}", err=True)

    return report


def _note(record: Mapping[str, float]) -> str:
    shown = {
        "loss": "loss {:.3f}",
        "train_accuracy": "training accuracy {:.1%}",
        "discriminator_loss": "discriminator {:.3f}",
        "generator_loss": "generator {:.3f}",
        "variance_ratio": "variance {:.0%}",
    }
    return "  ".join(text.format(record[key]) for key, text in shown.items() if key in record)
