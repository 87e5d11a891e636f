"""The ops of the soft top-k in plain torch: their gradients, and what torch asks of an operator.

That masks sum to their counts, and what the papers say of them, is in tests/test_transport.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.kernels import soft_topk as ops
from sparsekit.kernels.soft_topk import exact_mask, sinkhorn_step

VALID = torch.arange(7) < torch.tensor([[7], [5], [4]])
COUNTS = torch.tensor([2.0, 3.5, 1.0])


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(3, 7, dtype=dtype)


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rows(dtype).requires_grad_(), COUNTS.to(dtype, copy=True).requires_grad_()


def state(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A plan that has begun to harden."""
    _, log_odds, potential = sinkhorn_step(
        rows(dtype).flip(1), COUNTS, torch.zeros(3, 7, dtype=dtype), torch.zeros(3, dtype=dtype), VALID, epsilon=0.3
    )
    return log_odds, potential


def test_gradients_are_those_of_finite_differences() -> None:
    inputs, before = leaves(torch.float64), state(torch.float64)
    assert torch.autograd.gradcheck(lambda s, k: exact_mask(s, k, VALID, epsilon=0.3), inputs)
    assert torch.autograd.gradcheck(lambda s, k: sinkhorn_step(s, k, *before, VALID, epsilon=0.3)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_gradient_of_a_sinkhorn_step_is_autograds_through_it(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    direction, before = torch.randn(3, 7, dtype=dtype), state(dtype)
    expected, closed = leaves(dtype), leaves(dtype)
    (ops._sinkhorn(*expected, *before, VALID, 0.3, num_steps=1)[0] * direction).sum().backward()
    (sinkhorn_step(*closed, *before, VALID, epsilon=0.3)[0] * direction).sum().backward()
    for ours, theirs in zip(closed, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_the_state_may_be_overwritten_before_the_backward_pass() -> None:
    """As `SoftMasks` does, whose buffers take the new state at once."""
    expected, ours = leaves(torch.float64), leaves(torch.float64)
    log_odds, potential = state(torch.float64)
    sinkhorn_step(*expected, log_odds.clone(), potential.clone(), VALID, epsilon=0.3)[0].square().sum().backward()
    mask, *new = sinkhorn_step(*ours, log_odds, potential, VALID, epsilon=0.3)
    assert not any(value.requires_grad for value in new)
    log_odds.copy_(new[0])
    potential.copy_(new[1])
    mask.square().sum().backward()
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_half_precision_is_computed_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        scores = rows().to(dtype).requires_grad_()
        mask = exact_mask(scores, COUNTS, VALID, epsilon=0.1)
        assert torch.equal(mask, exact_mask(scores.float(), COUNTS, VALID, epsilon=0.1))
        mask.square().sum().backward()
        assert scores.grad is not None
        assert scores.grad.dtype == dtype


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_keep_torchs_contract(dtype: torch.dtype) -> None:
    scores, counts = leaves(dtype)
    log_odds, potential = state(dtype)
    mask, odds, rise = rows(dtype), rows(dtype) - 0.5, COUNTS.to(dtype) / 9
    for operator, arguments in {
        ops._soft_topk: (scores, counts, VALID, 0.3),
        ops._soft_topk_backward: (mask.flip(0), mask, 0.3),
        ops._sinkhorn_step: (scores, counts, log_odds, potential, VALID, 0.3),
        ops._sinkhorn_step_backward: (mask.flip(0), mask, odds, rise, COUNTS.to(dtype), 0.3),
    }.items():
        torch.library.opcheck(operator, arguments)


class BothMasks(nn.Module):
    def forward(self, scores: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
        log_odds, potential = torch.zeros_like(scores), torch.zeros_like(counts)
        for _ in range(2):
            mask, log_odds, potential = sinkhorn_step(scores, counts, log_odds, potential, valid, epsilon=0.3)
        return mask + exact_mask(scores, counts, valid, epsilon=0.3)


def test_one_graph_holds_them_and_their_gradients() -> None:
    compiled = torch.compile(BothMasks(), fullgraph=True, backend="aot_eager")
    results = []
    for function in (BothMasks(), compiled):
        inputs = leaves(torch.float32)
        mask = function(*inputs, VALID)
        mask.square().sum().backward()
        results.append([mask, *(leaf.grad for leaf in inputs)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_an_exported_program_takes_any_number_of_rows_of_any_length(tmp_path: Path) -> None:
    num_rows, num_columns = torch.export.Dim("num_rows", min=2), torch.export.Dim("num_columns", min=2)
    shapes = {0: num_rows, 1: num_columns}
    program = torch.export.export(
        BothMasks(), (rows(), COUNTS, VALID), dynamic_shapes=(shapes, {0: num_rows}, shapes), strict=False
    )
    torch.export.save(program, tmp_path / "masks.pt2")
    loaded = torch.export.load(tmp_path / "masks.pt2").module()
    for few in (slice(None), slice(2)):
        inputs = rows()[few, :6], COUNTS[few], VALID[few, :6]
        assert torch.equal(loaded(*inputs), BothMasks()(*inputs))
