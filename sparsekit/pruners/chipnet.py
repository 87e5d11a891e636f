"""ChipNet: gates that two losses make crisp and the budget counts.

Every channel has a gate z' = 1 - exp(-gamma z) + z exp(-gamma) with z = sigmoid(beta zeta), a smooth step over a
logistic curve; zeta trains with the weights. The loss gains `budget_weight` times the squared distance between the
share of channels that are open and the budget's, and `crispness_weight` times the mean of (z' - z)^2. Open is counted
with a logistic rounding of z'. Over the run beta rises from 1 to 1.4, gamma from 2 by a factor of sqrt(2) per
twentieth to at most 256, the rounding's steepness from 10 to 60: what the paper does per epoch in its 20 epochs.

The budget fixes how many channels each group keeps, so the shares are compared group by group, weighted by size; for
a single group that is the paper's loss. The gates scale every place that reads a channel, see `gates.py`.

Needs task.fit.

Source: Tiwari et al., "ChipNet: Budget-Aware Pruning with Heaviside Continuous Approximations", ICLR 2021,
arXiv:2102.07156. It trains with AdamW at a rate and a weight decay of 0.001 and batches of 32, without weight decay on
zeta; here zeta has it too, which over a run shrinks zeta by a few percent at most.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import Counts, TrainingOptions, penalised, require_positive, trained_plan, trainee
from sparsekit.selection import keep_top
from sparsekit.task import Record, Schedule, Task

PAPER_EPOCHS = 20


def sharpness(progress: float) -> tuple[float, float, float]:
    """beta, gamma and kappa after a share `progress` in [0, 1] of the run.

    >>> [round(value, 2) for value in sharpness(0.5)]
    [1.2, 64.0, 60.0]
    """
    epoch = PAPER_EPOCHS * progress
    return min(6.0, 1 + 0.02 * epoch), min(256.0, 2 * 2 ** (epoch / 2)), min(60.0, 10 + 5 * epoch)


def crisp_gates(zeta_GC: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The logistic gate z and the crisp gate z' = 1 - exp(-gamma z) + z exp(-gamma), both [G, C] in [0, 1]."""
    soft_GC = torch.sigmoid(beta * zeta_GC)
    return soft_GC, 1 - torch.exp(-gamma * soft_GC) + soft_GC * math.exp(-gamma)


class CrispNetwork(nn.Module):
    """A network behind crisp gates; each training forward sharpens them.

    zeta and the position in the schedule are part of `state_dict`, so that a run can resume.

    Args:
        network: owned and trained from here on.
        counts: how many channels stay of each group.
        method: the options.
        num_steps: length of the whole run.
    """

    def __init__(self, network: nn.Module, counts: Counts, method: ChipNet, *, num_steps: int) -> None:
        super().__init__()
        self.gated, self.method, self.counts, self.num_steps = (
            GatedNetwork(network, [*counts]),
            method,
            counts,
            num_steps,
        )
        # The loop has one learning rate, whose mean over the cosine is half its peak. A step of AdamW is about as long
        # as the rate, so that in zeta = c p zeta moves c times as far as p.
        self.scale = method.reach / (method.lr / 2 * max(1, num_steps))
        generator = torch.Generator().manual_seed(method.seed)
        self.scaled_zeta = nn.Parameter(0.01 * torch.rand(self.gated.valid.shape, generator=generator) / self.scale)
        self.keep_counts = nn.Buffer(torch.tensor([*counts.values()]))
        self.num_done = 0

    def forward(self, *inputs: Any) -> Any:
        if self.training:
            self.num_done += 1
        return self.gated(self.gates()[1], *inputs)

    # A number and not a buffer: on a GPU, reading one would make every step wait.
    def get_extra_state(self) -> dict[str, int]:
        return {"num_done": self.num_done}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.num_done = state["num_done"]

    @property
    def zeta(self) -> Tensor:
        """float [G, C]; larger is more open."""
        return self.scale * self.scaled_zeta

    def gates(self) -> tuple[Tensor, Tensor]:
        """z and z' as they stand."""
        beta, gamma, _ = self._sharpness()
        return crisp_gates(self.zeta, beta, gamma)

    def penalty(self) -> Tensor:
        """Weighted budget and crispness losses."""
        valid = self.gated.valid
        soft_GC, crisp_GC = self.gates()
        kappa = self._sharpness()[2]
        open_G = (torch.sigmoid(kappa * (crisp_GC - 0.5)) * valid).sum(1)
        size_G = valid.sum(1)
        budget = ((self.keep_counts - open_G) / size_G).square() @ (size_G / size_G.sum())
        crispness = ((crisp_GC - soft_GC)[valid]).square().mean()
        return self.method.budget_weight * budget + self.method.crispness_weight * crispness

    def measure(self) -> Record:
        """Mean z'(1 - z') and the share of channels that are open."""
        gates = self.gates()[1].detach()[self.gated.valid]
        return {"mask_hardness": float((gates * (1 - gates)).mean()), "mask_open": float((gates > 0.5).float().mean())}

    def plan(self) -> PruningPlan:
        """Each group's largest zeta, and the trained weights with the gates folded in."""
        zeta = self.zeta.detach().cpu()
        scores = {group: row[: group.size] for group, row in zip(self.counts, zeta, strict=True)}
        folded = self.gated.weights(self.gates()[1])
        return trained_plan(self.gated.network, keep_top(scores, self.counts).keep, folded=folded)

    def _sharpness(self) -> tuple[float, float, float]:
        return sharpness(max(0, self.num_done - 1) / max(1, self.num_steps))


@dataclass(frozen=True)
class ChipNet(TrainingOptions):
    """Train gates and weights together for `epochs`, then keep each group's k most open.

    Attributes:
        lr: peak learning rate of AdamW, > 0; the paper's is the default.
        reach: how far zeta can move over the run, > 0; in the paper's 31,000 steps at a rate of 0.001 it is 31.
        budget_weight: of the budget loss.
        crispness_weight: of the crispness loss.
    """

    only_optimizer: ClassVar[str | None] = "adamw"

    reach: float = 30.0
    budget_weight: float = 30.0
    crispness_weight: float = 10.0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        require_positive("chipnet", self, "lr", "reach")

    def schedule(self) -> Schedule:
        """AdamW with a cosine over all epochs."""
        return replace(super().schedule(), optimizer="adamw")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task.
            BudgetError: the budget lies below what the network can reach.
        """
        copy, counts, task = trainee("chipnet", graph, budget, task, round_to=self.round_to)
        if not counts:
            return PruningPlan()
        network = CrispNetwork(copy, counts, self, num_steps=self.epochs * task.num_batches)
        task.fit(network, penalised(task, network.penalty), self.schedule(), stage="prune", observe=network.measure)
        return network.plan()
