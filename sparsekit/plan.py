"""What to cut, as values: Slot, ChannelGroup, PruningPlan, and their JSON + safetensors form.

A plan names every position it touches, so it applies to a fresh copy of the network without tracing again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekit.errors import PlanError

COUNT = -1  # Slot.dim of an integer attribute that counts channels (`groups`), which has no dimension


@dataclass(frozen=True, eq=False)
class Slot:
    """One place that must be cut when a channel goes.

    Attributes:
        tensor: name of a parameter or buffer as in `state_dict`, or the dotted path of an integer attribute.
        dim: the dimension cut, or `COUNT` where `tensor` names an attribute such as `conv.groups`.
        size: of that dimension, or the attribute's value, in the network that the plan is for.
        index: int64 [C, k], the k positions along `dim` that belong to each of the C channels.
        read: True where these positions multiply the channel inside a sum (a consumer's input slice):
            setting them to zero removes the channel's contribution exactly.
    """

    tensor: str
    dim: int
    size: int
    index: Tensor
    read: bool = False


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that live or die together.

    Attributes:
        name: module path of the layer that makes the channels.
        size: number of channels, C.
        slots: every place the channels occupy.
        exact: zero-masking the `read` slots equals removal (no normalisation across these channels).
        residual: the outputs of several layers are added up in these channels.
        silent: masking sets every slot to zero, because activations are summed over these channels (attention scores).
        fixed_by: what in the forward names their number as a literal, "net.py:12, aten::view: the forward fixes a
            size here"; they can be cut only in a recorded program. Empty where the model's own forward follows.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    exact: bool = True
    residual: bool = False
    silent: bool = False
    fixed_by: str = ""

    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, size={self.size}, slots={len(self.slots)}, exact={self.exact})"


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What to do to a network; the only thing a method returns. Validates itself.

    Attributes:
        keep: bool [C] per group, True where the channel stays; at least one stays.
        merge: float [C, K] per group, how each old channel is rebuilt from the K kept ones. The row of a kept
            channel is its unit vector, a zero row is a channel dropped without compensation.
        nonzero: parameter name -> bool mask of the parameter's shape, False where the weight is zero.
        weights: parameter or buffer name -> replacement of the original (uncut) shape.

    Raises:
        PlanError: a mask of the wrong dtype or shape, a group without a survivor.
    """

    keep: Mapping[ChannelGroup, Tensor] = field(default_factory=dict)
    merge: Mapping[ChannelGroup, Tensor] = field(default_factory=dict)
    nonzero: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [group.name for group in self.keep]
        if len(set(names)) < len(names):
            raise PlanError(f"plan: group names must differ, got {sorted(names)}")
        for group, keep in self.keep.items():
            where = f"group {group.name!r}"
            if keep.dtype != torch.bool or keep.shape != (group.size,):
                raise PlanError(f"{where}: keep must be bool [{group.size}], got {keep.dtype} {list(keep.shape)}")
            if not keep.any():
                raise PlanError(f"{where}: keep drops all {group.size} channels, at least one must stay")
        for group, merge in self.merge.items():
            where = f"group {group.name!r}"
            if group not in self.keep:
                raise PlanError(f"{where}: has a merge matrix but no keep mask")
            keep = self.keep[group]
            expected = (group.size, int(keep.sum()))
            if tuple(merge.shape) != expected:
                raise PlanError(f"{where}: merge must be {list(expected)}, got {list(merge.shape)}")
            if not torch.equal(merge[keep], torch.eye(expected[1], dtype=merge.dtype)):
                raise PlanError(f"{where}: merge must map every kept channel to itself")
        for name, mask in self.nonzero.items():
            if mask.dtype != torch.bool:
                raise PlanError(f"{name}: nonzero mask must be bool, got {mask.dtype}")

    @cached_property
    def kept(self) -> dict[str, int]:
        """Number of channels that stay, per group name."""
        return {group.name: int(keep.sum()) for group, keep in self.keep.items()}

    def save(self, json_path: Path, tensors_path: Path) -> None:
        """Write groups and masks as JSON, `merge`, `nonzero` and `weights` as safetensors (only if any)."""
        groups = [
            {
                "name": group.name,
                "size": group.size,
                "exact": group.exact,
                "residual": group.residual,
                "silent": group.silent,
                "fixed_by": group.fixed_by,
                "keep": keep.nonzero().flatten().tolist(),
                "slots": [_slot_to_json(slot) for slot in group.slots],
            }
            for group, keep in self.keep.items()
        ]
        document = {"format": "sparsekit-plan", "version": 1, "groups": groups}
        json_path.write_text(json.dumps(document), encoding="utf-8")
        tensors = {f"merge/{group.name}": merge for group, merge in self.merge.items()}
        tensors |= {f"nonzero/{name}": mask for name, mask in self.nonzero.items()}
        tensors |= {f"weights/{name}": value for name, value in self.weights.items()}
        if tensors:
            save_file({name: value.contiguous() for name, value in tensors.items()}, tensors_path)

    @classmethod
    def load(cls, json_path: Path, tensors_path: Path | None = None) -> PruningPlan:
        """Read what `save` wrote.

        Raises:
            PlanError: a missing or damaged file.
        """
        try:
            document = json.loads(json_path.read_text(encoding="utf-8"))
            if (
                not isinstance(document, dict)
                or document.get("format") != "sparsekit-plan"
                or document.get("version") != 1
            ):
                raise PlanError(f"{json_path}: not a sparsekit plan of version 1")
            groups = [(_group_from_json(row), row) for row in document["groups"]]
            keep = {}
            for group, row in groups:
                keep[group] = torch.zeros(group.size, dtype=torch.bool)
                keep[group][row["keep"]] = True
            tensors = load_file(tensors_path) if tensors_path and tensors_path.exists() else {}
        except (
            OSError,
            UnicodeDecodeError,
            json.JSONDecodeError,
            SafetensorError,
            KeyError,
            TypeError,
            IndexError,
        ) as error:
            raise PlanError(f"{json_path}: damaged plan: {type(error).__name__}: {error}") from error
        by_name = {group.name: group for group in keep}
        parts: dict[str, dict[Any, Tensor]] = {"merge": {}, "nonzero": {}, "weights": {}}
        for name, value in tensors.items():
            kind, _, key = name.partition("/")
            parts[kind][by_name[key] if kind == "merge" else key] = value
        return cls(keep, parts["merge"], parts["nonzero"], parts["weights"])


def _slot_to_json(slot: Slot) -> dict[str, Any]:
    """Contiguous runs, which most slots are, shrink to their start and step."""
    row: dict[str, Any] = {"tensor": slot.tensor, "dim": slot.dim, "size": slot.size, "read": slot.read}
    num_channels, width = slot.index.shape
    start = int(slot.index[0, 0]) if slot.index.numel() else 0
    run = torch.arange(start, start + num_channels * width).view(num_channels, width)
    if torch.equal(slot.index, run):
        return row | {"start": start, "width": width}
    return row | {"index": slot.index.tolist()}


def _group_from_json(row: dict[str, Any]) -> ChannelGroup:
    slots = []
    for cell in row["slots"]:
        if "index" in cell:
            index = torch.tensor(cell["index"], dtype=torch.int64)
        else:
            stop = cell["start"] + row["size"] * cell["width"]
            index = torch.arange(cell["start"], stop).view(row["size"], cell["width"])
        slots.append(Slot(cell["tensor"], cell["dim"], cell["size"], index, cell["read"]))
    flags = {name: row[name] for name in ("exact", "residual", "silent", "fixed_by")}
    return ChannelGroup(row["name"], row["size"], tuple(slots), **flags)
