"""L0 regularisation with hard-concrete gates: random gates that are exactly 0 or 1 with positive probability.

A training step draws u uniformly from (0, 1) per channel and opens its gate by
clip(sigmoid((log u - log(1 - u) + log alpha) / beta) (zeta - gamma) + gamma, 0, 1), with beta 2/3, gamma -0.1 and zeta
1.1. The loss gains `penalty_weight` times the mean probability that a gate is not 0, which is
sigmoid(log alpha - beta log(-gamma / zeta)). Outside training the gate is clip(sigmoid(log alpha) (zeta - gamma) +
gamma, 0, 1); it scales every place that reads the channel, see `gates.py`, since train-mode BatchNorm would undo the
scaling of a filter.

Needs task.fit.

Source: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, arXiv:1712.01312. It
gates the filters and the inputs of layers, divides the expected count by the number of training examples instead of
the number of channels (0.001 per weight for a WideResNet), trains for 200 epochs and evaluates averaged weights; its
own l2 term is left to the weight decay here.
"""

# G groups, C channels of the widest group; rows of narrower groups are padded and marked in valid_GC
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph
from sparsekit.plan import PruningPlan
from sparsekit.pruner import Counts, TrainingOptions, penalised, require_positive, trained_plan, trainee
from sparsekit.selection import keep_top
from sparsekit.task import Record, Task

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma, zeta
LEAST_LOG_ALPHA, MOST_LOG_ALPHA = math.log(0.01), math.log(100)
_SMALLEST_U = 1e-6


def sampled_gates(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates in [0, 1] for draws `u` in (0, 1)."""
    concrete = torch.sigmoid((torch.logit(u) + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_gates(log_alpha: Tensor) -> Tensor:
    """The gates outside training, in [0, 1].

    >>> expected_gates(torch.tensor([-3.0, 0.0, 3.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """How likely a sampled gate is not 0."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


class StochasticNetwork(nn.Module):
    """A network behind hard-concrete gates, drawn anew in each training forward.

    log alpha is part of `state_dict`, so that a run can resume; draws come from torch's generator.

    Args:
        network: owned and trained from here on.
        counts: how many channels stay of each group.
        method: the options.
    """

    def __init__(self, network: nn.Module, counts: Counts, method: HardConcrete) -> None:
        super().__init__()
        self.gated, self.method, self.counts = GatedNetwork(network, [*counts]), method, counts
        # The loop has one learning rate. Training a / c in place of a is training a at c * c times that rate.
        self.scale = math.sqrt(method.gate_lr / method.lr)
        start = -torch.logit(torch.tensor(method.droprate))
        noise = torch.randn(self.gated.valid.shape, generator=torch.Generator().manual_seed(method.seed))
        self.scaled_log_alpha = nn.Parameter((start + 0.01 * noise) / self.scale)

    def forward(self, *inputs: Any) -> Any:
        return self.gated(self._sample() if self.training else expected_gates(self.log_alpha), *inputs)

    @property
    def log_alpha(self) -> Tensor:
        """float [G, C]; larger is more open."""
        return self.scale * self.scaled_log_alpha

    def penalty(self) -> Tensor:
        """Weighted mean probability that a gate is not 0."""
        return self.method.penalty_weight * open_probability(self.log_alpha)[self.gated.valid].mean()

    def measure(self) -> Record:
        """Mean m(1 - m) of the gates outside training, and the expected share of gates that are not 0."""
        log_alpha = self.log_alpha.detach()[self.gated.valid]
        gates = expected_gates(log_alpha)
        hardness, expected = (gates * (1 - gates)).mean(), open_probability(log_alpha).mean()
        return {"mask_hardness": float(hardness), "mask_open": float(expected)}

    def plan(self) -> PruningPlan:
        """Each group's largest log alpha, and the trained weights with the gates folded in."""
        log_alpha = self.log_alpha.detach().cpu()
        scores = {group: row[: group.size] for group, row in zip(self.counts, log_alpha, strict=True)}
        folded = self.gated.weights(expected_gates(self.log_alpha))
        return trained_plan(self.gated.network, keep_top(scores, self.counts).keep, folded=folded)

    def _sample(self) -> Tensor:
        with torch.no_grad():  # far out there is no gradient that could bring it back
            self.scaled_log_alpha.clamp_(LEAST_LOG_ALPHA / self.scale, MOST_LOG_ALPHA / self.scale)
        u = torch.rand_like(self.scaled_log_alpha)
        return sampled_gates(self.log_alpha, _SMALLEST_U + (1 - 2 * _SMALLEST_U) * u)


@dataclass(frozen=True)
class HardConcrete(TrainingOptions):
    """Train gates and weights together for `epochs`, then keep each group's k largest log alpha.

    Attributes:
        penalty_weight: of the expected share of open gates.
        droprate: probability, in (0, 1), from which log alpha starts: log((1 - p) / p). The paper has 0.3 for a
            WideResNet and 0.5 for LeNet.
        gate_lr: peak learning rate of log alpha, > 0.
    """

    only_optimizer: ClassVar[str | None] = "sgd"

    penalty_weight: float = 1.0
    droprate: float = 0.3
    gate_lr: float = 1.0

    def __post_init__(self) -> None:
        require_positive("l0", self, "lr", "gate_lr")
        if not 0 < self.droprate < 1:
            raise UsageError(f"l0: droprate must be in (0, 1), got {self.droprate:g}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task.
            BudgetError: the budget lies below what the network can reach.
        """
        copy, counts, task = trainee("l0", graph, budget, task, round_to=self.round_to)
        if not counts:
            return PruningPlan()
        network = StochasticNetwork(copy, counts, self)
        task.fit(network, penalised(task, network.penalty), self.schedule(), stage="prune", observe=network.measure)
        return network.plan()
