"""Seconds of work on a GPU: what launching it from Python costs left out, its data in memory and not in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLUSH_BYTES = 150 * 2**20  # the L2 cache of an H100 three times
_NUM_WARMUPS = 3  # compiles, lets libraries choose, and fills their workspaces before the capture


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The work of `run` as a CUDA graph, which computes it again from what its inputs then hold.

    The graph reads the memory that `run` read, so whoever made that memory must keep it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_NUM_WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails may leave its stream the current one; the outer block does not
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    replay()  # the first replay uploads the graph
    return replay


def flush_buffer() -> Tensor:
    """What `cold_seconds` reads to empty the cache."""
    return torch.ones(FLUSH_BYTES // 4, device="cuda")


def cold_seconds(run: Callable[[], object], flush: Tensor) -> float:
    """Seconds of one call, by the GPU's clock, when its cache holds nothing but `flush`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Read and not written, else the cache would write it back on the clock; and long enough to launch `run` meanwhile
    flush.sum()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def replay_seconds(runs: Sequence[Callable[[], object]], *, num_rounds: int = 20) -> list[list[float]]:
    """Seconds of each run in each round: as CUDA graphs, from a cold cache, taking turns so that they share all drift.

    Returns:
        for each run `num_rounds` times.
    """
    replays, flush = [captured(run) for run in runs], flush_buffer()
    rounds = [[cold_seconds(replay, flush) for replay in replays] for _ in range(num_rounds)]
    return [list(times) for times in zip(*rounds, strict=True)]
