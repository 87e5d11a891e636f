"""Runs a table of cases on a GPU and appends their rows; a case that fails stops no other."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from benchmarks.kernels_measure import described, failures


def alive() -> bool:
    """Whether the GPU still works for this process; after an illegal access it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def gpu_facts() -> dict[str, Any]:
    """The GPU, and the clocks and power limit that it has: read, never set."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.split("\n")[0]
    except FileNotFoundError:
        answer = ""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "num_processors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": importlib.import_module("triton").__version__,
        "nvidia_smi": dict(zip(query.split(","), (text.strip() for text in answer.split(",")), strict=False)),
    }


def arguments(prog: str, text: str | None, max_seconds: float) -> argparse.Namespace:
    """`--only`, `--out` and `--max-seconds`; ends the process where there is no GPU."""
    parser = argparse.ArgumentParser(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, or what their names begin with up to a slash")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, metavar="DIR", help="where the rows go")
    parser.add_argument("--max-seconds", type=float, default=max_seconds, help="later cases are skipped")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{prog}: needs a CUDA device")
    return chosen


def chosen_from(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """The names that were asked for, in the table's order.

    >>> chosen_from(["k1/a", "k1/b", "k10/a"], ["k1", "k10/a"]), chosen_from(["k1/a"], None)
    (['k1/a', 'k1/b', 'k10/a'], ['k1/a'])
    """
    if only is None:
        return [*names]
    return [name for name in names if any(name == each or name.startswith(f"{each}/") for each in only)]


def run_all(
    module: str, table: Mapping[str, Callable[[], dict[str, Any]]], chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure what was chosen of a table and append the rows; a fresh process goes on where this one's GPU is lost.

    Args:
        module: of the benchmark, which also names its file.
    """
    end = time.monotonic() + chosen.max_seconds
    names, facts, measured = chosen_from([*table], chosen.only), gpu_facts(), []
    if not names:
        sys.exit(f"{module}: no case is called {' or '.join(chosen.only)}")
    for number, name in enumerate(names, start=1):
        start = time.monotonic()
        row: dict[str, Any] = {"case": name}
        if start > end:
            row["error"] = f"skipped: {chosen.max_seconds:.0f} s are over"
        else:
            try:
                row = table[name]()
            except failures() as error:
                row["error"] = described(error)
        row["seconds"] = round(time.monotonic() - start, 1)
        rows.append(module.rpartition(".")[2], row | facts, folder=chosen.out)
        measured.append(row)
        if not alive():
            print(summary(measured))
            _go_on(module, names[number:], chosen.out, end - time.monotonic())
            sys.exit(f"{module}: {name} broke the GPU's context; what came after it ran in a new process")
        torch.cuda.empty_cache()
    print(summary(measured))
    return measured


def _go_on(module: str, names: Sequence[str], out: Path, max_seconds: float) -> None:
    """Measure these cases in a new process."""
    if names:
        flags = [f"--max-seconds={max_seconds:.0f}", f"--out={out}", "--only", *names]
        subprocess.run([sys.executable, "-m", module, *flags], check=False)


def summary(measured: Sequence[Mapping[str, Any]]) -> str:
    """A line for each goal, and for each number of a case that has none.

    >>> goal = {"what": "ours vs B0", "must": 1.2, "value": 1.25, "verdict": "met", "stretch_met": False}
    >>> print(summary([{"case": "k1/a", "goals": [goal]}, {"case": "k1/b", "error": "RuntimeError: no"}]))
    k1/a  ours vs B0 1.25, must 1.2: met
    k1/b  RuntimeError: no
    """
    lines = []
    for row in measured:
        said = [f"{name}: {why}" for name, why in row.get("failed", {}).items()]
        said += [f"{row['num_right']} right, {row['num_wrong']} wrong"] if "num_right" in row else []
        said += [row["error"]] if "error" in row else []
        for goal in row.get("goals", ()):
            if goal["value"] is not None:
                stretch = ", stretch too" if goal["stretch_met"] else ""
                said.append(f"{goal['what']} {goal['value']:.4g}, must {goal['must']:.4g}: {goal['verdict']}{stretch}")
        goals = {goal["what"] for goal in row.get("goals", ())}
        said += [
            f"{name} {value:.4g}"
            for name, value in row.get("quantities", {}).items()
            if " vs " in name and name not in goals
        ]
        lines += [f"{row['case']}  {each}" for each in said]
    return "\n".join(lines)
