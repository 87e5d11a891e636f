"""The kernels' goal table on a GPU: first whether every configuration is right, then every layer beside its baselines.

    PYTHONPATH=. python -m benchmarks.kernels [--only NAME ...] [--out DIR] [--max-seconds N]
    PYTHONPATH=. python -m benchmarks.kernels_networks [...]
    PYTHONPATH=. python -m pytest -m gpu tests/kernels

On a machine that is lent, `--out "$OUT"`; where there is no git, SPARSEKIT_COMMIT says what is measured. A run takes at
most N seconds, 480 if not said otherwise, and a summary comes last. NAME is a case, or what its name has before a
slash: check, k0, k1, k1-bsr, k2, k3a, k3b, k5, k6, k7.

A row per case goes to `kernels.jsonl`: microseconds, how many times faster than each baseline (quartiles over 50 rounds
in which all take turns), TB/s and TFLOP/s, errors against a product in high precision, and for each goal whether it was
met, missed or dropped: by the kill rule such shapes then stay with the baseline. Everything runs as a CUDA graph on
random numbers, from a cold cache, going round sets of data that are together larger than it. The share of
dense speed that a kernel reaches is its teraflops over B0's or B2's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import rows
from benchmarks.kernels_cases import BSR_GOAL, CASES
from benchmarks.kernels_checks import CHECKS, checked
from benchmarks.kernels_measure import Case, gpu_clock, measure, versus
from benchmarks.kernels_networks import K0_CASE
from benchmarks.kernels_run import arguments, gpu_facts, run_all

MAX_SECONDS = 480
# The most important first, should time run out; cuSPARSELt last, should a capture of it do harm.
ORDER = ("check", "k5", "k7", "k1", "k2", "k0", "k3b", "k6", "k1-bsr", "k3a")


def table() -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes each row, in order."""
    makers: dict[str, Callable[[], dict[str, Any]]] = {name: partial(_check, name) for name in CHECKS}
    makers |= {case.name: partial(_measured, case) for case in (*CASES, K0_CASE)}
    return dict(sorted(makers.items(), key=lambda item: ORDER.index(item[0].partition("/")[0])))


def _check(name: str) -> dict[str, Any]:
    return {"case": name, **checked(CHECKS[name]())}


def _measured(case: Case) -> dict[str, Any]:
    return measure(case, gpu_clock())


def beside_bsr(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the geometric mean over the shapes with torch's BSR kernel beside them; None if one is missing."""
    shapes = [case.name for case in CASES if case.name.startswith("k1-bsr/")]
    quantities = {row["case"]: row.get("quantities", {}) for row in measured}
    ratios = [quantities[name][versus("B1")] for name in shapes if versus("B1") in quantities.get(name, {})]
    if len(ratios) < len(shapes):
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"case": "k1-bsr", "goals": [BSR_GOAL.row({versus("B1"): mean})], "note": "geometric mean over the shapes"}


def main() -> None:
    chosen = arguments("python -m benchmarks.kernels", __doc__, MAX_SECONDS)
    mean = beside_bsr(run_all("benchmarks.kernels", table(), chosen))
    if mean:
        rows.append("kernels", mean | gpu_facts(), folder=chosen.out)


if __name__ == "__main__":
    main()
