"""sparsekit report: the pages of finished runs, made anew from their numbers, and one page that compares them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sparsekit.cli.console import json_option, print_json
from sparsekit.comparison import comparison_html, contests
from sparsekit.errors import UsageError
from sparsekit.gan_report import KIND, GanReport
from sparsekit.measured import read_document
from sparsekit.report import Report


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page that compares; pareto.html unless given.")
@json_option
def report(folders: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Rebuild report.html of finished runs from their report.json; compare two or more.

    The comparison has accuracy, MACs and latency of all of them in a chart, with a link to each run's page; generators
    are not in it. With --json the reports are printed instead, by folder, and nothing is written.

    \b
    sparsekit report out
    sparsekit report runs/* --out pareto.html
    sparsekit report runs/* --json
    """
    page = out or Path("pareto.html")
    runs = [folder for folder in dict.fromkeys(folders) if folder != page]  # which `runs/*` may have caught
    reports = {folder: read_document(folder / "report.json", _parsed) for folder in runs}
    compared = {folder: found for folder, found in reports.items() if isinstance(found, Report)}
    if out and (as_json or len(compared) < 2):
        raise UsageError(f"--out {out}: compares runs of sparsekit compress; give two or more, and not --json")
    if as_json:
        print_json({str(folder): found.to_json() for folder, found in reports.items()})
        return
    for folder, found in reports.items():
        (folder / "report.html").write_text(found.html(), encoding="utf-8")
        click.echo(f"{folder}/report.html   {found.headline}")
    if len(compared) > 1:
        found_contests = contests(compared)
        page.write_text(comparison_html(found_contests, page), encoding="utf-8")
        best = ", ".join(str(run.folder) for contest in found_contests for run in contest.best)
        click.echo(f"{page}   {len(compared)} runs, beaten by nothing else: {best or 'none'}")


def _parsed(document: Mapping[str, Any]) -> Report | GanReport:
    return GanReport.from_json(document) if document.get("kind") == KIND else Report.from_json(document)
