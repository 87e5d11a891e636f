"""Scores + budget -> plan: exact counts per group, then the highest scores of each.

Channels are chosen group by group; single weights layer by layer or all together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.budget import Budget, Metric
from sparsekit.cost import Costs, Counts, prunable_weights
from sparsekit.errors import BudgetError, PlanError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan

Scope = Literal["global", "layer"]  # do all weights compete for the budget, or those of each layer for its share


def kept_count(size: int, keep_ratio: float, *, round_to: int = 1) -> int:
    """How many of `size` channels a keep ratio leaves: size - ceil((1 - ratio) size), at least 1.

    With `round_to` the count goes up to the next multiple, at most to `size`.
    Source: Li et al. 2023 and its predecessors prune min(ceil(p n), n - 1) of n filters.

    >>> [kept_count(16, 0.3), kept_count(16, 0.01), kept_count(10, 0.7), kept_count(64, 0.3, round_to=16)]
    [4, 1, 7, 32]
    """
    # 9 digits undo the float error of 1 - 0.7, which would prune one filter too many.
    kept = max(1, size - math.ceil(round((1 - keep_ratio) * size, 9)))
    return min(size, math.ceil(kept / round_to) * round_to)


def allocate(graph: ChannelGraph, budget: Budget, *, round_to: int = 1) -> dict[ChannelGroup, int]:
    """How many channels each group keeps.

    Groups that a keep pattern names get exactly its ratio. The others share one ratio, the largest that meets
    every limit, and are then filled up one step at a time, largest shortfall first, until nothing more fits.
    Where the other groups can meet the limits alone, residual streams stay whole, which every layer of a stage reads,
    and channels whose number the forward fixes, which would turn the user's module into a recorded program.

    Args:
        graph: what can be cut.
        budget: limits and keep ratios.
        round_to: counts are multiples of this, or a group's full size.

    Raises:
        BudgetError: the limits lie below the floor, which it names; a pattern matches no group; a limit counts single
            weights.
    """
    if round_to < 1:
        raise BudgetError(f"round_to must be at least 1, got {round_to}")
    if budget.measured:
        raise BudgetError(f"budget {budget.measured[0]}: is measured on the exported file; use sparsekit.compress")
    for limit in budget.limits:
        if limit.metric is Metric.NUM_NONZERO:
            raise BudgetError(
                f"budget {limit}: counts single weights, and this method removes channels; "
                "limit macs, params or channels, or choose an unstructured method like gmp"
            )
    names = [group.name for group in graph.groups]
    for pattern, _ in budget.keep:
        if not any(Budget(keep=((pattern, 1.0),)).keep_ratio(name) for name in names):
            raise BudgetError(f"budget: no channel group matches {pattern!r}{nearest(pattern, names)}")
    ratios = [budget.keep_ratio(name) for name in names]
    sizes = [group.size for group in graph.groups]
    pinned = [None if r is None else kept_count(n, r, round_to=round_to) for n, r in zip(sizes, ratios, strict=True)]
    costs = Costs(graph)
    free = [number for number, pin in enumerate(pinned) if pin is None]
    limits = {limit.metric: limit.resolve(costs(limit.metric, costs.dense)) for limit in budget.limits}

    def at(ratio: float, free: list[int]) -> Counts:
        counts = [size if pin is None else pin for size, pin in zip(sizes, pinned, strict=True)]
        for number in free if ratio < 1 else []:
            whole_steps = kept_count(sizes[number], ratio) // round_to * round_to
            counts[number] = max(min(sizes[number], round_to), whole_steps)
        return np.array(counts, dtype=np.int64)

    def fits(counts: Counts) -> bool:
        return all(costs(metric, counts) <= limit for metric, limit in limits.items())

    inner = [number for number in free if not (graph.groups[number].residual or graph.groups[number].fixed_by)]
    if fits(at(0.0, inner)):
        free = inner
    elif not fits(at(0.0, free)):
        raise BudgetError(_floor(limits, costs, at(0.0, free)))
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle, free)) else (low, middle)
    counts = _fill(at(low, free), costs.dense, np.full(len(sizes), low), round_to, free, fits)
    return dict(zip(graph.groups, counts.tolist(), strict=True))


def whole_counts(
    ratios: Mapping[ChannelGroup, float],
    graph: ChannelGraph,
    budget: Budget,
    counts: Mapping[ChannelGroup, int],
    *,
    round_to: int = 1,
) -> dict[ChannelGroup, int]:
    """Counts that meet `budget` with no room for one more, as near as they can be to learned keep ratios.

    The ratios move together, by one shift of their log-odds, to where their whole parts just fit; then the groups
    are filled up one step at a time, largest shortfall first, until nothing more fits: at the end the cheap ones.

    Args:
        ratios: learned, in (0, 1); of the groups that may move.
        graph: what is cut.
        budget: its limits must be met.
        counts: of every group; those that may not move keep theirs, and all together they meet the budget.
        round_to: counts are multiples of this, or a group's full size.
    """
    costs = Costs(graph)
    limits = [(limit.metric, limit.resolve(costs(limit.metric, costs.dense))) for limit in budget.limits]
    start, sizes = costs.counts(counts), costs.dense
    free = [number for number, group in enumerate(graph.groups) if group in ratios]
    learned = np.clip([ratios.get(group, 0.5) for group in graph.groups], 1e-6, 1 - 1e-6)

    def moved(shift: float) -> NDArray[np.float64]:
        odds: NDArray[np.float64] = learned / (1 - learned) * math.exp(shift)
        return odds / (1 + odds)

    def at(shift: float) -> Counts:
        whole_steps = np.floor(sizes * moved(shift) / round_to + 1e-9).astype(np.int64) * round_to
        tried = start.copy()
        tried[free] = np.clip(whole_steps, np.minimum(round_to, sizes), sizes)[free]
        return tried

    def fits(counts: Counts) -> bool:
        return all(costs(metric, counts) <= limit for metric, limit in limits)

    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    filled = _fill(at(low), sizes, moved(low), round_to, free, fits)
    return dict(zip(graph.groups, filled.tolist(), strict=True))


def _fill(
    counts: Counts,
    sizes: Counts,
    ratios: NDArray[np.float64],
    round_to: int,
    free: list[int],
    fits: Callable[[Counts], bool],
) -> Counts:
    """Add steps of `round_to` channels while one still fits, the group furthest below its ratio first."""
    counts = counts.copy()
    open_groups = {number for number in free if counts[number] < sizes[number]}
    while open_groups:
        number = min(open_groups, key=lambda g: (counts[g] / sizes[g] - ratios[g], g))
        tried = counts.copy()
        tried[number] = min(sizes[number], tried[number] + round_to)
        # Costs only grow with counts: what does not fit now never will.
        if not fits(tried):
            open_groups.discard(number)
            continue
        counts = tried
        if counts[number] == sizes[number]:
            open_groups.discard(number)
    return counts


def _floor(limits: Mapping[Metric, float], costs: Costs, least: Counts) -> str:
    for metric, limit in limits.items():
        floor = costs(metric, least)
        if floor > limit:
            share = floor / costs(metric, costs.dense)
            return (
                f"budget {metric.value}<={limit:,.0f} is below the floor of {floor:,.0f} "
                f"({share:.3f}x of the dense network): every group is down to its last channels"
            )
    return "budget: the limits together are below the floor"


def keep_top(scores: Mapping[ChannelGroup, Tensor], counts: Mapping[ChannelGroup, int]) -> PruningPlan:
    """Keep the `counts[group]` highest-scoring channels of every group; ties go to the lower channel number.

    Args:
        scores: float [C] per group, higher is kept.
        counts: channels to keep per group; a group that keeps all is left out of the plan.

    Raises:
        PlanError: scores of the wrong length, or not finite.
    """
    keep = {}
    for group, count in counts.items():
        if count == group.size:
            continue
        score = scores[group]
        if score.shape != (group.size,) or not score.isfinite().all():
            raise PlanError(f"group {group.name!r}: scores must be {group.size} finite numbers")
        order = torch.sort(score, descending=True, stable=True).indices
        keep[group] = torch.zeros(group.size, dtype=torch.bool)
        keep[group][order[:count]] = True
    return PruningPlan(keep)


def select(
    scores: Mapping[ChannelGroup, Tensor], graph: ChannelGraph, budget: Budget, *, round_to: int = 1
) -> PruningPlan:
    """`allocate`, then `keep_top`."""
    return keep_top(scores, allocate(graph, budget, round_to=round_to))


def allocate_weights(graph: ChannelGraph, budget: Budget, *, scope: Scope) -> dict[tuple[str, ...], int]:
    """How many weights stay nonzero in each set of tensors that compete: all of them, or one layer's.

    The counts add up to the budget. Every tensor keeps one weight; of their others, layers on their own keep the same
    share each, up to rounding. A set that keeps all it has is left out.

    Args:
        graph: what can be zeroed, see `prunable_weights`.
        budget: limits on `nonzero` only.
        scope: who competes.

    Raises:
        BudgetError: another kind of budget, or one below a weight per tensor.
    """
    other = [str(limit) for limit in budget.limits if limit.metric is not Metric.NUM_NONZERO]
    other += [f"{pattern}={ratio:g}" for pattern, ratio in budget.keep]
    if other:
        raise BudgetError(
            f"budget {other[0]}: counts channels, and this method zeroes single weights; use one like nonzero<=0.1x"
        )
    sizes = {name: weight.numel() for name, weight in prunable_weights(graph).items()}
    num_all = sum(sizes.values())
    num_kept = min([num_all, *(math.floor(limit.resolve(num_all) + 1e-6) for limit in budget.limits)])
    if num_kept < len(sizes):
        raise BudgetError(
            f"budget nonzero<={num_kept:,} is below the floor of {len(sizes):,} "
            f"({len(sizes) / num_all:.2g}x of the dense network): every weight tensor is down to one"
        )
    if num_kept == num_all:
        return {}
    if scope == "global":
        return {tuple(sizes): num_kept}
    return {(name,): count for name, count in _shares(sizes, num_kept).items() if count < sizes[name]}


def _shares(sizes: Mapping[str, int], num_kept: int) -> dict[str, int]:
    """1 each and the others in proportion to `sizes`; what rounding leaves goes to the largest rests.

    >>> _shares({"a": 4, "b": 10, "c": 1}, num_kept=9)
    {'a': 3, 'b': 5, 'c': 1}
    """
    spare, room = num_kept - len(sizes), sum(sizes.values()) - len(sizes)
    shares = {name: divmod(spare * (size - 1), room) for name, size in sizes.items()}
    left = spare - sum(whole for whole, _ in shares.values())
    favoured = sorted(sizes, key=lambda name: -shares[name][1])[:left]
    return {name: 1 + whole + (name in favoured) for name, (whole, _) in shares.items()}


def keep_top_weights(scores: Mapping[str, Tensor], counts: Mapping[tuple[str, ...], int]) -> dict[str, Tensor]:
    """Which weights stay: of each set of tensors the `counts` highest-scoring, of each tensor at least one.

    Equal scores are ranked by position, in the order of the set and of memory.

    Args:
        scores: name -> float tensor of the weight's shape, higher is kept.
        counts: what `allocate_weights` returns, or any numbers from the number of tensors to that of weights.

    Returns:
        name -> bool mask, as `PruningPlan.nonzero` has them, on the scores' device.

    Raises:
        PlanError: scores that are not finite.

    >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.5, 0.5])}
    >>> {name: mask.int().tolist() for name, mask in keep_top_weights(scores, {("a", "b"): 3}).items()}
    {'a': [1, 0, 1], 'b': [1, 0]}
    """
    keep: dict[str, Tensor] = {}
    for names, count in counts.items():
        rows = [scores[name].flatten().clone() for name in names]
        for name, row in zip(names, rows, strict=True):
            if not row.isfinite().all():
                raise PlanError(f"{name}: scores must be finite numbers")
            row[row.argmax()] = torch.inf
        kept = _top(torch.cat(rows), count).split([len(row) for row in rows])
        keep |= {name: mask.view(scores[name].shape) for name, mask in zip(names, kept, strict=True)}
    return keep


def _top(scores_N: Tensor, count: int) -> Tensor:
    """Bool [N], the `count` highest, equal ones by position; by its threshold, which needs no sorting."""
    threshold = scores_N.kthvalue(len(scores_N) - count + 1).values
    above, level = scores_N > threshold, scores_N == threshold
    return above | (level & (level.cumsum(0) <= count - above.sum()))
