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

# N examples, P positions of each, R = N P rows, K kernel positions; G conv groups, F inputs and O outputs of each group
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from sparsekit.errors import UsageError
from sparsekit.plan import PruningPlan
from sparsekit.program import Program, Run
from sparsekit.recovery.layers import Layer
from sparsekit.recovery.lockstep import recorded, visit
from sparsekit.recovery.receptive_fields import (
    as_matrices,
    num_examples,
    num_features,
    num_positions,
    rows,
    write_matrices,
)
from sparsekit.recovery.units import Unit, output_scale, shift_output, split, units
from sparsekit.surgery import tensor_of

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
    one's statistics and parameters. Up to rounding the result does not depend on `batch_size`, unless a layer that
    reads the rows of all images in turn (attention with the batch second) has more of them than are looked at.

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
        PlanError: the forward of either network follows the values of tensors, so that it cannot be recorded.
        UsageError: `ridge` is not above 0.
    """
    if ridge <= 0:
        raise UsageError(f"reconstruct: ridge must be above 0, got {ridge:g}")
    batches, example = split(images, batch_size, small), split(images[:2], 2, small)[0]
    theirs, ours = recorded(dense, example), recorded(small, example)
    found = [unit for unit in units(theirs, ours, plan) if unit.small.weight not in plan.nonzero]
    found = [unit for unit in found if num_features(unit.small, tensor_of(ours, unit.small.weight)) <= max_features]
    inputs = visit(ours, batches, [unit.small.step for unit in found])
    outputs = visit(theirs, batches, [unit.dense.end for unit in found])
    done: list[str] = []
    for unit, our_runs, their_runs in zip(found, inputs, outputs, strict=True):
        if not go_on(len(done), len(found)):
            break
        layer, weight = unit.small, tensor_of(ours, unit.small.weight)
        scale_K = output_scale(theirs, unit.dense)
        ys = [_target(unit, *runs, scale_K) for runs in zip(our_runs, their_runs, strict=True)]
        num_rows = max(max_positions, 8 * num_features(layer, weight))
        chosen_NP = _positions(layer, ys, [len(batch) for batch in batches], num_rows)
        triples = zip(our_runs, ys, chosen_NP, strict=True)
        parts = (rows(layer, weight, run.tensors[layer.input], y, chosen) for run, y, chosen in triples)
        _refit(theirs, ours, unit, reduce(add, (NormalEquations.of(*part) for part in parts)), ridge)
        done.append(unit.name)
    return done


def _target(unit: Unit, ours: Run, theirs: Run, scale_K: Tensor) -> Tensor:
    """What the layer should return for one batch: as the dense one, and what the stream has lost by now.

    Args:
        unit: the layer.
        ours: the pass of the small network, before the layer.
        theirs: of the dense one, behind it.
        scale_K: what the BatchNorm behind multiplies the dense outputs with.
    """
    dim, whole = unit.small.channel_dim, theirs.tensors[unit.dense.output]
    kept = unit.kept.to(whole.device)
    y = whole.index_select(dim, kept)
    wanted, got = _stream(theirs, unit.dense, whole), _stream(ours, unit.small, y)
    if wanted is None or got is None:
        return y
    # Through a BatchNorm that makes next to nothing of a channel nothing can be made up for.
    inverse_K = torch.where(scale_K.abs() > 0.01 * scale_K.abs().max(), 1 / scale_K, 0)[kept]
    lost = wanted.index_select(dim, kept) - got
    return y + (lost.movedim(dim, -1) * inverse_K).movedim(-1, dim)


def _stream(run: Run, layer: Layer, output: Tensor) -> Tensor | None:
    """What the layer's output is added to, each value at the place in `output` of what it meets; None if nothing."""
    if layer.stream is None:
        return None
    values = run.tensors[layer.stream.value]
    with torch.enable_grad():
        start = torch.zeros_like(output, requires_grad=True)
        end = run.through(layer.stream.path, start)
        if end.shape != values.shape:
            return None  # broadcast: one output meets many values
        # The transpose of what moves values to other places moves them back.
        (found,) = torch.autograd.grad(end, start, values) if layer.stream.path else (values,)
    return found


def _positions(layer: Layer, ys: list[Tensor], sizes: list[int], least: int) -> list[Tensor]:
    """Output positions for the equations, `least` in all, int64 [N, P] per batch of `sizes` images.

    They are the same however the images are split.
    """
    sizes = [num_examples(layer, y, size) for y, size in zip(ys, sizes, strict=True)]
    available = [num_positions(layer, y, size) for y, size in zip(ys, sizes, strict=True)]
    each = math.ceil(least / sum(sizes))
    if max(available) <= each:
        chosen = [torch.arange(count).expand(size, -1) for count, size in zip(available, sizes, strict=True)]
    else:
        draws_NP = torch.randint(max(available), (sum(sizes), each), generator=torch.Generator().manual_seed(0))
        chosen = [part % count for part, count in zip(draws_NP.split(sizes), available, strict=True)]
    return [part.to(ys[0].device) for part in chosen]


@torch.no_grad()
def _refit(dense: Program, small: Program, unit: Unit, equations: NormalEquations, ridge: float) -> None:
    layer, weight = unit.small, tensor_of(small, unit.small.weight)
    if layer.norm and unit.dense.norm:  # it is to see what the dense one saw
        for name, theirs in unit.dense.norm.states.items():
            whole = tensor_of(dense, theirs)
            tensor_of(small, layer.norm.states[name]).copy_(whole[unit.kept.to(whole.device)])
    matrices_GFO, constant = equations.solve(as_matrices(layer, weight), ridge=ridge, intercept=unit.holds_constant)
    write_matrices(layer, weight, matrices_GFO)
    if layer.bias is not None:
        constant = constant - tensor_of(small, layer.bias).unflatten(0, constant.shape)
    shift_output(small, layer, constant.flatten())
