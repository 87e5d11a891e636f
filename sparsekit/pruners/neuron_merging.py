"""Neuron merging: what reads a dropped channel reads the most similar kept channel instead, scaled. Needs no data.

The weights that make a channel are close to a positive multiple of those that make another. ReLU and LeakyReLU let the
factor through, so it can move into the layer that reads the channel; Tanh, SoftSign, ELU, SELU and Hardswish do so
only near zero or far from it, and still gain in the authors' response. How many channels stay, and which, is ordinary
pruning by a norm of the original weights; merging changes neither the size nor the cost, and no bias.

A group is merged if each of its channels is one row of one Linear or convolution, followed by at most one BatchNorm, or
by a depthwise convolution, whose outer product with it is then compared. The graph does not hold the ops in between:
normalisation by the image's own statistics is seen where it is a module, not as a function. All other groups are
pruned without merging, which is logged, or refused where `strict`: residual streams, attention, channels normalised
together or several times (DenseNet), gated (squeeze and excitation), with parameters of their own (PReLU, layer scale).

Where BatchNorm follows, the published code and paper differ. `bn_mode="code"`, the default, is what the printed
results were made with: the running variance stands where sigma should, and but for the ratio of norms the dropped and
the kept channel trade places. "sqrt" is the same with sigma; "exact" is what follows from the definition of BatchNorm.

`decomposition="nmf"` is the authors' foil: nonnegative matrix factorisation of the positive weights, which replaces
the layer's weights too. It serves layers without BatchNorm only.

Source: Kim et al. 2020, "Neuron Merging: Compensating for Pruned Neurons", arXiv:2010.13160, algorithms 1 to 3, and
the authors' response for depthwise layers, other activations and the factorisation.
"""

# C channels, P dropped, K kept, D weights that make a channel
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sparsekit.budget import Budget
from sparsekit.errors import UsageError, nearest
from sparsekit.graph import ChannelGraph
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.pruner import filters, slot_rows
from sparsekit.selection import allocate, keep_top
from sparsekit.surgery import tensor_of
from sparsekit.task import Task

log = logging.getLogger(__name__)

_ORDERS = {"l1": 1.0, "l2": 2.0}
_CHOICES = {
    "criterion": (*_ORDERS, "l2-gm"),
    "bn_mode": ("code", "sqrt", "exact"),
    "decomposition": ("mostsim", "nmf"),
}


@dataclass(frozen=True)
class NeuronMerging:
    """One-shot, per group.

    Attributes:
        criterion: which channels stay, those of the largest "l1" or "l2" norm; or "l2-gm", those farthest from all
            others, which lie around the geometric median.
        threshold: least cosine similarity, in [0, 1], at which a channel is merged; 0 merges whatever it is.
        lam: where BatchNorm follows, the weight in [0, 1] of the cosine distance, beside that of the bias residue, in
            choosing what to merge with.
        bn_mode: "code", "sqrt" or "exact", see above.
        decomposition: "mostsim", one kept channel for each dropped one, or "nmf".
        strict: refuse groups that cannot be merged instead of only pruning them.
        round_to: widths are multiples of this.
    """

    criterion: str = "l1"
    threshold: float = 0.1
    lam: float = 0.85
    bn_mode: str = "code"
    decomposition: str = "mostsim"
    strict: bool = False
    round_to: int = 1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"neuron_merging: unknown {name} {value!r}{nearest(value, list(choices))}")
        for name in ("threshold", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"neuron_merging: {name} must be in [0, 1], got {getattr(self, name):g}")

    def __call__(self, graph: ChannelGraph, budget: Budget, task: Task | None = None) -> PruningPlan:
        """The plan that meets `budget`.

        Raises:
            UsageError: `strict`, and a group that must be cut cannot be merged.
            BudgetError: the budget lies below what the network can reach.
        """
        counts = allocate(graph, budget, round_to=self.round_to)
        origins = {group: origin_of(graph.model, group) for group, count in counts.items() if count < group.size}
        plan = keep_top({group: ranks(origin.rows_CD, self.criterion) for group, origin in origins.items()}, counts)
        obstacles = {group: self._obstacle(origin) for group, origin in origins.items()}
        self._report({group: obstacle for group, obstacle in obstacles.items() if obstacle})
        merged = {group: origin for group, origin in origins.items() if not obstacles[group]}
        if self.decomposition == "nmf":
            return replace(plan, weights=factorised(graph.model, merged, plan.keep))
        merge = {
            group: merge_matrix(origin, plan.keep[group], threshold=self.threshold, lam=self.lam, bn_mode=self.bn_mode)
            for group, origin in merged.items()
        }
        return replace(plan, merge=merge)

    def _obstacle(self, origin: Origin) -> str:
        if self.decomposition == "nmf" and (origin.norm is not None or not origin.parts):
            return origin.obstacle or "BatchNorm or a depthwise layer follows"
        return origin.obstacle

    def _report(self, obstacles: Mapping[ChannelGroup, str]) -> None:
        for group, obstacle in obstacles.items() if self.strict else ():
            advice = f"keep it whole with '{group.name}=1' in the budget"
            raise UsageError(f"neuron_merging: group {group.name!r} cannot be merged: {obstacle}; {advice}")
        if obstacles:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in Counter(obstacles.values()).most_common())
            log.warning("neuron_merging: groups pruned without merging: %s", reasons)


@dataclass(frozen=True, eq=False)
class Origin:
    """What makes a group's channels, as far as merging cares.

    Attributes:
        rows_CD: float64 [C, D], each channel's filter, with its bias where only an activation follows; times its
            kernel of the depthwise layer, the outer product; all filters beside each other if there is an obstacle.
        parts: the places of which these are the rows, side by side; none if they are products.
        norm: of the BatchNorm that follows, gamma, beta, mean less the layer's bias, var and sqrt(var + eps),
            float64 [5, C]; None with a depthwise layer, where the method compares filters alone.
        obstacle: why the channels cannot be merged, or "".
    """

    rows_CD: Tensor
    parts: tuple[Slot, ...] = ()
    norm: Tensor | None = None
    obstacle: str = ""


def origin_of(model: nn.Module, group: ChannelGroup) -> Origin:
    """What makes the channels of `group`, as its slots and the modules in which they lie tell."""
    made = {slot.tensor: slot for slot in group.slots if not slot.read}
    modules = {path: model.get_submodule(path) for path in dict.fromkeys(name.rpartition(".")[0] for name in made)}
    layers = [path for path, module in modules.items() if _is_layer(module) and f"{path}.weight" in made]
    depthwise = [path for path in layers if f"{path}.groups" in made]
    makers = [path for path in layers if path not in depthwise]
    # Without running statistics they are the image's own, which no scale survives.
    norms = {p: m for p, m in modules.items() if isinstance(m, _NormBase) and m.running_mean is not None}
    others = modules.keys() - set(layers) - norms.keys()
    if obstacle := _obstacle(group, makers, depthwise, norms, others):
        rows_CD = torch.cat([torch.empty(group.size, 0), *filters(model, group)], 1)
        return Origin(rows_CD.double(), obstacle=obstacle)
    weight, bias = made[f"{makers[0]}.weight"], made.get(f"{makers[0]}.bias")
    if depthwise:
        filters_CI, kernels_CJ = (slot_rows(model, slot).double() for slot in (weight, made[f"{depthwise[0]}.weight"]))
        return Origin(torch.einsum("ci,cj->cij", filters_CI, kernels_CJ).flatten(1))
    parts = (weight,) if bias is None or norms else (weight, bias)
    rows_CD = torch.cat([slot_rows(model, slot) for slot in parts], 1).double()
    if not norms:
        return Origin(rows_CD, parts)

    def vector(name: str, default: float = 0.0) -> Tensor:
        return slot_rows(model, made[name])[:, 0].double() if name in made else torch.full_like(rows_CD[:, 0], default)

    ((path, norm),) = norms.items()
    mean, var = vector(f"{path}.running_mean") - vector(f"{makers[0]}.bias"), vector(f"{path}.running_var")
    affine = (vector(f"{path}.weight", 1.0), vector(f"{path}.bias"))
    return Origin(rows_CD, parts, torch.stack([*affine, mean, var, (var + norm.eps).sqrt()]))


def _is_layer(module: nn.Module) -> bool:
    """Whether the weight is what is multiplied with; classes with a forward of their own may standardise it first."""
    return isinstance(module, nn.Linear | _ConvNd) and type(module).forward.__module__.startswith("torch.nn.")


def _obstacle(group: ChannelGroup, makers: Sized, depthwise: Sized, norms: Sized, others: Sized) -> str:
    # GLU, pixel shuffle, convolution groups; and what is read before a depthwise layer as well as behind it.
    wide = any(slot.index.shape[1] > 1 for slot in group.slots if depthwise or not slot.read)
    reasons = {
        "what is left of the channels is normalised anew": not group.exact,
        "activations are summed over the channels": group.silent,
        "outputs of layers are added up in the channels": group.residual,
        "something other than layers and BatchNorm has parameters of the channels": len(others) > 0,
        "the channels are not made by one layer": len(makers) != 1 or len(depthwise) > 1,
        "several BatchNorms run over the channels": len(norms) > 1 + len(depthwise),
        "a channel is more than one row of a layer": wide,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def ranks(rows_CD: Tensor, criterion: str) -> Tensor:
    """Each channel's place in the order of `criterion`, float64 [C], highest is kept; of equals the later channel.

    >>> ranks(torch.tensor([[3.0, 0.0], [-2.0, -2.0], [3.0, 0.0]]), "l1").tolist()
    [0.0, 2.0, 1.0]
    """
    if criterion == "l2-gm":
        importance = torch.cdist(rows_CD, rows_CD).sum(1)
    else:
        importance = torch.linalg.vector_norm(rows_CD, ord=_ORDERS[criterion], dim=1)
    places = importance.argsort(stable=True).argsort()
    return torch.where(importance.isfinite(), places.double(), torch.nan)


def merge_matrix(origin: Origin, keep: Tensor, *, threshold: float, lam: float, bn_mode: str) -> Tensor:
    """How each channel is rebuilt from the kept ones, float32 [C, K], at most one entry in a dropped channel's row.

    A row is zero where even the kept channel chosen is less similar than `threshold`, or no scale is finite (a weight
    or gamma of zero). Scales are negative where the gammas' signs differ, as in the published code.
    """
    directions_CD = F.normalize(origin.rows_CD)
    cosine_PK = directions_CD[~keep] @ directions_CD[keep].T
    norms_C = torch.linalg.vector_norm(origin.rows_CD, dim=1)
    scale_PK = norms_C[~keep, None] / norms_C[keep]
    distance_PK = 1 - cosine_PK
    if origin.norm is not None:
        scale_PK, residue_PK = _through_batch_norm(origin.norm, keep, scale_PK, bn_mode)
        distance_PK = lam * distance_PK + (1 - lam) * _stretched(residue_PK.abs() / scale_PK)
    usable_PK = scale_PK.isfinite() & distance_PK.isfinite()
    best_P = distance_PK.masked_fill(~usable_PK, torch.inf).argmin(1)
    accepted_PK = usable_PK if threshold == 0 else usable_PK & (cosine_PK >= threshold)
    chosen_PK = F.one_hot(best_P, int(keep.sum())).bool() & accepted_PK
    merge_CK = torch.zeros(len(keep), int(keep.sum()))
    merge_CK[keep] = torch.eye(int(keep.sum()))
    merge_CK[~keep] = torch.where(chosen_PK, scale_PK, 0).float()
    return merge_CK


def _through_batch_norm(norm: Tensor, keep: Tensor, ratio_PK: Tensor, bn_mode: str) -> tuple[Tensor, Tensor]:
    """Scale and residue, [P, K] each: y_p = scale y_k + residue behind the BatchNorm, if w_p = ratio w_k before it.

    That is bn_mode "exact"; the others exchange p and k, though not in the ratio.
    """
    gamma, beta, mean, var, std = norm
    vectors = torch.stack([gamma, beta, mean, var if bn_mode == "code" else std])
    p, k = vectors[:, ~keep, None], vectors[:, None, keep]
    (gamma_p, beta_p, mean_p, sigma_p), (gamma_k, beta_k, mean_k, sigma_k) = (p, k) if bn_mode == "exact" else (k, p)
    scale_PK = ratio_PK * (gamma_p / gamma_k) * (sigma_k / sigma_p)
    residue_PK = gamma_p / sigma_p * (ratio_PK * (mean_k - sigma_k * beta_k / gamma_k) - mean_p) + beta_p
    return scale_PK, residue_PK


def _stretched(bias_PK: Tensor) -> Tensor:
    """Each row's finite values from 0 to 1, all 0 where they are the same."""
    finite = bias_PK.isfinite()
    low = bias_PK.where(finite, torch.inf).amin(1, keepdim=True)
    high = bias_PK.where(finite, -torch.inf).amax(1, keepdim=True)
    return (bias_PK - low) / (high - low).clamp(min=torch.finfo(bias_PK.dtype).tiny)


def factorised(
    model: nn.Module, origins: Mapping[ChannelGroup, Origin], keep: Mapping[ChannelGroup, Tensor]
) -> dict[str, Tensor]:
    """Name -> weight of the layers and their readers, with max(W, 0) = Z Y: Y in the kept rows, readers times Z."""
    weights: dict[str, Tensor] = {}

    def channels_first(slot: Slot) -> Tensor:
        if slot.tensor not in weights:
            weights[slot.tensor] = tensor_of(model, slot.tensor).detach().cpu().clone()
        return weights[slot.tensor].movedim(slot.dim, 0)

    mixing = {}
    # All rows before any reader: a weight may be both, and the factors are those of the original.
    for group, origin in origins.items():
        mixing[group], rows_KD = nonnegative_factors(origin.rows_CD.clamp(min=0), int(keep[group].sum()))
        widths = [channels_first(slot)[0].numel() for slot in origin.parts]
        for slot, part_KD in zip(origin.parts, rows_KD.split(widths, 1), strict=True):
            weight = channels_first(slot)
            weight[slot.index[keep[group], 0]] = part_KD.to(weight).view(-1, *weight.shape[1:])
    for group, mixing_CK in mixing.items():
        for slot in group.slots:
            if slot.read:
                weight = channels_first(slot)
                mixed = torch.einsum("ck,cp...->kp...", mixing_CK.to(weight), weight[slot.index])
                weight[slot.index[keep[group]]] = mixed
    return weights


def nonnegative_factors(matrix_CD: Tensor, rank: int, *, num_steps: int = 200) -> tuple[Tensor, Tensor]:
    """Z [C, K] and Y [K, D], nonnegative, with Z Y near the nonnegative `matrix_CD` in the Frobenius norm.

    Source: Lee and Seung 2001, "Algorithms for Non-negative Matrix Factorization", multiplicative updates.

    >>> z, y = nonnegative_factors(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), rank=1)
    >>> (z @ y).round(decimals=3).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(len(matrix_CD), rank, generator=generator).to(matrix_CD)
    right = torch.rand(rank, matrix_CD.shape[1], generator=generator).to(matrix_CD)
    tiny = torch.finfo(matrix_CD.dtype).tiny
    for _ in range(num_steps):
        right *= left.T @ matrix_CD / (left.T @ left @ right).clamp(min=tiny)
        left *= matrix_CD @ right.T / (left @ (right @ right.T)).clamp(min=tiny)
    return left, right
