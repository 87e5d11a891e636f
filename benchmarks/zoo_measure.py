"""One network of the zoo, in a process of its own: every cell of its row.

    python -m benchmarks.zoo_measure NAME CELLS.jsonl

Each cell is written as soon as it is known, so that a process that is killed leaves what it measured and the name of
the stage it died in.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import zoo_models, zoo_torch_pruning
from benchmarks.zoo_torch_pruning import Pruned, status_bytes
from sparsekit import ChannelGraph, PruningPlan, certify, compact, export_onnx, trace
from sparsekit.cost import term_value
from sparsekit.selection import keep_top

MAX_ONNX_BYTES = 400e6  # of weights: larger files take minutes to export and show nothing new
MAX_ROUNDS, ENOUGH_S = 3, 3.0  # both tools in turns, until so many rounds or seconds of CPU
SHOWN_REFUSALS = 3
MEMORY_BYTES = 20 * 2**30  # of the process; the largest network needs 16 GB for its certificate in float64


@dataclass(frozen=True)
class Notes:
    """Where cells go: a line of JSON each."""

    path: Path

    def write(self, **cells: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cells) + "\n")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that may fail: the row then says why, and the stages after it are measured all the same."""
        self.write(stage=name)
        try:
            yield
        # Networks and tools may raise anything; a failure belongs in its cell.
        except Exception as error:  # noqa: BLE001
            self.write(failures={name: one_line(error)})


def one_line(error: BaseException) -> str:
    """Type, message, and the innermost line that is neither torch's nor Python's."""
    frames = traceback.extract_tb(error.__traceback__)
    skipped = (f"{Path(torch.__file__).parent}/", f"{Path(os.__file__).parent}/", "<")
    where = next((frame for frame in reversed(frames) if not frame.filename.startswith(skipped)), frames[-1])
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:240]} ({'/'.join(Path(where.filename).parts[-2:])}:{where.lineno})"


@dataclass(frozen=True, eq=False)
class Ours:
    graph: ChannelGraph
    plan: PruningPlan
    small: nn.Module
    seconds: float
    growth_bytes: int


def ours(model: nn.Module, inputs: tuple[Any, ...], seed: int) -> Ours:
    """Trace, a random half of every group, compact; `growth_bytes` is how far resident memory rose on the way."""
    generator = torch.Generator().manual_seed(seed)
    ctypes.CDLL(None).malloc_trim(0)  # what others freed must not be there to be filled again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from VmRSS
    before = status_bytes("VmRSS")
    start = time.process_time()
    graph = trace(model, inputs, renormalise=True)
    scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
    plan = keep_top(scores, {group: max(1, group.size // 2) for group in graph.groups})
    small = compact(model, plan, inputs)
    seconds = time.process_time() - start
    return Ours(graph, plan, small, seconds, max(0, status_bytes("VmHWM") - before))


def theirs(model: nn.Module, inputs: tuple[Any, ...], seed: int) -> Pruned:
    """Torch-Pruning on a copy, because it cuts in place."""
    copied = copy.deepcopy(model)
    with zoo_torch_pruning.limits():
        return zoo_torch_pruning.prune(copied, inputs, seed)


def in_turns(model: nn.Module, inputs: tuple[Any, ...], seed: int, notes: Notes) -> tuple[Ours | None, Pruned | None]:
    """Both tools on the same network, in an order drawn anew every round; medians of CPU seconds into `notes`."""
    draw = random.Random(seed)
    seconds: dict[str, list[float]] = {"sparsekit": [], "torch_pruning": []}
    mine: Ours | None = None
    peer: Pruned | None = None
    running = sorted(seconds)
    for _ in range(MAX_ROUNDS):
        for tool in draw.sample(running, k=len(running)):
            gc.collect()
            with notes.stage(tool):
                if tool == "sparsekit":
                    done = ours(model, inputs, seed)
                    seconds[tool].append(done.seconds)
                    mine = mine or done
                else:
                    pruned = theirs(model, inputs, seed)
                    seconds[tool].append(pruned.seconds)
                    peer = peer or pruned
        running = [tool for tool in running if seconds[tool]]  # what failed once fails again
        if sum(map(sum, seconds.values())) > ENOUGH_S:
            break
    for tool in running:
        notes.write(**{f"{tool}_s": statistics.median(seconds[tool]), f"{tool}_rounds": len(seconds[tool])})
    return mine, peer


def _num_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs_share(graph: ChannelGraph) -> float:
    """Share in [0, 1] of the MACs in layers with at least one prunable dimension."""
    # A size is {group numbers: positions per channel}; the empty key is what no group owns.
    macs = [(term_value(term, graph), any(any(size) for size in term.sizes)) for term in graph.macs]
    total = sum(count for count, _ in macs)
    return sum(count for count, prunable in macs if prunable) / total if total else 0.0


def describe(model: nn.Module, mine: Ours, notes: Notes) -> None:
    """What was cut, and what was not and why."""
    graph = mine.graph
    refused = Counter(refusal.op for refusal in graph.refusals)
    notes.write(
        groups=len(graph.groups),
        renormalised_groups=sum(not group.exact for group in graph.groups),
        fixed_groups=sum(bool(group.fixed_by) for group in graph.groups),
        dense_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        growth_bytes=mine.growth_bytes,
        macs=sum(term_value(term, graph) for term in graph.macs),
        prunable_share=macs_share(graph),
        params_kept=_num_params(mine.small) / _num_params(model),
        compacted_as=_form(model, mine),
        refusals=[vars(refusal) for refusal in graph.refusals[:SHOWN_REFUSALS]],
        refused_ops=dict(refused),
        uncounted=list(graph.uncounted),
    )


def _form(model: nn.Module, mine: Ours) -> str:
    if not mine.plan.keep:
        return "nothing to cut"
    return "module" if type(mine.small) is type(model) else type(mine.small).__name__


def exported(model: nn.Module, small: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The ONNX cell; where the small network cannot be exported, whether the dense one can."""
    if 4 * _num_params(small) > MAX_ONNX_BYTES:
        return {"onnx": "skipped", "onnx_reason": f"{4 * _num_params(small) / 1e6:.0f} MB of weights"}
    reason = _onnx(small, inputs)
    if isinstance(reason, float):
        return {"onnx": "equal", "onnx_max_relative_error": reason}
    if 4 * _num_params(model) > MAX_ONNX_BYTES or isinstance(_onnx(model, inputs), float):
        return {"onnx": "fails", "onnx_reason": reason}
    return {"onnx": "dense fails too", "onnx_reason": reason}


def _onnx(network: nn.Module, inputs: tuple[Any, ...]) -> float | str:
    """Relative error of ONNX Runtime against the network, or why there is none."""
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # reasons then name no folder
            return export_onnx(network, inputs, "network.onnx").max_relative_error
    # The exporter runs the network's own code, which may raise anything.
    except Exception as error:  # noqa: BLE001
        return one_line(error)


def measure(case: zoo_models.Case, notes: Notes) -> None:
    """Write every cell of one row."""
    seed = zlib.crc32(case.name.encode())
    torch.manual_seed(seed)
    notes.write(stage="build")
    model = case.build().eval()
    zoo_models.redraw(model, case.inputs())
    inputs = case.inputs()
    num_params = _num_params(model)
    notes.write(num_params=num_params)
    with notes.stage("warm-up"):
        _warm_up(seed)
    mine, peer = in_turns(model, inputs, seed, notes)
    if peer is not None:
        with notes.stage("torch_pruning forward"):
            notes.write(torch_pruning_params_kept=_num_params(peer.network) / num_params)
            notes.write(torch_pruning=zoo_torch_pruning.verdict(model, peer, inputs))
        del peer
    if mine is not None:
        _prove(model, mine, inputs, notes)


def _prove(model: nn.Module, mine: Ours, inputs: tuple[Any, ...], notes: Notes) -> None:
    with notes.stage("exact groups"):
        exact = trace(model, inputs)
        notes.write(exact_groups=len(exact.groups), exact_prunable_share=macs_share(exact))
    with notes.stage("describe"):
        describe(model, mine, notes)
    with notes.stage("forward"), torch.no_grad():
        mine.small(*inputs)
    with notes.stage("certify"):
        certificate = certify(model, mine.plan, mine.small, inputs)
        notes.write(
            max_relative_error=certificate.max_relative_error,
            max_abs_output=certificate.max_abs_output,
            certified=certificate.holds,
        )
    with notes.stage("onnx"):
        notes.write(**exported(model, mine.small, inputs))


class _Warm(nn.Module):
    """Touches what every first call pays for, whatever the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(tokens + tokens.mean(1, keepdim=True)).mean(1))
        return logits


def _warm_up(seed: int) -> None:
    """Imports and caches are paid once per process, by neither tool's timing."""
    inputs = (torch.randn(1, 3, 8, 8),)
    ours(_Warm().eval(), inputs, seed)
    zoo_torch_pruning.prune(_Warm().eval(), inputs, seed)


def main(name: str, path: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")  # of networks and exporters: nobody reads them here
    case = next(case for case in zoo_models.cases() if case.name == name)
    measure(case, Notes(Path(path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
