"""What a plan does to tensors: `mask` writes zeros, `cut` takes slices away. Both fold `merge` the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsekit.baking import bake, is_computed
from sparsekit.copying import copy_module, kept_tensors, modules_by_path, states_by_name
from sparsekit.errors import PlanError
from sparsekit.plan import COUNT, ChannelGroup, PruningPlan, Slot


def mask(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of `model` with the shapes it had, in which every dropped channel is multiplied by zero.

    Where a group is not exact this is not what cutting means: what is left is normalised anew (see `certify`).

    Raises:
        PlanError: the plan names a tensor, dimension or position the model does not have.
    """
    model = plain(model, plan)
    value_of = _values(model)
    edited = _edited(model, plan, value_of)
    for group, keep in plan.keep.items():
        for slot in group.slots:
            if slot.dim == COUNT or not (slot.read or group.silent):
                continue
            if slot.tensor not in edited:
                edited[slot.tensor] = value_of(slot.tensor).detach().clone()
            tensor = edited[slot.tensor]
            tensor.index_fill_(slot.dim, slot.index[~keep].flatten().to(tensor.device), 0)
    return _replaced(model, edited, value_of)


def cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of `model` from which every dropped channel has been cut; class and forward stay the user's own.

    An empty plan gives a bit-equal copy.

    Raises:
        PlanError: the plan names a tensor, dimension or position the model does not have.
    """
    given, model = model, plain(model, plan)
    value_of = _values(model)
    edited = _edited(model, plan, value_of)
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}  # numpy: a fifth of the time, on so little
    for group, keep in plan.keep.items():
        dropped = ~keep.numpy()
        indices = {id(slot.index): slot.index for slot in group.slots}  # many slots share theirs
        positions = {key: index.numpy()[dropped].ravel() for key, index in indices.items()}
        for slot in group.slots:
            gone.setdefault((slot.tensor, slot.dim), []).append(positions[id(slot.index)])
    counts: dict[str, int] = {}
    kept: dict[tuple[int, ...], Tensor] = {}  # by a dimension's size and the ids of what goes
    for (name, dim), parts in gone.items():
        if dim == COUNT:
            counts[name] = len(np.unique(np.concatenate(parts)))
            continue
        tensor = edited[name] if name in edited else value_of(name).detach()
        key = (tensor.shape[dim], *map(id, parts))
        if key not in kept:
            stay = np.ones(tensor.shape[dim], dtype=bool)
            stay[np.concatenate(parts)] = False
            kept[key] = torch.from_numpy(stay.nonzero()[0])
        edited[name] = _selected(tensor, dim, kept[key])
    small = _replaced(model, edited, value_of, keeps=model is not given)
    modules = modules_by_path(small)
    for name, count in counts.items():
        path, _, leaf = name.rpartition(".")
        setattr(modules[path], leaf, getattr(modules[path], leaf) - count)
    for path in {name.rpartition(".")[0] for name, _ in gone}:
        _sync_sizes(modules[path])
    return small


def _selected(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    if tensor.is_meta:  # a quarter of the time
        shape = (*tensor.shape[:dim], len(positions), *tensor.shape[dim + 1 :])
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.index_select(dim, positions.to(tensor.device))


def plain(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """`model`; or a copy without what modules keep, their computed weights made parameters where the plan cuts them."""
    paths = {slot.tensor.rpartition(".")[0] for group in plan.keep for slot in group.slots}
    known = modules_by_path(model)
    computing = [path for path in paths if path in known and is_computed(known[path])]
    if computing or kept_tensors(model):
        model = copied(model)
        for path in computing:
            bake(model.get_submodule(path))
    return model


def _edited(model: nn.Module, plan: PruningPlan, value_of: Callable[[str], Any]) -> dict[str, Tensor]:
    """Copies of the tensors that the plan replaces, zeroes or folds, with that done."""
    states = states_by_name(model) if plan.weights or plan.nonzero else {}
    edited: dict[str, Tensor] = {}
    for kind, values in (("weights", plan.weights), ("nonzero", plan.nonzero)):
        for name, value in values.items():
            if name not in states:
                raise PlanError(f"{kind} {name!r}: the model has no such parameter or buffer")
            if states[name].shape != value.shape:
                expected, got = list(states[name].shape), list(value.shape)
                raise PlanError(f"{kind} {name!r}: the model's shape is {expected}, the plan's {got}")
    for name, value in plan.weights.items():
        edited[name] = value.to(states[name], copy=True)
    for name, value in plan.nonzero.items():
        edited[name] = edited.get(name, states[name].detach()) * value.to(states[name].device)
    for group, keep in plan.keep.items():
        for slot in _checked_slots(value_of, group):
            if slot.read and group in plan.merge:
                if slot.tensor not in edited:
                    edited[slot.tensor] = value_of(slot.tensor).detach().clone()
                _fold(edited[slot.tensor], slot, keep, plan.merge[group])
    return edited


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also where a module keeps activations."""
    return _replaced(model, {}, _values(model))


def fresh(model: nn.Module) -> nn.Module:
    """A copy without what modules keep from an earlier pass; its parameters and buffers share the model's storage."""
    return _replaced(model, states_by_name(model), _values(model))


def _replaced(
    model: nn.Module, values: Mapping[str, Tensor], value_of: Callable[[str], Any], *, keeps: bool = True
) -> nn.Module:
    """A deep copy of `model` with some of its tensors replaced; a tensor that two modules share stays shared.

    `keeps` says that its modules may hold other tensors.
    """
    memo: dict[int, Any] = {}
    for name, value in values.items():
        old = value_of(name)
        new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        memo[id(old)] = new
    kept = kept_tensors(model) if keeps else []
    # Torch refuses to copy what is no leaf.
    memo |= {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    small = copy_module(model, memo)
    if kept:  # modules that keep activations for inference drop them when training begins
        modes = [(module, module.training) for module in small.modules()]
        small.train()
        for module, mode in modes:
            module.training = mode
    return small


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or computed weight of that name."""
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), leaf)
    return value


def _values(model: nn.Module) -> Callable[[str], Any]:
    """Name -> parameter, buffer, computed weight or attribute; raises AttributeError or KeyError."""
    modules = modules_by_path(model)

    @cache
    def value_of(name: str) -> Any:
        path, _, leaf = name.rpartition(".")
        return getattr(modules[path], leaf)

    return value_of


def _checked_slots(value_of: Callable[[str], Any], group: ChannelGroup) -> tuple[Slot, ...]:
    for slot in group.slots:
        try:
            value = value_of(slot.tensor)
        except (AttributeError, KeyError):
            raise PlanError(f"group {group.name!r}: the model has no {slot.tensor!r}") from None
        size = value if slot.dim == COUNT else value.shape[slot.dim] if slot.dim < value.dim() else 0
        if size != slot.size:
            where = slot.tensor if slot.dim == COUNT else f"{slot.tensor} dim {slot.dim}"
            raise PlanError(
                f"group {group.name!r}: {where}: expected {slot.size}, as in the plan's network, got {size}"
            )
    return group.slots


def _fold(weight: Tensor, slot: Slot, keep: Tensor, merge: Tensor) -> None:
    """Let each kept position read also what `merge` rebuilds from it: W[:, kept] = sum_c merge[c] W[:, c]."""
    index = slot.index.to(weight.device)
    moved = weight.movedim(slot.dim, 0)
    moved[index[keep.to(weight.device)]] = torch.einsum("ck,cp...->kp...", merge.to(weight), moved[index])


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
        module.num_features = sizes[0] if sizes else module.num_features
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
