"""Which positions of a recording's tensors a plan leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparsekit.coupling import Label, Labels
from sparsekit.errors import PlanError
from sparsekit.record import Ref

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Living:
    """Which positions of a recording's tensors are left.

    Attributes:
        labels: `Ref.index` -> one label per dimension; a tensor without an entry is left whole.
        alive: bool [num_atoms].
    """

    labels: Mapping[int, Labels]
    alive: Mask
    _masks: dict[int, list[Mask]] = field(default_factory=dict)
    _left: dict[int, Mask] = field(default_factory=dict)  # by the id of a label, which many tensors share

    def masks(self, ref: Ref) -> list[Mask]:
        """Which positions are left, bool [size] per dimension."""
        known = self._masks.get(ref.index)
        if known is None:
            labels = self.labels.get(ref.index, (None,) * len(ref.shape))
            known = self._masks[ref.index] = [
                np.ones(size, dtype=bool) if label is None else self._living(label)
                for size, label in zip(ref.shape, labels, strict=False)
            ]
        if len(known) != len(ref.shape):
            raise PlanError(f"a tensor of shape {list(ref.shape)} changed its rank in place: it cannot be cut")
        return known

    def _living(self, label: Label) -> Mask:
        if id(label) not in self._left:
            self._left[id(label)] = np.asarray(self.alive[label].all(axis=1))
        return self._left[id(label)]

    def mask(self, ref: Ref, dim: int) -> Mask:
        """Which positions along `dim` are left, bool [size]."""
        return self.masks(ref)[dim]

    def shape(self, ref: Ref) -> list[int]:
        """The shape that is left."""
        return [int(mask.sum()) for mask in self.masks(ref)]

    def is_cut(self, ref: Ref, dim: int | None = None) -> bool:
        """Whether anything along `dim` is gone, or along any dimension."""
        if all(label is None for label in self.labels.get(ref.index, ())):
            return False
        return not all(mask.all() for mask in (self.masks(ref) if dim is None else [self.mask(ref, dim)]))
