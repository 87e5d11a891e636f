"""What the verbs share: progress on stderr, one JSON document on stdout, options that several verbs take."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[str, int, int, Mapping[str, float]], None]

out = Console()
err = Console(stderr=True)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def print_json(document: Any) -> None:
    """The only thing on stdout when `--json` is given."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


@contextmanager
def progress() -> Iterator[Report]:
    """A callback for stages: bars on a terminal, one line per stage elsewhere (logs, CI)."""
    if not err.is_terminal:
        yield _lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=32),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, record: Mapping[str, float]) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    finished = bars.tasks[task].total or 1
                    bars.update(task, total=finished, completed=finished)
                tasks[stage] = bars.add_task(stage, total=None, note="")
            bars.update(tasks[stage], total=total or None, completed=done, note=_note(record))

        yield report
        for task in tasks.values():
            finished = bars.tasks[task].total or 1
            bars.update(task, total=finished, completed=finished)


def _lines() -> Report:
    seen: set[str] = set()
    start = time.perf_counter()

    def report(stage: str, done: int, total: int, record: Mapping[str, float]) -> None:
        if stage not in seen:
            seen.add(stage)
            err.print(f"[{time.perf_counter() - start:6.1f} s] {stage}", highlight=False, markup=False)

    return report


def _note(record: Mapping[str, float]) -> str:
    shown = {"loss": "{:.3f}", "train_accuracy": "{:.1%}"}
    return "  ".join(f"{key.split('_')[-1]} {text.format(record[key])}" for key, text in shown.items() if key in record)
