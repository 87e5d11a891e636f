"""Finished runs side by side: which of them no other beats, as a self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from sparsekit.page import render
from sparsekit.pareto import Point, front, pareto_charts
from sparsekit.report import Report


@dataclass(frozen=True)
class Run:
    """One finished run: the folder that it lies in, and the number of its point in the chart."""

    number: int
    folder: Path
    report: Report

    @property
    def points(self) -> list[Point]:
        """What to draw of it among others: not what its search tried."""
        points = self.report.points(str(self.folder), mark=str(self.number))
        return [point for point in points if point.kind != "tried"]


@dataclass(frozen=True)
class Contest:
    """Runs that may be compared: of the same network and data, timed on the same target. Fastest first."""

    runs: tuple[Run, ...]

    @property
    def points(self) -> list[Point]:
        """Of all runs, each dense or stock network once."""
        return list({(p.kind, p.label, p.accuracy): p for run in self.runs for p in run.points}.values())

    @property
    def best(self) -> tuple[Run, ...]:
        """The runs whose small network no other beats."""
        marks = {point.mark for point in front(self.points)}
        return tuple(run for run in self.runs if str(run.number) in marks)

    @property
    def charts(self) -> list[Markup]:
        return pareto_charts(self.points)


def contests(reports: Mapping[Path, Report]) -> tuple[Contest, ...]:
    """The reports by folder, in as many contests as it takes for ratios in each to mean the same."""
    contested: dict[tuple[object, ...], list[tuple[Path, Report]]] = {}
    for folder, report in reports.items():
        names = (report.recipe.get("model"), report.recipe.get("data"), report.dense.num_macs)
        contested.setdefault((*names, report.target_text), []).append((folder, report))
    found, number = [], 1
    for members in contested.values():
        members.sort(key=lambda member: member[1].ratio["latency_ms"] or float("inf"))
        found.append(Contest(tuple(Run(n, *member) for n, member in enumerate(members, number))))
        number += len(members)
    return tuple(found)


def comparison_html(found: tuple[Contest, ...], path: Path) -> str:
    """The page that compares them, to be written to `path`: it links to each run's report.html from there."""
    links = {
        run.folder: quote(Path(os.path.relpath(run.folder / "report.html", path.parent)).as_posix())
        for contest in found
        for run in contest.runs
    }
    num_best = sum(len(contest.best) for contest in found)
    values = {"contests": found, "links": links, "num_runs": len(links), "num_best": num_best}
    return render("comparison.html.jinja", values)
