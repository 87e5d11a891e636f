"""Shapes worked out by formula are torch's own, strides and refusals included."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.formulas import worked_out

ATEN = torch.ops.aten
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "with gaps": lambda x: x[:, :, 1:7],
    "transposed with gaps": lambda x: x.permute(0, 2, 1, 3)[..., :3],
    "one of a batch with gaps": lambda x: x[:1].transpose(1, 2)[..., :2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}
UNARY = "relu gelu hardtanh hardswish hardsigmoid sigmoid silu tanh exp neg rsqrt elu mish".split()
SHAPES = [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 1, 1), (3, 1, 1), (8,), (1,), (), (5, 2, 3, 8, 8), (4, 8)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(value: Any) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype) for x in (value if isinstance(value, tuple) else (value,))]


def answered(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether there is an answer; it must be torch's."""
    got = worked_out(func, args, kwargs)
    if got is not None:
        assert rows(got) == rows(func(*args, **kwargs))
    return got is not None


def images(dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    for size in (1, 2, 5):
        yield from (layout(empty(size, 3, 8, 8, dtype=dtype)) for layout in LAYOUTS.values())


@pytest.mark.parametrize("name", UNARY)
def test_element_by_element(name: str) -> None:
    func = getattr(ATEN, name).default
    assert sum(answered(func, x) for x in images()) >= 18
    assert not any(answered(func, x) for dtype in (torch.float16, torch.int64) for x in images(dtype))


def test_in_place_only_the_shape_counts() -> None:
    x = empty(2, 3, 8, 8)
    for func in (ATEN.relu_.default, ATEN.hardtanh_.default, ATEN.silu_.default):
        assert worked_out(func, (x,), {}).shape == x.shape
    assert worked_out(ATEN.mul_.Tensor, (empty(3, 1, 1), x), {}).shape != (3, 1, 1)  # torch is asked, and refuses
    assert worked_out(ATEN.relu_.default, (LAYOUTS["expanded"](x),), {}) is None


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_element_by_element_of_two(name: str) -> None:
    func = getattr(ATEN, name)
    assert sum(answered(func.Scalar, x, number) for x in images() for number in (2, 2.5, 1j)) >= 36
    others = [*images(), *(empty(*shape) for shape in SHAPES), empty(dtype=torch.float64)]
    # Shapes that do not fit are left to torch, which would raise in `answered`.
    assert sum(answered(func.Tensor, x, y) for x in others for y in others) > 80


def test_convolutions() -> None:
    draw = random.Random(0)
    num_answered = 0
    for _ in range(2000):
        rank, groups = draw.choice([1, 2, 3]), draw.choice([1, 1, 2])

        def each(*of: int, rank: int = rank) -> list[int]:
            return draw.choices(of, k=draw.choice([1, rank]))

        x = empty(draw.choice([0, 1, 2]), groups * draw.choice([1, 2]), *draw.choices([1, 5, 8], k=rank))
        x = x.transpose(-1, -2) if draw.random() < 0.1 else x
        num_out = groups * draw.choice([1, 2])
        weight = empty(num_out, draw.choice([1, 2]), *draw.choices([1, 3], k=rank))
        bias = draw.choice([None, empty(num_out), empty(num_out + 1)])
        args = (x, weight, bias, each(1, 2), each(0, 1), each(1, 2), draw.random() < 0.1, [0] * rank, groups)
        num_answered += answered(ATEN.convolution.default, *args)
    assert num_answered > 200


def test_the_usual_calls_are_answered() -> None:
    x, states = empty(2, 6, 8, 8), [empty(6)] * 4
    assert answered(ATEN.convolution.default, x, empty(4, 3, 3, 3), None, [2], [1], [1], False, [0], 2)
    assert answered(ATEN.native_batch_norm.default, x, *states, False, 0.1, 1e-5)
    assert answered(ATEN.native_layer_norm.default, x, [8], empty(8), None, 1e-5)
    assert answered(ATEN.addmm.default, empty(5), empty(2, 6), empty(6, 5))
    assert answered(ATEN.cat.default, [x, empty(2, 1, 8, 8)], 1)
    assert answered(ATEN._softmax.default, x, -1, False)


def test_reductions_and_rolls() -> None:
    dims = [[-1, -2], [2], [1], [0], [-1], [1, -3], [7], []]
    calls = [(x, some, keep) for x in images() for some in dims for keep in (True, False)]
    assert sum(answered(ATEN.mean.dim, *call) for call in calls) == 30
    assert not answered(ATEN.mean.dim, empty(2, 3), [1], dtype=torch.float64)
    rolls = [([1], [1]), ([1, 2], [1, 2]), ([1], []), ([1, 1], [1]), ([1], [9])]
    assert sum(answered(ATEN.roll.default, x, *roll) for x in images() for roll in rolls) == 6
