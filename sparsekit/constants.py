"""What is known of a tensor before the network has seen an input, and how sums and products keep it known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.record import Op, Recording, Ref


@dataclass(frozen=True, eq=False)
class Constant:
    """What is known of a tensor; both parts broadcast to its shape, and size 1 means "the same at all positions".

    Attributes:
        value: the number where it is known, 0 elsewhere.
        known: bool, whether the number is the same for every input.
        static: computed from parameters alone, `value` in the tensor's own shape.
    """

    value: Tensor
    known: Tensor
    static: bool = False

    @property
    def zero(self) -> Tensor:
        """Where it is known to be zero."""
        return self.known & (self.value == 0)

    @property
    def nonzero(self) -> Tensor:
        """Where it is known and not zero."""
        return self.known & (self.value != 0)


def static(value: Tensor) -> Constant:
    """A tensor that comes from parameters alone."""
    return Constant(value, torch.ones((1,) * value.dim(), dtype=torch.bool), static=True)


def nothing_known(rank: int) -> Constant:
    """Of a tensor of that many dimensions."""
    shape = (1,) * rank
    return Constant(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))


def constant(value: Tensor, known: Tensor) -> Constant:
    """As small as broadcasting allows."""
    value, known = _shrunk(value), _shrunk(known)
    return Constant(_shrunk(torch.where(known, value, torch.zeros_like(value))), _shrunk(known))


def _shrunk(tensor: Tensor) -> Tensor:
    for dim, size in enumerate(tensor.shape):
        if size > 1 and (tensor.stride(dim) == 0 or (tensor == tensor.narrow(dim, 0, 1)).all()):
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def uniform(given: Constant, dims: Sequence[int]) -> Constant:
    """Size 1 along `dims`, known where it is one number along them."""
    value, known = torch.broadcast_tensors(given.value, given.known)
    first = value
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    if dims:
        known = (known & (value == first)).all(tuple(dims), keepdim=True)
    return constant(first, known)


def per_channel(given: Constant, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """Value (float64) and known, [size] each: what a channel along `dim` is at all positions of the others."""
    same = uniform(given, [axis for axis in range(given.known.dim()) if axis != dim])
    return same.value.flatten().double().expand(size), same.known.flatten().expand(size)


def zeros_of(given: Constant) -> Constant:
    """Only what is known to be zero."""
    return Constant(torch.zeros_like(given.value), given.zero)


def kernel(weight: Tensor, num_conv_groups: int = 1, *, transposed: bool = False) -> Tensor:
    """[G, O/G, I/G, k]: the weight of a convolution or linear layer, whose k taps reach the same input channel.

    >>> kernel(torch.zeros(6, 2, 3, 3), 2).shape, kernel(torch.zeros(6, 2, 3, 3), 2, transposed=True).shape
    (torch.Size([2, 3, 2, 9]), torch.Size([2, 2, 3, 9]))
    """
    split = weight.reshape(num_conv_groups, -1, *weight.shape[1:2], weight[0, 0].numel())
    return split.transpose(1, 2) if transposed else split


def weighted_sum(taps: Tensor, value: Tensor) -> Tensor:
    """float64 [O], what inputs of constant `value` [G, I/G] add to each output of a `kernel`."""
    nonzero = (value != 0).any(0)  # few: the others need no sum over their taps
    return (taps[:, :, nonzero].sum(-1, dtype=torch.float64) @ value[:, nonzero, None]).flatten()


def reads_only(taps: Tensor, known: Tensor) -> Tensor:
    """bool [O], whether each output of a `kernel` reads none but these inputs, bool [G, I/G]."""
    others = taps.masked_fill(known[:, None, :, None], 0) if known.any() else taps
    return ~others.flatten(2).any(-1).flatten()


def product(left: Constant, right: Constant, size: int) -> Constant:
    """Matrix product [..., r, size] @ [..., size, m]; known where every term has two known factors, or one of zero."""
    if right.static and right.value.dim() == 2:
        rows = uniform(left, [0])
        value, known = rows.value.double().expand(1, size), rows.known.expand(1, size)
        taps = kernel(right.value.T)
        return constant(weighted_sum(taps, value)[None], reads_only(taps, known)[None])
    left, right = _expanded(left, -1, size), _expanded(right, -2, size)
    # Terms that may be nonzero, less those that surely are: what remains is open.
    maybe = (~left.zero).double() @ (~right.zero).double()
    surely = left.nonzero.double() @ right.nonzero.double()
    return constant(left.value.double() @ right.value.double(), maybe == surely)


def _expanded(given: Constant, dim: int, size: int) -> Constant:
    value, known = torch.broadcast_tensors(given.value, given.known)
    shape = list(value.shape)
    shape[dim] = size
    return Constant(value.expand(shape), known.expand(shape))


def occupied(tensor: Tensor, dim: int) -> Tensor:
    """bool [size], whether anything is nonzero at each position along `dim`.

    >>> occupied(torch.tensor([[0.0, 2.0], [0.0, -1.0]]), 1)
    tensor([False,  True])
    """
    others = [axis for axis in range(tensor.dim()) if axis != dim]
    return tensor.any(others) if others else tensor != 0


def aliases(recording: Recording) -> tuple[dict[int, int], set[int]]:
    """View -> the tensor it is a view of, and the tensors that in-place ops write into, views or not."""
    root: dict[int, int] = {}
    written: set[int] = set()
    for op in recording.ops:
        written |= {root.get(ref.index, ref.index) for ref in touched(op, write=True)}
        for source in touched(op, write=False):
            base = root.get(source.index, source.index)
            root.update({ref.index: base for ref in op.outputs})
    return root, written


def touched(op: Op, *, write: bool) -> list[Ref]:
    """The tensors that the op writes into, or those that its outputs are views of."""
    names = [a.name for a in op.func._schema.arguments if a.alias_info and a.alias_info.is_write == write]
    return [op.args[name] for name in names if isinstance(op.args[name], Ref)]
