"""What the soft masks of ResNet-50 cost, 53 layers and 26,560 filters: forward and backward.

    python -m benchmarks.soft_topk

On the CPU: our batched solvers beside a Python loop over the layers of 20 log-domain Sinkhorn iterations each, which
autograd goes back through. On a GPU, where there is one: beside the same iterations on all layers in a padded tensor,
as they are and as a CUDA graph. All take turns in drawn order; on a CPU one thread, and its CPU time is counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import rows
from sparsekit.kernels.soft_topk import exact_mask, sinkhorn_step

MAX_SECONDS = 60
NUM_ITERATIONS = 20
EPSILON = 0.25
KEEP_RATIO = 0.5
STAGES = {64: 3, 128: 4, 256: 6, 512: 3}  # bottlenecks of each width
WIDTHS = [64] + [
    width
    for inner, num_blocks in STAGES.items()
    for width in [inner, inner, 4 * inner] * num_blocks + [4 * inner]  # the last is the projection
]

Step = Callable[[], tuple[Tensor, ...]]


def log_sinkhorn(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor) -> Tensor:
    """The textbook's mask: both potentials in turns, on the [G, C, 2] costs of "drop" and "keep"."""
    num_G = valid_GC.sum(1)
    log_kernel_GC2 = -torch.stack([scores_GC**2, (scores_GC - 1) ** 2], 2) / EPSILON
    log_row_GC = torch.where(valid_GC, -num_G.log()[:, None], -torch.inf)
    log_target_G2 = torch.stack([1 - keep_G / num_G, keep_G / num_G], 1).log()
    g_G2 = torch.zeros_like(log_target_G2)
    for _ in range(NUM_ITERATIONS):
        f_GC = log_row_GC - torch.logsumexp(log_kernel_GC2 + g_G2[:, None], 2)
        g_G2 = log_target_G2 - torch.logsumexp(log_kernel_GC2 + f_GC[:, :, None], 1)
    return num_G[:, None] * (f_GC + log_kernel_GC2[:, :, 1] + g_G2[:, 1:]).exp()


def looped(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor) -> Tensor:
    """`log_sinkhorn` one layer at a time."""
    masks = []
    for scores_C, keep, valid_C in zip(scores_GC, keep_G, valid_GC, strict=True):
        size = int(valid_C.sum())
        masks.append(log_sinkhorn(scores_C[None, :size], keep[None], valid_C[None, :size])[0])
    return pad_sequence(masks, batch_first=True)


def exact(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor) -> Tensor:
    return exact_mask(scores_GC, keep_G, valid_GC, epsilon=EPSILON)


def one_step(scores_GC: Tensor, keep_G: Tensor, valid_GC: Tensor) -> Tensor:
    start = torch.zeros_like(scores_GC), torch.zeros_like(keep_G)
    return sinkhorn_step(scores_GC, keep_G, *start, valid_GC, epsilon=EPSILON)[0]


def stepper(solve: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device) -> Step:
    """Solves the masks of all layers and goes back to the scores."""
    torch.manual_seed(0)
    scores_GC = pad_sequence([torch.rand(width) for width in WIDTHS], batch_first=True).to(device).requires_grad_()
    sizes_G = torch.tensor(WIDTHS, device=device)
    valid_GC = torch.arange(scores_GC.shape[1], device=device) < sizes_G[:, None]
    direction_GC = torch.randn_like(scores_GC)
    keep_G = (KEEP_RATIO * sizes_G).round()

    def step() -> tuple[Tensor, ...]:
        mask_GC = solve(scores_GC, keep_G, valid_GC)
        return mask_GC.detach(), *torch.autograd.grad(mask_GC, scores_GC, direction_GC)

    return step


def as_graph(step: Step) -> Step:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def seconds_on_cpu(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def seconds_on_gpu(step: Step, num_steps: int = 20) -> float:
    """Of one step among `num_steps` in a row, until the device has finished."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_steps):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / num_steps


def interleaved(turns: dict[str, Step], timed: Callable[[Step], float]) -> dict[str, list[float]]:
    """Seconds of each step, in rounds of drawn order, until the time is up."""
    for step in [*turns.values()] * 2:  # the first steps allocate
        step()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order, end = random.Random(0), time.perf_counter() + MAX_SECONDS
    while time.perf_counter() < end:
        for name in order.sample([*turns], len(turns)):
            seconds[name].append(timed(turns[name]))
    return seconds


def largest_error(turns: dict[str, Step], ours: str, baseline: str) -> float:
    """How far our mask is from the baseline's, which has not quite converged."""
    return float((turns[ours]()[0] - turns[baseline]()[0]).abs().max())


def measure(turns: dict[str, Step], timed: Callable[[Step], float], baselines: tuple[str, ...], device: str) -> None:
    """Check that the masks agree, time all, and append the row."""
    errors = {name: largest_error(turns, "exact", name) for name in baselines}
    assert max(errors.values()) < 1e-2, errors
    seconds = {name: np.array(values) for name, values in interleaved(turns, timed).items()}
    ours = [name for name in turns if name not in baselines]
    speedups = {
        f"{name}, beside {baseline}": np.percentile(seconds[baseline] / seconds[name], [20, 50, 80]).tolist()
        for name in ours
        for baseline in baselines
    }
    rows.append(
        "soft_topk",
        {
            "device": device,
            "num_layers": len(WIDTHS),
            "num_filters": sum(WIDTHS),
            "epsilon": EPSILON,
            "num_iterations": NUM_ITERATIONS,
            "clock": "CPU time" if timed is seconds_on_cpu else "CUDA events",
            "num_rounds": len(seconds[ours[0]]),
            "milliseconds": {name: (1e3 * np.percentile(s, [20, 50, 80])).tolist() for name, s in seconds.items()},
            "speedup": speedups,
            "largest_mask_difference": errors,
        },
    )


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    turns = {"exact": stepper(exact, cpu), "sinkhorn step": stepper(one_step, cpu), "loop": stepper(looped, cpu)}
    measure(turns, seconds_on_cpu, ("loop",), "cpu, one thread")
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        padded = stepper(log_sinkhorn, gpu)
        turns = {"exact": as_graph(stepper(exact, gpu)), "sinkhorn step": as_graph(stepper(one_step, gpu))}
        turns |= {"padded": padded, "padded graph": as_graph(padded)}
        measure(turns, seconds_on_gpu, ("padded", "padded graph"), torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
