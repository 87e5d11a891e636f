"""The Triton bodies of the soft top-k and the Sinkhorn step against their float64 references, which stay in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparsekit.kernels.soft_topk as ops
from sparsekit.kernels.soft_topk import exact_mask, sinkhorn_step
from sparsekit.kernels.triton import soft_topk as kernels

SIZES = torch.tensor([[150], [2], [149], [64], [150]])
COUNTS = torch.tensor([1.0, 1.0, 147.5, 63.0, 60.0])
CASES = pytest.mark.parametrize(
    ("epsilon", "max_tile"), [(0.002, 2048), (0.02, 2048), (0.25, 2048), (1.0, 2048), (0.02, 64), (1.0, 64)]
)
TILES = pytest.mark.parametrize("max_tile", [64, 2048], ids=["rows of many tiles", "rows in one tile"])


def problem(num_columns: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, counts and validity of rows of very different lengths."""
    torch.manual_seed(0)
    return 2 * torch.rand(len(SIZES), num_columns), COUNTS, torch.arange(num_columns) < SIZES


def gradients(mask: Tensor, direction: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((mask * direction.to(mask.dtype)).sum(), of)


@CASES
def test_exact_mask_and_its_gradient(epsilon: float, max_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_TILE", max_tile)
    scores, counts, valid = problem()
    direction = torch.randn(scores.shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (scores, counts)]
        mask = exact_mask(leaves[0], leaves[1], valid, epsilon=epsilon)
        results.append((mask, *gradients(mask, direction, *leaves)))
    (mask, grad_scores, grad_counts), exact = results
    assert (mask.sum(1) - counts).abs().max() <= 1e-3
    assert not mask[~valid].any()
    # float32 holds the logits, up to 3 / epsilon, to 2^-24 of themselves; a sigmoid turns at most a quarter of it.
    error = 3 / epsilon * 2**-24 + 2**-20
    assert (mask - exact[0]).abs().max() <= error
    assert (grad_scores - exact[1]).abs().max() <= 2 / epsilon * direction.abs().max() * error
    # The mean over slopes m (1 - m), which are only known to 2^-24 where m is almost 1.
    slope_error = 2**-24 * counts / (exact[0] * (1 - exact[0])).sum(1)
    assert ((grad_counts - exact[2]).abs() <= direction.abs().max() * (4 * error + slope_error)).all()


@CASES
def test_sinkhorn_step_and_its_gradient_while_the_plan_hardens(
    epsilon: float, max_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MAX_TILE", max_tile)
    scores, counts, valid = problem()
    log_odds, potential = torch.zeros_like(scores), torch.zeros(len(scores))
    for _ in range(4):
        direction = torch.randn(scores.shape)
        results = []
        for dtype in (torch.float32, torch.float64):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (scores, counts)]
            state = log_odds.to(dtype), potential.to(dtype)
            mask, *new = sinkhorn_step(leaves[0], leaves[1], *state, valid, epsilon=epsilon)
            results.append((mask, *new, *gradients(mask, direction, *leaves)))
        (mask, log_odds, potential, grad_scores, grad_counts), exact = results
        assert (mask.sum(1) - counts).abs().max() <= 1e-3
        assert not mask[~valid].any()
        # Relative to a mask entry, that is the absolute error of its log-odds, known to 2^-24 of the largest.
        error = 4 * float(log_odds.abs().max()) * 2**-24 + 2**-20
        torch.testing.assert_close(mask.double(), exact[0], rtol=error, atol=1e-30)
        torch.testing.assert_close(log_odds.double(), exact[1], rtol=0, atol=error)
        torch.testing.assert_close(potential.double(), exact[2], rtol=0, atol=error)
        bound = error * direction.abs().max() * mask.amax(1)
        assert ((grad_scores - exact[3]).abs() <= 2 / epsilon * bound[:, None]).all()
        assert (grad_counts - exact[4]).abs().max() <= 2 * error * direction.abs().max()


def test_a_sinkhorn_row_whose_sigmoids_all_vanish_still_sums_to_its_count() -> None:
    """exp(-10,000) is 0 in float32."""
    scores, counts, valid = problem()
    mask, *_ = sinkhorn_step(scores, counts, scores - 10_000, torch.zeros(len(scores)), valid, epsilon=1.0)
    assert (mask.sum(1) - counts).abs().max() <= 1e-3
    _, _, potential = sinkhorn_step(scores, counts, scores + 10_000, torch.zeros(len(scores)), valid, epsilon=1.0)
    assert potential.isfinite().all()


def test_a_full_row_is_all_ones_and_scores_that_tie_share_their_count() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 7.0], [0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    mask = exact_mask(scores, torch.tensor([3.0, 1.0]), valid, epsilon=0.01)
    assert mask[0].tolist() == [1, 1, 1, 0]
    assert torch.allclose(mask[1], torch.full((4,), 0.25))
    (gradient,) = torch.autograd.grad(mask[0] @ torch.rand(4), scores)
    assert not gradient.any()


def test_padding_may_lie_between_the_entries() -> None:
    """As it does where all groups share one row."""
    scores, _, valid = problem()
    row, among = scores.view(1, -1), valid.view(1, -1)
    count = torch.tensor([250.0])
    expected = exact_mask(scores[valid][None], count, torch.ones(1, int(valid.sum()), dtype=torch.bool), epsilon=0.1)
    assert torch.allclose(exact_mask(row, count, among, epsilon=0.1)[among], expected[0], atol=1e-5)


def test_rows_of_half_precision_and_odd_strides_are_taken_as_they_are() -> None:
    scores, counts, valid = problem()
    strange = scores.T.contiguous().T.half()
    exact = exact_mask(strange.double(), counts, valid, epsilon=0.25)
    assert torch.allclose(exact_mask(strange, counts, valid, epsilon=0.25), exact.float(), atol=1e-5)


def test_rows_too_long_for_one_program_and_float64_stay_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> Tensor:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(kernels, "_launch", launched)
    scores, counts, valid = problem()
    exact_mask(scores.double(), counts, valid, epsilon=0.25)
    with pytest.raises(AssertionError, match="launched"):
        exact_mask(scores, counts, valid, epsilon=0.25)
    monkeypatch.setattr(ops, "MAX_COLUMNS", 149)
    exact_mask(scores, counts, valid, epsilon=0.25)


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """A copy between margins of NaN (of ones, if these are flags), and the buffer around it."""
    margin = 5000
    fill = torch.nan if values.is_floating_point() else 1
    buffer = torch.full((values.numel() + 2 * margin,), fill, dtype=values.dtype)
    inner = buffer[margin:-margin].view_as(values)
    inner.copy_(values)
    return inner, buffer


@TILES
@pytest.mark.parametrize(
    ("kernel", "inputs", "outputs"),
    [
        ("exact_mask_kernel", ("scores", "keep", "valid"), ("GC",)),
        ("exact_mask_backward_kernel", ("grad", "mask"), ("GC", "G")),
        ("sinkhorn_step_kernel", ("scores", "keep", "log_odds", "potential", "valid"), ("GC", "GC", "G", "G")),
        ("sinkhorn_step_backward_kernel", ("grad", "mask", "log_odds", "rise", "keep"), ("GC", "G")),
    ],
)
def test_kernels_read_and_write_their_rows_and_nothing_else(
    kernel: str, inputs: tuple[str, ...], outputs: tuple[str, ...], max_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter does not notice what lies out of bounds: margins of NaN do."""
    monkeypatch.setattr(kernels, "MAX_TILE", max_tile)
    scores, keep, valid = problem()
    rows, column = torch.rand_like(scores), torch.rand(len(scores))
    values = {"scores": scores, "keep": keep, "valid": valid.to(torch.uint8), "potential": column, "rise": column}
    values |= {"grad": rows, "mask": rows, "log_odds": rows}
    read = [guarded(values[name])[0] for name in inputs]
    written = [guarded(torch.full_like(rows if shape == "GC" else column, torch.nan)) for shape in outputs]
    steps = [ops.NEWTON_STEPS] if kernel == "exact_mask_kernel" else []
    kernels._launch(getattr(kernels, kernel), scores, *read, *(inner for inner, _ in written), *steps, epsilon=0.25)
    for inner, buffer in written:
        assert inner.isfinite().all()
        assert buffer.isfinite().sum() == inner.numel()
