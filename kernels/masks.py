"""Masks whose zeros the kernels can skip: the best groups of a weight, or the best N of every M inputs."""

# N outputs, K inputs, R row blocks, H columns of groups, V rows and g columns of a group
from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.errors import KernelError
from sparsekit.kernels.formats import blocks


def group_mask(
    scores_NK: Tensor, *, rows: int, cols: int, density: float, balanced: bool = True, taps: int = 1
) -> Tensor:
    """Keep the groups of `rows` outputs by `cols` inputs whose scores sum to the most.

    The count is exact whatever the ties: groups are chosen by rank, never by threshold.

    Args:
        scores_NK: importance of each weight, [N, K] as `formats.pack` wants it, higher is kept.
        rows: outputs of a group.
        cols: inputs of a group.
        density: fraction of the groups to keep, in [0, 1]; rounded to a whole count.
        balanced: every block of `rows` outputs keeps equally many, so that no part of a GPU waits for another;
            otherwise they compete over the whole weight.
        taps: kernel positions of a convolution.

    Returns:
        bool [N, K], True where the weight is kept.

    >>> scores = torch.zeros(32, 16)
    >>> scores[0, 3], scores[20, 9] = 2, 1
    >>> group_mask(scores, rows=16, cols=8, density=0.5)[::16, ::8].int().tolist()
    [[1, 0], [0, 1]]
    """
    if not 0 <= density <= 1:
        raise KernelError(f"density {density}: must lie in [0, 1]")
    scores_RH = blocks(scores_NK, rows, cols, taps).sum((2, 3))
    ranked = scores_RH if balanced else scores_RH.flatten()[None]
    best = ranked.topk(round(density * ranked.shape[1]), dim=1).indices
    kept_RH = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, best, True).view_as(scores_RH)
    num_out, num_in = scores_NK.shape
    per_tap = kept_RH.view(kept_RH.shape[0], taps, -1).repeat_interleave(cols, 2)[:, :, : num_in // taps]
    return per_tap.reshape(-1, num_in).repeat_interleave(rows, 0)[:num_out]


def nm_mask(scores_NK: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs, exactly `n` whatever the ties.

    Returns:
        bool [N, K], True where the weight is kept.

    Raises:
        KernelError: if K is not a multiple of `m`, or not 0 < n <= m.

    >>> nm_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]])).int().tolist()
    [[1, 0, 1, 0]]
    """
    num_out, num_in = scores_NK.shape
    if not 0 < n <= m or num_in % m:
        raise KernelError(f"pattern {n}:{m}: needs 0 < N <= M and a multiple of M inputs, got {num_in}")
    runs = scores_NK.reshape(num_out, -1, m)
    best = runs.topk(n, dim=2).indices
    return torch.zeros_like(runs, dtype=torch.bool).scatter(2, best, True).view(num_out, num_in)
