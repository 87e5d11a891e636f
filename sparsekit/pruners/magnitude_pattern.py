"""One-shot magnitude pruning of weights in a pattern whose zeros a GPU can skip. Needs no data.

`block:128x16` keeps whole groups of 128 outputs by 16 inputs, equally many for every 128 outputs, so that no part of
the GPU waits for another; `2:4` keeps 2 of every 4 consecutive inputs. Layers that the pattern does not fit, such as
the first and depthwise convolutions, stay as they are.

Source: Narang et al. 2017, "Block-Sparse Recurrent Neural Networks", arXiv:1711.02782; Mishra et al. 2021,
"Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, for 2:4.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from sparsekit.budget import Budget
from sparsekit.cost import prunable_weights
from sparsekit.errors import BudgetError, UsageError
from sparsekit.graph import ChannelGraph
from sparsekit.kernels.formats import COLS, ROWS
from sparsekit.kernels.masks import group_mask, nm_mask
from sparsekit.plan import PruningPlan
from sparsekit.selection import allocate_weights
from sparsekit.task import Task

_BLOCK = r"block:(\d+)x(\d+)"
_FACTORS = [0.98**k for k in range(10)]  # groups at the edge are smaller than others, and may be the ones dropped


@dataclass(frozen=True)
class MagnitudePattern:
    """Zero the groups of least norm in every layer that the pattern fits, the same share of each.

    Attributes:
        pattern: "block:VxG" with V outputs of 16 to 128 and G inputs of 8 to 64, powers of two; or "N:M".

    Raises:
        UsageError: a pattern that no kernel knows.
    """

    pattern: str = "block:128x16"

    def __post_init__(self) -> None:
        if self.pattern != "2:4":
            block = re.fullmatch(_BLOCK, self.pattern)
            if not block or int(block[1]) not in ROWS or int(block[2]) not in COLS:
                raise UsageError(
                    f"magnitude_pattern: pattern {self.pattern!r}: expected 2:4, or block:VxG with V in {ROWS} "
                    f"and G in {COLS}, like block:128x16"
                )

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        """The plan that meets `budget`, a limit on `nonzero`.

        Raises:
            BudgetError: another kind of budget, or one that the pattern cannot meet.
        """
        weights = prunable_weights(graph)
        counts = allocate_weights(graph, budget, scope="global")
        if not counts:
            return PruningPlan()
        (allowed,) = counts.values()
        fitting = {name: weight.detach().cpu() for name, weight in weights.items() if self._fits(graph, name, weight)}
        whole = sum(weight.numel() for name, weight in weights.items() if name not in fitting)
        density = (allowed - whole) / max(1, sum(weight.numel() for weight in fitting.values()))
        for factor in _FACTORS if density > 0 else ():
            masks = {name: self._mask(weight, density * factor) for name, weight in fitting.items()}
            if whole + sum(int(mask.sum()) for mask in masks.values()) <= allowed:
                return PruningPlan(nonzero=masks)
        raise BudgetError(
            f"budget nonzero<={allowed:,} cannot be met with pattern {self.pattern}: "
            f"{len(weights) - len(fitting)} of {len(weights)} layers, which hold {whole:,} weights, do not fit it"
        )

    def _fits(self, graph: ChannelGraph, name: str, weight: Tensor) -> bool:
        """Whether a layer is a plain product, and holds a few groups at least."""
        owner = graph.model.get_submodule(name.rpartition(".")[0])
        if weight.dim() not in (2, 4) or (isinstance(owner, _ConvNd) and (owner.groups > 1 or owner.transposed)):
            return False
        rows, cols = self._sides
        return 2 * len(weight) >= rows and weight.shape[1] >= 2 * cols and weight.shape[1] % 4 == 0

    def _mask(self, weight: Tensor, density: float) -> Tensor:
        """What stays of a weight of shape [N, K] or [N, C, R, S], bool of that shape."""
        taps_last = weight.movedim(1, -1)  # kernels run over one pixel of the window after the other
        scores_NK = taps_last.flatten(1).square()
        if self.pattern == "2:4":
            mask_NK = nm_mask(scores_NK)
        else:
            rows, cols = self._sides
            taps = scores_NK.shape[1] // weight.shape[1]
            num_groups = taps * -(-weight.shape[1] // cols)
            density = max(1, math.floor(density * num_groups)) / num_groups
            mask_NK = group_mask(scores_NK, rows=rows, cols=cols, density=density, taps=taps)
        return mask_NK.view(taps_last.shape).movedim(-1, 1).contiguous()

    @property
    def _sides(self) -> tuple[int, int]:
        """Outputs and inputs of a group."""
        block = re.fullmatch(_BLOCK, self.pattern)
        return (int(block[1]), int(block[2])) if block else (1, 4)
