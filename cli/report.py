"""sparsekit report: the page of a finished run, made anew from its numbers."""

from __future__ import annotations

from pathlib import Path

import click

from sparsekit.cli.console import json_option, print_json
from sparsekit.report import Report


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def report(folders: tuple[Path, ...], as_json: bool) -> None:
    """Rebuild report.html of finished runs from their report.json.

    With --json the reports are printed instead, by folder, and nothing is written.

    \b
    sparsekit report out
    sparsekit report runs/* --json
    """
    reports = {folder: Report.read(folder / "report.json") for folder in folders}
    if as_json:
        print_json({str(folder): found.to_json() for folder, found in reports.items()})
        return
    for folder, found in reports.items():
        (folder / "report.html").write_text(found.html(), encoding="utf-8")
        click.echo(f"{folder}/report.html   {found.headline}")
