"""One JSON line per measurement: what was measured, on which hardware and versions, at which commit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsekit.environment import Environment

RESULTS = Path(__file__).parent / "results"


def append(name: str, values: Mapping[str, Any], *, folder: Path = RESULTS) -> None:
    """Add a row to `<name>.jsonl` in a folder and print it.

    Where there is no git, the environment variable SPARSEKIT_COMMIT may say which commit was measured.
    """
    row = {
        "benchmark": name,
        **values,
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": os.environ.get("SPARSEKIT_COMMIT") or _described() or None,
        "environment": dataclasses.asdict(Environment.collect()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
    print(json.dumps(values, indent=1))


def _described() -> str:
    """The commit of this checkout; empty where git is not installed or this is no checkout."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()


def compress(*flags: str) -> dict[str, Any]:
    """Run `sparsekit compress <flags> --json` in a fresh process; its report."""
    command = [sys.executable, "-c", "from sparsekit.cli import main; main()", "compress", *flags, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that a row keeps."""
    return {
        key: report[key]
        for key in ("dense", "compact", "ratio", "accuracies", "certificate", "seconds", "recipe", "recipe_hash")
    } | {"latency": report["latency"]["ratio"], "runtime": report["latency"]["runtime"]}
