"""The soft top-k and the Sinkhorn step on a GPU against float64 on the CPU, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsekit.kernels.soft_topk import MAX_COLUMNS, exact_mask, sinkhorn_step
from sparsekit.soft_topk import SoftMasks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Solve = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def problem(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged rows in float32, and counts from one to nearly all."""
    torch.manual_seed(0)
    sizes = torch.randint(num_columns // 2, num_columns + 1, (num_rows,))
    counts = torch.linspace(0, 1, num_rows) * (sizes - 2) + 1
    return torch.rand(num_rows, num_columns), counts, torch.arange(num_columns) < sizes[:, None]


def second_step(scores: Tensor, counts: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    """The mask of a plan that has begun to harden."""
    start = torch.zeros_like(scores), torch.zeros_like(counts)
    _, log_odds, potential = sinkhorn_step(scores.detach() / 2, counts.detach(), *start, valid, epsilon=epsilon)
    return sinkhorn_step(scores, counts, log_odds, potential, valid, epsilon=epsilon)[0]


def solved(scores: Tensor, counts: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    return exact_mask(scores, counts, valid, epsilon=epsilon)


@pytest.mark.parametrize("solve", [solved, second_step])
@pytest.mark.parametrize("epsilon", [0.002, 0.02, 0.25, 1.0])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(53, 2048), (3, 64), (5, 4), (7, 1000), (2, 4099), (1, 108_544), (1, MAX_COLUMNS + 1)]
)
def test_masks_and_gradients_are_those_of_float64(
    solve: Solve, epsilon: float, num_rows: int, num_columns: int
) -> None:
    scores, counts, valid = problem(num_rows, num_columns)
    direction, results = torch.randn(scores.shape), []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (scores, counts)]
        mask = solve(leaves[0], leaves[1], valid.to(device), epsilon)
        gradient, *_ = torch.autograd.grad((mask * direction.to(device, dtype)).sum(), leaves)
        results.append((mask.detach().cpu(), gradient.cpu()))
    (mask, gradient), (exact, exact_gradient) = results
    assert ((mask.sum(1) - counts).abs() <= 1e-3 + 1e-5 * counts).all()
    # 1e-5, or where scores are many epsilons wide, what float32 knows of logits as large as that.
    error = 1e-5 + 16 / epsilon * 2**-24
    assert (mask - exact).abs().max() <= error * exact.max()
    assert (gradient - exact_gradient).abs().max() <= 2 / epsilon * direction.abs().max() * error * exact.max()


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_training_through_soft_masks_fits_in_a_cuda_graph(solver: str) -> None:
    scores, counts, valid = (x.cuda() for x in problem(53, 512))
    eager, graphed = (
        SoftMasks(scores, counts, valid, solver=solver, epsilon=0.25).cuda()  # type: ignore[arg-type]
        for _ in range(2)
    )
    weights = torch.randn_like(scores)

    def step(masks: SoftMasks) -> Tensor:
        (gradient,) = torch.autograd.grad((masks(counts) * weights).sum(), masks.scaled_scores)
        return gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(graphed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step(graphed)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        expected = step(eager)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(graphed.mask, eager.mask)
