"""`sparsekit compress` with no arguments: seconds, accuracy, MACs, latency.

python -m benchmarks.default_run
"""

from __future__ import annotations

import tempfile
import time

from benchmarks import rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = rows.compress("--out", f"{folder}/out")
        wall_s = time.perf_counter() - start
    rows.append("default_run", {"wall_s": round(wall_s, 1)} | rows.summary(report))


if __name__ == "__main__":
    main()
