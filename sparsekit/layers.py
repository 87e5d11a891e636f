"""What the layers behind a network's cost terms compute, apart from how many channels they have.

A layer and the sizes of its cost term are all that is needed to build it again and time it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Convolution:
    """A convolution whose cost term has two sizes, the first two dimensions of its weight.

    These are [out, in / groups] or, transposed, [in, out / groups].

    Attributes:
        extent: spatial size of the input.
        kernel: spatial size of the weight, as `stride`, `padding`, `output_padding` and `dilation` one per dimension.
        groups: convolution groups when nothing is cut.
        per_group: entries of the weight's first dimension that each of them owns, when nothing is cut.
        cut_groups: what is cut are whole groups, so that their number follows the weight's first dimension.
        static: the weight is known at export.
        num_inputs: how many times it runs per example.
    """

    extent: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    per_group: int
    cut_groups: bool
    transposed: bool
    static: bool
    num_inputs: int

    def per_example(self, num_examples: int) -> Convolution:
        """The same, recorded with a batch of `num_examples`."""
        return replace(self, num_inputs=_share(self.num_inputs, num_examples))

    def steps(self, num_sizes: int) -> tuple[int, ...]:
        """What each size of the term is a multiple of."""
        return (self.per_group if self.cut_groups else self.groups, *[1] * (num_sizes - 1))

    def channels(self, sizes: Sequence[int]) -> tuple[int, int, int]:
        """Input channels, output channels and convolution groups at these sizes of the term.

        >>> plain = Convolution((8, 8), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, 32, False, False, True, 1)
        >>> plain.channels((32, 16)), replace(plain, transposed=True).channels((32, 16))
        ((16, 32, 1), (32, 16, 1))
        >>> replace(plain, groups=32, per_group=1, cut_groups=True).channels((24, 1))
        (24, 24, 24)
        """
        first, inner = sizes
        groups = max(1, first // self.per_group) if self.cut_groups else self.groups
        return (first, inner * groups, groups) if self.transposed else (inner * groups, first, groups)

    @property
    def output_extent(self) -> tuple[int, ...]:
        """Spatial size of the output.

        >>> one = Convolution((7,), (3,), (2,), (1,), (0,), (1,), 1, 8, False, False, True, 1)
        >>> one.output_extent, replace(one, transposed=True).output_extent
        ((4,), (13,))
        """
        numbers = zip(
            self.extent, self.kernel, self.stride, self.padding, self.output_padding, self.dilation, strict=True
        )
        if self.transposed:
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, o, d in numbers)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, _, d in numbers)

    def macs(self, sizes: Sequence[int]) -> int:
        """Multiply-accumulates per example at these sizes of the term."""
        positions = self.extent if self.transposed else self.output_extent
        return self.num_inputs * math.prod((*positions, *self.kernel, *sizes))


@dataclass(frozen=True)
class MatrixProduct:
    """[..., n, k] @ [..., k, m], whose cost term has the sizes (..., n, k, m).

    Attributes:
        static: which operand is known at export.
        num_examples: the examples among what n and the dimensions before it count.
    """

    static: Literal["left", "right"] | None
    num_examples: int = 1

    def per_example(self, num_examples: int) -> MatrixProduct:
        """The same, recorded with a batch of `num_examples`."""
        return replace(self, num_examples=num_examples)

    def steps(self, num_sizes: int) -> tuple[int, ...]:
        """What each size of the term is a multiple of."""
        return (1,) * num_sizes

    def shape(self, sizes: Sequence[int]) -> tuple[int, int, int, int]:
        """Matrices per example, then n, k and m of each.

        >>> MatrixProduct("right", num_examples=2).shape((394, 768, 3072))
        (1, 197, 768, 3072)
        >>> MatrixProduct(None, num_examples=2).shape((2, 12, 197, 64, 197))
        (12, 197, 64, 197)
        """
        *batch, rows, inner, columns = sizes
        matrices = math.prod(batch)
        if matrices % self.num_examples == 0:
            return matrices // self.num_examples, rows, inner, columns
        return matrices, _share(rows, self.num_examples), inner, columns

    def macs(self, sizes: Sequence[int]) -> int:
        """Multiply-accumulates per example at these sizes of the term."""
        return math.prod(self.shape(sizes))


@dataclass(frozen=True)
class Pass:
    """An op that goes over every number of its output, whose sizes are those of its cost term, batch first.

    Attributes:
        op: the ATen operator, without the underscore of the one that works in place.
        images: the second size are channels and the others space, as convolutions leave them.
        broadcast: of a second operand, which of its dimensions have size 1; None where there is one operand.
        reduced: dimensions that are averaged away; the sizes are then the input's.
        num_examples: the examples among what the first size counts.
    """

    op: str
    images: bool = False
    broadcast: tuple[bool, ...] | None = None
    reduced: tuple[int, ...] = ()
    num_examples: int = 1

    def per_example(self, num_examples: int) -> Pass:
        """The same, recorded with a batch of `num_examples`."""
        return replace(self, num_examples=num_examples)

    def steps(self, num_sizes: int) -> tuple[int, ...]:
        """What each size of the term is a multiple of."""
        return (1,) * num_sizes

    def shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The dimensions per example, the first of which is 1 unless several tensors belong to one.

        >>> Pass("silu", num_examples=2).shape((2, 16, 8, 8))
        (1, 16, 8, 8)
        """
        return (_share(sizes[0], self.num_examples), *sizes[1:])

    def operands(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes per example of what it reads.

        >>> Pass("mul", broadcast=(False, False, True, True)).operands((1, 16, 8, 8))
        [(1, 16, 8, 8), (1, 16, 1, 1)]
        """
        if self.broadcast is None:
            return [tuple(shape)]
        small = [1 if one else size for one, size in zip(self.broadcast, shape, strict=True)]
        return [tuple(shape), (shape[0], *small[1:])]

    def macs(self, sizes: Sequence[int]) -> int:
        """None: what it does is no multiply-accumulate worth counting."""
        return 0


Layer = Convolution | MatrixProduct | Pass


def _share(total: int, num_examples: int) -> int:
    """Per example, or all where it does not grow with the batch."""
    return total if total % num_examples else total // num_examples
