"""Every network of the zoo: trace, cut half of every group, compact, certify, export, and Torch-Pruning beside it.

    python -m benchmarks.zoo [--only PATTERN ...] [--skip-done] [--jobs N] [--timeout-s S] [--board]

One process per network, small networks first, large ones alone at the end. Every row is written when it is known:
after an interruption `--skip-done` goes on. The last row of a network counts. Then `docs/ZOO.md` is written anew;
`--board` does only that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows, zoo_board, zoo_models

ROOT = Path(__file__).parents[1]
RESULTS = rows.RESULTS / "zoo.jsonl"
BOARD = ROOT / "docs" / "ZOO.md"
ALONE_MILLIONS = 150  # parameters above which two networks in float64 would not fit in memory side by side


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="such as 'timm:*'")
    parser.add_argument("--skip-done", action="store_true", help="leave networks alone that have a row")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="wall time one network may take")
    parser.add_argument("--board", action="store_true", help="only write docs/ZOO.md anew")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes it starts: what the rows say of their environment
    zoo = zoo_models.cases()
    done = _load()
    todo = [
        case
        for case in sorted(zoo, key=lambda case: case.millions)
        if any(fnmatch(case.name, pattern) for pattern in chosen.only)
        and not chosen.board
        and not (chosen.skip_done and case.name in done)
    ]
    for number, row in enumerate(_run(todo, chosen.jobs, chosen.timeout_s), start=1):
        rows.append("zoo", row)
        print(f"{number}/{len(todo)} {row['model']} {row['wall_s']:.0f} s {_brief(row)}", file=sys.stderr, flush=True)
    _tidy([case.name for case in zoo])
    BOARD.write_text(zoo_board.render(list(_load().values()), "python -m benchmarks.zoo"), encoding="utf-8")


def _run(todo: list[zoo_models.Case], jobs: int, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Rows as they come."""
    beside = [case for case in todo if case.millions <= ALONE_MILLIONS]
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(_row, case, timeout_s) for case in beside]):
            yield future.result()
    for case in todo:
        if case.millions > ALONE_MILLIONS:
            yield _row(case, timeout_s)


def _row(case: zoo_models.Case, timeout_s: float) -> dict[str, Any]:
    """Measure one network in a process of its own, and gather the cells it wrote."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.jsonl"
        path.touch()
        command = [sys.executable, "-m", "benchmarks.zoo_measure", case.name, str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        try:
            ended = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=timeout_s, check=False, capture_output=True, text=True
            )
            death = "" if ended.returncode == 0 else _death(ended)
        except subprocess.TimeoutExpired:
            death = f"more than {timeout_s:.0f} s"
        cells = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        "model": case.name,
        "kind": case.kind,
        "inputs": [list(shape) for shape in case.shapes],
        **gather(cells, death),
        "wall_s": time.perf_counter() - start,
        "timm": version("timm"),
        "torch_pruning_version": version("torch-pruning"),
    }


def _death(ended: subprocess.CompletedProcess[str]) -> str:
    last = ended.stderr.strip().splitlines()[-1:] or [""]
    return f"exit code {ended.returncode}: {last[0]}"


def gather(cells: list[dict[str, Any]], death: str) -> dict[str, Any]:
    """The cells of one process as one row; where it died, the stage it was in says how."""
    row: dict[str, Any] = {}
    failures: dict[str, str] = {}
    stage = "build"
    for cell in cells:
        stage = cell.pop("stage", stage)
        failures |= cell.pop("failures", {})
        row |= {key: _finite(value) for key, value in cell.items()}
    if death:
        failures[stage] = death
    return row | {"failures": failures}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _brief(row: dict[str, Any]) -> str:
    cells = {key: row.get(key) for key in ("certified", "compacted_as", "onnx", "sparsekit_s", "torch_pruning_s")}
    return f"{cells} {row['failures'] or ''}"


def _load() -> dict[str, dict[str, Any]]:
    """The last row of every network."""
    if not RESULTS.exists():
        return {}
    read: Callable[[str], dict[str, Any]] = json.loads
    found = [read(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {row["model"]: row for row in found}


def _tidy(order: list[str]) -> None:
    """One row per network, in the order of the zoo."""
    latest = _load()
    lines = [json.dumps(latest[name], allow_nan=False) for name in order if name in latest]
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(RESULTS)


if __name__ == "__main__":
    main()
