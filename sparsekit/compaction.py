"""The two interpreters of a plan, and the certificate that they agree.

`mask` gives the plan its obvious meaning: same shapes, zeros. `compact` cuts. Both fold `merge` the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from sparsekit.errors import PlanError
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan, Slot


@dataclass(frozen=True)
class Certificate:
    """Evidence that the small network computes what the plan says.

    Attributes:
        max_relative_error: max |mask - compact| / max |mask|, the worst of the outputs, in float64.
        max_abs_output: max |mask|; a value near 0 would make the comparison vacuous.
        groups: group name -> whether zero-masking equals removal there.
        onnx_max_relative_error: ONNX Runtime against eager in float32, once exported.
    """

    max_relative_error: float
    max_abs_output: float
    groups: Mapping[str, bool]
    onnx_max_relative_error: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the networks agree to 1e-9 on outputs that are not all zero."""
        return self.max_abs_output > 0 and self.max_relative_error <= 1e-9

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def mask(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of `model` with the shapes it had, in which every dropped channel is multiplied by zero.

    Raises:
        PlanError: the plan names a tensor, dimension or position the model does not have.
    """
    masked = _with_weights(model, plan)
    with torch.no_grad():
        for group, keep in plan.keep.items():
            for slot in _checked_slots(masked, group):
                if slot.read:
                    tensor = _tensor(masked, slot.tensor)
                    _fold(tensor, slot, keep, plan.merge.get(group))
                    index = slot.index[~keep].flatten().to(tensor.device)
                    tensor.index_fill_(slot.dim, index, 0)
    return masked


def compact(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of `model` from which every dropped channel has been cut; class and forward stay the user's own.

    An empty plan gives a bit-equal copy.

    Raises:
        PlanError: the plan names a tensor, dimension or position the model does not have.
    """
    small = _with_weights(model, plan)
    cuts: dict[tuple[str, int], list[Tensor]] = {}
    for group, keep in plan.keep.items():
        for slot in _checked_slots(small, group):
            if slot.read and group in plan.merge:
                _fold(_tensor(small, slot.tensor), slot, keep, plan.merge[group])
            cuts.setdefault((slot.tensor, slot.dim), []).append(slot.index[~keep].flatten())
    touched: dict[str, nn.Module] = {}
    for (name, dim), gone in cuts.items():
        path, _, leaf = name.rpartition(".")
        module = touched[path] = small.get_submodule(path)
        if dim == COUNT:
            setattr(module, leaf, getattr(module, leaf) - len(torch.cat(gone).unique()))
        else:
            _cut(module, leaf, dim, torch.cat(gone))
    for module in touched.values():
        _sync_sizes(module)
    return small


def certify(model: nn.Module, plan: PruningPlan, small: nn.Module, example_inputs: tuple[Any, ...]) -> Certificate:
    """Compare `small` with `mask(model, plan)` on `example_inputs`, both in float64 on the CPU and eval mode.

    Raises:
        PlanError: the two return different structures or shapes.
    """
    reference, candidate = (copy.deepcopy(network).double().cpu().eval() for network in (mask(model, plan), small))
    inputs = tree_map_only(
        Tensor, lambda x: x.detach().cpu().double() if x.is_floating_point() else x.cpu(), example_inputs
    )
    with torch.no_grad():
        expected, got = (
            [leaf for leaf in tree_flatten(network(*inputs))[0] if isinstance(leaf, Tensor)]
            for network in (reference, candidate)
        )
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in got]:
        shapes = [list(leaf.shape) for leaf in expected], [list(leaf.shape) for leaf in got]
        raise PlanError(f"certificate: masked outputs are {shapes[0]}, compact outputs {shapes[1]}")
    # Each output by its own scale, and tensor maxima, which keep a NaN where Python's max may drop it.
    scales = torch.stack([leaf.abs().max() for leaf in expected])
    errors = torch.stack([(a - b).abs().max() for a, b in zip(expected, got, strict=True)])
    return Certificate(
        max_relative_error=float(torch.where(errors == 0, errors, errors / scales).max()),
        max_abs_output=float(scales.max()),
        groups={group.name: group.exact for group, keep in plan.keep.items() if not keep.all()},
    )


def _with_weights(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A deep copy carrying the plan's replacement weights and its zeros."""
    clone = copy.deepcopy(model)
    states = dict(clone.named_parameters()) | dict(clone.named_buffers())
    with torch.no_grad():
        for kind, values in (("weights", plan.weights), ("nonzero", plan.nonzero)):
            for name, value in values.items():
                if name not in states:
                    raise PlanError(f"{kind} {name!r}: the model has no such parameter or buffer")
                if states[name].shape != value.shape:
                    expected, got = list(states[name].shape), list(value.shape)
                    raise PlanError(f"{kind} {name!r}: the model's shape is {expected}, the plan's {got}")
        for name, value in plan.weights.items():
            states[name].copy_(value)
        for name, value in plan.nonzero.items():
            states[name].mul_(value.to(states[name].device))
    return clone


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), leaf)
    return value


def _checked_slots(model: nn.Module, group: ChannelGroup) -> tuple[Slot, ...]:
    for slot in group.slots:
        path, _, leaf = slot.tensor.rpartition(".")
        try:
            value = getattr(model.get_submodule(path), leaf)
        except AttributeError:
            raise PlanError(f"group {group.name!r}: the model has no {slot.tensor!r}") from None
        size = value if slot.dim == COUNT else value.shape[slot.dim] if slot.dim < value.dim() else 0
        if not isinstance(size, int) or int(slot.index.max()) >= size:
            raise PlanError(
                f"group {group.name!r}: {slot.tensor!r} dim {slot.dim} has {size} positions, "
                f"the plan needs {int(slot.index.max()) + 1}"
            )
    return group.slots


def _fold(weight: Tensor, slot: Slot, keep: Tensor, merge: Tensor | None) -> None:
    """Let each kept position read also what `merge` rebuilds from it: W[:, kept] = sum_c merge[c] W[:, c]."""
    if merge is None:
        return
    index = slot.index.to(weight.device)
    with torch.no_grad():
        moved = weight.movedim(slot.dim, 0)
        folded = torch.einsum("ck,cp...->kp...", merge.to(weight), moved[index])
        moved[index[keep.to(weight.device)]] = folded


def _cut(module: nn.Module, leaf: str, dim: int, gone: Tensor) -> None:
    tensor: Tensor = getattr(module, leaf)
    stay = torch.ones(tensor.shape[dim], dtype=torch.bool)
    stay[gone] = False
    # `.data` keeps the object, so that a weight that two modules share stays shared.
    tensor.data = tensor.detach().index_select(dim, stay.nonzero().flatten().to(tensor.device))


def _sync_sizes(module: nn.Module) -> None:
    """Let a module's own size attributes say what its cut tensors are, so that it prints and saves correctly."""
    if isinstance(module, nn.modules.conv._ConvNd):
        sizes = list(module.weight.shape[:2])
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            module.in_channels, module.out_channels = sizes[0], sizes[1] * module.groups
        else:
            module.out_channels, module.in_channels = sizes[0], sizes[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sizes = [t.shape[0] for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = sizes[0]
