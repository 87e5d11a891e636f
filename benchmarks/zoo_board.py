"""The rows of the zoo as a page: what was cut, proven and exported, what was not and why, and a peer beside it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MAX_SECONDS, MEDIAN_SECONDS = 10.0, 0.5
_NOTHING = "nothing to cut"  # then the certificate is vacuous
_CELL_LENGTH = 90

_COLUMNS = (
    *("model", "groups", "prunable share of MACs", "params kept", "cut as", "max error", "exact or re-normalised"),
    *("ONNX", "seconds", "Torch-Pruning", "its seconds"),
)

_LEGEND = """\
Every network runs in a process of its own, on one thread, with random weights and its own forward, unedited. Nothing
hides behind a branch that is switched off: zeros, LayerScale's 1e-5 and every other parameter that holds one single
value are redrawn, and BatchNorm statistics are those of another random input, disturbed. Half of the channels of every
group go, drawn at random.

- **groups**: groups of coupled channels, with `renormalise=True`.
- **prunable share of MACs**: of the layers with at least one prunable dimension; in brackets the share without
  `renormalise=True`, where it differs.
- **cut as**: `module`, the user's own class and forward with smaller tensors, or `Program`, the recorded forward with
  the sizes that it hard-codes rewritten.
- **max error**: the compact network against the masked original, relative, float64, the worst of its outputs.
  A certificate holds up to 1e-9.
- **exact or re-normalised**: whether the mask is zeros alone, or how many groups lie under a normalisation, which the
  reference then takes over the surviving channels.
- **ONNX**: ONNX Runtime against the compact network, relative, float32, at two batch sizes.
- **seconds**: CPU time of trace + plan + compact. Both tools in turns, in an order drawn for each round, median of up
  to 3 rounds, warmed up on another network.
- **Torch-Pruning**: `BasePruner` at its defaults, `pruning_ratio=0.5`, random importance, the layers that make the
  outputs ignored. "equal": its network computes what the original does once the input slices that it cut are zero.
  Where a LayerNorm or the like runs over the channels "runs, off by" is no fault: there zeroing is not removal.
"""


def render(rows: Sequence[Row], command: str) -> str:
    """The board in Markdown; `rows` in the order in which they are to stand."""
    parts = ["# The zoo", _summary(rows), _LEGEND]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [row for row in rows if row["kind"] == kind]
        parts += [f"## {kind[0].upper()}{kind[1:]} ({len(chosen)})", _table(_COLUMNS, [_cells(row) for row in chosen])]
    parts += ["## What failed", _failures(rows), "## What is left alone, and why", _refusals(rows)]
    parts += ["## How it was measured", _provenance(rows, command)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _cells(row: Row) -> list[str]:
    failures: Mapping[str, str] = row.get("failures", {})

    def cell(key: str, show: Callable[[Any], str], *stages: str) -> str:
        if key in row:
            return show(row[key])
        reason = next((failures[stage] for stage in stages if stage in failures), None)
        return "-" if reason is None else f"**fails**: {_short(reason)}"

    return [
        row["model"].partition(":")[2],
        cell("groups", str, "sparsekit", "describe", "build"),
        cell("prunable_share", lambda share: _share(share, row.get("exact_prunable_share", share)), "describe"),
        cell("params_kept", _percent, "describe"),
        cell("compacted_as", str, "describe"),
        cell("max_relative_error", lambda _: _error(row), "forward", "certify"),
        cell("renormalised_groups", lambda n: f"{n} of {row['groups']} re-normalised" if n else "exact"),
        cell("onnx", lambda _: _onnx(row), "onnx"),
        cell("sparsekit_s", lambda s: f"{s:.2f}", "sparsekit"),
        _peer(row),
        cell("torch_pruning_s", lambda s: f"{s:.2f}"),
    ]


def _short(reason: str) -> str:
    return reason if len(reason) <= _CELL_LENGTH else reason[: _CELL_LENGTH - 3] + "..."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(share: float, exact: float) -> str:
    return _percent(share) if _percent(share) == _percent(exact) else f"{_percent(share)} ({_percent(exact)})"


def _error(row: Row) -> str:
    error = f"{float(row['max_relative_error']):.0e}"
    return error if row["certified"] else f"**{error}**"


def _onnx(row: Row) -> str:
    if row["onnx"] == "equal":
        return f"{row['onnx_max_relative_error']:.0e}"
    kind = row["onnx"] if row["onnx"] == "skipped" else f"**{row['onnx']}**"
    return f"{kind}: {_short(row['onnx_reason'])}"


def _peer(row: Row) -> str:
    if "torch_pruning" in row:
        return f"{row['torch_pruning']}, {_percent(row['torch_pruning_params_kept'])} kept"
    failures = row.get("failures", {})
    if "torch_pruning forward" in failures:
        return f"**does not run**: {_short(failures['torch_pruning forward'])}"
    return f"**fails**: {_short(failures['torch_pruning'])}" if "torch_pruning" in failures else "-"


def _summary(rows: Sequence[Row]) -> str:
    compacted = [row for row in rows if row.get("compacted_as", _NOTHING) != _NOTHING]
    seconds = [row["sparsekit_s"] for row in rows if "sparsekit_s" in row]
    both = [row for row in rows if "sparsekit_s" in row and "torch_pruning_s" in row]
    onnx = Counter(row.get("onnx", "not reached") for row in rows)
    cut = Counter(row["compacted_as"] for row in compacted)
    equal = sum(row.get("torch_pruning") == "equal" for row in rows)
    lines = [
        f"{len(rows)} networks, none edited.",
        f"- **Compacted**: {len(compacted)} ({_counts(cut)}); **certified** to 1e-9: "
        f"{sum(bool(row.get('certified')) for row in compacted)}.",
        f"- **ONNX Runtime**: {_counts(onnx)}.",
        f"- **Torch-Pruning**: {sum('torch_pruning' in row for row in rows)} run afterwards, {equal} of them equal to "
        "their masked originals.",
    ]
    if seconds:
        slowest = max((row for row in rows if "sparsekit_s" in row), key=lambda row: row["sparsekit_s"])
        lines.append(
            f"- **Seconds** of CPU for trace + plan + compact: median {statistics.median(seconds):.2f} (aim "
            f"{MEDIAN_SECONDS}), at most {max(seconds):.1f} (aim {MAX_SECONDS:.0f}; {slowest['model']})."
        )
    if both:
        ratios = {row["model"]: row["sparsekit_s"] / row["torch_pruning_s"] for row in both}
        slower = sorted((name for name in ratios if ratios[name] > 1), key=lambda name: -ratios[name])
        lines.append(
            f"- **Beside Torch-Pruning**, on the {len(both)} networks that both finish: median "
            f"{statistics.median(row['sparsekit_s'] for row in both):.2f} s and "
            f"{statistics.median(row['torch_pruning_s'] for row in both):.2f} s, median ratio "
            f"{statistics.median(ratios.values()):.2f}; slower on {len(slower)}"
            + (f" ({', '.join(f'{name} {ratios[name]:.2f}' for name in slower[:8])})." if slower else ".")
        )
    lines += _memory(rows)
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def _memory(rows: Sequence[Row]) -> list[str]:
    """Peak memory beside its bound: 2.2 times the parameters and 500 MB."""
    shares = {
        row["model"]: (row["dense_bytes"] + row["growth_bytes"]) / (2.2 * row["dense_bytes"] + 500e6)
        for row in rows
        if "growth_bytes" in row
    }
    if not shares:
        return []
    worst = max(shares, key=lambda name: shares[name])
    return [
        "- **Peak memory** of that, as a share of 2.2 times the parameters plus 500 MB: median "
        f"{_percent(statistics.median(shares.values()))}, at most {_percent(shares[worst])} ({worst}); "
        f"{sum(share > 1 for share in shares.values())} above."
    ]


def _failures(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        failures = {stage: why for stage, why in row.get("failures", {}).items() if not stage.startswith("torch_")}
        if row.get("compacted_as") == _NOTHING:
            failures["compact"] = "no group was found"
        if row.get("certified") is False:
            failures["certificate"] = f"error {row['max_relative_error']}, outputs up to {row['max_abs_output']}"
        if row.get("onnx") in ("fails", "dense fails too"):
            failures["onnx" if row["onnx"] == "fails" else "onnx, dense too"] = row["onnx_reason"]
        lines += [f"- `{row['model']}`, {stage}: {_escape(why)}" for stage, why in failures.items()]
    return "\n".join(lines) or "Nothing."


def _refusals(rows: Sequence[Row]) -> str:
    """A count per op, and the worst of each network."""
    networks: Counter[str] = Counter()
    sites: Counter[str] = Counter()
    for row in rows:
        networks.update(row.get("refused_ops", {}).keys())
        sites.update(row.get("refused_ops", {}))
    ops = [[f"`{op}`", str(networks[op]), str(sites[op])] for op in sorted(networks, key=lambda op: -networks[op])]
    worst = [
        [row["model"], _percent(r["macs_share"]), f"`{r['module']}`", f"`{r['source']}`", f"`{r['op']}`", r["reason"]]
        for row in rows
        for r in row.get("refusals", [])[:1]
    ]
    if not ops:
        return "Nothing is refused."
    header = ("model", "MACs locked", "module", "source", "op", "reason")
    return "\n\n".join([_table(("op", "networks", "places"), ops), "The worst of each network:", _table(header, worst)])


def _provenance(rows: Sequence[Row], command: str) -> str:
    last = max(rows, key=lambda row: row["when"])
    environment = last["environment"]
    versions = environment["packages"] | {"timm": last["timm"], "torch-pruning": last["torch_pruning_version"]}
    commits = dict.fromkeys(str(row["commit"]) for row in rows)
    return "\n".join(
        [
            f"- Command: `{command}`; rows: `benchmarks/results/zoo.jsonl`",
            f"- {environment['cpu']}, {environment['num_cores']} cores, one thread per process, {environment['os']}",
            f"- Python {environment['python']}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            f"- {min(row['when'] for row in rows)} to {last['when']}, commits {', '.join(commits)}",
        ]
    )
