"""Least-squares reconstruction: every layer is refitted to what the dense network's layer returned.

Layer by layer in the order of the forward pass, with the inputs that the network repaired so far gives it. A layer's
weight becomes the W that minimises |X W + b - Y|^2 + ridge |W - W0|^2 over the receptive fields X of some thousand
positions; Y are the dense layer's outputs there and W0 is the weight before. Where the layer's output is added to a
residual stream, Y also makes up for what that stream has lost. Without labels and without gradients.

A layer with F inputs per conv group (channels x kernel positions) and G conv groups takes 16 G F^2 bytes for its normal
equations and 8 G F bytes for each position of a batch; wider layers than `max_features` stay as they are.

Sources: He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, for the
reconstruction; He et al. 2016, arXiv:1512.03385, is the residual network whose streams it follows.
"""

# N images, P positions of each, R = N P rows, K kernel positions; G conv groups, F inputs and O outputs of each group
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparsekit.errors import UsageError
from sparsekit.plan import PruningPlan
from sparsekit.recovery.lockstep import Stop, visit
from sparsekit.recovery.receptive_fields import as_matrices, num_features, num_positions, rows, write_matrices
from sparsekit.recovery.units import (
    Unit,
    channel_dim,
    eval_mode,
    holds_constant,
    output_scale,
    shift_output,
    split,
    units,
)

GoOn = Callable[[int, int], bool]  # (layers done, layers in all) -> whether to go on


@dataclass(frozen=True)
class NormalEquations:
    """Second moments of rows from which least squares follows, float64.

    Attributes:
        num_rows: rows summed up.
        xx: [G, F, F], sums of products of two inputs.
        xy: [G, F, O], of an input and an output.
        x: [G, F], sums of inputs.
        y: [G, O], sums of outputs.
    """

    num_rows: int
    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x_GRF: Tensor, y_GRO: Tensor) -> NormalEquations:
        """Those of these rows."""
        x, y = x_GRF.double(), y_GRO.double()
        return cls(x.shape[1], x.mT @ x, x.mT @ y, x.sum(1), y.sum(1))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Those of the rows of both."""
        return NormalEquations(
            self.num_rows + other.num_rows,
            self.xx + other.xx,
            self.xy + other.xy,
            self.x + other.x,
            self.y + other.y,
        )

    def solve(self, before_GFO: Tensor, *, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """The weight and the intercept that fit best: float64 [G, F, O] and [G, O].

        Args:
            before_GFO: what `ridge` draws the weight to.
            ridge: above 0, relative to the mean of the diagonal of xx.
            intercept: fit one; without, it is 0.

        >>> x, before = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.zeros(1, 1, 1)
        >>> equations = NormalEquations.of(x, 3 * x + 1)
        >>> [round(part.item(), 6) for part in equations.solve(before, ridge=1e-9, intercept=True)]
        [3.0, 1.0]
        """
        xx, xy = self.xx, self.xy
        if intercept:
            xx = xx - self.x[:, :, None] * self.x[:, None, :] / self.num_rows
            xy = xy - self.x[:, :, None] * self.y[:, None, :] / self.num_rows
        scale_G = xx.diagonal(dim1=1, dim2=2).mean(1)
        scale_G = torch.where(scale_G > 0, scale_G, 1)  # inputs that are always 0 keep their weights
        damping = ridge * scale_G[:, None, None] * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
        before = before_GFO.to(xx)
        weight = before + torch.linalg.solve(xx + damping, xy - xx @ before)
        if not intercept:
            return weight, torch.zeros_like(self.y)
        return weight, (self.y - torch.einsum("gf,gfo->go", self.x, weight)) / self.num_rows


@torch.no_grad()
def reconstruct(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    *,
    batch_size: int = 128,
    ridge: float = 1e-3,
    max_positions: int = 16384,
    max_features: int = 4608,
    go_on: GoOn = lambda done, total: True,
) -> list[str]:
    """Refit the layers of `small`, in place, to the outputs of `dense`; returns their names.

    Intercepts go into biases, or into the running mean of the BatchNorm behind, which starts again from the dense
    one's statistics and parameters. The result does not depend on `batch_size`, up to rounding.

    Args:
        dense: the network that the plan was made for; on the same device.
        small: what the plan made of it, or any later state of that.
        plan: which channels are left.
        images: [N, ...], unlabelled; some hundreds do.
        batch_size: images per forward pass.
        ridge: how strongly weights keep to what they are, relative to the mean square of a layer's inputs.
        max_positions: output positions per layer, at least eight per input of the layer, the same number of each image.
        max_features: wider layers are left as they are, and so are those whose zeros the plan names.
        go_on: asked before each layer; what is repaired by then stays repaired.

    Raises:
        UsageError: `small` is a recorded program, or `ridge` is not above 0.
    """
    if ridge <= 0:
        raise UsageError(f"reconstruct: ridge must be above 0, got {ridge:g}")
    found = units(dense, small, plan, split(images[:2], 2, small)[0])
    found = [unit for unit in found if num_features(small.get_submodule(unit.name)) <= max_features]
    found = [unit for unit in found if f"{unit.name}.weight" not in plan.nonzero]
    visits, batches = _visits(found), split(images, batch_size, small)
    lost: dict[str, list[Tensor]] = {}
    done: list[str] = []
    with (
        eval_mode(dense, small),
        closing(visit(small, batches, [stop.small for stop in visits])) as inputs,
        closing(visit(dense, batches, [stop.dense for stop in visits])) as outputs,
    ):
        for (unit, here, _, _), xs, ys in zip(visits, inputs, outputs, strict=True):
            layer = small.get_submodule(unit.name)
            ys = [y.index_select(channel_dim(layer), unit.kept.to(y.device)) for y in ys]
            if here == "stream":
                lost[unit.name] = [y - x for x, y in zip(xs, ys, strict=True)]
                continue
            if not go_on(len(done), len(found)):
                break
            if unit.stream:
                ys = _compensated(dense, unit, ys, lost.pop(unit.name))
            chosen_NP = _positions(layer, ys, [len(batch) for batch in batches], max_positions)
            pairs = zip(xs, ys, chosen_NP, strict=True)
            equations = reduce(add, (NormalEquations.of(*rows(layer, x, y, chosen)) for x, y, chosen in pairs))
            _refit(dense, small, unit, equations, ridge)
            done.append(unit.name)
    return done


class _Visit(NamedTuple):
    """A stop of both networks on behalf of a unit: before the layer runs, or where its stream is seen."""

    unit: Unit
    here: Literal["stream", "layer"]
    small: Stop
    dense: Stop


def _visits(found: list[Unit]) -> list[_Visit]:
    """Those of all units, in the order of the forward pass; at one moment streams come first."""
    layers = [_Visit(unit, "layer", Stop(unit.name, "input"), Stop(unit.name, "output")) for unit in found]
    streams = [_Visit(unit, "stream", unit.stream, unit.stream) for unit in found if unit.stream]
    return sorted(
        streams + layers,
        key=lambda stop: (stop.unit.stream_moment, 0) if stop.here == "stream" else (stop.unit.moment, 1),
    )


def _compensated(dense: nn.Module, unit: Unit, ys: list[Tensor], lost: list[Tensor]) -> list[Tensor]:
    """What the layer should return for the stream to be right after its unit's output has been added."""
    dim = channel_dim(dense.get_submodule(unit.name))
    scale_K = output_scale(dense, unit)[unit.kept.to(ys[0].device)]
    # Through a BatchNorm that makes next to nothing of a channel nothing can be made up for.
    inverse_K = torch.where(scale_K.abs() > 0.01 * scale_K.abs().max(), 1 / scale_K, 0)
    return [y + (part.movedim(dim, -1) * inverse_K).movedim(-1, dim) for y, part in zip(ys, lost, strict=True)]


def _positions(layer: nn.Module, ys: list[Tensor], sizes: list[int], max_positions: int) -> list[Tensor]:
    """Output positions for the equations, int64 [N, P] per batch, the same ones however the images are split."""
    available = num_positions(layer, ys[0], sizes[0])
    per_image = math.ceil(max(max_positions, 8 * num_features(layer)) / sum(sizes))
    if available <= per_image:
        chosen_NP = torch.arange(available).expand(sum(sizes), -1)
    else:
        generator = torch.Generator().manual_seed(0)
        chosen_NP = torch.randint(available, (sum(sizes), per_image), generator=generator)
    return list(chosen_NP.to(ys[0].device).split(sizes))


@torch.no_grad()
def _refit(dense: nn.Module, small: nn.Module, unit: Unit, equations: NormalEquations, ridge: float) -> None:
    layer = small.get_submodule(unit.name)
    if unit.norm:
        _take_over(small.get_submodule(unit.norm), dense.get_submodule(unit.norm), unit.kept)
    weight, constant = equations.solve(as_matrices(layer), ridge=ridge, intercept=holds_constant(small, unit))
    write_matrices(layer, weight)
    if layer.bias is not None:
        constant = constant - layer.get_parameter("bias").unflatten(0, constant.shape)
    shift_output(small, unit, constant.flatten())


def _take_over(norm: nn.Module, dense: nn.Module, kept: Tensor) -> None:
    """Give a BatchNorm the dense one's statistics and parameters: it is to see what that one saw."""
    theirs = dict(dense.named_parameters()) | dict(dense.named_buffers())
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        tensor.copy_(theirs[name][kept.to(tensor.device)] if tensor.dim() else theirs[name])
