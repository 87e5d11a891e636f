"""What removal means where channels are normalised together: the masked network with those ops run on what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.coupling import Coupling, Labels
from sparsekit.plan import PruningPlan
from sparsekit.record import Op, Ref, record
from sparsekit.survey import living


def gathered(masked: nn.Module, plan: PruningPlan, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The output tensors of `masked(*inputs)`, where each op that normalises over dropped channels runs without them.

    Such an op gets the living positions of its inputs; its outputs are put back at their places, zero elsewhere.

    Args:
        masked: `mask(model, plan)`, in eval mode.
        plan: what it keeps.
        inputs: real tensors.
    """
    recording = record(masked, inputs)
    if recording.error is not None:
        raise recording.error
    coupling = Coupling()
    (labels,), alive = living([recording], plan, coupling)
    # Sums that would be silent are among them: which ones are may depend on the device.
    marks = coupling.renormalised + coupling.silent
    normalising = {mark.op for mark in marks if not alive[mark.atoms].all()}
    states = dict(masked.named_parameters()) | dict(masked.named_buffers())
    values = {ref.index: states[name] for name, ref in recording.states.items()} | recording.constants
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    values |= {ref.index: leaf.clone() for ref, leaf in zip(recording.inputs, given, strict=True)}
    returned = {ref.index for ref in recording.outputs}
    last = {ref.index: op for op in recording.ops for ref in (*op.outputs, *op.tensors)}
    for op in recording.ops:
        if op in normalising:
            results = _without_dropped(op, values, labels, alive)
        else:
            results = _call(op, _filled(op.args, values))
        values |= {ref.index: result for ref, result in zip(op.outputs, results, strict=True)}
        for index in {ref.index for ref in (*op.outputs, *op.tensors)} - returned:
            if last[index] is op:  # all activations at once would not fit
                del values[index]
    return [values[ref.index] for ref in recording.outputs]


def _filled(args: dict[str, Any], values: dict[int, Tensor]) -> dict[str, Any]:
    filled: dict[str, Any] = tree_map_only(Ref, lambda ref: values[ref.index], args)
    return filled


def _without_dropped(
    op: Op, values: dict[int, Tensor], labels: dict[int, Labels], alive: NDArray[np.bool_]
) -> list[Tensor]:
    def stay(ref: Ref) -> list[Tensor]:
        given = labels.get(ref.index, (None,) * len(ref.shape))
        return [
            torch.arange(size) if label is None else torch.from_numpy(np.flatnonzero(alive[label].all(axis=1)))
            for size, label in zip(ref.shape, given, strict=True)
        ]

    def gather(ref: Ref) -> Tensor:
        value = values[ref.index]
        for dim, positions in enumerate(stay(ref)):
            if len(positions) < ref.shape[dim]:
                value = value.index_select(dim, positions)
        return value

    args = tree_map_only(Ref, gather, op.args)
    if "normalized_shape" in args:
        args["normalized_shape"] = list(args["input"].shape[-len(args["normalized_shape"]) :])
    if op.name.startswith("_scaled_dot_product") and args["scale"] is None:
        args["scale"] = op.args["query"].shape[-1] ** -0.5
    if op.name == "native_group_norm":
        args["C"] = args["input"].shape[1]
    results = []
    for ref, small in zip(op.outputs, _call(op, args), strict=True):
        whole = small.new_zeros(ref.shape)
        whole[torch.meshgrid(*stay(ref), indexing="ij") if ref.shape else ()] = small
        results.append(whole)
    return results


def _call(op: Op, args: dict[str, Any]) -> list[Tensor]:
    named = {argument.name for argument in op.func._schema.arguments if argument.kwarg_only}
    positional = [value for name, value in args.items() if name not in named]
    # What was put together again has other strides than the op's own output had.
    func = torch.ops.aten.reshape.default if op.name == "view" else op.func
    result = func(*positional, **{name: value for name, value in args.items() if name in named})
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
