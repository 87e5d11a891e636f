"""Transportation pruning: soft channel masks that always sum to the budget, learned with the weights.

Importance scores and weights train together through the soft top-k of `soft_topk.py`, one mask per channel group,
which sums to the number of channels kept and hardens by itself as training goes on. How many channels each group
keeps is given beforehand, or learned: as one mask over all groups, or as keep ratios under a penalty on their cost.

The mask gates every place that reads a channel, see `gates.py`.

Needs task.fit.

Source: Li et al., "Differentiable Transportation Pruning", ICCV 2023, Algorithm 1 and, for learned keep ratios, A.9.
"""

# G groups, C channels of the widest group, R rows of the soft top-k: the groups, or one that holds them all
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sparsekit.budget import Budget, Metric
from sparsekit.errors import BudgetError, UsageError, nearest
from sparsekit.gates import GatedNetwork, Place
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan
from sparsekit.pruner import TrainingOptions, channel_norms, penalised, require_positive, trained_plan
from sparsekit.selection import allocate, whole_counts
from sparsekit.soft_cost import LearnedCounts, soft_limits
from sparsekit.soft_topk import SoftMasks, Solver
from sparsekit.surgery import copied, plain
from sparsekit.task import Record, Task

Scope = Literal["layer", "global"]
Ratios = Literal["given", "learned"]
ScoreInit = Literal["l2", "l1", "ones"]

_NORMS = {"l2": 2.0, "l1": 1.0}


class MaskedNetwork(nn.Module):
    """A network whose gates are trained soft masks, which each training forward advances by one step.

    Args:
        network: owned and trained from here on.
        groups: per pruned group its initial scores, float [C], and how many channels it keeps, 0 < k < C.
        method: how masks are computed and trained.
        learned: soft counts of the same groups that train along, in place of those in `groups`.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Mapping[ChannelGroup, tuple[Tensor, int]],
        *,
        method: Transport,
        learned: LearnedCounts | None = None,
    ) -> None:
        super().__init__()
        self.gated, self.method, self.learned = GatedNetwork(network, tuple(groups), at=method.gate), method, learned
        scores, counts = zip(*groups.values(), strict=True)
        self.masks = SoftMasks(
            pad_sequence([row.detach() for row in scores], batch_first=True),
            torch.tensor(counts),
            self.gated.valid,
            solver=method.solver,
            epsilon=method.epsilon,
            inner_steps=method.inner_steps,
            plan_every=method.plan_every,
            logodds_clip=method.logodds_clip,
            shared=method.scope == "global",
            scale=method.score_scale,
        )
        self.kept = nn.Buffer(self.masks.top_k(self.masks.keep_counts))
        self.watched = _three_channels(groups)

    def forward(self, *inputs: Any) -> Any:
        counts_G = self.learned() if self.learned else self.masks.keep_counts
        return self.gated(self.masks(counts_G), *inputs)

    def penalty(self) -> Tensor:
        """What the loss is raised by: being off the budget.

        What shall not decay gets a gradient without a value, the opposite of the optimizer's weight decay.
        """
        lasting = [] if self.method.decay_scores else [self.masks.scaled_scores]
        total = self.masks.scaled_scores.new_zeros(())
        if self.learned:
            lasting.append(self.learned.scaled_log_odds)
            total = total + self.learned.penalty()
        for parameter in lasting:
            decay = self.method.weight_decay / 2 * parameter.square().sum()
            total = total - (decay - decay.detach())
        return total

    def measure(self) -> Record:
        """Mean m(1 - m), number of channels swapped in since the last call, largest |sum of m - k|, three channels.

        With learned counts also the cost above the budget, as a share of the dense cost. The three channels of the
        widest group are those that start as the best, the last one kept, and the worst: mask, score and the l1 norm
        of the filter, as "quantity/group/channel".
        """
        masks, kept = self.masks, self.masks.top_k(self.masks.keep_counts)
        sums_R, counts_R = masks.rows(masks.mask).sum(1), masks.row_counts(masks.keep_counts)
        record = {
            "mask_hardness": float((masks.mask * (1 - masks.mask))[masks.valid].mean()),
            "mask_flips": float((kept & ~self.kept).sum()),
            "mask_sum_error": float((sums_R - counts_R).abs().max()),
        }
        if self.learned:
            record["mask_cost_excess"] = float(self.learned.excess().detach())
        self.kept.copy_(kept)
        return record | self._watch()

    def plan(self, counts: Mapping[ChannelGroup, int]) -> PruningPlan:
        """The hard top k of each group, and the trained weights with the soft mask folded in, on the CPU.

        With it the plan's network is the one trained, also where a kept channel's mask is not quite 1.
        """
        groups = self.gated.groups
        counts_G = self.masks.keep_counts.new_tensor([counts[group] for group in groups])
        keep = dict(zip(groups, self.masks.top_k(counts_G), strict=True))
        return trained_plan(self.gated.network, keep, folded=self.gated.weights(self.masks.mask))

    def _watch(self) -> Record:
        group, channels = self.watched
        row = self.gated.groups.index(group)
        norms = channel_norms(ChannelGraph(self.gated.network, (group,), (), (), (), ()), p=1)
        values = {"mask": self.masks.mask[row], "score": self.masks.scores.detach()[row], "norm": norms[group]}
        return {
            f"{name}/{group.name}/{channel}": float(values_C[channel])
            for name, values_C in values.items()
            for channel in channels
        }


def _three_channels(groups: Mapping[ChannelGroup, tuple[Tensor, int]]) -> tuple[ChannelGroup, list[int]]:
    """Of the widest group, the channels of the highest score, the lowest one kept, and the lowest."""
    group = max(groups, key=lambda group: group.size)
    scores_C, count = groups[group]
    order = scores_C.argsort(descending=True, stable=True).tolist()
    return group, list(dict.fromkeys([order[0], order[count - 1], order[-1]]))


@dataclass(frozen=True)
class Transport(TrainingOptions):
    """Train soft masks and weights together for `epochs`, then keep each group's k largest mask entries.

    How many channels each group keeps comes from the budget beforehand, unless `scope` or `ratios` say otherwise;
    training decides which. SGD with a cosine schedule moves weights and scores, which start as norms of the filters.
    The paper trains both at 0.1 for 120 epochs. A few epochs at that rate forget what a trained network knows
    before they relearn it, so the weights' default is lower; the scores need the speed to explore.

    Attributes:
        epsilon: strength of the entropy, > 0; larger keeps the masks soft, and the choice open, for longer.
        solver: "sinkhorn", one proximal step per batch, hardens by itself; "exact" solves each batch's masks
            fully and stays as soft as epsilon says: choose it small, say 0.05.
        inner_steps: Sinkhorn iterations per proximal step, >= 1; the paper finds that more cost time only.
        plan_every: batches per proximal step, >= 1; more keep the masks soft for longer.
        logodds_clip: bound on the log-odds that the plan carries on, > 0; without one, a channel takes as many steps
            to come back as it took to fall.
        gate: "reads" scales what reads a channel; "filter" scales what makes it, which BatchNorm undoes: a control.
        scope: "layer" keeps given counts per group; "global" has one mask over all groups, whose budget is a limit
            on channels. Initial scores are then divided by their group's mean, and each group keeps its best.
        ratios: "given", or "learned": keep ratios, starting from the given ones, train along, and are pulled to
            the budget's limits by a growing penalty. Groups that a keep pattern names keep what it says.
        score_init: initial scores, the filters' "l2" or "l1" norms, or "ones".
        decay_scores: weight decay falls on the scores too.
        score_lr: peak learning rate of scores and keep ratios, > 0.

    Raises:
        UsageError: an option out of its range, or two that contradict each other.
    """

    only_optimizer: ClassVar[str | None] = "sgd"

    epsilon: float = 0.25
    solver: Solver = "sinkhorn"
    inner_steps: int = 1
    plan_every: int = 1
    logodds_clip: float = math.inf
    gate: Place = "reads"
    scope: Scope = "layer"
    ratios: Ratios = "given"
    score_init: ScoreInit = "l2"
    decay_scores: bool = True
    score_lr: float = 0.1

    def __post_init__(self) -> None:
        require_positive("transport", self, "epsilon", "score_lr", "lr", "logodds_clip", "inner_steps", "plan_every")
        choices = {"solver": Solver, "gate": Place, "scope": Scope, "ratios": Ratios, "score_init": ScoreInit}
        for name, words in choices.items():
            if (value := getattr(self, name)) not in get_args(words):
                raise UsageError(f"transport: unknown {name} {value!r}{nearest(value, list(get_args(words)))}")
        if self.solver == "exact" and (self.inner_steps, self.plan_every, self.logodds_clip) != (1, 1, math.inf):
            raise UsageError("transport: solver 'exact' has no inner_steps, plan_every or logodds_clip")
        if self.scope == "global" and self.ratios == "learned":
            raise UsageError("transport: scope 'global' already shares channels out; choose ratios 'given'")
        if self.scope == "global" and self.round_to > 1:
            raise UsageError("transport: scope 'global' cannot round widths; choose scope 'layer', or round_to 1")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None) -> PruningPlan:
        """The plan that meets `budget`, with trained weights; `graph.model` stays as it is.

        Raises:
            UsageError: no task; transport trains, so it needs data.
            BudgetError: the budget lies below what the network can reach, or is of another kind than the scope.
        """
        if task is None:
            raise UsageError("transport: trains its masks and needs data; without data choose magnitude")
        counts = allocate(graph, budget, round_to=self.round_to)
        pruned = {group for group, count in counts.items() if count < group.size}
        if not pruned:
            return PruningPlan()
        free = _movable(graph, budget, pruned) if self.scope == "global" or self.ratios == "learned" else set()
        if self.scope == "global" and not (pruned <= free and _limits_channels_alone(budget)):
            raise BudgetError("transport: scope 'global' takes a limit on channels alone, such as channels<=0.5x")
        learned = None
        if self.ratios == "learned":
            learned = LearnedCounts(counts, free, soft_limits(graph, budget), scale=self.score_scale)
        scores = self._initial_scores(graph)
        groups = {group: (scores[group], counts[group]) for group in graph.groups if group in pruned | free}
        uncut = PruningPlan({group: torch.ones(group.size, dtype=torch.bool) for group in groups})
        network = MaskedNetwork(copied(plain(graph.model, uncut)), groups, method=self, learned=learned)
        task.fit(network, penalised(task, network.penalty), self.schedule(), stage="prune", observe=network.measure)
        if learned:
            soft_counts = zip(counts, learned.counts().tolist(), strict=True)
            ratios = {group: count / group.size for group, count in soft_counts if group in free}
            counts = whole_counts(ratios, graph, budget, counts, round_to=self.round_to)
        return network.plan(counts)

    @property
    def score_scale(self) -> float:
        """The loop has one learning rate. Training s / c in place of s is training s at c * c times that rate."""
        return math.sqrt(self.score_lr / self.lr)

    def _initial_scores(self, graph: ChannelGraph) -> dict[ChannelGroup, Tensor]:
        if self.score_init == "ones":
            return {group: torch.ones(group.size) for group in graph.groups}
        norms = channel_norms(graph, p=_NORMS[self.score_init])
        if self.scope == "layer":
            return norms
        # Across layers norms of filters follow their sizes: only how they compare within a layer means something.
        return {group: row / row.mean().clamp_min(torch.finfo(row.dtype).tiny) for group, row in norms.items()}


def _movable(graph: ChannelGraph, budget: Budget, pruned: Collection[ChannelGroup]) -> set[ChannelGroup]:
    """Groups whose counts may be traded: those that the budget does not name, and that `allocate` would not spare."""

    def spared(group: ChannelGroup) -> bool:
        return group.residual or bool(group.fixed_by)

    unnamed = {group for group in graph.groups if budget.keep_ratio(group.name) is None and group.size > 1}
    return unnamed if any(map(spared, unnamed & {*pruned})) else {group for group in unnamed if not spared(group)}


def _limits_channels_alone(budget: Budget) -> bool:
    return {limit.metric for limit in budget.limits} == {Metric.CHANNELS}
