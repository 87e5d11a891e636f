"""What transport's masks cost: a training step with masks over one without, on random data.

    python -m benchmarks.transport_cost                                    # resnet56, batch 128, 32 pixels
    python -m benchmarks.transport_cost torchvision:resnet50 64 224

Both take turns, in pairs whose order is drawn. On a CPU one thread, and its CPU time is counted, which other work on
the machine disturbs least; on a GPU, where there is one, time until the device has finished, with 10 steps a turn.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import rows
from sparsekit.budget import Budget
from sparsekit.graph import trace
from sparsekit.networks import build_network
from sparsekit.pruner import channel_norms
from sparsekit.pruners.transport import MaskedNetwork, Transport
from sparsekit.selection import allocate

MAX_SECONDS = 240
BUDGET = "macs<=0.5x"


def masked(network: nn.Module, inputs: Tensor) -> MaskedNetwork:
    """The network that transport trains."""
    graph = trace(network, inputs)
    counts, norms = allocate(graph, Budget.parse(BUDGET)), channel_norms(graph)
    groups = {group: (norms[group], count) for group, count in counts.items() if count < group.size}
    return MaskedNetwork(copy.deepcopy(network), groups, method=Transport())


def stepper(network: nn.Module, inputs: Tensor, targets: Tensor, *, num_steps: int) -> Callable[[], float]:
    """Trains `network` for some steps and returns the seconds of one."""
    network.train().to(inputs.device)
    for parameter in network.parameters():
        if parameter.dim() == 4:  # as the training loop lays them out
            parameter.data = parameter.data.clone(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    def timed() -> float:
        clock = time.process_time
        if inputs.is_cuda:
            clock = time.perf_counter
            torch.cuda.synchronize()
        start = clock()
        for _ in range(num_steps):
            step()
        if inputs.is_cuda:
            torch.cuda.synchronize()
        return (clock() - start) / num_steps

    return timed


def main(name: str = "resnet56", batch_size: str = "128", side: str = "32") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = torch.randn(int(batch_size), 3, int(side), int(side), device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (len(inputs),), device=device)
    network = build_network(name, num_classes=10, in_channels=3)
    num_steps = 10 if inputs.is_cuda else 1
    with_masks = masked(network, inputs[:1].cpu())
    turns = {
        "plain": stepper(network, inputs, targets, num_steps=num_steps),
        "masked": stepper(with_masks, inputs, targets, num_steps=num_steps),
    }
    for turn in [*turns.values()] * 2:  # the first steps allocate
        turn()
    seconds: dict[str, list[float]] = {key: [] for key in turns}
    order, end = random.Random(0), time.perf_counter() + MAX_SECONDS
    while time.perf_counter() < end:
        for key in order.sample([*turns], 2):
            seconds[key].append(turns[key]())
    plain, ours = (np.array(values) for values in seconds.values())
    pairs = ours / plain  # neighbours in time, so that a busier minute weighs on both sides alike
    drawn = np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    rows.append(
        "transport_cost",
        {
            "network": name,
            "batch_size": len(inputs),
            "device": torch.cuda.get_device_name() if inputs.is_cuda else "cpu, one thread",
            "num_groups": len(with_masks.gated.groups),
            "clock": "wall time" if inputs.is_cuda else "CPU time",
            "num_pairs": len(plain),
            "ratio": float(np.median(pairs)),
            "ratio_95": np.percentile(np.median(pairs[drawn], axis=1), [2.5, 97.5]).tolist(),
            "plain_ms": (1e3 * np.percentile(plain, [20, 50, 80])).tolist(),
            "masked_ms": (1e3 * np.percentile(ours, [20, 50, 80])).tolist(),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
